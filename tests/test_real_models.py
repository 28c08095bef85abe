"""Trained models, all packaged: everything converges, and a known head does what it is known for."""

import functools
from typing import Any

import pytest
import torch

import lig_lens

SENTENCE = "The cat sat on the mat because it was tired."
IOI = "When Mary and John went to the store, John gave a drink to"


@functools.cache
def load(name: str) -> Any:
    return lig_lens.load_model(name)


@pytest.mark.parametrize("resid, tail", [("itb", "att_itb_a0"), ("zero", "zero")])
@pytest.mark.parametrize("name, prompt, layers", [("minilm", SENTENCE, None), ("smollm2", IOI, [0, 14, 29])])
def test_every_cell_converges(name: str, prompt: str, layers: list[int] | None, resid: str, tail: str) -> None:
    flow = lig_lens.attribute(
        load(name),
        prompt,
        layers=layers,
        attn_baseline=resid,
        mlp_baseline=tail,
        block_baseline=resid,
        progress=False,
    )
    for map_name in ("attn", "mlp", "block"):
        assert bool(flow.converged[map_name].all()) and float(flow.gap[map_name].max()) <= 1e-3
    sums = {
        "attn": flow.attn.sum(2),
        "mlp": flow.mlp.sum(1) + flow.skip + flow.bias,
        "block": flow.block.sum(1),
    }
    for map_name, total in flow.total.items():
        missing = (sums[map_name] - total).abs()
        # A cell that moves by less than this is held to float32's rounding of the vectors, not to tol.
        rounding = 4e-6 * total.abs().amax((-1,), keepdim=True)
        assert (missing <= torch.maximum(1e-3 * total.abs(), rounding)).all(), map_name


def test_smollm2_answers_mary() -> None:
    model = load("smollm2")
    with torch.no_grad():
        logits = model(model.to_tokens(IOI))
    assert model.to_string(logits[0, -1].argmax()) == " Mary"


def test_minilm_previous_token_head() -> None:
    # Head 2 of the first block attends to the previous token; contributions must say so, off the special tokens.
    flow = lig_lens.attribute(load("minilm"), SENTENCE, maps="attn", layers=0, progress=False)
    head = flow.attn[0, 2]
    strongest = head.argmax(0)[2:-1]
    assert (strongest == torch.arange(1, len(flow.tokens) - 2)).float().mean() >= 0.8
