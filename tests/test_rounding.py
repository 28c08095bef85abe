"""What a float64 model rounds to inside, and what a warning says of it."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from checkpoints import GPT2, GQA, IDS, OTHER, SMALL, saved
from families import FAMILIES

import lig_lens as ll
from lig_lens.errors import ConvergenceWarning

SINGLE = {"NanoChatForCausalLM": FAMILIES["NanoChatForCausalLM"].config, "LlamaForCausalLM": GQA}
DOUBLE = {"GPT2LMHeadModel": GPT2, "BertForMaskedLM": SMALL}


@pytest.mark.parametrize("kind", [*SINGLE, *DOUBLE])
def test_norms_that_round_to_float32_are_told_from_others(kind: str, tmp_path: Path) -> None:
    """transformers' RMS norms cast to float32 whatever the dtype is, its LayerNorms do not; see findings."""
    saved(kind, tmp_path, **{**SINGLE, **DOUBLE}[kind])
    model = ll.load_model(str(tmp_path), device="cpu", dtype="float64")
    asked: dict[str, Any] = {"target": ll.logit_difference(3, 4), "corrupted": OTHER, "progress": False}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ll.attribute(model, IDS, tol=1e-9, max_nodes=64, **asked)  # which is missed
    (said,) = [str(one.message) for one in caught if one.category is ConvergenceWarning]
    assert ("weights are float64, but some of its steps round to float32" in said) == (kind in SINGLE)
    assert kind not in SINGLE or "or a float64 model" not in said
