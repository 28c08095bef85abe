"""Models of attention and recurrences: contributions to a metric through recurrences, and what is refused at them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import IDS, OTHER, saved
from families import FAMILIES
from family_oracle import apart, metric_by_source

import lig_lens as ll

# Attention first, so that a recurrence runs along with what comes after.
FIRST: dict[str, dict[str, Any]] = {
    "JambaForCausalLM": {"attn_layer_offset": 0},
    "BambaForCausalLM": {"attn_layer_indices": [0]},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["attention", "mamba"]},
    "NemotronHForCausalLM": {"layers_block_type": ["attention", "mamba", "mlp", "moe"]},
    "Lfm2ForCausalLM": {"layer_types": ["full_attention", "conv"]},
    "OlmoHybridForCausalLM": {"layer_types": ["full_attention", "linear_attention"]},
    "Qwen3_5ForCausalLM": {"layer_types": ["full_attention", "linear_attention"]},
    "RecurrentGemmaForCausalLM": {"block_types": ["attention", "recurrent"]},
}


def curved(logits: torch.Tensor) -> torch.Tensor:
    return logits[..., -1, 9] - logits[..., -1, 17] ** 2


@pytest.mark.parametrize("kind", FIRST)
def test_contributions_to_a_metric_pass_through_recurrences(kind: str, tmp_path: Path) -> None:
    """What each source contributes, through heads and past them, is the integrated gradient of the plain model."""
    row = FAMILIES[kind]
    plain = saved(kind, tmp_path, **row.config | FIRST[kind]).double()
    plain.config.use_cache = False
    if hasattr(plain, "set_experts_implementation"):
        plain.set_experts_implementation("eager")
    model = ll.load_model(str(tmp_path), device="cpu", dtype="float64")
    flow = ll.attribute(model, IDS, corrupted=OTHER, target=ll.metric(curved), layers=[0], tol=1e-5, progress=False)
    layer, prompts = plain.get_submodule(row.layers)[0], (torch.tensor([IDS]), torch.tensor([OTHER]))
    expected, change = metric_by_source(plain, layer, curved, *prompts)
    found = (flow.attn.sum((1, 3)) + flow.skip)[0]
    apart(found, expected, 1e-5, "sources")
    assert float(found.sum()) == pytest.approx(change, rel=2e-5)
