"""What norms divide a token's vectors by, and the vectors that they divide."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor


def centred(norm: str, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """The vectors whose mean square the norm takes."""
    return resid - resid.mean(-1, keepdim=True) if norm == "layer" else resid


def sigma(norm: str, eps: float, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
    """What the norm divides by."""
    if norm == "none":
        return torch.ones_like(resid[..., :1])
    return (centred(norm, resid).square().mean(-1, keepdim=True) + eps).sqrt()


@dataclass(frozen=True)
class Divisor:
    """A root of mean squares: `sigma_i^2 = floor + sum_t weight_t mean(vectors_ti^2)`, and more behind a bias.

    All of the vectors are linear in the residual, so along a straight path sigma^2 is a parabola. A norm on heads that
    follows the block's own gives such a root too: with a key K / sigma, it divides K by the root of
    `mean(K^2) + eps sigma^2`.

    Attributes:
        weights: of the terms; none where no norm divides, and then the floor is 1.
        vectors: of the terms, one set for all heads or one each.
        floor: what is added, eps.
        biased: what is added where a bias comes before the norm.
    """

    weights: Sequence[float]
    vectors: Sequence[Float[Tensor, "#head pos _"]] = field(repr=False)
    floor: float
    biased: "Biased | None" = field(default=None, repr=False)

    @classmethod
    def of_norm(cls, norm: str, eps: float, centred: Float[Tensor, "pos d_model"]) -> "Divisor":
        """What the block's norm divides by; `centred` are the vectors whose mean square it takes."""
        return cls((), (), 1.0) if norm == "none" else cls((1.0,), (centred[None],), eps)

    @property
    def constant(self) -> bool:
        """Whether it is 1, with no norm to divide."""
        return not self.weights

    def value(self, like: Tensor) -> Float[Tensor, "#head pos 1"]:
        """Sigma of every token; `like` gives the dtype and, without a norm, the number of tokens."""
        if self.constant:
            return torch.ones_like(like[..., :1])
        square = self.product(self.vectors, self.vectors) + self.floor
        if self.biased is not None:
            square = self.biased.on(square, self.biased.before.value(like)[..., 0], self.biased.along)
        return square.sqrt()[..., None]

    def product(self, these: Sequence[Tensor], those: Sequence[Tensor]) -> Float[Tensor, "#head pos"]:
        """Mean products of two sets of vectors, token by token, weighed as the squares are."""
        pairs = zip(self.weights, these, those, strict=True)
        return sum((weight * (a * b).mean(-1) for weight, a, b in pairs), torch.zeros(()).to(these[0]))

    def table(self, rows: Tensor) -> Float[Tensor, "#head row pos"]:
        """The same of the tokens `rows` with every token."""
        parts = zip(self.weights, self.vectors, strict=True)
        return sum(
            (weight / x.shape[-1] * (x[:, rows] @ x.mT) for weight, x in parts), torch.zeros(()).to(self.vectors[0])
        )


@dataclass(frozen=True)
class Biased:
    """What a bias b adds to a mean square: with a key `K / sigma + b`, `2 sigma mean(K b) + sigma^2 (mean(b^2) + eps)`.

    Attributes:
        before: sigma, of the block's own norm.
        along: twice the mean of K b, which is linear in the residual.
        square: the mean of b^2.
        eps: see above.
    """

    before: Divisor
    along: Float[Tensor, "#head pos"]
    square: Float[Tensor, "#head 1"]
    eps: float

    def on(self, square: Tensor, sigma: Tensor, along: Tensor, own: Tensor | None = None) -> Tensor:
        """The mean square with that, of the square without; `own` is `square` in another shape."""
        # A vector that its bias cancels has a square of nearly 0, which rounding must not make negative.
        with_bias = square + sigma * (along + sigma * (self.square if own is None else own))
        return with_bias.clamp_(min=0.0).add_(self.eps * sigma * sigma)


@dataclass(frozen=True)
class Part:
    """Vectors that are linear in the residual, or rest, and what divides them; what rests may be multiplied first."""

    vectors: Float[Tensor, "head pos dim"]
    of: Divisor
    times: Divisor | None = None

    @property
    def divided(self) -> Float[Tensor, "head pos dim"]:
        """What they give."""
        made = self.vectors / self.of.value(self.vectors)
        return made if self.times is None else made * self.times.value(self.vectors)


@dataclass(frozen=True)
class Tokens:
    """Residual vectors and what attention's linear maps make of them before norms divide.

    A query is the sum of the parts of `q`, each divided by its own norm, and `b_q`; a key likewise. Without norms of
    queries, keys and latents there is one part of each, and their divisors are one object.
    """

    q: tuple[Part, ...]
    k: tuple[Part, ...]
    v: Part
