"""What an intervention is: something else enters one block, or its heads put out something else.

A new one is a class with `trials`; `runner.intervene` does everything else.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.known import Needs
from lig_lens.blocks.values import Values
from lig_lens.inputs.inputs import Inputs


@dataclass(frozen=True)
class Change:
    """What some runs have at one block instead of what the prompt's own run has there.

    Attributes:
        resid: residual vectors that enter the block; the prompt's own with None.
        z: head outputs before W_O; with None those that the block itself makes of what enters.
    """

    resid: Float[Tensor, "run pos d_model"] | None = field(default=None, repr=False)
    z: Float[Tensor, "run pos head d_head"] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Trials:
    """The runs of an intervention at one block.

    Attributes:
        shape: in which the runs are numbered, the last axis fastest; as the effects have it after the layer.
        make: numbers of some runs -> what is changed in them.
    """

    shape: tuple[int, ...]
    make: Callable[[Int[Tensor, "run"]], Change] = field(repr=False)

    @property
    def count(self) -> int:
        """How many runs there are."""
        return math.prod(self.shape)

    def arranged(self, found: Float[Tensor, "run"]) -> Float[Tensor, "..."]:
        """What was found in each run, on the axes that the effects have after the layer."""
        return found.reshape(self.shape)


class Intervention(ABC):
    """What is changed in a run at one block at a time.

    Attributes:
        on: axes of the effects, a key of `effects.AXES`.
        done: what becomes of the node, such as "ablated"; for `measures`.
        needs: what of the runs' values is kept.
    """

    on: str
    done: str
    needs = Needs(formula=False)

    @property
    @abstractmethod
    def name(self) -> str:
        """What was done, as Effects say it."""

    @property
    def doing(self) -> str:
        """What the progress bar says."""
        return self.name

    @property
    def denoises(self) -> bool:
        """Which run it is put into, and with which sign it counts.

        False: the first prompt's (clean), and its effect is f(clean) - f(changed). True: the last one's (corrupted),
        and its effect is f(changed) - f(corrupted). Both are positive where what is put back, or left in, raises the
        metric.
        """
        return False

    @property
    def measures(self) -> str:
        """What a positive effect means."""
        return f"metric gained: {self.done} - corrupted" if self.denoises else f"metric lost: clean - {self.done}"

    def settings(self, prompts: Sequence[Inputs]) -> dict[str, object]:
        """What Effects keep of the prompts and of what was asked; JSON-able."""
        first, *others = prompts
        return {"prompt": first.record(), "others": [one.record() for one in others]}

    @abstractmethod
    def trials(self, into: Values, others: Sequence[Values]) -> Trials:
        """The runs at one block; asked for at every block before anything is measured.

        Args:
            into: the block's values in the run that is changed.
            others: its values in the other prompts' runs, in the prompts' order.

        Raises:
            InputError: the block lacks what is to be changed.
        """


def copies(
    value: Float[Tensor, "pos *rest"], numbers: Int[Tensor, "run"]
) -> tuple[Float[Tensor, "run pos *rest"], Int[Tensor, "run"]]:
    """A node's value once for each run, and which copy each run has."""
    return value.repeat(len(numbers), *[1] * value.ndim), torch.arange(len(numbers), device=value.device)
