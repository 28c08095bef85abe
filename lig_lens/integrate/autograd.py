"""Integrands by automatic differentiation: interpolated tensors are put in at one node, the next one is read.

That works on every block that can be replayed, and needs one backward pass per destination (and head).
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.tail import Scales, Tail
from lig_lens.blocks.values import Values
from lig_lens.integrate.integrand import Budget, ByPoints, PathIntegrand
from lig_lens.integrate.quadrature import Integral
from lig_lens.models.running import Hook
from lig_lens.paths.path import ResidPath, TailPath
from lig_lens.targets.target import DestinationTarget, Scalar


class _ByAutograd(ByPoints, PathIntegrand):
    """What both have in common: a leaf that is interpolated, and what destinations get from it."""

    @abstractmethod
    def _read(self, positions: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> tuple[Any, Tensor]:
        """What is interpolated, at `a`, as leaves; and what the destinations get from it: [item group dim]."""

    def _scalars(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item group"]:
        positions = self.positions.to(self.device)[dst]
        return self.scalar(self._read(positions, a)[1] - self.start[dst], positions)


@dataclass(frozen=True)
class _At:
    """Takes each item's own position."""

    positions: Int[Tensor, "item"]

    def __call__(self, value: Float[Tensor, "item pos"]) -> Float[Tensor, "item"]:
        """Give the values at the positions."""
        return value[torch.arange(len(self.positions), device=value.device), self.positions]


class FromResid(_ByAutograd):
    """Integrand of resid_pre -> hook_z (groups are heads) and of resid_pre -> resid_post (one group)."""

    def __init__(
        self, values: Values, path: ResidPath, scalar: Scalar, dst: Tensor, to_heads: bool, chunk: int
    ) -> None:
        n_groups = values.heads.n_heads if to_heads else 1
        super().__init__(values, scalar, dst, n_groups, n_parts=len(values))
        self.path, self.to_heads, self.chunk = path, to_heads, chunk
        scales = Scales(values)
        zero, pieces = torch.zeros(len(dst), device=self.device, dtype=self.dtype), []
        with torch.no_grad():
            for part in torch.split(torch.arange(len(dst), device=self.device), chunk):
                hooks = {} if to_heads else scales.hooks(_At(dst[part]))
                pieces.append(self._read(dst[part], zero[part], hooks)[1])
        self.start = torch.cat(pieces)
        self.scales = None if to_heads else scales

    def _read(
        self, positions: Int[Tensor, "item"], a: Float[Tensor, "item"], hooks: Mapping[str, Hook] | None = None
    ) -> tuple[Any, Tensor]:
        """Residual vectors at `a`, as a leaf, and what the destinations get: [item group dim]."""
        steps = self.path.steps(positions)
        resid = self.path.starts(positions) + a.to(steps.dtype)[:, None, None] * steps
        resid.requires_grad_(torch.is_grad_enabled())
        if self.to_heads:
            out = self.values.read_z(resid)
        else:
            out = self.values.call.run(resid, hooks)[:, :, None]
        return resid, out[torch.arange(len(positions), device=a.device), positions]

    def _parts(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"], groups: list[int]) -> Tensor:
        positions = self.positions.to(self.device)[dst]
        steps = self.path.steps(positions)
        with torch.enable_grad():
            resid, out = self._read(positions, a)
            scalars = self.scalar(out - self.start[dst], positions)
        result = steps.new_zeros(len(dst), self.n_groups, self.n_parts)
        for group in groups:
            (gradient,) = torch.autograd.grad(scalars[:, group].sum(), resid, retain_graph=group != groups[-1])
            result[:, group] = (gradient * steps).sum(-1)
        return result


class FromHeads(_ByAutograd):
    """Integrand of (hook_z, skip) -> resid_post: parts are the heads, then skip, then bias."""

    def __init__(self, values: Values, path: TailPath, scalar: Scalar, dst: Tensor, chunk: int) -> None:
        super().__init__(values, scalar, dst, n_groups=1, n_parts=path.z_end.shape[1] + 2)
        self.path, self.chunk, self.row = path, chunk, len(values)
        self.attn_out_start = values.heads.attn_out(path.z_start, path.bias_start)
        self.attn_out_end = values.heads.attn_out(path.z_end, 1.0)
        self.tail = Tail(values, self.attn_out_start[dst], path.skip_start[dst], dst)
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
        return leaves, self.tail(*leaves, positions)[:, None]

    def _parts(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"], groups: list[int]) -> Tensor:
        positions, path = self.positions.to(self.device)[dst], self.path
        with torch.enable_grad():
            leaves, out = self._read(positions, a)
            value = self.scalar(out - self.start[dst], positions).sum()
            by_attn_out, by_skip = torch.autograd.grad(value, leaves)
        by_z = torch.einsum("im,hem->ihe", by_attn_out, self.values.heads.W_O)
        heads = ((path.z_end - path.z_start)[positions] * by_z).sum(-1)
        skip = ((path.skip_end - path.skip_start)[positions] * by_skip).sum(-1)
        bias = torch.einsum("im,m->i", by_attn_out, self.values.heads.nodes.b_O) * (1 - path.bias_start)
        return torch.cat([heads, skip[:, None], bias[:, None]], -1)[:, None]


def resid_integrand(
    values: Values,
    path: ResidPath,
    target: DestinationTarget,
    dst: Int[Tensor, "dst"],
    to_heads: bool,
    budget: Budget,
) -> FromResid:
    """Contributions of source tokens to head outputs (`attn` map) or to the block's output (`block` map).

    Its parts are [dst, head or 1, src].
    """
    n_dst = len(values.resid_post)
    scalar = target.at_node(n_dst, values.resid_pre, values.heads.W_O if to_heads else None)
    return FromResid(values, path, scalar, dst, to_heads, budget.items(max(n_dst, len(values))))


def tail_integral(
    values: Values, path: TailPath, target: DestinationTarget, dst: Int[Tensor, "dst"], budget: Budget
) -> Integral:
    """Contributions of heads, skip connection and output bias to the block's output (`mlp` map).

    Returns:
        parts [dst, 1, head + 2]: the heads, then skip, then bias.
    """
    scalar, n_pos = target.at_node(len(values), values.resid_pre), len(values)
    integrand = FromHeads(values, path, scalar, dst, budget.items(n_pos) * n_pos)
    s0, s1 = integrand.tail.scales.widths(dst)
    return integrand.integrate(s0, s1, values.resid_post[:, None], budget)
