"""Chefer, Gur and Wolf, ICCV 2021: "Generic Attention-Model Explainability", for self-attention.

With `A` a block's attention, `dF/dA` the number's gradient there, and `R = I` before the first block (eq. 5 and 6):

    A' = E_h((dF/dA * A)^+),       R <- R + A' R,

and the row of R that the output looks at behind the last block is the answer: [CLS]'s, the last token's, or, with
lengths of gradients as weights, a mean of rows. It knows the class, but what speaks against it is cut off: scores are
at least 0. A position keeps all that it had, so that sums grow with every block.
"""

from dataclasses import dataclass

from lig_lens.relevance.explained import Explained
from lig_lens.relevance.follow import additive, read_back
from lig_lens.relevance.method import Advance, Answer, Method


@dataclass(frozen=True)
class Chefer(Method):
    """Chefer et al. 2021 (ICCV); see the module. Edges of attention are `(p_ji dF/dp_ji)^+`."""

    name = "chefer"

    def explain(self, what: Explained, advance: Advance) -> Answer:
        """See the base class."""
        return read_back(what.readout, (what.patterns * what.pattern_gradients).clamp(min=0), additive)
