"""The map of contributions to a metric of the logits."""

from collections.abc import Callable

from lig_lens.blocks.values import Values
from lig_lens.errors import InputError
from lig_lens.integrate.engines import ENGINES
from lig_lens.integrate.to_metric import metric_integral
from lig_lens.maps.job import Job
from lig_lens.maps.map import Map, cells_of
from lig_lens.paths.columns import Columns


class AttnToMetric(Map):
    """resid_pre -> heads -> metric: through each head, and past all of them."""

    name = "attn"
    engines = ENGINES
    parts = ("skip",)
    without_heads = "leave the layer out."

    def columns(self, job: Job, index: int, advance: Callable[[int], object]) -> Columns:
        """Heads [head src dst], skip [src], and one cell."""
        down, place = job.downstream, job.place(index)
        if down is None:
            raise InputError("Contributions to a metric need a metric as target.")
        values, path = place.values, job.chosen[self.name].resid_path(place)
        start = values.resid_pre if path.start is None else path.start
        between = self.engine(job.engine, values).between(values, start, job.budget, job.by_message)
        # Where the path starts in the second prompt's run, the metric there is known.
        known = down.corrupted if place.corrupted is not None and path.start is place.corrupted.resid_pre else None
        heads, skip, integral = metric_integral(values, path, between, down, known, job.hold, job.budget)
        advance(self.work(job, index))
        # One for each head, or one for everything.
        each = slice(None) if job.each_head else 0
        cells = {name: value[each, 0] for name, value in cells_of(integral).items()}
        return self.finished(job, index, Columns(heads, **cells, skip=skip))

    def work(self, job: Job, index: int) -> int:
        """The blocks that every point of the path runs through."""
        layer = job.layers[index]
        return job.values[layer].call.stack.count_from(layer)

    def check_block(self, values: Values, wanted: str, by_message: bool) -> None:
        """See the base class."""
        super().check_block(values, wanted, by_message)
        if by_message:
            self.engine(wanted, values).check_messages(values)
