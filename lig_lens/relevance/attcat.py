"""AttCAT (Qiang et al., NeurIPS 2022): "Explaining Transformers via Attentive Class Activation Tokens".

Gradient times hidden vector, weighted with the attention that a token gets, and summed over layers:

    CAT_i^l = <h_i^l, dF/dh_i^l>,       scores_i = sum_l E_h(alpha_i^l) CAT_i^l.

The paper's words leave two things open, and the authors' code (github.com/qiangyao1988/AttCAT, `generate_TransCAM`) is
taken as the definition of both. `alpha_i^l` is the mean over heads and over all destinations of the attention of block
l to token i. And h is what enters block l, whose attention weighs it, the embeddings being the first and what leaves
the last block being left out; as 'output of a layer' h would be what leaves block l: `vectors="leaving"`. Signed.
"""

from dataclasses import dataclass
from typing import ClassVar

from lig_lens.relevance.explained import Explained
from lig_lens.relevance.grad_x_input import gradient_times_input
from lig_lens.relevance.method import Advance, Answer, Method


@dataclass(frozen=True)
class AttCat(Method):
    """AttCAT; see the module.

    Its answer's `token` is CAT. Edges of attention are `p_ji CAT_i / n_dst`: over all destinations and layers, and in
    the mean of heads, they add up to the scores. `rolled` is what blocks from each on add to them.

    Attributes:
        vectors: those that are weighted with a block's attention: `entering` the block, or `leaving` it.
    """

    name = "attcat"
    CHOICES: ClassVar = {"vectors": ("entering", "leaving")}

    vectors: str = "entering"

    def explain(self, what: Explained, advance: Advance) -> Answer:
        """See the base class."""
        first, n_layers = int(self.vectors == "leaving"), len(what.layers)
        boundaries = tuple(range(first, first + n_layers))
        token = gradient_times_input(what)[list(boundaries)]
        edges = what.patterns * token.to(what.patterns)[:, None, :, None] / len(what)
        added = edges.sum(-1).mean(1)
        rolled = added.flip(0).cumsum(0).flip(0)
        return Answer(scores=rolled[0], rolled=rolled, token=token, boundaries=boundaries, attention=edges)
