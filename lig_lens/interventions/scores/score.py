"""What a score is. A new one is a class here in the room, and a line in `lig_lens.interventions`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.values import Messages, Values
from lig_lens.interventions.run import Run, messages_at
from lig_lens.targets.metrics import BatchMetric


class ScoredRun:
    """One of the two prompts: its run, and the metric's gradient there, which is computed once somebody asks for it."""

    def __init__(self, run: Run, metric: BatchMetric) -> None:
        self.run, self._metric = run, metric

    @cached_property
    def gradients(self) -> dict[int, Float[Tensor, "pos head d_head"]]:
        """Gradient of the metric at the head outputs of every block.

        Raises:
            InputError: the metric has none.
        """
        return self.run.gradients(self._metric)


@dataclass(frozen=True)
class Side:
    """One of the two prompts at one block.

    Attributes:
        values: at the block.
        messages: pattern and values of its attention.
        prompt: all of its run.
    """

    values: Values
    messages: Messages
    prompt: ScoredRun = field(repr=False)

    @property
    def gradient(self) -> Float[Tensor, "pos head d_head"]:
        """Gradient of the metric at the head outputs."""
        return self.prompt.gradients[self.values.layer]

    def weighted(self, gradient: Float[Tensor, "pos head d_head"]) -> Float[Tensor, "head src dst"]:
        """`p_ji <g_j, v_i>`: every message times a gradient at the head outputs."""
        return self.messages.pattern.mT * torch.einsum("jhe,ihe->hij", gradient, self.messages.values)


def sides(prompts: Sequence[ScoredRun], layer: int) -> list[Side]:
    """Prompts at one block.

    Raises:
        InputError: the block's pattern and values cannot be read.
    """
    values = [prompt.run.values[layer] for prompt in prompts]
    messages = [messages_at(one, "leave the layer out.") for one in values]
    return [Side(*of_one) for of_one in zip(values, messages, prompts, strict=True)]


class Score(ABC):
    """A number for every edge, from a clean and a corrupted run without any intervention."""

    @abstractmethod
    def edges(self, clean: Side, corrupted: Side) -> Float[Tensor, "head src dst"]:
        """Scores of one block's edges."""

    def heads(self, clean: Side, corrupted: Side) -> Float[Tensor, "head dst"]:
        """Scores of its heads' outputs at every position; by default what all edges to there add up to."""
        return self.edges(clean, corrupted).sum(1)
