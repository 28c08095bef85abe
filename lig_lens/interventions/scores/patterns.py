"""Scores from attention patterns."""

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.interventions.scores.score import Score, Side


class Attention(Score):
    """`p_ji`; of a head's output at j what j pays to other tokens, `1 - p_jj`."""

    def edges(self, clean: Side, corrupted: Side) -> Float[Tensor, "head src dst"]:
        """See the base class."""
        return clean.messages.pattern.mT

    def heads(self, clean: Side, corrupted: Side) -> Float[Tensor, "head dst"]:
        """See the base class."""
        return 1 - clean.messages.pattern.diagonal(dim1=1, dim2=2)


class AttentionValueNorm(Score):
    """`p_ji` times the length of `v_i W_O` (Kobayashi et al. 2020)."""

    def edges(self, clean: Side, corrupted: Side) -> Float[Tensor, "head src dst"]:
        """See the base class."""
        moved = torch.einsum("ihe,hem->him", clean.messages.values, clean.values.heads.W_O)
        length: Float[Tensor, "head src"] = torch.linalg.vector_norm(moved, dim=-1)
        return clean.messages.pattern.mT * length[..., None]
