"""DecompX (Modarressi et al., ACL 2023, "Explaining Transformers Decisions by Propagating Token Decomposition").

Every vector of the model is held as a sum of parts, one for each position that it came from, and parts go on block by
block up to the logits of the head:

- attention: `x_{i<-k} -> sum_j p_ij x_{j<-k} W_V W_O + x_{i<-k}`, the pattern being what it is;
- norms: the mean of each part is taken off, and what divides is that of the whole;
- feed-forward layers, pooler: the slope of the activation is f(x) / x of the whole;
- biases: `absdot` shares each among the parts by the absolute value of its dot product with them, those of attention
  behind the skip connection, as the released code does by default; `apart` shares none.

With biases apart all this is linear, so that a position's score is its vector times what one backward pass brings, with
pattern, divisors and slopes held: that is how it is computed, and then there is `token` at every boundary, with what
it adds up to, as in `attn_lrp`. Shared biases need the parts themselves: as many runs of the model as there are
positions, in one batch; their scores add up to the number itself.

Sign and unit are the logit's. A model whose feed-forward layers multiply activations (gates: Llama, Gemma) is refused,
as the paper knows no such product; encoders and decoders without gates, of any order of norms, are served. Where more
than attention's output joins the skip connection (GPT-NeoX), attention's biases are shared among the parts of its
output. The released code lets the value bias of the first block go where attention takes it from; here it is shared
like all others.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from lig_lens.relevance.decomposition import decompose
from lig_lens.relevance.explained import Explained
from lig_lens.relevance.method import Advance, Answer, Method
from lig_lens.relevance.propagated import propagate
from lig_lens.relevance.propagation import Propagation


@dataclass(frozen=True)
class DecompX(Method):
    """DecompX; see the module. With `biases="apart"` edges of attention are the relevance of messages.

    Attributes:
        biases: `absdot` or `apart`.
    """

    name = "decompx"
    CHOICES: ClassVar = {"biases": ("absdot", "apart")}

    biases: str = "absdot"

    def explain(self, what: Explained, advance: Advance) -> Answer:
        """See the base class."""
        if self.biases == "apart":
            found = propagate(what, Propagation(self.name, hold_softmax=True, refuse_products=True))
            return Answer(attention=found.edges, **found.answer())
        scores, value = decompose(what, self.name)
        total = torch.tensor([value])
        gap = (scores.sum().cpu() - total).abs() / total.abs().clamp(min=torch.finfo(torch.float32).tiny)
        return Answer(
            scores=scores,
            boundaries=(what.layers[0],),
            token=scores[None],
            total=total,
            gap=gap,
            converged=gap <= what.budget.tol,
        )
