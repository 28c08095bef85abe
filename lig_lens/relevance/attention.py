"""Attention of the last block, as a baseline: where the positions that the output looks at look themselves.

`scores_i = sum_j readout_j mean_h p_ji`, of [CLS] or the last token alone for a head that reads one position. At least
0; blind to all blocks but the last, and to all of the class but where the output looks.
"""

from dataclasses import dataclass

from lig_lens.relevance.explained import Explained
from lig_lens.relevance.method import Advance, Answer, Method


@dataclass(frozen=True)
class Attention(Method):
    """Attention of the last block; see the module. Edges of attention are the patterns, of all blocks."""

    name = "attention"

    def explain(self, what: Explained, advance: Advance) -> Answer:
        """See the base class."""
        patterns = what.patterns
        return Answer(scores=patterns[-1].mean(0) @ what.readout.to(patterns), attention=patterns)
