"""The general engine: interpolated tensors are put in at one node, the next one is read, autograd does the rest.

It works on every block that can be replayed, and needs one backward pass per destination (and head).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lig_lens.baselines import ResidPath, TailPath
from lig_lens.boundaries import BlockNodes
from lig_lens.quadrature import Integral, integrate
from lig_lens.targets import Direction, Scalar


@dataclass(frozen=True)
class Budget:
    """How hard to try: relative tolerance, nodes per cell, and tokens that are run through a block at once."""

    tol: float
    max_nodes: int
    max_batch_tokens: int

    def items(self, n_pos: int) -> int:
        """Interpolation points that fit into one run of the block."""
        return max(1, self.max_batch_tokens // n_pos)


class _Integrand(ABC):
    """What both integrands share: scalars are distances of what `_read` gives from its value at the start."""

    start: Float[Tensor, "dst group dim"]

    def __init__(self, nodes: BlockNodes, scalar: Scalar, dst: Tensor, n_groups: int, n_parts: int) -> None:
        self.nodes, self.scalar, self.positions = nodes, scalar, dst
        self.n_dst, self.n_groups, self.n_parts = len(dst), n_groups, n_parts
        self.dtype, self.device = nodes.resid_pre.dtype, nodes.resid_pre.device

    @abstractmethod
    def _read(self, positions: Tensor, a: Tensor) -> tuple[Any, Tensor]:
        """What is interpolated, at `a`, as leaves; and what the destinations get from it: [item group dim]."""

    @abstractmethod
    def parts(
        self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"], groups: Bool[Tensor, "item group"]
    ) -> Float[Tensor, "item group part"]:
        """See `quadrature.Integrand`."""

    def _read_start(self, chunk: int) -> Tensor:
        zero = torch.zeros(1, device=self.device)
        with torch.no_grad():
            pieces = [self._read(d, zero.expand(len(d)))[1] for d in torch.split(self.positions, chunk)]
        return torch.cat(pieces)

    def scalars(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item group"]:
        with torch.no_grad():
            _, out = self._read(self.positions[dst], a)
            return self.scalar(out - self.start[dst], self.positions[dst])

    def noise(self, end: Float[Tensor, "pos group dim"]) -> Float[Tensor, "dst group"]:
        """Change of each scalar that rounding alone can cause, `end` being what comes out at a = 1."""
        lengths = [self.scalar.size(vectors, self.positions) for vectors in (self.start, end[self.positions])]
        return 8 * self.nodes.rounding * torch.maximum(*lengths)


class _FromResid(_Integrand):
    """Integrand of resid_pre -> hook_z (groups are heads) and of resid_pre -> resid_post (one group)."""

    def __init__(
        self, nodes: BlockNodes, path: ResidPath, scalar: Scalar, dst: Tensor, to_heads: bool, chunk: int
    ) -> None:
        n_groups = nodes.boundaries.n_heads if to_heads else 1
        super().__init__(nodes, scalar, dst, n_groups, n_parts=len(nodes.resid_pre))
        self.path, self.to_heads = path, to_heads
        self.start = self._read_start(chunk)

    def _read(self, positions: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Residual vectors at `a`, as a leaf, and what the destinations get: [item group dim]."""
        steps = self.path.steps(positions)
        resid = self.path.starts(positions) + a.to(steps.dtype)[:, None, None] * steps
        resid.requires_grad_(torch.is_grad_enabled())
        if self.to_heads:
            out = self.nodes.read_z(resid)
        else:
            result = self.nodes.call.run(resid)
            assert result is not None
            out = result[:, :, None]
        return resid, out[torch.arange(len(positions), device=a.device), positions]

    def parts(
        self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"], groups: Bool[Tensor, "item group"]
    ) -> Float[Tensor, "item group part"]:
        positions = self.positions[dst]
        steps = self.path.steps(positions)
        with torch.enable_grad():
            resid, out = self._read(positions, a)
            values = self.scalar(out - self.start[dst], positions)
        result = steps.new_zeros(len(dst), self.n_groups, self.n_parts)
        wanted = groups.any(0).nonzero()[:, 0].tolist()
        for group in wanted:
            (gradient,) = torch.autograd.grad(values[:, group].sum(), resid, retain_graph=group != wanted[-1])
            result[:, group] = (gradient * steps).sum(-1)
        return result * groups[..., None]


class _FromHeads(_Integrand):
    """Integrand of (hook_z, skip) -> resid_post: parts are the heads, then skip, then bias.

    The rest of a block acts token by token, so items, each at its own point of its own destination's path, are
    packed side by side into rows of the prompt's length.
    """

    def __init__(self, nodes: BlockNodes, path: TailPath, scalar: Scalar, dst: Tensor, chunk: int) -> None:
        super().__init__(nodes, scalar, dst, n_groups=1, n_parts=path.z_end.shape[1] + 2)
        self.path = path
        self.attn_out_start = nodes.attn_out(path.z_start, path.bias_start)
        self.attn_out_end = nodes.attn_out(path.z_end, 1.0)
        self.start = self._read_start(chunk)

    def _read(self, positions: Tensor, a: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        nodes, path, n_pos = self.nodes, self.path, len(self.path.z_end)
        fraction = a.to(path.skip_end.dtype)[:, None]
        # Whole attention outputs are interpolated: b_O added to a z near 0 would drown it in rounding.
        attn_out = torch.lerp(self.attn_out_start[positions], self.attn_out_end[positions], fraction)
        skip = torch.lerp(path.skip_start[positions], path.skip_end[positions], fraction)
        leaves = (attn_out, skip)
        for leaf in leaves:
            leaf.requires_grad_(torch.is_grad_enabled())
        rows = -(-len(positions) // n_pos)
        filler = torch.zeros(rows * n_pos - len(positions), dtype=torch.long, device=a.device)
        index = torch.cat([torch.arange(len(positions), device=a.device), filler])
        packed = [leaf[index].reshape(rows, n_pos, -1) for leaf in leaves]
        out = nodes.run_tail(*packed)
        return leaves, out.reshape(rows * n_pos, -1)[: len(positions), None]

    def parts(
        self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"], groups: Bool[Tensor, "item group"]
    ) -> Float[Tensor, "item group part"]:
        positions, path = self.positions[dst], self.path
        with torch.enable_grad():
            leaves, out = self._read(positions, a)
            value = self.scalar(out - self.start[dst], positions).sum()
            by_attn_out, by_skip = torch.autograd.grad(value, leaves)
        by_z = torch.einsum("im,hem->ihe", by_attn_out, self.nodes.W_O)
        heads = ((path.z_end - path.z_start)[positions] * by_z).sum(-1)
        skip = ((path.skip_end - path.skip_start)[positions] * by_skip).sum(-1)
        bias = torch.einsum("im,m->i", by_attn_out, self.nodes.b_O) * (1 - path.bias_start)
        return torch.cat([heads, skip[:, None], bias[:, None]], -1)[:, None] * groups[..., None]


def integrate_resid(
    nodes: BlockNodes,
    path: ResidPath,
    target: "str | Direction",
    dst: Int[Tensor, "dst"],
    to_heads: bool,
    budget: Budget,
) -> Integral:
    """Contributions of source tokens to head outputs (`attn` map) or to the block's output (`block` map).

    Returns:
        parts [dst, head or 1, src].
    """
    W_O = nodes.W_O if to_heads else None
    scalar = Scalar(target, len(nodes.resid_pre), nodes.resid_pre, W_O)
    chunk = budget.items(len(nodes.resid_pre))
    integrand = _FromResid(nodes, path, scalar, dst, to_heads, chunk)
    depth = nodes.norms_to_z if to_heads else nodes.norms_to_resid_post
    s0, s1 = _layers_of_paths(path, dst, nodes.eps, depth)
    end = nodes.z if to_heads else nodes.resid_post[:, None]
    assert end is not None
    return _integrate(integrand, s0, s1, integrand.noise(end), budget, chunk)


def integrate_tail(
    nodes: BlockNodes,
    path: TailPath,
    target: "str | Direction",
    dst: Int[Tensor, "dst"],
    budget: Budget,
) -> Integral:
    """Contributions of heads, skip connection and output bias to the block's output (`mlp` map).

    Returns:
        parts [dst, 1, head + 2]: the heads, then skip, then bias.
    """
    assert nodes.W_O is not None
    scalar = Scalar(target, len(nodes.resid_pre), nodes.resid_pre)
    n_pos = len(nodes.resid_pre)
    chunk = budget.items(n_pos) * n_pos
    integrand = _FromHeads(nodes, path, scalar, dst, chunk)
    start, end = integrand.attn_out_start + path.skip_start, integrand.attn_out_end + path.skip_end
    depth = nodes.norms_to_resid_post - nodes.norms_to_z
    s0, s1 = _widths(_rms(start[dst]), _rms(end[dst]), nodes.eps, depth)
    return _integrate(integrand, s0, s1, integrand.noise(nodes.resid_post[:, None]), budget, chunk)


def _integrate(integrand: _Integrand, s0: Tensor, s1: Tensor, noise: Tensor, budget: Budget, chunk: int) -> Integral:
    return integrate(integrand, s0, s1, noise, tol=budget.tol, max_nodes=budget.max_nodes, chunk=chunk)


def _layers_of_paths(
    path: ResidPath, dst: Int[Tensor, "dst"], eps: float, depth: int
) -> tuple[Float[Tensor, "dst"], Float[Tensor, "dst"]]:
    """Widths of the boundary layers at both ends of each destination's path, narrowest source first."""
    if depth == 0:
        one = torch.ones(len(dst), dtype=torch.float64)
        return one, one
    end = _rms(path.end)
    start = end[dst.cpu()][:, None] if path.start is None else _rms(path.start).expand(len(dst), -1)
    s0, s1 = _widths(start, end.expand(len(dst), -1), eps, depth)
    return s0.amin(-1), s1.amin(-1)


def _widths(start: Tensor, end: Tensor, eps: float, depth: int) -> tuple[Tensor, Tensor]:
    """Where a norm turns from one end's direction to the other's: rms of the ends, eps standing in for 0.

    A path from 0 through several norms in a row has a layer for each: the next norm sees the first one's steep
    rise, and so turns within the square of the width, and so on.
    """
    narrow_start, narrow_end = ((side.double() ** 2 + eps).sqrt() for side in (start, end))
    s0, s1 = (narrow_start / narrow_end).clamp(max=1.0), (narrow_end / narrow_start).clamp(max=1.0)
    from_zero, to_zero = (side.double() ** 2 <= eps for side in (start, end))
    return torch.where(from_zero, s0**depth, s0), torch.where(to_zero, s1**depth, s1)


def _rms(vectors: Tensor) -> Tensor:
    return vectors.cpu().double().pow(2).mean(-1).sqrt()
