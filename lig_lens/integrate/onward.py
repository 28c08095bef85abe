"""The rest of a model along a path of residual vectors, up to a metric of its output.

Along `x(a)`, the vectors of all positions at one boundary between blocks, `dF/da = sum_i <x_i - x0_i, dF/dx_i>`: one
forward and backward pass of what follows the boundary gives the derivative by all positions at once. What a position
contributes is its term; what it contributes by which way is a subclass's matter.
"""

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

# With each block that is still to run, a path needs up to so many nodes more: a factor, and a number.
_GROWTH, _MORE = 1.5, 2

Pairs = Sequence[tuple[nn.Module, Any, bool]]


@dataclass(frozen=True)
class Downstream:
    """What a metric needs of the whole model, and its values on both prompts.

    Attributes:
        forward: the run on the clean prompt, to be continued from any block.
        metric: of its output.
        clean: its value there.
        corrupted: its value in the second prompt's run, if there is one.
        needed: how many nodes the paths that were integrated needed, by the block that they enter.
    """

    forward: Forward
    metric: BatchMetric
    clean: float
    corrupted: float | None
    needed: dict[int, float] = field(default_factory=dict, repr=False, compare=False)

    def foretold(self, layer: int) -> int | None:
        """How many nodes a path that enters a block may need, as the next one's tell; None where they are not known."""
        behind = self.needed.get(layer + 1)
        return None if behind is None else math.ceil(_GROWTH * behind) + _MORE


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
    """An integrand of one cell: the metric of what follows from the vectors at a point of the path."""

    n_dst, n_groups = 1, 1

    def __init__(self, entry: Entry, down: Downstream, n_parts: int, budget: Budget) -> None:
        self.entry, self.down = entry, down
        self.first, self.step = entry.start, entry.path.end - entry.start
        self.dtype, self.device = self.first.dtype, self.first.device
        self.n_parts = n_parts
        # Every block that is still to run keeps activations for the backward pass.
        passed = max(1, down.forward.stack.count_from(entry.layer))
        self.chunk = max(1, budget.max_batch_tokens // (len(self.first) * passed))
        # One run shows what comes out at both ends, and whether anything switches on the way.
        seen: list[tuple[Tensor, Tensor]] = []
        self._switches = Switches(lambda n: seen.append(self._ends(n)))
        logits, values = seen[0]
        self.at_ends: tuple[float, float] = tuple(values.to(self.dtype).tolist())
        self.sensitivity = max(down.metric.sensitivity(one[None]) for one in logits)

    def integrate(self, known: float | None, budget: Budget) -> Integral:
        """Integrate, once it is seen that the path starts and ends in the model's own runs.

        Args:
            known: the metric in the run that the path starts from, if that is one of the model's.
            budget: how hard to try.

        Raises:
            BoundaryError: the model gives something else when it is run from the boundary on.
        """
        for here, whole in zip(self.at_ends, (known, self.down.clean), strict=True):
            missed = 0.0 if whole is None else abs(here - whole) / max(self.sensitivity, 1e-30)
            if not missed <= 1e-4:
                raise BoundaryError(
                    f"Running the model from block {self.entry.layer} on gives a metric of {here:.6g} where the whole "
                    f"model gives {whole:.6g}: something else than the residual stream passes between its blocks, or "
                    "the model is random. No metric can be attributed there."
                )
        entry = self.entry
        with torch.no_grad():
            s0, s1 = layers_of_paths(entry.path, torch.zeros(1, dtype=torch.long), entry.eps, entry.depth)
            # What logits that differ by rounding alone can do to the metric.
            noise = torch.full((1, 1), 8 * entry.rounding * self.sensitivity)
            found = integrate(
                self,
                s0,
                s1,
                noise,
                tol=budget.tol,
                max_nodes=budget.max_nodes,
                first_nodes=self.down.foretold(entry.layer),
            )
        self.down.needed[entry.layer] = float(found.needed)
        return found

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
            return self.first.new_full((len(a), 1), self.at_ends[1] - self.at_ends[0])
        return super().scalars(dst, a)

    def _ends(self, n: int) -> tuple[Float[Tensor, "item *rest"], Float[Tensor, "item"]]:
        """The model's output and the metric of so many items: the path's start and its end by turns."""
        logits = self.onward(torch.stack([self.first, self.entry.path.end])[torch.arange(n) % 2])
        return logits, self.down.metric(logits)

    def _scalars(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item group"]:
        return (self.down.metric(self.onward(self.resid(a))).to(self.dtype) - self.at_ends[0])[:, None]


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
