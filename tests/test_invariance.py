"""How the work is cut, and what else is asked for, changes nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import KINDS, fresh_bridge, tiny_bridge

import lig_lens

NAMES = ("attn", "mlp", "skip", "bias", "block")
IDS = [5, 12, 30, 7, 22, 39]


def attend(kind: str, ids: object = IDS, **options: object) -> lig_lens.Flow:
    defaults = {"attn_baseline": "itb", "mlp_baseline": "zero", "block_baseline": "zero", "progress": False}
    return lig_lens.attribute(tiny_bridge(kind), ids, **(defaults | options))


def assert_same(one: lig_lens.Flow, other: lig_lens.Flow) -> None:
    for name in NAMES:
        a, b = getattr(one, name), getattr(other, name)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-7)


@settings(max_examples=5)
@given(st.sampled_from(KINDS), st.integers(6, 400))
def test_any_batch_size(kind: str, max_batch_tokens: int) -> None:
    options = {"layers": 1, "destinations": [0, 4]}
    assert_same(attend(kind, max_batch_tokens=max_batch_tokens, **options), attend(kind, **options))


@pytest.mark.parametrize("tail", ["zero", "att_itb_a0"])
@pytest.mark.parametrize("kind", KINDS)
def test_subset_of_layers_and_destinations(kind: str, tail: str) -> None:
    whole = attend(kind, mlp_baseline=tail)
    part = attend(kind, mlp_baseline=tail, layers=-1, destinations=[4, 1, -1])
    assert part.layers == (1,) and part.destinations == (4, 1, 5)
    for name in NAMES:
        b = getattr(whole, name)[1:, ..., [4, 1, 5]]
        torch.testing.assert_close(getattr(part, name), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-7)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_several_prompts_equal_their_single_runs(kind: str) -> None:
    prompts = [[5, 12, 30], [7, 22, 39, 8, 9], "w3 w14 w9"]
    flows = attend(kind, prompts)
    assert len(flows) == 3
    for flow, prompt in zip(flows, prompts, strict=True):
        single = attend(kind, prompt)
        assert flow.tokens == single.tokens
        assert_same(flow, single)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_padding_is_dropped(kind: str) -> None:
    plain = attend(kind, IDS)
    padded = torch.tensor([0, 0, *IDS, 0])  # [PAD] is 0
    mask = (padded != 0).long()
    for flow in (attend(kind, padded), attend(kind, padded[None], attention_mask=mask)):
        assert flow.tokens == plain.tokens
        assert_same(flow, plain)


def test_padding_agrees_with_a_masked_batch() -> None:
    # What the model itself does with a right-padded batch: the kept positions must not notice.
    model = tiny_bridge("bert")
    padded = torch.tensor([[*IDS, 0, 0]])
    mask = (padded != 0).long()
    _, masked = model.run_with_cache(padded, attention_mask=mask)
    _, alone = model.run_with_cache(torch.tensor([IDS]))
    name = "blocks.1.hook_out"
    torch.testing.assert_close(masked[name][:, : len(IDS)], alone[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_any_gradient_mode(mode: type) -> None:
    with mode():
        inside = attend("llama", torch.tensor(IDS))
    assert_same(inside, attend("llama"))


def test_models_cast_after_loading() -> None:
    reference = attend("llama")
    for dtype, near in ((torch.float64, 1e-3), (torch.bfloat16, 0.08)):
        flow = lig_lens.attribute(
            fresh_bridge("llama").to(dtype),
            IDS,
            mlp_baseline="zero",
            attn_baseline="itb",
            block_baseline="zero",
            progress=False,
        )
        assert (flow.attn - reference.attn).abs().max() <= near * reference.attn.abs().max()
        assert flow.settings["model"]["dtype"] == str(dtype).removeprefix("torch.")
    hooked = fresh_bridge("gpt2").double()
    flow = lig_lens.attribute(hooked, IDS, progress=False)
    torch.testing.assert_close(flow.attn, attend("gpt2").attn, rtol=1e-3, atol=1e-4)


def test_ids_and_selections_from_numpy() -> None:
    flow = attend("gpt2", np.array(IDS), layers=np.int64(1), destinations=np.array([2, -1]))
    assert (flow.layers, flow.destinations) == ((1,), (2, 5))
    assert_same(flow, attend("gpt2", layers=1, destinations=[2, 5]))
    assert attend("gpt2", list(np.array(IDS)), layers=1, maps="mlp").tokens == flow.tokens


def test_text_and_its_ids_agree() -> None:
    model = tiny_bridge("bert")
    text = attend("bert", "w3 w14 w9")
    assert list(text.tokens) == model.to_str_tokens("w3 w14 w9")
    assert_same(text, attend("bert", model.to_tokens("w3 w14 w9")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, near", [(torch.float16, 0.01), (torch.bfloat16, 0.08)])
def test_half_precision_models_give_float32_results_near_the_float32_ones(
    kind: str, dtype: torch.dtype, near: float
) -> None:
    half = lig_lens.attribute(tiny_bridge(kind, dtype), IDS, progress=False)
    full = lig_lens.attribute(tiny_bridge(kind), IDS, progress=False)
    for name in ("attn", "mlp", "block"):
        a, b = getattr(half, name), getattr(full, name)
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= near * b.abs().max(), name
        assert bool(half.converged[name].all())
