"""How far a destination's vector has moved."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.targets.target import DestinationTarget, Scalar, length


class L2(DestinationTarget, Scalar):
    """`L_j = |y_j(a) - y_j(0)|_2`, of each head's output or of the whole vector."""

    name = "l2"

    def at_node(self, n_pos: int, like: Tensor, W_O: Float[Tensor, "head d_head d_model"] | None = None) -> Scalar:
        """See the base class; the length is the same scalar at every node."""
        return self

    def __call__(
        self, displacement: Float[Tensor, "item group dim"], dst: Int[Tensor, "item"]
    ) -> Float[Tensor, "item group"]:
        """See `Scalar`."""
        return length(displacement)

    def gradient(
        self, displacement: Float[Tensor, "group item node dim"], dst: Int[Tensor, "#group item"]
    ) -> Float[Tensor, "group item node dim"]:
        """See `Scalar`. The length has none at 0, where it is given as 0."""
        size = length(displacement)[..., None]
        return displacement / torch.where(size > 0, size, torch.ones_like(size))

    def size(self, vector: Float[Tensor, "item group dim"], dst: Int[Tensor, "item"]) -> Float[Tensor, "item group"]:
        """See `Scalar`."""
        return length(vector)
