"""Columns: what the sources of one layer contribute to its destinations, with their errors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """Contributions of one map at one layer, and how certain they are.

    The last axis of each tensor is that of destinations (with a metric there is one cell for all of them). `skip` and
    `bias` are what goes past the heads, where the map has it.

    Attributes:
        contributions: [head src dst], [src dst], or of heads alone [head dst].
        total: exact change of the target.
        gap: how far the contributions are from adding up to it, relative.
        error: estimated error of the worst contribution, relative to the largest.
        converged: whether both are within the tolerance.
        nodes: points of the path that were evaluated.
        scale: what the gap is relative to, see `quadrature.Integral`.
        jumped: what of the gap is jumps of the target itself.
        skip: what the skip connection contributes.
        bias: what the attention output's bias contributes.
    """

    contributions: Float[Tensor, "..."]
    total: Float[Tensor, "..."]
    gap: Float[Tensor, "..."]
    error: Float[Tensor, "..."]
    converged: Bool[Tensor, "..."]
    nodes: Int[Tensor, "..."]
    scale: Float[Tensor, "..."]
    jumped: Float[Tensor, "..."]
    skip: Float[Tensor, "..."] | None = None
    bias: Float[Tensor, "..."] | None = None

    def one_group(self) -> "Columns":
        """The same without the axis of heads, where that has length 1."""
        return self.each(lambda tensor: tensor[0])

    def stored(self, tol: float) -> "Columns":
        """The same on the CPU in float32, as a Flow keeps them; the gap is at least what these numbers miss."""
        kept = self.each(lambda tensor: tensor.cpu().float() if tensor.is_floating_point() else tensor.cpu())
        gap = torch.maximum(kept.gap, ((kept.summed() - kept.total.double()).abs() / self.scale.cpu().double()).float())
        return replace(kept, gap=gap, converged=kept.converged & (gap <= tol) & (kept.error <= tol))

    def summed(self) -> Float[Tensor, "..."]:
        """Sum of all that should add up to the total, cell by cell, in float64."""

        def of_cells(part: Tensor) -> Tensor:
            if not self.total.ndim:  # one cell for everything
                return part.sum(dtype=torch.float64)
            return part.sum(-2, dtype=torch.float64) if part.ndim > self.total.ndim else part.double()

        if self.contributions.ndim == self.total.ndim + 2:  # one cell for each head, past which nothing goes
            return self.contributions.sum((-2, -1), dtype=torch.float64)
        return sum(
            (of_cells(part) for part in (self.skip, self.bias) if part is not None), of_cells(self.contributions)
        )

    def cells_only(self) -> "Columns":
        """The same without contributions, which may be large."""
        return replace(self, contributions=self.total, skip=None, bias=None)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Columns":
        """The same with every tensor changed."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in named.items() if value is not None})


def joined(pieces: Sequence[Columns]) -> Columns:
    """Columns of several portions of the destinations, one beside the other."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    present = [field.name for field in fields(first) if getattr(first, field.name) is not None]
    return replace(first, **{name: torch.cat([getattr(one, name) for one in pieces], -1) for name in present})
