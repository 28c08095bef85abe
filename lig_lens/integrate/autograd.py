"""The general engine: interpolated tensors are put in at one node, the next one is read, autograd does the rest.

It works on every block that can be replayed, and needs one backward pass per destination (and head).
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lig_lens.blocks.call import Hook
from lig_lens.blocks.find import BlockNodes
from lig_lens.blocks.tail import Scales, Tail
from lig_lens.integrate import integrand as common
from lig_lens.integrate.integrand import Budget, PathIntegrand
from lig_lens.integrate.quadrature import Integral
from lig_lens.paths.baselines import ResidPath, TailPath
from lig_lens.targets.targets import Direction, Scalar


class _Integrand(PathIntegrand):
    """Integrand by automatic differentiation, `chunk` points at a time."""

    chunk: int

    @abstractmethod
    def _read(self, positions: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> tuple[Any, Tensor]:
        """What is interpolated, at `a`, as leaves; and what the destinations get from it: [item group dim]."""

    @abstractmethod
    def _parts(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"], groups: list[int]) -> Tensor:
        """Parts at single points, for the groups asked for: [item group part]."""

    def scalars(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item group"]:
        """See `quadrature.Integrand`."""
        pieces = []
        with torch.no_grad():
            for d, x in zip(torch.split(dst, self.chunk), torch.split(self._on_device(a), self.chunk), strict=True):
                d = d.to(self.device)
                positions = self.positions.to(self.device)[d]
                pieces.append(self.scalar(self._read(positions, x)[1] - self.start[d], positions))
        return torch.cat(pieces)

    def sums(
        self,
        dst: Int[Tensor, "panel"],
        a: Float[Tensor, "panel node"],
        factors: Float[Tensor, "panel node column"],
        groups: Bool[Tensor, "panel group"],
    ) -> Float[Tensor, "column panel group part"]:
        """See `quadrature.Integrand`."""
        n_nodes = a.shape[1]
        items = torch.arange(a.numel())
        shape = (factors.shape[2], len(dst), self.n_groups, self.n_parts)
        result = torch.zeros(shape, dtype=self.dtype, device=self.device)
        a, factors = self._on_device(a.flatten()), self._on_device(factors.flatten(0, 1))
        for part in torch.split(items, self.chunk):
            panel = part // n_nodes
            wanted = groups[panel].any(0).nonzero()[:, 0].tolist()
            values = self._parts(dst[panel].to(self.device), a[part], wanted)
            rows = panel.to(self.device)
            for column, factor in zip(result, factors[part].T, strict=True):
                column.index_add_(0, rows, values * factor[:, None, None])
        return result

    def _on_device(self, values: Tensor) -> Tensor:
        # Cast first: a device may not have float64.
        return values.to(self.dtype).to(self.device)


@dataclass(frozen=True)
class _At:
    """Takes each item's own position."""

    positions: Int[Tensor, "item"]

    def __call__(self, value: Float[Tensor, "item pos"]) -> Float[Tensor, "item"]:
        """Give the values at the positions."""
        return value[torch.arange(len(self.positions), device=value.device), self.positions]


class _FromResid(_Integrand):
    """Integrand of resid_pre -> hook_z (groups are heads) and of resid_pre -> resid_post (one group)."""

    def __init__(
        self, nodes: BlockNodes, path: ResidPath, scalar: Scalar, dst: Tensor, to_heads: bool, chunk: int
    ) -> None:
        n_groups = nodes.boundaries.n_heads if to_heads else 1
        super().__init__(nodes, scalar, dst, n_groups, n_parts=len(nodes.resid_pre))
        self.path, self.to_heads, self.chunk = path, to_heads, chunk
        self.scales = Scales(nodes)
        zero, pieces = torch.zeros(len(dst), device=self.device, dtype=self.dtype), []
        with torch.no_grad():
            for part in torch.split(torch.arange(len(dst), device=self.device), chunk):
                hooks = {} if to_heads else self.scales.hooks(_At(dst[part]))
                pieces.append(self._read(dst[part], zero[part], hooks)[1])
        self.start = torch.cat(pieces)

    def _read(
        self, positions: Int[Tensor, "item"], a: Float[Tensor, "item"], hooks: Mapping[str, Hook] | None = None
    ) -> tuple[Any, Tensor]:
        """Residual vectors at `a`, as a leaf, and what the destinations get: [item group dim]."""
        steps = self.path.steps(positions)
        resid = self.path.starts(positions) + a.to(steps.dtype)[:, None, None] * steps
        resid.requires_grad_(torch.is_grad_enabled())
        if self.to_heads:
            out = self.nodes.read_z(resid)
        else:
            result = self.nodes.call.run(resid, hooks)
            assert result is not None
            out = result[:, :, None]
        return resid, out[torch.arange(len(positions), device=a.device), positions]

    def _parts(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"], groups: list[int]) -> Tensor:
        positions = self.positions.to(self.device)[dst]
        steps = self.path.steps(positions)
        with torch.enable_grad():
            resid, out = self._read(positions, a)
            values = self.scalar(out - self.start[dst], positions)
        result = steps.new_zeros(len(dst), self.n_groups, self.n_parts)
        for group in groups:
            (gradient,) = torch.autograd.grad(values[:, group].sum(), resid, retain_graph=group != groups[-1])
            result[:, group] = (gradient * steps).sum(-1)
        return result


class _FromHeads(_Integrand):
    """Integrand of (hook_z, skip) -> resid_post: parts are the heads, then skip, then bias."""

    def __init__(self, nodes: BlockNodes, path: TailPath, scalar: Scalar, dst: Tensor, chunk: int) -> None:
        super().__init__(nodes, scalar, dst, n_groups=1, n_parts=path.z_end.shape[1] + 2)
        self.path, self.chunk = path, chunk
        self.attn_out_start = nodes.attn_out(path.z_start, path.bias_start)
        self.attn_out_end = nodes.attn_out(path.z_end, 1.0)
        self.tail = Tail(nodes, self.attn_out_start[dst], path.skip_start[dst])
        self.start = self.tail.out[:, None]

    def _read(self, positions: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> tuple[Any, Tensor]:
        path = self.path
        fraction = a.to(path.skip_end.dtype)[:, None]
        # Whole attention outputs are interpolated: b_O added to a z near 0 would drown it in rounding.
        attn_out = torch.lerp(self.attn_out_start[positions], self.attn_out_end[positions], fraction)
        skip = torch.lerp(path.skip_start[positions], path.skip_end[positions], fraction)
        leaves = (attn_out, skip)
        for leaf in leaves:
            leaf.requires_grad_(torch.is_grad_enabled())
        return leaves, self.tail(*leaves)[:, None]

    def _parts(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"], groups: list[int]) -> Tensor:
        positions, path = self.positions.to(self.device)[dst], self.path
        with torch.enable_grad():
            leaves, out = self._read(positions, a)
            value = self.scalar(out - self.start[dst], positions).sum()
            by_attn_out, by_skip = torch.autograd.grad(value, leaves)
        by_z = torch.einsum("im,hem->ihe", by_attn_out, self.nodes.W_O)
        heads = ((path.z_end - path.z_start)[positions] * by_z).sum(-1)
        skip = ((path.skip_end - path.skip_start)[positions] * by_skip).sum(-1)
        bias = torch.einsum("im,m->i", by_attn_out, self.nodes.b_O) * (1 - path.bias_start)
        return torch.cat([heads, skip[:, None], bias[:, None]], -1)[:, None]


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
    integrand = _FromResid(nodes, path, scalar, dst, to_heads, budget.items(len(nodes.resid_pre)))
    return common.integrate_resid(integrand, path, None if to_heads else integrand.scales, dst, budget)


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
    integrand = _FromHeads(nodes, path, scalar, dst, budget.items(n_pos) * n_pos)
    s0, s1 = integrand.tail.scales.widths(dst)
    return integrand.integrate(s0, s1, nodes.resid_post[:, None], budget)
