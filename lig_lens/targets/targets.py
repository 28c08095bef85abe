"""Scalars of a destination: what the contributions add up to.

Every target measures how far a destination's vector y(a) has moved from where its path starts, so that it is
0 at a = 0 and the contributions add up to its value at a = 1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.errors import InputError, check_choice

TARGETS = ("l2",)


@dataclass(frozen=True, eq=False)
class Direction:
    """`L_j = <w_j, y_j(a) - y_j(0)>`: movement along given directions of the residual stream."""

    w: Float[Tensor, "#pos d_model"]


def direction(w: Tensor) -> Direction:
    """Target that measures movement along `w`, for example along an unembedding column.

    Args:
        w: one direction of the residual stream for all destinations, [d_model], or one for each position of
            the prompt, [pos, d_model]. For the `attn` map it is pulled back through W_O of each head, so that
            contributions are in units of `<w, residual stream>` there too.

    Positive contributions move the destination along `w`.
    """
    if not isinstance(w, Tensor) or w.ndim not in (1, 2) or not w.is_floating_point():
        raise InputError(
            f"direction needs a float tensor [d_model] or [pos, d_model], got "
            f"{tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__}."
        )
    return Direction(w.detach().reshape(-1, w.shape[-1]))


def check_target(target: Any, n_pos: int, d_model: int) -> "str | Direction":
    """Return a usable target.

    Raises:
        InputError: unknown name, or a direction of the wrong shape.
    """
    if not isinstance(target, Direction):
        return check_choice("target", target, TARGETS)
    rows, width = target.w.shape
    if width != d_model or rows not in (1, n_pos):
        raise InputError(
            f"direction has shape {list(target.w.shape)}: this prompt needs [{d_model}] or [{n_pos}, {d_model}] "
            "([d_model] or [pos, d_model])."
        )
    if not bool(torch.isfinite(target.w).all()):
        raise InputError("direction holds NaN or infinite values: check how w was computed.")
    return target


def describe_target(target: "str | Direction") -> str:
    """Name of a target, as a Flow records it."""
    return target if isinstance(target, str) else f"direction{list(target.w.shape)}"


class Scalar:
    """A target made ready for one node: `[item, group, dim]` displacements in, `[item, group]` scalars out.

    A group is a head for `hook_z`, and the whole vector (one group) for resid_post.
    """

    def __init__(
        self,
        target: "str | Direction",
        n_pos: int,
        like: Tensor,
        W_O: Float[Tensor, "head d_head d_model"] | None = None,
    ) -> None:
        self.weights: Float[Tensor, "pos group dim"] | None = None
        if isinstance(target, Direction):
            w = target.w.to(like).expand(n_pos, -1)
            self.weights = w[:, None] if W_O is None else torch.einsum("hem,pm->phe", W_O, w)

    def __call__(
        self, displacement: Float[Tensor, "item group dim"], dst: Int[Tensor, "item"]
    ) -> Float[Tensor, "item group"]:
        """Scalar of each item and group, `dst` being the item's destination position."""
        if self.weights is None:
            return _length(displacement)
        return (self.weights[dst] * displacement).sum(-1)

    def gradient(
        self, displacement: Float[Tensor, "group item node dim"], dst: Int[Tensor, "#group item"]
    ) -> Float[Tensor, "group item node dim"]:
        """Gradient at each displacement. The length has none at 0, where it is given as 0."""
        if self.weights is None:
            length = _length(displacement)[..., None]
            return displacement / torch.where(length > 0, length, torch.ones_like(length))
        group = torch.arange(len(displacement), device=dst.device)[:, None]
        return self.weights[dst, group][:, :, None].expand_as(displacement)

    def size(self, vector: Float[Tensor, "item group dim"], dst: Int[Tensor, "item"]) -> Float[Tensor, "item group"]:
        """Largest scalar that a vector of this length can give: the yardstick for rounding errors."""
        norm = _length(vector)
        return norm if self.weights is None else norm * _length(self.weights[dst])


def _length(vectors: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return length
