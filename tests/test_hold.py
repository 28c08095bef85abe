"""Contributions to a metric with what bypasses heads held: against the oracle, and against patching."""

import functools
from dataclasses import replace

import metric_oracle
import pytest
import torch
from test_metric import ALL_DIFFERENT, CLEAN, curved
from tiny_hooked import HOOKED_KINDS, has_hooked_transformer, tiny_hooked
from tiny_models import KINDS, N_LAYERS, hf_residuals, tiny_bridge

import lig_lens
from lig_lens.errors import InputError
from lig_lens.interventions.patching import patch
from lig_lens.names import HOLDS, SPLITS


@functools.cache
def run(kind: str, hold: str, noising: bool, engine: str = "auto", **options):
    return lig_lens.attribute(
        tiny_bridge(kind, torch.float64),
        CLEAN,
        corrupted=ALL_DIFFERENT,
        target=lig_lens.metric(curved),
        hold=hold,
        noising=noising,
        engine=engine,
        tol=1e-4,
        progress=False,
        **options,
    )


@pytest.mark.parametrize("noising", [False, True])
@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("kind", KINDS)
def test_oracle(kind: str, hold: str, noising: bool):
    flow = run(kind, hold, noising)
    for layer in range(N_LAYERS):
        x, x0 = (hf_residuals(kind, torch.tensor(ids))[layer] for ids in (CLEAN, ALL_DIFFERENT))
        heads, total = metric_oracle.held_contributions(kind, layer, x, x0, curved, hold == "others", noising)
        assert (flow.attn[layer] - heads).abs().max() <= 1e-4 * heads.abs().max()
        found = flow.total["attn"][layer].reshape(-1).double()
        torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-5 * float(heads.abs().max()))
    assert not flow.skip.any() and flow.converged["attn"].all()


@pytest.mark.parametrize("noising", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_head_adds_up_to_what_patching_it_does(kind: str, noising: bool):
    flow, model = run(kind, "others", noising), tiny_bridge(kind, torch.float64)
    effects = patch(
        model, CLEAN, ALL_DIFFERENT, lig_lens.metric(curved), each_position=False, noising=noising, progress=False
    )
    assert flow.total["attn"].shape == flow.gap["attn"].shape == effects.values.shape
    scale = float(effects.values.abs().max())
    torch.testing.assert_close(flow.attn.sum((2, 3)), effects.values.float(), rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_engines_and_splits_agree(kind: str, hold: str):
    by_source, by_message = (run(kind, hold, False, split=split) for split in SPLITS)
    scale = float(by_source.attn.abs().max())
    for split, flow in zip(SPLITS, (by_source, by_message), strict=True):
        hooks = run(kind, hold, False, "hooks", split=split)
        assert set(hooks.engines["attn"]) == {"hooks"} != set(flow.engines["attn"])
        assert (hooks.attn - flow.attn).abs().max() <= 1e-4 * scale
    assert (by_source.attn - by_message.attn).abs().max() > 0.01 * scale
    torch.testing.assert_close(by_message.attn.sum(2), by_source.attn.sum(2), rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.skipif(not has_hooked_transformer(), reason="TransformerLens has no HookedTransformer")
@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("kind", HOOKED_KINDS)
def test_hooked_transformer(kind: str, hold: str):
    asked = {"corrupted": ALL_DIFFERENT, "target": lig_lens.metric(curved), "hold": hold, "tol": 1e-5}
    flow = lig_lens.attribute(tiny_hooked(kind), CLEAN, progress=False, **asked)
    totals = flow.total["attn"]
    summed = flow.attn.sum((2, 3)) if hold == "others" else flow.attn.sum((1, 2, 3))
    torch.testing.assert_close(summed, totals, rtol=1e-3, atol=1e-4 * float(flow.attn.abs().max()))


def test_compare_finds_patching_again():
    model, pair = lig_lens.load_model("induction"), lig_lens.induction_pairs(1)[0]
    metric = lig_lens.logit_difference(pair.answer, pair.wrong)
    effects = patch(model, pair.clean, pair.corrupted, metric, each_position=False, progress=False)
    asked = {"corrupted": pair.corrupted, "target": metric, "progress": False}
    others, free = (lig_lens.attribute(model, pair.clean, hold=hold, **asked) for hold in ("others", None))
    assert lig_lens.compare(others, effects).pearson > 1 - 1e-6 > lig_lens.compare(free, effects).pearson


def test_positions_are_not_compared_with_what_is_held():
    model, target = tiny_bridge("gpt2", torch.float64), lig_lens.metric(curved)
    effects = patch(model, CLEAN, ALL_DIFFERENT, target, at="resid_pre", progress=False)
    with pytest.raises(InputError, match="hold=None to compare positions"):
        lig_lens.compare(run("gpt2", "skip", False), effects)


@pytest.mark.parametrize("noising", [False, True])
@pytest.mark.parametrize("hold", HOLDS)
def test_paths_from_zeros(hold: str, noising: bool):
    model = tiny_bridge("llama", torch.float64)
    asked = {"attn_baseline": "zero", "target": lig_lens.metric(curved), "hold": hold, "noising": noising, "tol": 1e-4}
    flow = lig_lens.attribute(model, CLEAN, progress=False, **asked)
    summed = flow.attn.sum((2, 3)) if hold == "others" else flow.attn.sum((1, 2, 3))
    torch.testing.assert_close(summed, flow.total["attn"], rtol=1e-3, atol=1e-4 * float(flow.attn.abs().max()))


def test_noising_and_denoising_are_each_others_mirror():
    # From the other prompt's side, what is held as in the clean run is held as in the corrupted one.
    model, target = tiny_bridge("gpt2", torch.float64), lig_lens.metric(curved)
    asked = {"target": target, "hold": "skip", "tol": 1e-5, "progress": False}
    forth = lig_lens.attribute(model, CLEAN, corrupted=ALL_DIFFERENT, noising=True, **asked)
    back = lig_lens.attribute(model, ALL_DIFFERENT, corrupted=CLEAN, **asked)
    torch.testing.assert_close(forth.attn, -back.attn, rtol=1e-3, atol=1e-4 * float(back.attn.abs().max()))


def test_a_file_an_average_a_table_and_figures_know_what_is_held(tmp_path):
    others, skip = run("gpt2", "others", False), run("gpt2", "skip", True)
    for flow in (others, skip):
        again = lig_lens.Flow.load(flow.save(tmp_path / "flow.safetensors"))
        assert again.axes == flow.axes and again.settings["hold"] == flow.settings["hold"]
        assert torch.equal(again.total["attn"], flow.total["attn"])
        assert "held as" in lig_lens.plots.importance(flow).to_json()
        assert len(flow.to_dataframe()) == flow.attn.numel()
        lig_lens.plots.gap_map(flow)
        lig_lens.plots.head_map(flow, layer=0, head=1, share=True)
    with pytest.raises(InputError, match="minus= has hold='skip', not 'others'"):
        lig_lens.plots.head_map(others, layer=1, head=1, minus=skip)
    with pytest.raises(InputError, match="whole of its own"):
        lig_lens.plots.importance(others, share=True)
    shares = others.shares("attn").sum((2, 3))
    torch.testing.assert_close(shares[others.total["attn"] != 0], torch.ones_like(shares[others.total["attn"] != 0]))
    with pytest.raises(InputError, match="one for each layer"):
        others.explore()
    without = lig_lens.attribute(
        tiny_bridge("gpt2", torch.float64),
        CLEAN,
        corrupted=ALL_DIFFERENT,
        target=lig_lens.metric(curved),
        tol=1e-4,
        progress=False,
    )
    old = replace(without, settings={k: v for k, v in without.settings.items() if k not in ("hold", "noising")})
    for pair in ([others, skip], [old, skip], [skip, old]):
        with pytest.raises(InputError, match="hold"):
            lig_lens.average(pair)
    assert lig_lens.average([others, others]).mean.total["attn"].shape == others.total["attn"].shape


def test_bad_input():
    model, target = tiny_bridge("gpt2"), lig_lens.metric(curved)
    asked = {"corrupted": ALL_DIFFERENT, "target": target, "progress": False}
    with pytest.raises(InputError, match="'skip', 'others'"):
        lig_lens.attribute(model, CLEAN, hold="mlp", **asked)
    with pytest.raises(InputError, match="nothing stays"):
        lig_lens.attribute(model, CLEAN, noising=True, **asked)
    with pytest.raises(InputError, match="metric as target"):
        lig_lens.attribute(model, CLEAN, hold="skip", progress=False)
