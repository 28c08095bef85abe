"""Chefer, Gur and Wolf, CVPR 2021: "Transformer Interpretability Beyond Attention Visualization".

With `dF/dA` the class's gradient at a block's attention and `R_A` the relevance of that attention:

    A' = I + E_h((dF/dA * R_A)^+),       R = A'_1 A'_2 ... A'_L   (with A' as [src, dst]),

and the row that the output looks at behind the last block is the answer. Scores are at least 0.

`R_A` is theirs by Deep Taylor-like rules: relevance of a sum or of a product of two activations is shared by the z+
rule or by size, and brought to the same total. Ours comes from AttnLRP's rules (`attn_lrp`), which have the halves of
products, `R_A = p_ji dF*/dp_ji / 2`, in common with theirs, but no positive parts and no totals that are restored. The
paper's formula is followed where relevance of attention meets gradients; numbers of its own code will differ.
"""

from dataclasses import dataclass

from lig_lens.relevance.explained import Explained
from lig_lens.relevance.follow import additive, read_back
from lig_lens.relevance.method import Advance, Answer, Method
from lig_lens.relevance.propagated import propagate
from lig_lens.relevance.propagation import Propagation


@dataclass(frozen=True)
class CheferCvpr(Method):
    """Chefer et al. 2021 (CVPR); see the module. Edges of attention are `(dF/dp_ji R_ji)^+`."""

    name = "chefer_cvpr"

    def explain(self, what: Explained, advance: Advance) -> Answer:
        """See the base class."""
        relevance = propagate(what, Propagation(self.name, hold_softmax=False)).edges / 2
        return read_back(what.readout, (what.pattern_gradients * relevance).clamp(min=0), additive)
