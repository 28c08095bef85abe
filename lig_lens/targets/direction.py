"""How far a destination's vector has moved along a direction."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.errors import InputError
from lig_lens.targets.target import DestinationTarget, Scalar, length


@dataclass(frozen=True, eq=False)
class Direction(DestinationTarget):
    """`L_j = <w_j, y_j(a) - y_j(0)>`: movement along given directions of the residual stream."""

    w: Float[Tensor, "#pos d_model"]

    @property
    def name(self) -> str:  # type: ignore[override]  # read-only, since it follows from w
        """As a Flow records it."""
        return f"direction{list(self.w.shape)}"

    def check(self, n_pos: int, d_model: int) -> None:
        """See the base class."""
        rows, width = self.w.shape
        if width != d_model or rows not in (1, n_pos):
            raise InputError(
                f"direction has shape {list(self.w.shape)}: this prompt needs [{d_model}] or [{n_pos}, {d_model}] "
                "([d_model] or [pos, d_model])."
            )
        if not bool(torch.isfinite(self.w).all()):
            raise InputError("direction holds NaN or infinite values: check how w was computed.")

    def at_node(self, n_pos: int, like: Tensor, W_O: Float[Tensor, "head d_head d_model"] | None = None) -> Scalar:
        """See the base class; at `hook_z` the direction is pulled back through W_O of each head."""
        w = self.w.to(like).expand(n_pos, -1)
        return _Along(w[:, None] if W_O is None else torch.einsum("hem,pm->phe", W_O, w))


def direction(w: Any) -> Direction:
    """Target that measures movement along `w`, for example along an unembedding column.

    Args:
        w: one direction of the residual stream for all destinations, [d_model], or one for each position of
            the prompt, [pos, d_model]. For the `attn` map it is pulled back through W_O of each head, so that
            contributions are in units of `<w, residual stream>` there too.

    Positive contributions move the destination along `w`.

    Raises:
        InputError: no float tensor of these shapes, or zeros alone.
    """
    if not isinstance(w, Tensor) or w.ndim not in (1, 2) or not w.is_floating_point() or w.is_meta:
        raise InputError(
            f"direction needs a float tensor [d_model] or [pos, d_model], got "
            f"{f'{w.dtype} {list(w.shape)} on {w.device}' if isinstance(w, Tensor) else type(w).__name__}."
        )
    if not bool((w != 0).any()):
        raise InputError(f"direction is all zeros {list(w.shape)}: nothing moves along it. Check how w was computed.")
    return Direction(w.detach().reshape(-1, w.shape[-1]))


@dataclass(frozen=True, eq=False)
class _Along(Scalar):
    weights: Float[Tensor, "pos group dim"]

    def __call__(
        self, displacement: Float[Tensor, "item group dim"], dst: Int[Tensor, "item"]
    ) -> Float[Tensor, "item group"]:
        return (self.weights[dst] * displacement).sum(-1)

    def gradient(
        self, displacement: Float[Tensor, "group item node dim"], dst: Int[Tensor, "#group item"]
    ) -> Float[Tensor, "group item node dim"]:
        group = torch.arange(len(displacement), device=dst.device)[:, None]
        return self.weights[dst, group][:, :, None].expand_as(displacement)

    def size(self, vector: Float[Tensor, "item group dim"], dst: Int[Tensor, "item"]) -> Float[Tensor, "item group"]:
        return length(vector) * length(self.weights[dst])
