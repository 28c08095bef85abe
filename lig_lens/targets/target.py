"""What a target is: a scalar that contributions add up to.

A target of a destination measures how far its vector y(a) has moved from where its path starts, so that it is 0 at
a = 0 and the contributions add up to its value at a = 1. A metric (`metrics.py`) is a scalar of the logits instead.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.errors import InputError


class Target:
    """What is measured along a path.

    Attributes:
        name: as a Flow records it.
        per_metric: whether it is one number of the logits for all destinations together.
    """

    name: str
    per_metric = False


class Scalar(ABC):
    """A target made ready for one node: `[item, group, dim]` displacements in, `[item, group]` scalars out.

    A group is a head for `hook_z`, and the whole vector (one group) for resid_post.
    """

    @abstractmethod
    def __call__(
        self, displacement: Float[Tensor, "item group dim"], dst: Int[Tensor, "item"]
    ) -> Float[Tensor, "item group"]:
        """Scalar of each item and group, `dst` being the item's destination position."""

    @abstractmethod
    def gradient(
        self, displacement: Float[Tensor, "group item node dim"], dst: Int[Tensor, "#group item"]
    ) -> Float[Tensor, "group item node dim"]:
        """Gradient at each displacement."""

    @abstractmethod
    def size(self, vector: Float[Tensor, "item group dim"], dst: Int[Tensor, "item"]) -> Float[Tensor, "item group"]:
        """Largest scalar that a vector of this length can give: the yardstick for rounding errors."""


class DestinationTarget(Target, ABC):
    """A target of each destination's own vector. One that has a name is a file here, and a line in `__init__.py`."""

    def check(self, n_pos: int, d_model: int) -> None:
        """Raise InputError if the target does not fit a prompt of `n_pos` positions; by default all fit."""
        return

    @abstractmethod
    def at_node(self, n_pos: int, like: Tensor, W_O: Float[Tensor, "head d_head d_model"] | None = None) -> Scalar:
        """Make it ready for a node.

        Args:
            n_pos: positions of the prompt.
            like: gives dtype and device.
            W_O: at `hook_z`, what takes head outputs to the residual stream.
        """


def length(vectors: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
    """Euclidean length."""
    result: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return result


def of_destinations(target: Target) -> DestinationTarget:
    """Return a target that is one of destinations.

    Raises:
        InputError: it is a metric.
    """
    if not isinstance(target, DestinationTarget):
        raise InputError(f"The target {target.name} is a metric of the logits, not one of each destination's vector.")
    return target
