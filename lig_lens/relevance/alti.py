"""ALTI (Ferrando et al., EMNLP 2022, "Measuring the Mixing of Contextual Information in the Transformer").

Attention with the skip connection and, behind it, the norm is a sum of vectors, one for each source:

    y_j = sum_i T_j(x_i) + bias,       T_j(x_i) = L(sum_h p_ji v_i W_O + [i = j] x_i),

L being the norm with what it divides by held. A source contributes as much as it brings the sum of vectors nearer to y,
and columns are brought to a sum of 1:

    c_ji = max(0, ||y_j||_1 - ||y_j - T_j(x_i)||_1),       C = C_1 C_2 ... C_L  (as [src, dst]),

read out where the output looks behind the last block. It knows neither the class nor a sign: scores are at least 0 and
add up to 1. The feed-forward layers are left out.

The paper has norms after the sum (`post_ln`: BERT). Where they come before (`pre_ln`: GPT-2, Llama, ViT) its released
code takes y before the next norm, with no L: y = resid_mid; values are made of what the first norm gives. That is taken
here. Values have their bias; the output bias b_O and the norm's belong to y alone. Layouts in which attention's output
does not simply join the skip connection are refused.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lig_lens.blocks.values import Values
from lig_lens.errors import InputError
from lig_lens.models.running import prepared
from lig_lens.relevance.explained import Explained
from lig_lens.relevance.follow import follow
from lig_lens.relevance.method import Advance, Answer, Method
from lig_lens.relevance.propagation import Propagation


@dataclass(frozen=True)
class Alti(Method):
    """ALTI; see the module. It has no heads of its own: `fused` are the contributions, as they were followed back."""

    name = "alti"

    def explain(self, what: Explained, advance: Advance) -> Answer:
        """See the base class."""
        edges = torch.stack([self._contributions(what, layer) for layer in what.layers])
        fused, rolled = follow(what.readout.to(edges), edges, lambda block: block)
        return Answer(scores=rolled[0], rolled=rolled, fused=fused)

    def _contributions(self, what: Explained, layer: int) -> Float[Tensor, "src dst"]:
        values, messages = what.values[layer], what.messages(layer)
        layout = values.block.boundaries.layout
        if layout not in ("post_ln", "pre_ln"):
            raise InputError(
                f"method={self.name!r} is for blocks in which attention's output is added to the skip connection, with "
                f"norms before attention or after the sum (pre_ln, post_ln): block {layer} is {layout!r}. Take "
                "'attn_lrp' or 'ca_lig'."
            )
        heads, x = values.heads, values.resid_pre
        parts = torch.einsum("hji,ihe,hem->ijm", messages.pattern, messages.values, heads.W_O)
        parts = parts + torch.diag_embed(x.T).permute(1, 2, 0)
        whole = x + heads.attn_out(heads.z, 1.0)
        if layout == "post_ln":
            norm = values.call.modules[_first_norm(values)]
            with prepared(what.down.forward.stack.model, norm):
                whole, parts = through(norm, whole, parts, self.name)
        nearer = (whole.abs().sum(-1) - (whole - parts).abs().sum(-1)).clamp(min=0)
        total = nearer.sum(0)
        return torch.where(total > 0, nearer / total, torch.eye(len(x)).to(nearer))


def _first_norm(values: Values) -> str:
    """Path of the module that norms the sum of attention's output and the skip connection."""
    return values.block.tail_norms[0].rpartition(".")[0]


def through(
    norm: nn.Module, whole: Float[Tensor, "dst d_model"], parts: Float[Tensor, "src dst d_model"], method: str
) -> tuple[Float[Tensor, "dst d_model"], Float[Tensor, "src dst d_model"]]:
    """What a norm makes of vectors, and of parts of them where what it divides by is held."""
    with torch.enable_grad():
        x = whole.detach().expand(parts.shape).contiguous().requires_grad_()
        with Propagation(method, hold_softmax=True).over(norm):
            output = norm(x)
        # The backward pass is linear in what enters it: its derivative is the forward one.
        direction = torch.zeros_like(output, requires_grad=True)
        (back,) = torch.autograd.grad(output, x, direction, create_graph=True)
        (forward,) = torch.autograd.grad(back, direction, parts.to(back))
    return output[0].detach(), forward
