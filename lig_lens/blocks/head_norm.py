"""A norm on queries or keys, between the linear maps that make them and their product."""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.divisor import Biased, Divisor, Part

# How far what it gives may be from what the block shows, relative to the largest value.
ALLOWED = 1e-4
# The same before eps is known.
_ROUGHLY = 1e-2


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm or LayerNorm on queries or keys: of each head by itself, or of all heads as one vector.

    Attributes:
        centred: whether the mean is taken off.
        together: whether it is one norm over all heads.
        eps: what is added to the mean square.
        weight: what it multiplies with. Of a norm that comes after rotary all ones: `Score.weight` has it.
        bias: what it adds.
    """

    centred: bool
    together: bool
    eps: float
    weight: Float[Tensor, "head 1 d_head"] = field(repr=False)
    bias: Float[Tensor, "head 1 d_head"] = field(repr=False)

    @classmethod
    def plain(cls, like: Float[Tensor, "head 1 d_head"], eps: float) -> "HeadNorm":
        """RMSNorm of each head, without weights."""
        return cls(False, False, eps, torch.ones_like(like), torch.zeros_like(like))

    def base(self, vectors: Float[Tensor, "*run head pos d_head"]) -> Float[Tensor, "*run head pos d_head"]:
        """The vectors whose mean square is taken."""
        if not self.centred:
            return vectors
        return vectors - vectors.mean(self._axes, keepdim=True)

    def __call__(self, vectors: Float[Tensor, "*run head pos d_head"]) -> Float[Tensor, "*run head pos d_head"]:
        """What comes out."""
        return self.base(vectors) / self.divides_by(vectors) * self.weight + self.bias

    def divides_by(self, vectors: Float[Tensor, "*run head pos d_head"]) -> Float[Tensor, "*run #head pos 1"]:
        """The root of the mean square and eps."""
        return (self.base(vectors).square().mean(self._axes, keepdim=True) + self.eps).sqrt()

    def parts(
        self, vectors: Float[Tensor, "head pos d_head"], bias: Float[Tensor, "head 1 d_head"], before: Divisor
    ) -> tuple[Part, ...]:
        """What comes out but for this norm's bias.

        Args:
            vectors: what enters, before the block's own norm divides.
            bias: what is added in between.
            before: what the block's own norm divides by.
        """
        of = self.divisor(vectors, before, bias)
        part = Part(self.base(vectors) * self.weight, of)
        if of.biased is None:
            return (part,)
        return part, Part((self.base(bias) * self.weight).expand_as(vectors), of, times=before)

    def divisor(
        self, vectors: Float[Tensor, "head pos d_head"], before: Divisor, bias: Tensor | None = None
    ) -> Divisor:
        """What divides there; arguments as in `parts`."""
        base = self.base(vectors)
        joined = base.transpose(0, 1).flatten(1)[None] if self.together else base
        if bias is None or not bool(bias.any()):
            weights = (1.0, *(self.eps * weight for weight in before.weights))
            return Divisor(weights, (joined, *before.vectors), self.eps * before.floor)
        added = self.base(bias)
        along, square = ((one * added).mean(self._axes, keepdim=True)[..., 0] for one in (base, added))
        return Divisor((1.0,), (joined,), 0.0, Biased(before, 2 * along, square, self.eps))

    @property
    def _axes(self) -> tuple[int, ...]:
        return (-3, -1) if self.together else (-1,)


def fit_head_norm(
    vectors: Float[Tensor, "run head pos d_head"], shown: Float[Tensor, "run head pos d_head"]
) -> HeadNorm | None:
    """The norm that makes `shown` of `vectors`, if it is one. The last run holds vectors near 0, which show eps."""
    large, there = vectors[:-1], shown[:-1]
    ones = torch.ones_like(vectors[0, :, :1])
    for centred in (False, True):
        for together in (False, True):
            plain = HeadNorm(centred, together, 1e-6, ones, torch.zeros_like(ones))
            weight, bias = _line(plain(large), there)
            found = HeadNorm(centred, together, 1e-6, weight, bias if centred else torch.zeros_like(bias))
            if not _gives(found, large, there, _ROUGHLY):
                continue
            eps = _eps(found, vectors[-1], shown[-1])
            weight, bias = _line(replace(plain, eps=eps)(large), there)
            found = HeadNorm(centred, together, eps, weight, bias if centred else torch.zeros_like(bias))
            if _gives(found, vectors, shown, ALLOWED):
                return found
    return None


def _line(x: Float[Tensor, "run head pos d_head"], y: Float[Tensor, "run head pos d_head"]) -> tuple[Tensor, Tensor]:
    """Least squares of `y = weight x + bias`, for every dimension of every head."""
    mean_x, mean_y = x.mean((0, 2), keepdim=True), y.mean((0, 2), keepdim=True)
    spread = (x - mean_x).square().sum((0, 2)).clamp(min=1e-30)
    weight = ((x - mean_x) * (y - mean_y)).sum((0, 2)) / spread
    bias = mean_y[0, :, 0] - weight * mean_x[0, :, 0]
    return weight[:, None], bias[:, None]


def _gives(norm: HeadNorm, vectors: Tensor, shown: Tensor, allowed: float) -> bool:
    by_run = (norm(vectors) - shown).abs().amax((-3, -2, -1)) / shown.abs().amax((-3, -2, -1)).clamp(min=1e-30)
    return float(by_run.max()) <= allowed


def _eps(norm: HeadNorm, small: Float[Tensor, "head pos d_head"], shown: Float[Tensor, "head pos d_head"]) -> float:
    """What is added to the mean square, from vectors that are small enough to show it."""
    base = norm.base(small).double()
    square = base.square().mean(norm._axes, keepdim=True)
    x, y = base * norm.weight, shown.double() - norm.bias
    # y = x / sqrt(square + eps), for each vector
    ratio = (x * y).sum(norm._axes, keepdim=True) / y.square().sum(norm._axes, keepdim=True).clamp(min=1e-300)
    eps = float((ratio.square() - square).median().clamp(min=0.0))
    digits = float(f"{eps:.0e}")
    return digits if abs(digits - eps) <= 0.02 * eps else eps  # written with one digit in practice
