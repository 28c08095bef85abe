"""Columns: what the sources of one layer contribute to its destinations, with their errors."""

from collections.abc import Sequence
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
        skip: what the skip connection contributes.
        bias: what the attention output's bias contributes.
    """

    contributions: Float[Tensor, "..."]
    total: Float[Tensor, "..."]
    gap: Float[Tensor, "..."]
    error: Float[Tensor, "..."]
    converged: Bool[Tensor, "..."]
    nodes: Int[Tensor, "..."]
    skip: Float[Tensor, "..."] | None = None
    bias: Float[Tensor, "..."] | None = None

    def one_group(self) -> "Columns":
        """The same without the axis of heads, where that has length 1."""
        return Columns(**{name: None if value is None else value[0] for name, value in self._named()})

    def cpu(self) -> "Columns":
        """The same on the CPU."""
        return Columns(**{name: None if value is None else value.cpu() for name, value in self._named()})

    def cells_only(self) -> "Columns":
        """The same without contributions, which may be large."""
        return replace(self, contributions=self.total, skip=None, bias=None)

    def _named(self) -> list[tuple[str, Tensor | None]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


def joined(pieces: Sequence[Columns]) -> Columns:
    """Columns of several portions of the destinations, one beside the other."""
    if len(pieces) == 1:
        return pieces[0]
    named = [dict(piece._named()) for piece in pieces]
    return Columns(
        **{
            name: None if value is None else torch.cat([one[name] for one in named if one[name] is not None], -1)
            for name, value in named[0].items()
        }
    )
