"""AttnLRP (Achtibat et al., ICML 2024, "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers").

Relevance goes back from the class's logit by one rule for each kind of function, and all rules together are gradient
times input of a model in which some parts are held (`propagation.py`):

- linear maps: the epsilon rule (eq. 8) with an epsilon of 0; biases keep their part;
- softmax: its Taylor expansion (proposition 3.1), `R_x = x (R_s - s sum R_s)`, which is its gradient; what the
  expansion's constant stands for is kept. `softmax="held"` hands all on to the values instead: CP-LRP (Ali et al.
  2022), which the paper compares with. Its authors' package lxt holds gates as well then; here they share;
- products of two activations, softmax times values, queries times keys, gate times up: half to each (eq. 7,
  propositions 3.2 and 3.3);
- functions of single numbers: all to the input (eq. 9);
- norms: all to the input, what divides being held (proposition 3.4).

Sign and unit are the logit's: positive raises it. Relevance of the vectors at a boundary adds up to the logit less what
biases keep behind it: `total`, and `gap` is how far it is from that, which is rounding where each function's rule is
right. Scores are those at the first boundary: where vectors enter the first block, position embeddings in them.

The paper's rule for linear maps of vision transformers is gamma, not epsilon; it is not served.
"""

from dataclasses import dataclass
from typing import ClassVar

from lig_lens.relevance.explained import Explained
from lig_lens.relevance.method import Advance, Answer, Method
from lig_lens.relevance.propagated import propagate
from lig_lens.relevance.propagation import Propagation


@dataclass(frozen=True)
class AttnLrp(Method):
    """AttnLRP; see the module. Edges of attention are the relevance of messages `p_ji v_i`.

    Attributes:
        softmax: `taylor`, or `held`, which takes attention's patterns as they are.
    """

    name = "attn_lrp"
    CHOICES: ClassVar = {"softmax": ("taylor", "held")}

    softmax: str = "taylor"

    def explain(self, what: Explained, advance: Advance) -> Answer:
        """See the base class."""
        found = propagate(what, Propagation(self.name, hold_softmax=self.softmax == "held"))
        return Answer(attention=found.edges, **found.answer())
