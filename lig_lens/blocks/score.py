"""What attention makes of q.k: scores, the pattern, and what is added."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ScoreBias:
    """What is added to the scores: 0 and -inf for masks, distances for ALiBi. One for all heads, or one each.

    Attributes:
        known: positions of the prompt that it was read on.
        window: of a plain mask, how many sources the last position sees, 0 where all see all; None of other biases.
        table: of other biases, what was read; of fewer positions the bias is its corner.
    """

    known: int
    window: int | None
    table: Float[Tensor, "#head dst src"] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, table: Float[Tensor, "#head dst src"]) -> "ScoreBias":
        """What a table of biases is; plain masks are kept without it."""
        n_pos, first = table.shape[-1], table[0]
        window = 0 if not bool(first.any()) else int((first[-1] == 0).sum())
        plain = len(table) == 1 and n_pos > 1 and torch.equal(first, _mask(n_pos, window, n_pos, first))
        return cls(n_pos, window) if plain else cls(n_pos, None, table)

    def at(self, n_pos: int, like: Tensor) -> Float[Tensor, "#head dst src"] | None:
        """The bias for `n_pos` positions, in the dtype of `like`, or None where it is not known."""
        if self.window is not None:
            return _mask(n_pos, self.window, self.known, like)[None]
        return None if self.table is None or n_pos > self.known else self.table[:, :n_pos, :n_pos]


def _mask(n_pos: int, window: int, known: int, like: Tensor) -> Float[Tensor, "dst src"]:
    """A causal mask of a width; a window as long as what is `known` may be longer, and 0 is no mask."""
    mask = torch.zeros(n_pos, n_pos, dtype=like.dtype, device=like.device)
    if window == 0:
        return mask
    place = torch.arange(n_pos, device=like.device)
    back = place[:, None] - place
    hidden = (back < 0) if window == known else (back < 0) | (back >= window)
    return mask.masked_fill(hidden, -torch.inf)


@dataclass(frozen=True)
class Score:
    """From products of queries and keys to the pattern: `softmax(cap(scale q.k) + bias)`, with a sink.

    Attributes:
        scale: of products.
        cap: c of `c tanh(x / c)`, which keeps scores between -c and c before the bias is added; None for none.
        sink: score of each head that no source has, but which takes part in the softmax; None for none.
        weight: what turned queries are multiplied with, where a norm with weights comes after rotary; None for none.
    """

    scale: float
    cap: float | None = None
    sink: Float[Tensor, "head"] | None = field(default=None, repr=False)
    weight: Float[Tensor, "head 1 d_head"] | None = field(default=None, repr=False)

    def capped(self, products: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Scaled products as they enter the softmax, but for the bias."""
        return products if self.cap is None else self.cap * torch.tanh(products / self.cap)

    def steepness(self, capped: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"] | None:
        """How fast `capped` follows the products, given what it is; None for just as fast."""
        return None if self.cap is None else 1 - (capped / self.cap).square()

    def softmax(self, scores: Float[Tensor, "head *batch src"]) -> Float[Tensor, "head *batch src"]:
        """The pattern. What the sink takes is missing from its rows."""
        if self.sink is None:
            return scores.softmax(-1)
        sink = self.sink.reshape(-1, *[1] * (scores.ndim - 1))
        lost = torch.sigmoid(torch.logsumexp(scores, -1, keepdim=True) - sink)
        return scores.softmax(-1) * lost
