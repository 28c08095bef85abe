"""The closed-form engine gives what automatic differentiation gives, wherever it says it can.

Most of it on one generation of TransformerLens: `test_oracle.py` holds the numbers themselves on both.
"""

import pytest
import torch
import transformers
from at_blocks import values_at
from engine_pairs import both, difference
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_hooked import HOOKED_KINDS, has_hooked_transformer, tiny_hooked
from tiny_models import KINDS, VOCAB, config_bridge, fresh_bridge, tiny_bridge

import lig_lens
from lig_lens.errors import InputError
from lig_lens.integrate import closed_form
from lig_lens.integrate.integrand import Budget, integrate_resid
from lig_lens.models.running import prepared
from lig_lens.paths.path import ResidPath
from lig_lens.targets.l2 import L2

# What the formula does not cover: its queries, keys and values are cut off.
CLIPPED = transformers.OlmoConfig(
    vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4, clip_qkv=0.1
)
# Rounding may decide whether a panel is halved, and the engines then differ by what `tol` allows: below their bounds.
TOL = 1e-5
BASELINES = ("zero", "itb", "itb_zero_ratio", "itb_map_ratio", "corrupted", "tensor")


@pytest.mark.once
@pytest.mark.parametrize("target", ["l2", "direction"])
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("name", ["attn", "block"])
@pytest.mark.parametrize("kind", KINDS)
def test_engines_agree(kind: str, name: str, baseline: str, target: str) -> None:
    if name == "block" and baseline == "itb_map_ratio":
        pytest.skip("not a baseline of the block map")
    model = tiny_bridge(kind)
    w = lig_lens.direction(torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(1)))
    flows = both(model, [5, 12, 30, 7, 22], name, baseline, w if target == "direction" else target, tol=TOL)
    # A zero ratio divides by totals that may cancel, which enlarges rounding; the Flow then marks the column.
    assert difference(flows, name) <= (2e-3 if baseline == "itb_zero_ratio" else 2e-5)
    torch.testing.assert_close(flows[0].total[name], flows[1].total[name], rtol=1e-4, atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("baseline", ["zero", "itb", "corrupted", "tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_engines_agree_at_the_default_tolerance(kind: str, baseline: str) -> None:
    flows = both(tiny_bridge(kind), [5, 12, 30, 7, 22], ("attn", "block"), baseline, "l2")
    assert max(difference(flows, name) for name in ("attn", "block")) <= 2e-3


@pytest.mark.once
@pytest.mark.parametrize("baseline", ["zero", "itb"])
@pytest.mark.parametrize("name", ["attn", "block"])
@pytest.mark.parametrize("kind", KINDS)
def test_engines_agree_in_float64(kind: str, name: str, baseline: str) -> None:
    flows = both(tiny_bridge(kind, torch.float64), [5, 12, 30, 7], name, baseline, "l2", layers=1, tol=1e-6)
    assert difference(flows, name) <= 1e-5


@pytest.mark.skipif(not has_hooked_transformer(), reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("name", ["attn", "block"])
@pytest.mark.parametrize("kind", HOOKED_KINDS)
def test_engines_agree_on_hooked_transformers(kind: str, name: str) -> None:
    for baseline in ("zero", "itb"):
        assert difference(both(tiny_hooked(kind), [5, 12, 30, 7], name, baseline, "l2", tol=TOL), name) <= 2e-5


@pytest.mark.once
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4, deadline=None)
@given(
    st.lists(st.integers(5, 39), min_size=1, max_size=8),
    st.sampled_from(["attn", "block"]),
    st.sampled_from(["zero", "itb"]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_engines_agree_on_any_prompt(kind: str, ids: list[int], name: str, baseline: str, dtype: torch.dtype) -> None:
    flows = both(tiny_bridge(kind, dtype), ids, name, baseline, "l2", layers=1, tol=TOL)
    fast, slow = (getattr(flow, name) for flow in flows)
    assert (fast - slow).abs().max() <= 2e-5 * slow.abs().max() + 1e-6


@pytest.mark.once
@pytest.mark.parametrize("baseline", ["zero", "itb"])
@pytest.mark.parametrize("name", ["attn", "block"])
@pytest.mark.parametrize("model_name", ["minilm", "smollm2"])
def test_engines_agree_on_real_models(model_name: str, name: str, baseline: str) -> None:
    model = lig_lens.load_model(model_name)
    ids = model.to_tokens("The cat sat on the mat.")[0].tolist()
    # SmolLM2's layer 14 has a first token of norm 200 times the others'.
    layer = 3 if model_name == "minilm" else 14
    assert difference(both(model, ids, name, baseline, "l2", layers=layer), name) <= 2e-4


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("baseline", ["zero", "itb"])
def test_portions_change_nothing(kind: str, baseline: str) -> None:
    options = {"maps": ("attn", "block"), "attn_baseline": baseline, "block_baseline": baseline, "progress": False}
    small, large = (
        lig_lens.attribute(tiny_bridge(kind), [5, 12, 30, 7, 22], max_batch_tokens=n, **options) for n in (1, 4096)
    )
    for name in ("attn", "block"):
        torch.testing.assert_close(getattr(small, name), getattr(large, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to_heads", [True, False])
def test_attention_needs_no_gradient(to_heads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bridge("llama")
    values = values_at(model, [5, 12, 30, 7], [1])[1]
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (calls.append(1), grad(*a, **k))[1])
    with prepared(model, model.blocks[1]):
        budget = Budget(1e-2, 64, 4096)
        path, dst = ResidPath(values.resid_pre, None), torch.arange(4)
        integrand = closed_form.resid_integrand(values, path, L2(), dst, to_heads, budget)
        result = integrate_resid(integrand, path, dst, budget)
    assert not result.parts.requires_grad
    # The tail's backward serves all destinations at once: one call per portion, not one per destination and node.
    assert len(calls) == 0 if to_heads else 0 < len(calls) <= int(result.nodes.max())


def test_what_the_formula_does_not_cover_goes_through_hooks() -> None:
    model, ids = config_bridge(CLIPPED), [5, 12, 30, 7]
    flow = lig_lens.attribute(model, ids, maps="attn", progress=False)
    assert set(flow.engines["attn"]) == {"hooks"}
    with pytest.raises(InputError, match=r"cannot work on block 0: .*not (affine|a softmax).*engine='auto'"):
        lig_lens.attribute(model, ids, maps="attn", engine="closed_form", progress=False)
    assert all(b.engine == "hooks" and b.why_hooks for b in lig_lens.describe_boundaries(model))


@pytest.mark.parametrize("ids", [[8, 31], [5, 12], [8, 31, 12], [30, 7, 22]])
@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_a_short_prompt_does_not_hide_what_the_formula_does_not_cover(kind: str, ids: list[int]) -> None:
    # A bias for each pair of two tokens can make up for capped scores on one prompt, and no gap would show it.
    auto, hooks = (
        lig_lens.attribute(
            fresh_bridge(kind), ids, maps="attn", attn_baseline="zero", engine=engine, tol=1e-4, progress=False
        )
        for engine in ("auto", "hooks")
    )
    assert (auto.attn - hooks.attn).abs().max() <= 2e-4 * hooks.attn.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_boundaries_name_the_engine(kind: str) -> None:
    assert {b.engine for b in lig_lens.describe_boundaries(tiny_bridge(kind))} == {"closed_form"}


def test_patterns_that_underflow_are_not_taken_for_masked() -> None:
    model, ids = fresh_bridge("llama"), [5, 12, 30, 7, 22, 9, 17, 33]
    for block in model.blocks:
        block.attn.q.original_component.weight.data *= 20
    options = {"maps": "attn", "layers": 1, "attn_baseline": "corrupted", "corrupted": ids[::-1], "progress": False}
    fast, slow = (lig_lens.attribute(model, ids, engine=engine, tol=1e-4, **options) for engine in ("auto", "hooks"))
    assert (fast.attn - slow.attn).abs().max() <= 1e-3 * slow.attn.abs().max()


@pytest.mark.parametrize("name", ["block", "mlp"])
def test_attention_does_not_run_with_the_rest_of_the_block(name: str) -> None:
    model, ids = tiny_bridge("llama"), [5, 12, 30, 7, 22]
    runs = []
    handle = model.blocks[1].attn.o.register_forward_hook(lambda *_: runs.append(1))
    try:
        flow = lig_lens.attribute(model, ids, maps=name, layers=1, tol=1e-4, max_batch_tokens=5, progress=False)
    finally:
        handle.remove()
    # Recording, the layout with the probe, and the start of the tail; then never again.
    assert len(runs) == 3 and flow.converged[name].all()


@pytest.mark.parametrize("destinations", [None, [2], range(1, 5)])
def test_a_tail_that_needs_the_length_of_the_prompt_runs_whole(destinations: object) -> None:
    model, ids = fresh_bridge("llama"), [5, 12, 30, 7, 22]
    options = {"maps": ("block", "mlp"), "layers": 1, "destinations": destinations, "progress": False}
    nothing = torch.zeros(1, len(ids), model.cfg.d_model)
    expected = lig_lens.attribute(model, ids, **options)
    handle = model.blocks[1].ln2.register_forward_hook(lambda _module, _inputs, output: output + nothing)
    try:
        flow = lig_lens.attribute(model, ids, **options)
    finally:
        handle.remove()
    for part in ("block", "mlp", "skip"):
        torch.testing.assert_close(getattr(flow, part), getattr(expected, part), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ids", [[5, 5, 5, 5, 5], [7, 12, 7, 12, 7], [9]])
@pytest.mark.parametrize("kind", ["neox", "gpt2", "gemma3"])
def test_prompts_of_tokens_alike_do_not_hide_what_norms_do(kind: str, ids: list[int]) -> None:
    """Met first by a fresh model; mixtures of a token with itself would tell no norm from another."""
    model = tiny_bridge.__wrapped__(kind, torch.float64)
    assert difference(both(model, ids, "attn", "zero", "l2", layers=1, tol=TOL), "attn") <= 2e-5
