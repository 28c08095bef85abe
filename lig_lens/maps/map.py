"""What a map is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.values import Values
from lig_lens.errors import InputError, NonFiniteError
from lig_lens.integrate.engines import Engine
from lig_lens.integrate.quadrature import Integral
from lig_lens.maps.job import Job
from lig_lens.paths.baseline import describe_baseline
from lig_lens.paths.columns import Columns, joined

# Contributions of unfinished panels that may be held at once, in bytes, and how many panels a column may have open.
_PANEL_BYTES = 2**28
_OPEN_PANELS = 32


class Map(ABC):
    """From which node to which, and which engines can integrate between them.

    Attributes:
        name: as users give it.
        engines: those that can serve it, the preferred first.
        parts: tensors that come beside the contributions, `skip` or `bias`.
        needs_heads: whether it needs a block's attention nodes.
        without_heads: what to do about a block that has none.
    """

    name: str
    engines: tuple[Engine, ...]
    parts: tuple[str, ...] = ()
    needs_heads = True
    without_heads = "use maps=('block',) or leave the layer out."

    @abstractmethod
    def columns(self, job: Job, index: int, advance: Callable[[int], object]) -> Columns:
        """All columns at one layer.

        Args:
            job: the prompt.
            index: of the layer among those asked for.
            advance: told how much of its `work` is done.
        """

    def work(self, job: Job, index: int) -> int:
        """How much is to be done at one layer, for the progress bar: the number of columns."""
        return len(job.destinations)

    def node_shape(self, values: Values, n_pos: int) -> tuple[int, ...]:
        """Shape of the node that the map goes from, for a prompt of `n_pos` positions."""
        return (n_pos, values.resid_pre.shape[-1])

    def engine(self, wanted: str, values: Values) -> Engine:
        """The engine that computes the map on a block.

        Args:
            wanted: its name, or `auto`; a map that has one engine takes that whichever is named.
            values: of a prompt at the block.
        """
        fitting = [engine for engine in self.engines if engine.serves(values)]
        return next((engine for engine in fitting if engine.name == wanted), fitting[0])

    def check_block(self, values: Values, wanted: str, by_message: bool) -> None:
        """Raise InputError if a block lacks what the map needs; before anything is integrated.

        Args:
            values: of a prompt at the block.
            wanted: name of the engine, or `auto`.
            by_message: whether contributions are split by message.
        """
        if self.needs_heads and values.attention is None:
            raise InputError(
                f"Block {values.layer} has no attention with separable heads, so it has no {self.name!r} map: "
                f"{self.without_heads}"
            )
        chosen = self.engine(wanted, values).name
        if chosen != wanted and wanted in [engine.name for engine in self.engines]:
            raise InputError(
                f"engine={wanted!r} cannot work on block {values.layer}: {values.block.boundaries.why_hooks}. Use "
                f"engine='auto', which takes {chosen!r} for such blocks."
            )

    def finished(self, job: Job, index: int, columns: Columns) -> Columns:
        """Columns as a Flow keeps them, with the gap of these very numbers.

        Raises:
            NonFiniteError: a contribution is NaN or infinite.
        """
        columns = columns.stored(job.budget.tol)
        parts = [columns.contributions, *(part for part in (columns.skip, columns.bias) if part is not None)]
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise NonFiniteError(
                f"The {self.name} map of block {job.layers[index]} is NaN or infinite along the path from "
                f"{self.name}_baseline={describe_baseline(job.baselines[self.name])!r}: choose another baseline."
            )
        return columns


class DestinationMap(Map):
    """A map whose columns belong to destinations, and can be computed a few at a time."""

    def columns(self, job: Job, index: int, advance: Callable[[int], object]) -> Columns:
        """See the base class."""
        pieces = []
        for dst in self._portions(job, index):
            pieces.append(self.columns_of(job, index, dst))
            advance(len(dst))
        return self.finished(job, index, joined(pieces))

    @abstractmethod
    def columns_of(self, job: Job, index: int, dst: Int[Tensor, "dst"]) -> Columns:
        """Columns of some destinations."""

    def cells_per_destination(self, values: Values) -> int:
        """How many cells a destination has."""
        return 1

    def _portions(self, job: Job, index: int) -> Iterator[Int[Tensor, "dst"]]:
        """Destinations in portions whose unfinished panels fit into `_PANEL_BYTES`."""
        values = job.values[job.layers[index]]
        width = len(job.inputs) * self.cells_per_destination(values)
        size = max(1, _PANEL_BYTES // (width * 4 * 4 * _OPEN_PANELS))  # four float32 sums for each
        yield from torch.split(torch.tensor(job.destinations, device=values.resid_pre.device), size)


def cells_of(integral: Integral) -> dict[str, Float[Tensor, "group dst"]]:
    """How certain an integral is, as `Columns` has it."""
    names = ("total", "gap", "error", "converged", "nodes", "scale", "jumped")
    return {name: getattr(integral, name).T for name in names}
