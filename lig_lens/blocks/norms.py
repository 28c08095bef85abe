"""Norms between the linear maps that make queries, keys and values, and what attention makes of those."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.call import BlockCall
from lig_lens.blocks.divisor import Divisor, Tokens, sigma
from lig_lens.blocks.reading import Heads, SeenAttention

AnyHeads = TypeVar("AnyHeads", bound=Heads)
# Root mean square of vectors that shows what a norm adds to the mean square.
_SMALL = 1e-4
# How many vectors are normed to see a norm's weights.
_VECTORS = 64


class Norms(ABC):
    """What is normed there, by what, and what is added afterwards.

    Attributes:
        weight: what queries are multiplied with after rotary, where norms with weights come after it.
        shown: whether hooks show what they do.
    """

    weight: Float[Tensor, "head 1 d_head"] | None
    shown: bool

    @property
    @abstractmethod
    def depth(self) -> int:
        """How many of them queries, keys or values pass one after the other."""

    @property
    @abstractmethod
    def biases(self) -> tuple[Tensor, Tensor, Tensor]:
        """b_q, b_k and b_v behind all norms."""

    @property
    @abstractmethod
    def before(self) -> tuple[Tensor, ...]:
        """What the linear maps add to `Heads.all` before these norms."""

    @abstractmethod
    def normed(self, heads: AnyHeads) -> AnyHeads:
        """With queries, keys and values as they leave the norms, rotary to come."""

    @abstractmethod
    def tokens(self, heads: Heads, plain: Divisor) -> Tokens:
        """What is homogeneous in the residual, with what divides it.

        Args:
            heads: what the linear maps make of the residual, before the block's norm divides.
            plain: what that divides by.
        """


def many_vectors(
    x: Float[Tensor, "pos d_model"], norm: str, eps: float, own: SeenAttention
) -> Float[Tensor, "run pos d_model"]:
    """Vectors that show what norms inside attention do: of a prompt's size at random, and at last some near 0."""
    # A prompt of one token would show no more than one of each weight.
    runs = -(-_VECTORS // len(x))
    noise = torch.randn(runs, *x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    return torch.cat([noise * x.square().mean().sqrt(), near_zero(x, norm, eps, own)[None]])


def near_zero(
    x: Float[Tensor, "pos d_model"], norm: str, eps: float, own: SeenAttention
) -> Float[Tensor, "pos d_model"]:
    """A prompt's residual vectors made so small that what is normed shows what a norm adds to its mean square."""
    # How long it is before anything divides, on average at each position.
    squares = torch.stack([one.square().mean((0, -1)) for one in own.latents or (own.q, own.k)])
    size = (squares.mean(0).sqrt()[:, None] * sigma(norm, eps, x)).clamp(min=1e-12)
    return _SMALL / size * (1.0 if norm == "none" else eps**0.5) * x


def read_at(call: BlockCall, resid: Float[Tensor, "run pos d_model"], paths: Sequence[str]) -> dict[str, Tensor]:
    """What those of a block's hooks that it has show in runs of its attention."""
    read: dict[str, Tensor] = {}

    def note(path: str, value: Tensor) -> None:
        read.setdefault(path, value.detach().clone())

    wanted = [path for path in paths if path in call.modules]
    call.read(resid, {path: functools.partial(note, path) for path in wanted}, stop_at="attn")
    return read
