"""Integrated Gradients (Sundararajan et al. 2017, eq. 1) at the embeddings, the vectors that enter the first block.

    scores_i = <x_i - x0_i, integral over a in [0, 1] of dF/dx_i at x0 + a (x - x0)>.

Signed, and they add up to F(x) - F(x0) ('completeness', proposition 1). The integral is exact to `tol`.
"""

from dataclasses import dataclass

from lig_lens.relevance.explained import Explained
from lig_lens.relevance.method import Advance, Answer, Method
from lig_lens.relevance.tokens import token_relevance


@dataclass(frozen=True)
class Ig(Method):
    """Integrated Gradients at the embeddings; see the module."""

    name = "ig"
    needs_heads = False
    needs_start = True

    def steps(self, n_layers: int) -> int:
        """See the base class."""
        return 1

    def explain(self, what: Explained, advance: Advance) -> Answer:
        """See the base class."""
        tokens = token_relevance(what, (0,), advance)
        return Answer(scores=tokens.token[0], **vars(tokens))
