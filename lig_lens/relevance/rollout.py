"""Attention rollout (Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3).

With `A_l` the mean over heads of block l's attention, the skip connection counts as much as attention does (eq. 1):

    M_l = 0.5 A_l + 0.5 I,       rollout = M_1 M_2 ... M_L  (with A_l as [src, dst]),

read out where the output looks behind the last block: at [CLS], at the last token, or, with lengths of gradients as
weights, at all positions. Of the class it knows no more than that. Scores are at least 0 and, where rows of attention
do, add up to 1.
"""

from dataclasses import dataclass

from lig_lens.relevance.explained import Explained
from lig_lens.relevance.follow import identity, read_back
from lig_lens.relevance.method import Advance, Answer, Method


@dataclass(frozen=True)
class Rollout(Method):
    """Attention rollout; see the module. Edges of attention are the patterns."""

    name = "rollout"

    def explain(self, what: Explained, advance: Advance) -> Answer:
        """See the base class."""
        return read_back(what.readout, what.patterns, identity)
