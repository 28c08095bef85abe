"""Cohere in TransformerLens 3.9, which rotates other pairs of dimensions than the model does.

The model's module for rotary angles gives each angle twice in a row. The bridge of 3.9 takes the angles of one half of
the dimensions, and rotates neighbours only where it is told to.
"""

from typing import Any

import torch
from torch import Tensor


def cohere_adapter(of_transformer_lens: type) -> type:
    """TransformerLens' adapter of Cohere, rotating the model's pairs; the same where it does so by itself."""

    class CohereAdapter(of_transformer_lens):  # type: ignore[misc]
        def prepare_model(self, hf_model: Any) -> None:
            super().prepare_model(hf_model)
            if not getattr(self.cfg, "rotary_interleaved_cos_sin", False):
                self.cfg.rotary_adjacent_pairs = True
                hf_model.model.rotary_emb.register_forward_hook(_in_halves)

    return CohereAdapter


def _in_halves(_module: Any, _args: Any, angles: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cosines and sines with each angle once in either half of the dimensions."""
    return tuple(torch.cat([one[..., ::2]] * 2, -1) for one in angles)
