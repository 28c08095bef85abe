"""The rest of a model along a path of residual vectors, up to a metric of its output.

Along `x(a)`, the vectors of all positions at one boundary between blocks, `dF/da = sum_i <x_i - x0_i, dF/dx_i>`: one
forward and backward pass of what follows the boundary gives the derivative by all positions at once. What a position
contributes is its term; what it contributes by which way is a subclass's matter.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lig_lens.blocks.call import BlockCall
from lig_lens.blocks.values import Values
from lig_lens.errors import BoundaryError
from lig_lens.integrate.integrand import Budget, ByPoints, layers_of_paths
from lig_lens.integrate.quadrature import Integral, integrate
from lig_lens.models.stack import Forward
from lig_lens.models.switches import Switches
from lig_lens.paths.path import ResidPath
from lig_lens.targets.metrics import BatchMetric

# A path that enters a model's first block needs about so many times as many nodes as one behind the last, whatever the
# number of blocks between; from one block to the next so much more than their share of that, by a factor and a number,
# was nearly always enough; and never more than so many times as many.
_GROWTH, _MARGIN, _MORE, _MOST_GROWTH = 7.0, 1.08, 2, 1.6

Pairs = Sequence[tuple[nn.Module, Any, bool]]


@dataclass(frozen=True)
class Downstream:
    """What a metric needs of the whole model, and its values on both prompts.

    Attributes:
        forward: the run on the clean prompt, to be continued from any block.
        metric: of its output.
        clean: its value there.
        corrupted: its value in the second prompt's run, if there is one.
        first: how the lowest block was called that paths enter.
        needed: how many nodes the paths that were integrated needed, by the block that they enter.
    """

    forward: Forward
    metric: BatchMetric
    clean: float
    corrupted: float | None
    first: BlockCall = field(repr=False)
    needed: dict[int, float] = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def smooth(self) -> bool:
        """Whether nothing switches from the lowest block on, so that it does not on any path."""

        def run(n: int) -> Float[Tensor, "item"]:
            resid = self.first.resid_pre.expand(n, -1, -1)
            return self.metric(self.forward.onward(self.first.layer, resid, [self.first.entering(resid)]))

        return not Switches(run)

    def foretold(self, layer: int) -> int | None:
        """How many nodes a path that enters a block may need, as the next one's tell; None where they are not known."""
        behind = self.needed.get(layer + 1)
        if behind is None:
            return None
        growth: float = _MARGIN * _GROWTH ** (1 / len(self.forward.stack))
        return math.ceil(min(growth, _MOST_GROWTH) * behind) + _MORE


@dataclass(frozen=True)
class Entry:
    """Where a path of residual vectors enters a model.

    Attributes:
        layer: number of the block that they enter; the number of blocks for what follows the last.
        call: of that block, if there is one.
        path: of the vectors, shared by all destinations.
        eps: what norms behind the boundary add to the mean square.
        depth: how many of them follow each other at once, each with a layer of its own at a path's end.
        rounding: relative rounding error there.
    """

    layer: int
    call: BlockCall | None
    path: ResidPath
    eps: float
    depth: int
    rounding: float
    start: Float[Tensor, "pos d_model"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.path.start is None:
            raise BoundaryError("A metric is one number for all destinations, so they need one path: it has no itb.")
        object.__setattr__(self, "start", self.path.start)


def entry_of(values: Values, path: ResidPath) -> Entry:
    """Where a path enters a block that was recorded."""
    block = values.block
    return Entry(values.layer, values.call, path, block.eps, block.norms_to_z, block.rounding)


def behind(values: Values, path: ResidPath) -> Entry:
    """Where a path enters what follows the last block, `values` being that block's."""
    block = values.block
    return Entry(values.layer + 1, None, path, block.eps, block.norms_to_z, block.rounding)


class Onward(ByPoints):
    """The metric of what follows from the vectors at a point of the path: one cell, unless a subclass runs several."""

    n_dst, n_groups = 1, 1
    guided = True
    """Whether paths at the next block tell how many nodes one needs."""

    def __init__(self, entry: Entry, down: Downstream, n_parts: int, budget: Budget) -> None:
        self.entry, self.down = entry, down
        self.first, self.step = entry.start, entry.path.end - entry.start
        self.dtype, self.device = self.first.dtype, self.first.device
        self.n_parts = n_parts
        # Every block that is still to run keeps activations for the backward pass.
        passed = max(1, down.forward.stack.count_from(entry.layer))
        self.chunk = max(1, budget.max_batch_tokens // (len(self.first) * passed * self.n_groups))
        with torch.no_grad():
            ends = self.outputs(torch.stack([self.first, entry.path.end]))
            self.at_ends = self._metric(ends).to(self.dtype)  # [2, group]
        self.sensitivity = max(down.metric.sensitivity(one[None]) for one in ends.flatten(0, 1))

    def integrate(self, known: tuple[float | None, float | None], budget: Budget) -> Integral:
        """Integrate, once it is seen that the path starts and ends in the model's own runs.

        Args:
            known: the metric in the runs that the path starts from and ends in, where these are the model's.
            budget: how hard to try.

        Raises:
            BoundaryError: the model gives something else when it is run from the boundary on.
        """
        for cells, whole in zip(self.runs().tolist(), known, strict=True):
            for here in cells if whole is not None else ():
                if abs(here - whole) <= 1e-4 * max(self.sensitivity, 1e-30):
                    continue
                raise BoundaryError(
                    f"Running the model from block {self.entry.layer} on gives a metric of {here:.6g} where the whole "
                    f"model gives {whole:.6g}: something else than the residual stream passes between its blocks, or "
                    "the model is random. No metric can be attributed there."
                )
        entry = self.entry
        with torch.no_grad():
            s0, s1 = layers_of_paths(entry.path, torch.zeros(1, dtype=torch.long), entry.eps, entry.depth)
            # What logits that differ by rounding alone can do to the metric.
            noise = torch.full((1, self.n_groups), 8 * entry.rounding * self.sensitivity)
            found = integrate(
                self,
                s0,
                s1,
                noise,
                tol=budget.tol,
                max_nodes=budget.max_nodes,
                first_nodes=self.down.foretold(entry.layer) if self.guided else None,
            )
        if self.guided:
            self.down.needed[entry.layer] = float(found.needed.max())
        return found

    def runs(self) -> Float[Tensor, "2 cell"]:
        """The metric of whole runs from both ends of the path on, which the model's own are held against."""
        return self.at_ends

    def onward(self, resid: Float[Tensor, "item pos d_model"], pairs: Pairs = ()) -> Float[Tensor, "item *rest"]:
        """The model's output for vectors that enter here.

        Args:
            resid: the vectors.
            pairs: torch hooks that are on meanwhile, as `module_hooks` takes them.
        """
        call = self.entry.call
        entering = [] if call is None else [call.entering(resid)]
        return self.down.forward.onward(self.entry.layer, resid, [*entering, *pairs])

    def value(self, resid: Float[Tensor, "item pos d_model"], pairs: Pairs = ()) -> Float[Tensor, "item"]:
        """The metric there, with a gradient.

        Raises:
            InputError: it has none.
        """
        metric = self.down.metric
        return metric.checked(metric(self.onward(resid, pairs)))

    def resid(self, a: Float[Tensor, "item"]) -> Float[Tensor, "item pos d_model"]:
        """Vectors at points of the path."""
        return self.first + a[:, None, None] * self.step

    def scalars(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item group"]:
        """See `split.Integrand`; the path's end has been run already."""
        if bool((a == 1).all()):
            return (self.at_ends[1] - self.at_ends[0]).expand(len(a), -1)
        return super().scalars(dst, a)

    def outputs(self, resid: Float[Tensor, "item pos d_model"]) -> Float[Tensor, "item group *rest"]:
        """The model's output in each cell for vectors that enter here."""
        return self.onward(resid)[:, None]

    def _metric(self, outputs: Float[Tensor, "item group *rest"]) -> Float[Tensor, "item group"]:
        return self.down.metric(outputs.flatten(0, 1)).reshape(outputs.shape[:2])

    def switches(self) -> bool:
        """See `split.Integrand`."""
        return not self.down.smooth and super().switches()

    def _scalars(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item group"]:
        return self._metric(self.outputs(self.resid(a))).to(self.dtype) - self.at_ends[0]


class OfPositions(Onward):
    """Parts are the positions: what the vector of each contributes, by whatever way."""

    def __init__(self, entry: Entry, down: Downstream, budget: Budget) -> None:
        super().__init__(entry, down, len(entry.start), budget)

    def _parts(
        self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"], groups: list[int]
    ) -> Float[Tensor, "item group part"]:
        """Parts `<x_i - x0_i, dF/dx_i>` at single points."""
        with torch.enable_grad():
            resid = self.resid(a).requires_grad_()
            (gradient,) = torch.autograd.grad(self.value(resid).sum(), resid, materialize_grads=True)
        return (gradient * self.step).sum(-1)[:, None]
