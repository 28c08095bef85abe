"""Straight paths from a baseline's vectors to the prompt's."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ResidPath:
    """Straight path of the residual vectors that enter a block, `x0 + a (x - x0)`; one per destination.

    `start` is shared by all destinations; None stands for ITB (arXiv 2606.21564), where every position starts
    at the destination's own vector.
    """

    end: Float[Tensor, "pos d_model"]
    start: Float[Tensor, "pos d_model"] | None

    def starts(self, dst: Int[Tensor, "item"]) -> Float[Tensor, "item pos d_model"]:
        """Start of each item's path."""
        if self.start is None:
            return self.end[dst][:, None].expand(-1, self.end.shape[0], -1)
        return self.start.expand(len(dst), *self.start.shape)

    def steps(self, dst: Int[Tensor, "item"]) -> Float[Tensor, "item pos d_model"]:
        """`x - x0` of each item's path."""
        return self.end - self.starts(dst)


@dataclass(frozen=True)
class TailStart:
    """Where the path of what the rest of a block sees starts: head outputs, skip connection, and the share of b_O."""

    z: Float[Tensor, "pos head d_head"]
    skip: Float[Tensor, "pos d_model"]
    bias: float = 1.0


@dataclass(frozen=True)
class TailPath:
    """Straight path of what the rest of a block sees: head outputs, skip connection, `bias_start` b_O to b_O."""

    z_start: Float[Tensor, "pos head d_head"]
    z_end: Float[Tensor, "pos head d_head"]
    skip_start: Float[Tensor, "pos d_model"]
    skip_end: Float[Tensor, "pos d_model"]
    bias_start: float
