"""Scores, effects, their averages and their comparison."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny_hooked import has_hooked_transformer, tiny_hooked
from tiny_models import N_LAYERS
from tiny_models import compatible_bridge as bridge
from torch import Tensor

import lig_lens
from lig_lens import patching
from lig_lens.interventions.agreement import aligned, precision_recall
from lig_lens.show.plots import agreement_scatter, effects_map, head_grid

CLEAN, CORRUPTED = [5, 12, 30, 7, 22], [5, 12, 11, 9, 22]


def curved(logits: Tensor) -> Tensor:
    return logits[0, -1].log_softmax(-1)[3] + 0.1 * logits[0, 2, 7] * logits[0, -2, 9]


def models(kind: str):
    yield bridge(kind)
    if has_hooked_transformer():
        yield tiny_hooked(kind)


def made(values: Tensor, on: str, **labels) -> lig_lens.Effects:
    fields = {"name": "made", "tokens": ("a", "b", "c"), "layers": (0, 1), "metric": "m"} | labels
    return lig_lens.Effects(values=values, on=on, **fields)


# Scores.


def gradients_of_patterns(model, ids: list[int]) -> dict[str, Tensor]:
    """Gradient at every pattern entry by autograd, times nothing."""
    leaves: dict[str, Tensor] = {}

    def hook(pattern, hook):
        leaves[hook.name] = torch.zeros_like(pattern, requires_grad=True)
        return pattern + leaves[hook.name]

    hooks = [(f"blocks.{layer}.attn.hook_pattern", hook) for layer in range(N_LAYERS)]
    value = curved(model.run_with_hooks(torch.tensor([ids]), fwd_hooks=hooks))
    grads = torch.autograd.grad(value, list(leaves.values()))
    return {name: grad[0].mT for name, grad in zip(leaves, grads, strict=True)}  # head src dst


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox"])
def test_scores_by_autograd(kind: str):
    for model in models(kind):
        found = lig_lens.scores(model, CLEAN, CORRUPTED, curved)
        heads = lig_lens.scores(model, CLEAN, CORRUPTED, curved, on="heads_by_pos")
        _, cache = model.run_with_cache(torch.tensor([CLEAN]))
        gradients = gradients_of_patterns(model, CLEAN)
        for layer in range(N_LAYERS):
            name = f"blocks.{layer}.attn.hook_pattern"
            pattern = cache[name][0].mT
            torch.testing.assert_close(found["attention"].values[layer], pattern, rtol=1e-4, atol=1e-6)
            expected = pattern * gradients[name]
            torch.testing.assert_close(found["gradient_pattern"].values[layer], expected, rtol=1e-3, atol=1e-5)
            own = 1 - pattern.diagonal(dim1=1, dim2=2)
            torch.testing.assert_close(heads["attention"].values[layer], own, rtol=1e-4, atol=1e-6)
            v = cache[f"blocks.{layer}.attn.hook_v"][0].reshape(len(CLEAN), -1, model.cfg.d_head)
            v = v.repeat_interleave(pattern.shape[0] // v.shape[1], 1)
            W_O = model.blocks[layer].attn.W_O
            length = torch.einsum("ihe,hem->him", v, W_O).norm(dim=-1)
            norm = found["attention_value_norm"].values[layer]
            torch.testing.assert_close(norm, (pattern * length[..., None]).float(), rtol=1e-3, atol=1e-5)
        for score in found:
            if score != "attention":
                summed = found[score].values.sum(2)
                torch.testing.assert_close(heads[score].values, summed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_attribution_patching_of_heads(kind: str):
    model = bridge(kind)
    ours = lig_lens.scores(model, CLEAN, CORRUPTED, curved, on="heads_by_pos", which=["attribution_patching"])
    values = ours["attribution_patching"].values
    (_, clean), (_, corrupted) = (model.run_with_cache(torch.tensor([ids])) for ids in (CLEAN, CORRUPTED))
    leaves: dict[str, Tensor] = {}

    def hook(z, hook):
        leaves[hook.name] = torch.zeros_like(z, requires_grad=True)
        return z + leaves[hook.name]

    names = [f"blocks.{layer}.attn.hook_z" for layer in range(N_LAYERS)]
    value = curved(model.run_with_hooks(torch.tensor([CORRUPTED]), fwd_hooks=[(name, hook) for name in names]))
    grads = torch.autograd.grad(value, [leaves[name] for name in names])
    for layer, (name, grad) in enumerate(zip(names, grads, strict=True)):
        expected = (grad[0] * (clean[name] - corrupted[name])[0]).sum(-1).T
        torch.testing.assert_close(values[layer], expected, rtol=1e-3, atol=1e-5)


def test_attribution_patching_equals_transformer_lens():
    theirs = pytest.importorskip(
        "transformer_lens.tools.analysis.attribution_patching", reason="TransformerLens before 4.3 has none"
    )
    model = bridge("gpt2")
    ours = lig_lens.scores(model, CLEAN, CORRUPTED, curved, on="heads_by_pos", which=["attribution_patching"])
    found = theirs.attribution_patch(model, torch.tensor([CLEAN]), torch.tensor([CORRUPTED]), curved)
    heads = {node: score for node, score in found.node_scores.items() if node.kind == "attn_head_out"}
    assert len(heads) == ours["attribution_patching"].values.numel()
    for node, score in heads.items():
        value = float(ours["attribution_patching"].values[node.layer, node.head, node.position])
        assert value == pytest.approx(float(score), rel=1e-3, abs=1e-5)


# Effects.


def test_effects():
    values = torch.tensor([[1.0, -3.0, torch.nan], [0.5, 2.0, 0.0]])
    effects = made(values, "positions", layers=(4, 7))
    assert effects.top(2) == [((4, 1), -3.0), ((7, 1), 2.0)] and len(effects.top(99)) == 5
    assert effects.label((7, 2)) == "layer 7 at 'c' (2)"
    frame = effects.to_dataframe()
    assert frame.columns.tolist() == ["layer", "pos", "pos_token", "effect"] and len(frame) == 5
    assert frame.iloc[1].tolist() == [4, 1, "b", -3.0]
    document = json.loads(effects.to_json())
    assert document["entries"][1] == {"index": [4, 1], "value": -3.0} and document["reference"] is None
    assert document["measures"] == effects.measures == "score"
    edges = made(torch.zeros(2, 3, 3, 3), "edges")
    assert edges.label((1, 2, 0, 2)) == "L1H2 'a' (0) → 'c' (2)"
    assert "made on edges [2, 3, 3, 3], 54 measured" in repr(edges)


@pytest.mark.parametrize(
    "run, message",
    [
        (lambda: made(torch.zeros(2, 4), "positions"), r"shape \[2, 4\], expected \['layer', 'pos'\]"),
        (lambda: made(torch.zeros(2, 3), "tokens"), "use one of heads"),
        (lambda: made(torch.zeros(2, 3), "positions").top(0), "k is 0"),
        (lambda: lig_lens.average([made(torch.zeros(2, 3), "positions")]), "got 0 Flows and 1 Effects"),
        (
            lambda: lig_lens.average([made(torch.zeros(2, 3), "heads"), made(torch.zeros(2, 3), "positions")]),
            "their on",
        ),
        (
            lambda: lig_lens.average([made(torch.zeros(2, 3), "heads", metric=m) for m in ("logit(3)", "kl")]),
            "several metrics",
        ),
        (
            lambda: lig_lens.average([made(torch.zeros(2, 3), "heads", tokens=t) for t in (("a",), ("a", "b"))]),
            r"\[1, 2\] tokens",
        ),
        (
            lambda: lig_lens.compare(made(torch.zeros(2, 3), "positions"), made(torch.zeros(2, 5), "heads")),
            "a score on positions says nothing of effects on heads",
        ),
        (
            lambda: lig_lens.compare(made(torch.zeros(2, 3), "heads", layers=(0, 2)), made(torch.zeros(2, 3), "heads")),
            r"the score is for the layers \[0, 2\]",
        ),
        (
            lambda: lig_lens.compare(made(torch.zeros(2, 3), "heads"), made(torch.full((2, 3), torch.nan), "heads")),
            "no entry of the effects",
        ),
        (
            lambda: lig_lens.compare(made(torch.full((2, 3), torch.nan), "heads"), made(torch.zeros(2, 3), "heads")),
            "lacks 6 of the 6",
        ),
    ],
)
def test_bad_input(run, message: str):
    with pytest.raises(lig_lens.InputError, match=message):
        run()


def test_scores_of_a_wrong_name():
    with pytest.raises(lig_lens.InputError, match=r"Unknown score 'atention'.*'attention'"):
        lig_lens.scores(bridge("gpt2"), CLEAN, CORRUPTED, curved, which=["atention"])


# Averages.


def test_average_of_effects():
    values = torch.tensor([[[1.0, 2.0]], [[3.0, 5.0]], [[8.0, 2.0]]])
    names = ("f(1)", "f(2)", "f(3)")
    tokens = (("a", "x"), ("a", "y"), ("a", "x"))
    effects = [made(v, "heads", layers=(0,), metric=m, tokens=t) for v, m, t in zip(values, names, tokens, strict=True)]
    found = lig_lens.average(effects)
    assert found.n == 3 and found.mean.metric == "f(…)" and found.mean.tokens == ("a", "*")
    assert found.mean.values.tolist() == [[4.0, 3.0]]
    expected = np.std(values.numpy()[:, 0], axis=0, ddof=1) / 3**0.5
    assert found.stderr.values[0].tolist() == pytest.approx(expected.tolist())
    assert found.mean.measures == "score" and found.stderr.measures == "standard error of score"
    with pytest.raises(lig_lens.InputError, match="differ in their measures, score and metric lost"):
        lig_lens.average([effects[0], dataclasses.replace(effects[1], measures="metric lost")])


def test_average_of_flows():
    model = bridge("gpt2")
    target = lig_lens.metric(curved)
    flows = lig_lens.attribute(
        model, [CLEAN, [5, 9, 30, 7, 22]], corrupted=[CORRUPTED, CORRUPTED], target=target, progress=False
    )
    found = lig_lens.average(flows)
    torch.testing.assert_close(found.mean.attn, (flows[0].attn + flows[1].attn) / 2)
    torch.testing.assert_close(found.stderr["attn"], (flows[0].attn - flows[1].attn).abs() / 2)
    torch.testing.assert_close(found.mean.total["attn"], (flows[0].total["attn"] + flows[1].total["attn"]) / 2)
    assert torch.equal(found.mean.gap["attn"], torch.maximum(flows[0].gap["attn"], flows[1].gap["attn"]))
    assert found.mean.tokens[1] == "*" and found.mean.tokens[0] == flows[0].tokens[0] and found.mean.metric == "curved"
    summed = found.mean.attn.sum((1, 2, 3)) + found.mean.skip.sum(1)
    torch.testing.assert_close(summed, found.mean.total["attn"], rtol=1e-3, atol=1e-4)


# Comparison.


def test_agreement_by_hand():
    score = made(torch.tensor([[0.9, -0.8, 0.1], [0.0, 0.3, 0.2]]), "heads")
    effects = made(torch.tensor([[2.0, -1.0, 0.0], [0.1, 0.05, torch.nan]]), "heads")
    found = lig_lens.compare(score, effects, k=2, threshold=0.1)
    # Ranks of the scores 5 1 3 2 4, of the effects 5 1 2 4 3: 1 - 6 (1 + 4 + 1) / (5 * 24).
    assert found.n == 5 and found.spearman == pytest.approx(0.7)
    # Six of ten pairs... counted: concordant 8, discordant 2.
    assert found.kendall == pytest.approx(0.6)
    assert found.pearson == pytest.approx(np.corrcoef([0.9, -0.8, 0.1, 0.0, 0.3], [2, -1, 0, 0.1, 0.05])[0, 1])
    assert found.top_k_overlap == 1.0 and found.n_present == 3
    curve = precision_recall(score, effects, threshold=0.1)
    # By size the scores put two of the present effects first and second; a score of 0 finds nothing.
    assert curve.precision.tolist() == pytest.approx([1, 1, 2 / 3, 1 / 2])
    assert curve.recall.tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3, 2 / 3])
    assert found.average_precision == pytest.approx((1 + 1) / 3) and found.precision == pytest.approx(2 / 3)


def test_what_is_constant_has_no_correlation():
    found = lig_lens.compare(made(torch.ones(2, 3), "heads"), made(torch.rand(2, 3), "heads"))
    assert np.isnan(found.spearman) and np.isnan(found.pearson)


def test_what_is_zero_is_neither_strong_nor_found():
    nothing, one, other = torch.zeros(2, 68), torch.zeros(2, 68), torch.zeros(2, 68)
    one[0, 5], other[1, 7] = 1.0, 1.0
    found = lig_lens.compare(made(one, "heads"), made(other, "heads"))
    assert found.top_k_overlap == 0 and found.average_precision == 0 and found.n_present == 1
    found = lig_lens.compare(made(one, "heads"), made(nothing, "heads"))
    assert found.n_present == 0 and np.isnan([found.average_precision, found.precision, found.top_k_overlap]).all()
    found = lig_lens.compare(made(nothing + 3, "heads"), made(one, "heads"))
    assert np.isnan(found.average_precision) and np.isnan(found.spearman)
    with pytest.raises(lig_lens.InputError, match="threshold=nan"):
        lig_lens.compare(made(one, "heads"), made(other, "heads"), threshold=float("nan"))


def test_layers_are_matched_by_number():
    score = made(torch.tensor([[1.0, 2.0], [5.0, 3.0], [0.0, 1.0]]), "heads", layers=(2, 0, 1))
    effects = made(torch.tensor([[5.0, 3.0], [1.0, 2.0]]), "heads", layers=(0, 2))
    assert lig_lens.compare(score, effects).pearson == pytest.approx(1)


def test_destinations_in_another_order_are_refused():
    model = bridge("gpt2")
    flow = lig_lens.attribute(model, CLEAN, maps="attn", destinations=[4, 3, 2, 1, 0], progress=False)
    with pytest.raises(lig_lens.InputError, match="all destinations in order"):
        lig_lens.compare(flow, made(torch.zeros(2, 3, 5), "heads_by_pos", tokens=flow.tokens))


def test_a_flow_of_fewer_edges_than_asked_for():
    model, other = bridge("gpt2"), [5, 12, 30, 7, 11]
    flow = lig_lens.attribute(model, CLEAN, corrupted=other, target=curved, progress=False)
    edges = patching.top_edges(flow, 10_000)
    assert 0 < len(edges) < flow.attn.numel() and all(src <= dst for _, _, src, dst in edges)
    only = [edge for edge in edges if edge[0] == 1]
    found = patching.knock_out(model, CLEAN, curved, edges=only, progress=False)
    assert found.layers == (1,) and lig_lens.compare(flow, found).n == len(only)
    everywhere = patching.knock_out(model, CLEAN, curved, edges=only, layers=[0, 1], progress=False)
    assert everywhere.layers == (0, 1) and bool(everywhere.values[0].isnan().all())
    with pytest.raises(lig_lens.InputError, match="these Effects are on heads"):
        patching.top_edges(made(torch.zeros(2, 3), "heads"), 3)


def test_flows_that_do_not_belong_together_have_no_average():
    model = bridge("gpt2")
    options = {"maps": "attn", "progress": False}
    flows = [lig_lens.attribute(model, CLEAN, attn_baseline=name, **options) for name in ("itb", "zero")]
    with pytest.raises(lig_lens.InputError, match="differ in their attn_baseline"):
        lig_lens.average(flows)
    metrics = [lig_lens.logit_difference(8, 14), lig_lens.logit_difference(8, 14, pos=2)]
    flows = [lig_lens.attribute(model, CLEAN, corrupted=CORRUPTED, target=m, progress=False) for m in metrics]
    with pytest.raises(lig_lens.InputError, match="several metrics"):
        lig_lens.average(flows)


def test_average_of_the_metric_itself():
    model = bridge("gpt2")
    flows = [
        lig_lens.attribute(model, clean, corrupted=CORRUPTED, target=curved, progress=False)
        for clean in (CLEAN, [5, 9, 30, 7, 22])
    ]
    settings = lig_lens.average(flows).mean.settings
    values = [flow.settings["metric"]["clean"] for flow in flows]
    assert settings["metric"]["clean"] == pytest.approx(sum(values) / 2) and "token_ids" not in settings


def test_a_flow_on_every_axis():
    model = bridge("gpt2")
    flow = lig_lens.attribute(model, CLEAN, corrupted=CORRUPTED, target=lig_lens.metric(curved), progress=False)
    heads = patching.patch(model, CLEAN, CORRUPTED, curved, progress=False)
    resid = patching.patch(model, CLEAN, CORRUPTED, curved, at="resid_pre", progress=False)
    whole = patching.patch(model, CLEAN, CORRUPTED, curved, each_position=False, progress=False)
    edges = patching.knock_out(model, CLEAN, curved, progress=False)
    n = {name: lig_lens.compare(flow, e).n for name, e in (("h", heads), ("r", resid), ("w", whole), ("e", edges))}
    assert n == {"h": heads.values.numel(), "r": resid.values.numel(), "w": 6, "e": 2 * 3 * 15}
    table = lig_lens.compare_table({"LIG": flow, **lig_lens.scores(model, CLEAN, CORRUPTED, curved)}, edges)
    assert table.index.tolist()[0] == "LIG" and len(table) == 5
    plain = lig_lens.attribute(model, CLEAN, progress=False)
    with pytest.raises(lig_lens.InputError, match="only a Flow with a metric"):
        lig_lens.compare(plain, resid)


def test_one_token_that_differs_is_all_that_contributes_in_the_first_layer():
    model, other = bridge("gpt2"), [5, 12, 11, 7, 22]
    flow = lig_lens.attribute(model, CLEAN, corrupted=other, target=lig_lens.metric(curved), layers=0, progress=False)
    resid = patching.patch(model, CLEAN, other, curved, at="resid_pre", layers=0, progress=False)
    # Patching that token into the first layer restores the clean run, and the path explains all of it.
    torch.testing.assert_close(aligned(flow, resid), resid.values, rtol=1e-3, atol=1e-5)
    assert (resid.values != 0).tolist() == [[False, False, True, False, False]]


# Figures.


def test_figures():
    values = torch.zeros(2, 3, 3, 3)
    values[0, 1, 0, 2], values[1, 2, 1, 1] = -4.0, 3.0
    effects = made(values, "edges", tokens=("<b>", "b", "c"))
    figure = effects_map(effects)
    assert figure.data[0].zmin == -figure.data[0].zmax == -4 and np.asarray(figure.data[0].z)[0, 1] == -4
    by_position = effects_map(made(torch.rand(2, 5, 3), "heads_by_pos"))
    assert np.asarray(by_position.data[0].z).shape == (10, 3) and by_position.layout.yaxis.ticktext[6] == "L1H1"
    for on, shape in (("heads", (2, 5)), ("positions", (2, 3))):
        assert np.asarray(effects_map(made(torch.rand(shape), on)).data[0].z).shape == shape
    scatter = agreement_scatter(effects, effects, name="<script>", labels=1)
    assert scatter.layout.title.text.startswith("<b>&lt;script&gt;</b> against made")
    assert sorted(set(scatter.data[0].text)) == ["", "L0H1 '&lt;b&gt;' (0) → 'c' (2)"]
    assert len(scatter.data[0].x) == 54
    flow = lig_lens.attribute(
        bridge("gpt2"), [5, 12, 30], corrupted=[5, 11, 30], target=lig_lens.metric(curved), progress=False
    )
    shares = head_grid(flow, share=True)
    assert "share of each layer" in shares.layout.annotations[-3].text
    assert "share of the layer" in shares.layout.coloraxis.colorbar.title.text
    with pytest.raises(lig_lens.InputError, match="labels=-1"):
        agreement_scatter(effects, effects, labels=-1)
