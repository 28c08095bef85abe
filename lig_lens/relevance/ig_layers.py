"""Integrated Gradients at every boundary, along the straight path of the vectors there: `ig` is its first row.

At boundary l, with x the vectors that enter block l (or leave the last) and x0 those of the baseline's run, it is the
equation of `ig`; adds up to F(x) - F(x0) at each of them. Signed.
"""

from dataclasses import dataclass

from lig_lens.errors import InputError
from lig_lens.relevance.explained import Explained
from lig_lens.relevance.method import Advance, Answer, Method
from lig_lens.relevance.tokens import token_relevance


@dataclass(frozen=True)
class IgLayers(Method):
    """Integrated Gradients at every boundary; see the module.

    Attributes:
        boundary: the one that is the answer, the number of a block whose vectors enter it, or the number of blocks for
            those that leave the last; -1 is that, too. By default the embeddings: deeper vectors belong less and less
            to the token at their position.
    """

    name = "ig_layers"
    needs_heads = False
    needs_start = True

    boundary: int = 0

    def steps(self, n_layers: int) -> int:
        """See the base class."""
        return n_layers + 1

    def explain(self, what: Explained, advance: Advance) -> Answer:
        """See the base class."""
        last = len(what.layers)
        if not -last - 1 <= self.boundary <= last:
            raise InputError(f"boundary={self.boundary}: give one from 0 (the embeddings) to {last} (what leaves).")
        tokens = token_relevance(what, range(last + 1), advance)
        return Answer(scores=tokens.token[self.boundary], **vars(tokens))
