"""Context-Aware Layer-wise Integrated Gradients (CA-LIG, arXiv 2602.16608).

The paper computes Integrated Gradients of a class in every block, fuses them with class-specific attention gradients,
and follows the signed result through the layers. Its abstract says no more, so what it leaves open is ours, and a
parameter:

- Token relevance `T_l` at each boundary is the exact path integral from the baseline's residual vectors to the
  prompt's, and adds up to F(x) - F(x0) at every one.
- Attention relevance of block l is `p_ji dF/dp_ji`, head by head, with F the number that is explained.
- Relevance starts as `T` behind the last block, r = T_L, and goes back block by block. What stood at a destination j is
  handed to sources i in two ways:

      fused_l[i, j] = (1 - mix) T_l[i] |r_j| / sum_k |r_k|  +  mix M_l[i, j] r_j,       r_i = sum_j fused_l[i, j],

  the one by what tokens contribute there, the other by where attention took it from, M_l being made of 1 on i = j and
  of the attention relevance. Both parts are brought to the same total first.

So mix = 0 is Integrated Gradients at the embeddings. With scale = "none", where the output reads one position, mix = 1
is Chefer et al. 2021 (positive, additive) or attention rollout (Abnar and Zuidema 2020; raw patterns, identity), times
F(x) - F(x0).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.errors import CancellationWarning, InputError, warn_caller
from lig_lens.flow.compose import CANCELS
from lig_lens.relevance.explained import Explained
from lig_lens.relevance.follow import THROUGH, VANISHING, follow
from lig_lens.relevance.method import Advance, Answer, Method
from lig_lens.relevance.path_gradients import path_pattern_gradients
from lig_lens.relevance.tokens import token_relevance

OVER_HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda edges: edges.mean(-3),
    "sum": lambda edges: edges.sum(-3),
    "max": lambda edges: edges.gather(-3, edges.abs().argmax(-3, keepdim=True)).squeeze(-3),
}
KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "signed": lambda edges: edges,
    "positive": lambda edges: edges.clamp(min=0),
}


@dataclass(frozen=True)
class CaLig(Method):
    """CA-LIG; see the module.

    Attributes:
        mix: share of what attention hands on, from 0 (Integrated Gradients alone) to 1 (attention alone).
        attention: `gradient`, attention times the number's gradient at it; `pattern`, attention alone.
        keep: `signed` edges, or `positive` ones, what is negative being 0.
        heads: how the edges of heads become one: `mean`, `sum`, or `max` (the one that is largest in absolute value).
        at: where the gradient is taken: at the prompt, `end`, or averaged along the `path`.
        scale: what of the two parts is made equal before they are mixed: their `sum`, the `max` of a position's
            absolute value, or `none`.
        through: how relevance passes a block: `identity`, `additive` or `conserving`.
    """

    name = "ca_lig"
    needs_start = True
    CHOICES: ClassVar = {
        "attention": ("gradient", "pattern"),
        "keep": tuple(KEPT),
        "heads": tuple(OVER_HEADS),
        "at": ("end", "path"),
        "scale": ("sum", "max", "none"),
        "through": tuple(THROUGH),
    }

    mix: float = 0.5
    attention: str = "gradient"
    keep: str = "signed"
    heads: str = "mean"
    at: str = "end"
    scale: str = "sum"
    through: str = "conserving"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.mix, bool) or not isinstance(self.mix, (int, float)) or not 0 <= self.mix <= 1:
            raise InputError(f"mix={self.mix!r}: give a number from 0 (tokens alone) to 1 (attention alone).")

    def steps(self, n_layers: int) -> int:
        """See the base class."""
        return n_layers + 1

    def explain(self, what: Explained, advance: Advance) -> Answer:
        """See the base class."""
        tokens = token_relevance(what, (*what.layers, len(what.layers)), advance)
        edges = KEPT[self.keep](self._edges(what))
        token = tokens.token.to(edges)

        def mixed(row: int, moved: Tensor, relevance: Tensor) -> Tensor:
            moved = moved * _factor(token[row], moved.sum(-1), self.scale)
            size = relevance.abs().sum()
            spread = relevance.abs() / size if size > 0 else torch.full_like(relevance, 1 / len(relevance))
            return (1 - self.mix) * token[row][:, None] * spread + self.mix * moved

        fused, rolled = follow(token[-1], OVER_HEADS[self.heads](edges), THROUGH[self.through], mixed)
        return Answer(scores=rolled[0], rolled=rolled, attention=edges, fused=fused, **vars(tokens))

    def _edges(self, what: Explained) -> Float[Tensor, "layer head src dst"]:
        if self.attention == "pattern":
            return what.patterns
        gradients = what.pattern_gradients if self.at == "end" else path_pattern_gradients(what)
        return what.patterns * gradients


def _factor(own: Float[Tensor, "pos"], moved: Float[Tensor, "pos"], scale: str) -> Float[Tensor, ""]:
    """What `moved` is multiplied by to be on the scale of `own`; 1 where there is nothing to compare."""
    one = torch.ones_like(own.sum())
    if scale == "sum":
        wanted, there = own.sum(), moved.sum()
        factor = one if there.abs() <= VANISHING * moved.abs().sum() else wanted / there
        if factor.abs() > CANCELS:
            warn_caller(
                f"What attention hands on nearly cancels: scale='sum' multiplies it by {float(factor):.0f}. Use a "
                "baseline that is a prompt with through='conserving', where both sums are the same, or scale='max'.",
                CancellationWarning,
            )
        return factor
    if scale == "max":
        wanted, there = own.abs().max(), moved.abs().max()
        return one if there == 0 else wanted / there
    return one
