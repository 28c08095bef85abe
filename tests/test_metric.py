"""Contributions to a metric: against the oracle, complete at every layer, in the sign of denoising."""

import functools

import metric_oracle
import numpy as np
import pytest
import torch
from tiny_hooked import HOOKED_KINDS, has_hooked_transformer, tiny_hooked
from tiny_models import KINDS, N_LAYERS, exact_hf, hf_residuals, tiny_bridge
from torch import Tensor

import lig_lens
from lig_lens.names import HOLDS, SPLITS

CLEAN, CORRUPTED = [5, 12, 30, 7, 22, 39], [5, 12, 11, 7, 22, 39]
ALL_DIFFERENT = [8, 31, 12, 25, 6, 17]


def curved(logits: Tensor) -> Tensor:
    """Depends on several positions, and not linearly."""
    return logits[0, -1].log_softmax(-1)[3] + 0.1 * logits[0, 2, 7] * logits[0, -2, 9]


@functools.cache
def run(kind: str, engine: str = "auto", corrupted: tuple[int, ...] = tuple(ALL_DIFFERENT), **options):
    return lig_lens.attribute(
        tiny_bridge(kind, torch.float64),
        CLEAN,
        corrupted=list(corrupted),
        target=lig_lens.metric(curved),
        engine=engine,
        tol=1e-4,
        progress=False,
        **options,
    )


def hf_value(kind: str, ids: list[int], function=curved) -> float:
    states = hf_residuals(kind, torch.tensor(ids))
    with torch.no_grad():
        return float(function(metric_oracle.unembed(kind)(states[-1][None])))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("layer", range(N_LAYERS))
@pytest.mark.parametrize("kind", KINDS)
def test_oracle(kind: str, layer: int, split: str):
    x, x0 = (hf_residuals(kind, torch.tensor(ids))[layer] for ids in (CLEAN, ALL_DIFFERENT))
    heads, skip, total = metric_oracle.contributions(kind, layer, x, x0, curved, split)
    scale = max(heads.abs().max(), skip.abs().max())
    for engine in ("auto", "hooks"):
        flow = run(kind, engine, split=split)
        assert (flow.attn[layer] - heads).abs().max() <= 1e-4 * scale
        assert (flow.skip[layer] - skip).abs().max() <= 1e-4 * scale
        assert float(flow.total["attn"][layer]) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_complete_at_every_layer(kind: str, split: str):
    flow = run(kind, split=split)
    change = hf_value(kind, CLEAN) - hf_value(kind, ALL_DIFFERENT)
    for layer in range(N_LAYERS):
        assert float(flow.attn[layer].sum() + flow.skip[layer].sum()) == pytest.approx(change, rel=1e-3)
    assert flow.converged["attn"].all() and flow.gap["attn"].shape == (N_LAYERS,)
    assert flow.settings["metric"] == {
        "clean": pytest.approx(hf_value(kind, CLEAN), rel=1e-4),
        "corrupted": pytest.approx(hf_value(kind, ALL_DIFFERENT), rel=1e-4),
    }
    assert flow.metric == "curved" and flow.maps == ("attn",)


@pytest.mark.parametrize("kind", KINDS)
def test_both_splits_have_the_same_heads(kind: str):
    by_source, by_message = (run(kind, split=split) for split in SPLITS)
    scale = float(by_source.attn.abs().max())
    assert (by_source.attn - by_message.attn).abs().max() > 0.01 * scale
    torch.testing.assert_close(by_message.attn.sum(2), by_source.attn.sum(2), rtol=1e-3, atol=1e-4 * scale)
    torch.testing.assert_close(by_message.skip, by_source.skip, rtol=1e-3, atol=1e-4 * scale)
    assert by_message.settings["split"] == "message"


def test_engines_are_named():
    assert set(run("llama").engines["attn"]) == {"closed_form"} and set(run("llama", "hooks").engines["attn"]) == {
        "hooks"
    }


def test_positive_raises_the_metric_from_corrupted_to_clean():
    # As in denoising: with the clean prompt's own answer as metric, all that differs can only add up to the rise.
    model = tiny_bridge("gpt2")
    with torch.no_grad():
        clean, corrupted = (model(torch.tensor([ids]))[0, -1] for ids in (CLEAN, CORRUPTED))
    token = int((clean - corrupted).argmax())
    target = lig_lens.metric(lambda logits: logits[0, -1, token])
    forth = lig_lens.attribute(model, CLEAN, corrupted=CORRUPTED, target=target, progress=False)
    back = lig_lens.attribute(model, CORRUPTED, corrupted=CLEAN, target=target, progress=False)
    rise = float((clean - corrupted)[token])
    assert rise > 0
    torch.testing.assert_close(forth.total["attn"], torch.full((N_LAYERS,), rise), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(back.total["attn"], -forth.total["attn"], rtol=1e-4, atol=1e-5)
    # The path is the same in both directions.
    torch.testing.assert_close(back.attn, -forth.attn, rtol=1e-3, atol=1e-4 * float(forth.attn.abs().max()))


def test_only_what_differs_contributes_and_only_later_positions_receive():
    flow = run("gpt2", corrupted=tuple(CORRUPTED))
    other = [i for i in range(len(CLEAN)) if i != 2]
    assert float(flow.attn[0, :, other].abs().max()) == 0 and float(flow.skip[0, other].abs().max()) == 0
    assert float(flow.attn[:, :, :, :2].abs().max()) == 0
    assert float(flow.attn[0, :, 2].abs().max()) > 0


@pytest.mark.parametrize("max_batch_tokens", [1, 13, 100])
def test_any_portions(max_batch_tokens: int):
    flow = run("llama", max_batch_tokens=max_batch_tokens)
    torch.testing.assert_close(flow.attn, run("llama").attn, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(flow.skip, run("llama").skip, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("baseline", ["zero", "tensor"])
def test_other_starts(baseline: str):
    model = tiny_bridge("llama", torch.float64)
    start = torch.randn(len(CLEAN), model.cfg.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flow = lig_lens.attribute(
        model,
        CLEAN,
        target=lig_lens.metric(curved),
        attn_baseline="zero" if baseline == "zero" else start,
        layers=1,
        tol=1e-4,
        progress=False,
    )
    x = hf_residuals("llama", torch.tensor(CLEAN))[1]
    x0 = torch.zeros_like(x) if baseline == "zero" else start
    heads, skip, total = metric_oracle.contributions("llama", 1, x, x0, curved)
    scale = max(heads.abs().max(), skip.abs().max())
    assert (flow.attn[0] - heads).abs().max() <= 1e-3 * scale and (flow.skip[0] - skip).abs().max() <= 1e-3 * scale
    assert flow.total["attn"].item() == pytest.approx(total, rel=1e-4)
    assert flow.settings["metric"]["corrupted"] is None


def test_half_precision_runs_in_float32():
    model = tiny_bridge("llama", torch.bfloat16)
    before = {name: (p.dtype, p.data_ptr()) for name, p in model.named_parameters()}
    flow = lig_lens.attribute(model, CLEAN, corrupted=ALL_DIFFERENT, target=lig_lens.metric(curved), progress=False)
    assert flow.converged["attn"].all()
    assert float(flow.total["attn"][0]) == pytest.approx(float(flow.total["attn"][1]), rel=1e-4)
    assert {name: (p.dtype, p.data_ptr()) for name, p in model.named_parameters()} == before


@pytest.mark.skipif(not has_hooked_transformer(), reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("kind", [kind for kind in HOOKED_KINDS if kind != "bert"])
def test_both_generations(kind: str):
    options = {"corrupted": ALL_DIFFERENT, "target": lig_lens.metric(curved), "tol": 1e-4, "progress": False}
    ours, expected = (lig_lens.attribute(model, CLEAN, **options) for model in (tiny_hooked(kind), tiny_bridge(kind)))
    scale = float(expected.attn.abs().max())
    torch.testing.assert_close(ours.attn, expected.attn, rtol=1e-3, atol=1e-3 * scale)
    torch.testing.assert_close(ours.skip, expected.skip, rtol=1e-3, atol=1e-3 * scale)


# Ready-made metrics.


@pytest.mark.parametrize(
    "target, by_hand",
    [
        (lig_lens.logit_difference("w3", "w9"), lambda x: x[0, -1, 8] - x[0, -1, 14]),
        (lig_lens.logit_difference(8, 14, pos=2), lambda x: x[0, 2, 8] - x[0, 2, 14]),
        (lig_lens.log_probability("w3"), lambda x: (x[0, -1, 8].exp() / x[0, -1].exp().sum()).log()),
        (lig_lens.class_logit(4, pos=0), lambda x: x[0, 0, 4]),
    ],
)
def test_ready_made(target, by_hand):
    flow = lig_lens.attribute(tiny_bridge("gpt2"), CLEAN, corrupted=CORRUPTED, target=target, layers=0, progress=False)
    values = [hf_value("gpt2", ids, by_hand) for ids in (CLEAN, CORRUPTED)]
    assert flow.settings["metric"]["clean"] == pytest.approx(values[0], rel=1e-4, abs=1e-5)
    assert float(flow.attn.sum() + flow.skip.sum()) == pytest.approx(values[0] - values[1], rel=1e-3, abs=1e-5)


def test_kl_divergence_is_zero_on_the_clean_run_and_falls_towards_it():
    target = lig_lens.kl_divergence()
    flow = lig_lens.attribute(tiny_bridge("gpt2"), CLEAN, corrupted=CORRUPTED, target=target, layers=0, progress=False)
    logits = [
        metric_oracle.unembed("gpt2")(hf_residuals("gpt2", torch.tensor(ids))[-1][None]) for ids in (CLEAN, CORRUPTED)
    ]
    p, q = (x[0, -1].softmax(-1) for x in logits)
    assert flow.settings["metric"]["clean"] == pytest.approx(0, abs=1e-6)
    assert float(flow.total["attn"][0]) == pytest.approx(-float((p * (p / q).log()).sum()), rel=1e-3)


def test_a_class_is_a_whole_number():
    assert lig_lens.class_logit(np.int64(1)).name == "class_logit(1)"
    with pytest.raises(lig_lens.InputError, match=r"^class_logit: index=1\.5: give a whole number"):
        lig_lens.class_logit(1.5)
    with pytest.raises(lig_lens.InputError, match=r"^class_logit: pos=0\.5: give a whole number, or None"):
        lig_lens.class_logit(1, pos=0.5)


def test_class_logit_of_logits_without_positions():
    ready = lig_lens.class_logit(1).on(None, torch.tensor([[3.0, 5.0]]))
    assert ready(torch.tensor([[1.0, 2.0], [7.0, 8.0]])).tolist() == [2.0, 8.0]


# What cannot be.


@pytest.mark.parametrize(
    "options, message",
    [
        ({"maps": ("attn", "mlp")}, "maps=.*use maps='attn'"),
        ({"attn_baseline": "itb"}, "attn_baseline='itb' has a path for each destination"),
        ({"destinations": [2]}, "destinations=.*add up over all"),
        ({"corrupted": None}, "corrupted"),
        ({"corrupted": [5, 12, 11, 7, 22]}, "5 tokens, the prompt 6.*part at position"),
        ({"target": lig_lens.metric(lambda logits: logits[0, -1])}, r"shape \[40\]"),
        ({"target": lig_lens.metric(lambda logits: logits[0, -1, 3] * torch.nan)}, "gave nan"),
        ({"target": lig_lens.metric(lambda logits: 1.0)}, "gave 1.0"),
        ({"split": "edge"}, "split 'edge'"),
        ({"target": "l2", "split": "message", "corrupted": None}, "split='message' goes with a metric"),
        ({"target": lig_lens.logit_difference("w3 w4", "w9")}, r"'w3 w4' is 2 tokens, \['w3', 'w4'\]"),
        ({"target": lig_lens.logit_difference("zebra", "w9")}, "does not know the answer 'zebra'"),
        ({"target": lig_lens.logit_difference(9, 9)}, "same token"),
        ({"target": lig_lens.metric(lambda logits: logits[0, -1, 3].detach())}, "has no gradient"),
        ({"target": lig_lens.logit_difference(3, 40)}, "token 40 is outside the vocabulary"),
        ({"target": lig_lens.log_probability(3, pos=6)}, "pos=6 is outside"),
        ({"target": lig_lens.class_logit(3)}, r"shape \[1, 6, 40\].*give pos="),
        ({"target": lig_lens.class_logit(40, pos=0)}, "class 40 is outside"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(lig_lens.InputError, match=message):
        lig_lens.attribute(
            tiny_bridge("gpt2"),
            CLEAN,
            **{"corrupted": CORRUPTED, "target": lig_lens.metric(curved), "progress": False, **options},
        )


def test_metric_wants_a_function():
    with pytest.raises(lig_lens.InputError, match="a function of the logits, got str"):
        lig_lens.metric("logits")


def test_small_metrics_are_held_to_the_same_tolerance():
    # A floor in units of the logits would let them pass unfinished.
    options = {"corrupted": ALL_DIFFERENT, "layers": 0, "attn_baseline": "zero", "progress": False}
    found = []
    for scale in (1.0, 1e-6):
        target = lig_lens.metric(lambda logits, scale=scale: scale * curved(logits))
        found.append(lig_lens.attribute(tiny_bridge("llama"), CLEAN, target=target, **options | {"corrupted": None}))
    large, small = found
    assert bool(small.converged["attn"].all()) == bool(large.converged["attn"].all())
    torch.testing.assert_close(1e6 * small.attn, large.attn, rtol=1e-3, atol=1e-4 * float(large.attn.abs().max()))


@pytest.mark.parametrize(
    "asked", [{}, *({"hold": one, "noising": two} for one in HOLDS for two in (False, True))], ids=str
)
def test_what_enters_besides_the_residual_stream_is_noticed(asked: dict):
    model = tiny_bridge.__wrapped__("gpt2")
    seen: list[Tensor] = []
    handles = [
        model.embed.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0])),
        model.blocks[1].attn.v.register_forward_hook(lambda _module, _inputs, v: v + 0.05 * (seen[-1][:, :, None] % 3)),
    ]
    try:
        with pytest.raises(lig_lens.BoundaryError, match="something else than the residual stream"):
            lig_lens.attribute(model, CLEAN, corrupted=ALL_DIFFERENT, target=curved, layers=0, progress=False, **asked)
    finally:
        for handle in handles:
            handle.remove()


def test_a_head_that_was_never_trained_is_refused():
    with pytest.raises(
        lig_lens.InputError, match=r"logits come from random weights: cls\.predictions.*saved as BertModel"
    ):
        lig_lens.attribute(
            lig_lens.load_model("minilm"), "a cat", corrupted="a dog", target=lig_lens.log_probability("cat")
        )


# The Flow.


def test_file_and_exports(tmp_path):
    flow = run("gpt2")
    loaded = lig_lens.Flow.load(flow.save(tmp_path / "flow.safetensors"))
    streamed = lig_lens.attribute(
        tiny_bridge("gpt2", torch.float64),
        CLEAN,
        corrupted=ALL_DIFFERENT,
        target=lig_lens.metric(curved),
        tol=1e-4,
        out=tmp_path / "streamed.safetensors",
        progress=False,
    )
    for other in (loaded, streamed):
        assert other.metric == "curved" and torch.equal(other.attn, flow.attn) and torch.equal(other.skip, flow.skip)
        assert torch.equal(other.gap["attn"], flow.gap["attn"])
    frame, data = flow.to_dataframe(), flow.to_xarray()
    assert len(frame) == flow.attn.numel() and frame["share"].sum() == pytest.approx(
        float((flow.attn.sum((1, 2, 3)) / flow.total["attn"]).sum()), rel=1e-4
    )
    assert data["skip"].dims == ("layer", "src") and data["attn_gap"].dims == ("layer",)
    assert data.attrs["metric"] == "curved"
    assert '"axes":["layer","src"]' in flow.to_json() and '"metric":"curved"' in flow.to_json()
    assert torch.equal(flow.select(layers=(1,)).skip, flow.skip[1:])
    assert "metric curved" in repr(flow)
    with pytest.raises(lig_lens.InputError, match="add up over all destinations"):
        flow.select(destinations=(2,))


def test_shares_of_a_layer_add_up_with_its_skip():
    flow = run("neox")
    skip = flow.skip / flow.total["attn"][:, None]
    torch.testing.assert_close(flow.shares().sum((1, 2, 3)) + skip.sum(1), torch.ones(N_LAYERS), rtol=1e-3, atol=1e-3)


def test_exact_model_is_what_the_bridge_runs():
    with torch.no_grad():
        logits = tiny_bridge("gemma2", torch.float64)(torch.tensor([CLEAN]))
    states = hf_residuals("gemma2", torch.tensor(CLEAN))
    assert exact_hf("gemma2").config.final_logit_softcapping is not None
    assert (metric_oracle.unembed("gemma2")(states[-1][None]) - logits).abs().max() < 1e-5


def test_nothing_to_share_where_nothing_changes():
    flow = lig_lens.attribute(
        # What comes later does not reach the first position.
        tiny_bridge("gpt2"),
        CLEAN,
        corrupted=[*CLEAN[:-1], 6],
        target=lig_lens.class_logit(3, pos=0),
        progress=False,
    )
    assert float(flow.attn.abs().max()) == 0 and float(flow.shares().abs().max()) == 0
    assert flow.converged["attn"].all()
