"""One prompt, recorded and checked: what maps are computed from."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lig_lens.blocks.values import Values
from lig_lens.inputs.inputs import Inputs
from lig_lens.integrate.held import Hold
from lig_lens.integrate.integrand import Budget
from lig_lens.integrate.onward import Downstream
from lig_lens.paths.baseline import Baseline, Place
from lig_lens.targets.target import Target


@dataclass(frozen=True)
class Job:
    """What is computed for one prompt.

    Attributes:
        inputs: the prompt.
        second: the corrupted prompt, if there is one.
        layers: block numbers.
        destinations: positions whose columns are computed.
        values: of the prompt, by layer.
        corrupted: of the second prompt, by layer.
        baselines: as asked for, by map: names or tensors.
        chosen: the objects that these stand for.
        target: what contributions add up to.
        downstream: with a metric as target, the rest of the model.
        budget: how hard to try.
        engine: as asked for.
        by_message: whether contributions to a metric are split by message.
        hold: with a metric, what stays while a path runs.
    """

    inputs: Inputs
    second: Inputs | None
    layers: tuple[int, ...]
    destinations: tuple[int, ...]
    values: Mapping[int, Values]
    corrupted: Mapping[int, Values]
    baselines: Mapping[str, "str | Tensor"]
    chosen: Mapping[str, Baseline]
    target: Target
    downstream: Downstream | None
    budget: Budget
    engine: str
    by_message: bool
    hold: Hold | None

    @property
    def each_head(self) -> bool:
        """Whether each head moves alone, in a cell of its own."""
        return self.hold is not None and self.hold.others

    def place(self, index: int) -> Place:
        """Layer number `index` of those asked for."""
        layer = self.layers[index]
        chunk = self.budget.items(len(self.inputs))
        return Place(self.values[layer], self.corrupted.get(layer), index, chunk)
