"""Axes of a Flow's tensors, for each kind of Flow."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

# Fields of a Flow that hold contributions, and those that hold a number for whatever they add up to, map by map.
TENSORS = ("attn", "mlp", "skip", "bias", "block")
CELLS = ("total", "gap", "converged")


@dataclass(frozen=True)
class Axes:
    """Axes of what a kind of Flow holds.

    Attributes:
        tensors: of each tensor, by its name.
        parts: names of the tensors that belong to each map.
        columns: of what `Flow.columns` gives for each map; `part` counts heads, skip and bias.
        cells: of the totals, gaps and converged masks of each map.
        counted: what cells are called in words.
    """

    tensors: Mapping[str, tuple[str, ...]]
    parts: Mapping[str, tuple[str, ...]]
    columns: Mapping[str, tuple[str, ...]]
    cells: Mapping[str, tuple[str, ...]]
    counted: str

    def within(self, map: str) -> tuple[int, ...]:
        """Which axes of `columns[map]` a cell adds up over."""
        return tuple(place for place, axis in enumerate(self.columns[map]) if axis not in self.cells[map])

    def spread(self, map: str, cells: Tensor) -> Tensor:
        """Cells with axes of length 1 put in, so that they stand beside the columns that they belong to.

        Args:
            map: whose cells.
            cells: with the axes `cells[map]`.

        Returns:
            with the axes `columns[map]`.
        """
        sizes = dict(zip(self.cells[map], cells.shape, strict=True))
        return cells.reshape([sizes.get(axis, 1) for axis in self.columns[map]])


PER_DESTINATION = Axes(
    tensors={
        "attn": ("layer", "head", "src", "dst"),
        "mlp": ("layer", "head", "dst"),
        "skip": ("layer", "dst"),
        "bias": ("layer", "dst"),
        "block": ("layer", "src", "dst"),
    },
    parts={"attn": ("attn",), "mlp": ("mlp", "skip", "bias"), "block": ("block",)},
    columns={
        "attn": ("layer", "head", "src", "dst"),
        "mlp": ("layer", "part", "dst"),
        "block": ("layer", "src", "dst"),
    },
    cells={"attn": ("layer", "head", "dst"), "mlp": ("layer", "dst"), "block": ("layer", "dst")},
    counted="columns",
)
# A metric is one number for all heads and destinations of a layer.
PER_METRIC = Axes(
    tensors=dict(PER_DESTINATION.tensors) | {"skip": ("layer", "src")},
    parts={"attn": ("attn", "skip")},
    columns={"attn": ("layer", "head", "src", "dst")},
    cells={"attn": ("layer",)},
    counted="layers",
)
# Where each head moves alone, it is a number of its own.
PER_HEAD = replace(PER_METRIC, cells={"attn": ("layer", "head")}, counted="heads")


def axes_of(metric: bool, each_head: bool = False) -> Axes:
    """Axes of a Flow of contributions to a metric, head by head or for all of them, or to destinations' vectors."""
    if not metric:
        return PER_DESTINATION
    return PER_HEAD if each_head else PER_METRIC
