"""Composition within and across blocks: by hand, by brute force, and in what has to add up."""

import dataclasses
import functools
import itertools
import warnings

import pytest
import torch
from flows import make_flow
from tiny_models import tiny_bridge

import lig_lens
from lig_lens.flow import compose, routes, rules
from lig_lens.registry import Entry

pytestmark = pytest.mark.filterwarnings("ignore::lig_lens.CancellationWarning")  # random Flows

IDS = [5, 12, 30, 7]
random_flow = functools.partial(make_flow, layers=(4, 5))


@functools.cache
def measured(kind: str, attn: str = "itb", mlp: str = "att_itb_a0", block: str = "itb") -> lig_lens.Flow:
    return lig_lens.attribute(
        tiny_bridge(kind), IDS, attn_baseline=attn, mlp_baseline=mlp, block_baseline=block, progress=False
    )


def test_product_by_hand():
    flow = random_flow()
    expected = torch.zeros_like(flow.block)
    for layer, head, src, dst in itertools.product(*map(range, flow.attn.shape)):
        expected[layer, src, dst] += flow.attn[layer, head, src, dst] * flow.mlp[layer, head, dst]
    torch.testing.assert_close(flow.compose("product"), expected)


def test_conserving_by_hand():
    flow = random_flow()
    expected = torch.zeros_like(flow.block)
    for layer, head, src, dst in itertools.product(*map(range, flow.attn.shape)):
        share = flow.attn[layer, head, src, dst] / flow.attn[layer, head, :, dst].sum()
        expected[layer, src, dst] += share * flow.mlp[layer, head, dst]
    for layer, dst in itertools.product(range(len(flow.layers)), range(len(flow.tokens))):
        expected[layer, dst, dst] += flow.skip[layer, dst] + flow.bias[layer, dst]
    torch.testing.assert_close(flow.compose("conserving"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "neox", "gemma2"])
@pytest.mark.parametrize("mlp", ["zero", "att_itb_a0"])
def test_conserving_keeps_what_the_mlp_map_explains(kind: str, mlp: str):
    flow = measured(kind, mlp=mlp)
    columns = flow.columns("mlp").sum(1)
    torch.testing.assert_close(flow.compose("conserving").sum(1), columns, rtol=1e-4, atol=1e-5 * float(columns.max()))


@pytest.mark.parametrize("rule", compose.RULES)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "neox"])
def test_rollout_columns_add_up_to_1(kind: str, rule: str):
    flow = measured(kind, mlp="zero")
    torch.testing.assert_close(flow.rollout(rule=rule).sum(0), torch.ones(len(IDS)), rtol=0, atol=1e-4)


def test_rollout_is_a_product_of_layers():
    flow = random_flow()
    one, two = (flow.rollout(n, n + 1) for n in flow.layers[:2])
    torch.testing.assert_close(flow.rollout(flow.layers[0], flow.layers[1] + 1), one @ two, rtol=1e-4, atol=1e-4)


def test_a_destination_that_nothing_moves_keeps_what_it_has():
    # The first token of a causal model sees itself alone: its itb path does not move.
    rollout = measured("gpt2").rollout()
    torch.testing.assert_close(rollout[:, 0], torch.eye(len(IDS))[0])


def test_steps_that_nearly_cancel_are_told():
    flow = random_flow()
    flow.mlp.abs_()
    flow.attn.abs_()
    flow.skip.abs_()
    flow.bias.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.rollout()
    # At destination 2 of the second layer the skip connection takes back nearly all that the heads bring.
    brought = float(compose.edges(flow, "conserving").heads[1, :, :, 2].sum())
    flow.skip[1, 2] = -0.9 * brought
    with pytest.warns(
        lig_lens.CancellationWarning, match=rf"In 1 of \d+ steps.*layer {flow.layers[1]} .*\(2\).* 19 times"
    ):
        flow.rollout()
    for call in (lambda: flow.paths(2), flow.graph):
        with pytest.warns(lig_lens.CancellationWarning):
            call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.rollout(stop=flow.layers[1])  # the step is not passed


@pytest.mark.parametrize("rule", compose.RULES)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_paths_equal_brute_force(kind: str, rule: str):
    flow = measured(kind, mlp="zero")
    shares = compose.shares(flow, rule)
    n_heads, n_pos = shares.heads.shape[1], len(IDS)
    ways = [(head, src) for head in (*range(n_heads), None) for src in range(n_pos)]
    for dst in range(n_pos):
        found = []
        for second, middle in ways:
            for first, start in ways:
                if (second is None and middle != dst) or (first is None and start != middle):
                    continue
                weight = 1.0
                for row, head, src, at in ((1, second, middle, dst), (0, first, start, middle)):
                    weight *= float(shares.skip[row, at] if head is None else shares.heads[row, head, src, at])
                found.append((weight, ((0, first, start, middle), (1, second, middle, dst))))
        found.sort(key=lambda path: -abs(path[0]))
        ours = flow.paths(dst, k=12, rule=rule)
        expected = [path for path in found if path[0] != 0][:12]
        assert [p.weight for p in ours] == pytest.approx([weight for weight, _ in expected], rel=1e-6)
        assert [tuple((s.layer, s.head, s.src, s.dst) for s in p.steps) for p in ours] == [p for _, p in expected]
        everything = flow.paths(dst, k=10_000, rule=rule)
        assert sum(p.weight for p in everything) == pytest.approx(1, abs=1e-4)
        by_source = [sum(p.weight for p in everything if p.steps[0].src == src) for src in range(n_pos)]
        torch.testing.assert_close(torch.tensor(by_source), flow.rollout(rule=rule)[:, dst], rtol=1e-3, atol=1e-4)
    assert all(p.weight == pytest.approx(p.steps[0].weight * p.steps[1].weight) for p in ours)


def test_a_path_in_words():
    def step(layer: int, head: int | None, src: int, dst: int) -> routes.Step:
        return routes.Step(layer, head, src, "abc"[src], dst, "abc"[dst], 0.5)

    path = routes.Path(0.25, (step(0, None, 0, 0), step(1, 4, 0, 2), step(2, None, 2, 2)))
    assert str(path) == "+0.25: 'a' (0) L1H4 → 'c' (2)"
    assert str(routes.Path(0.5, (step(0, None, 1, 1),))) == "+0.5: 'b' (1) skip"


def test_graph_has_the_same_edges():
    flow = measured("gpt2", mlp="zero")
    shares = compose.shares(flow, "conserving")
    graph = flow.graph(threshold=0.0)
    assert graph.nodes["resid", 0, 1]["token"] == flow.tokens[1]
    for (kind, layer, head, dst), data in ((n, d) for n, d in graph.nodes(data=True) if n[0] == "head"):
        assert data["kind"] == kind
        total = sum(d["weight"] for _, _, d in graph.in_edges(("head", layer, head, dst), data=True))
        (onward,) = graph.out_edges(("head", layer, head, dst), data=True)
        assert onward[2]["weight"] == pytest.approx(total, rel=1e-6) and onward[1] == ("resid", layer + 1, dst)
        assert total == pytest.approx(float(shares.heads[layer, head, :, dst].sum()), rel=1e-6)
    fewer = flow.graph(threshold=0.1)
    weights = [d["weight"] for _, _, d in fewer.edges(data=True) if d["kind"] != "mlp"]
    assert 0 < len(fewer.edges) < len(graph.edges) and min(map(abs, weights)) >= 0.1


# Consistency.


def test_consistency_by_hand():
    flow = random_flow()
    composed, direct = flow.compose().double(), flow.block.double()
    found = flow.consistency()
    for layer, dst in itertools.product(range(len(flow.layers)), range(len(flow.tokens))):
        x, y = composed[layer, :, dst], direct[layer, :, dst]
        length = float((x - y).square().sum().sqrt())
        assert float(found.l2[layer, dst]) == pytest.approx(length, rel=1e-5)
        assert float(found.l2_normalised[layer, dst]) == pytest.approx(length / float(y.norm()), rel=1e-5)
        correlation = float(torch.corrcoef(torch.stack([x, y]))[0, 1])
        assert float(found.pearson[layer, dst]) == pytest.approx(correlation, abs=1e-5)


def test_later_sources_are_no_agreement():
    flow = measured("gpt2")
    found = flow.consistency(rule="conserving")
    composed, direct = flow.compose("conserving"), flow.block
    expected = torch.corrcoef(torch.stack([composed[1, :3, 2], direct[1, :3, 2]]).double())[0, 1]
    assert float(found.pearson[1, 2]) == pytest.approx(float(expected), abs=1e-5)


def test_table_of_all_pairs():
    flows = [measured("bert", *names) for names in (("itb", "zero", "itb"), ("zero", "att_itb_a0", "zero"))]
    table = lig_lens.consistency_table(flows)
    assert len(table) == 2 * 2 * 2 * 2
    names = ["attn_baseline", "mlp_baseline", "rule", "block_baseline"]
    assert not table.duplicated(names).any()
    row = table[(table[names] == ["zero", "att_itb_a0", "product", "zero"]).all(axis=1)].iloc[0]
    assert row["l2"] == pytest.approx(flows[1].consistency().means()["l2"])
    mixed = table[(table[names] == ["itb", "att_itb_a0", "product", "zero"]).all(axis=1)].iloc[0]
    both = dataclasses.replace(flows[0], mlp=flows[1].mlp, skip=flows[1].skip, bias=flows[1].bias)
    assert mixed["pearson"] == pytest.approx(both.consistency(flows[1]).means()["pearson"])


@pytest.mark.parametrize(
    "run, message",
    [
        (lambda f: f.compose("sum"), "Unknown rule 'sum'"),
        (lambda f: dataclasses.replace(f, **_without(f, "mlp")).compose(), "compose needs the attn and mlp maps"),
        (lambda f: dataclasses.replace(f, **_without(f, "block")).consistency(), "compares with the block map"),
        (lambda f: f.consistency(measured("bert")), "differ in their (tokens|layers|destinations)"),
        (lambda f: f.select(layers=(f.layers[1],)).rollout(stop=9), "need every block between"),
        (lambda f: f.select(destinations=(0, 1)).rollout(), "go through all positions"),
        (lambda f: f.paths(99), "destination 99 is outside"),
        (lambda f: f.paths(0, k=0), "k is 0"),
        (lambda f: f.graph(-1.0), "threshold is -1.0"),
        (lambda f: lig_lens.consistency_table([]), "got none"),
        (
            lambda f: lig_lens.consistency_table([dataclasses.replace(f, **_without(f, "block"))]),
            "no Flow has the 'block'",
        ),
    ],
)
def test_bad_input(run, message: str):
    with pytest.raises(lig_lens.InputError, match=message):
        run(random_flow())


def _without(flow: lig_lens.Flow, name: str) -> dict:
    """Fields of the Flow with one map less."""
    groups = ("total", "gap", "converged", "engines")
    fields = {group: {key: v for key, v in getattr(flow, group).items() if key != name} for group in groups}
    return fields | dict.fromkeys(("mlp", "skip", "bias") if name == "mlp" else (name,))


def test_a_rule_is_a_class_and_a_line(monkeypatch):
    class Even(rules.Rule):
        """Every source has the same part of what the mlp map explains."""

        def edges(self, maps):
            heads = torch.ones_like(maps.attn).double() / maps.attn.shape[2] * maps.mlp.double()[:, :, None]
            return rules.Edges(heads, maps.past.double())

    monkeypatch.setattr(rules.RULES, "_entries", dict(rules.RULES._entries))
    rules.RULES.add("even", Entry(Even))
    flow = make_flow(layers=(0, 1))
    torch.testing.assert_close(flow.compose("even").sum(1), flow.total["mlp"])
    torch.testing.assert_close(flow.rollout(rule="even").sum(0), torch.ones(len(flow.tokens)))
    assert flow.paths(2, 3, rule="even")
    with pytest.raises(
        lig_lens.InputError, match="Unknown rule 'evn': use one of 'product', 'conserving', 'sizes', 'even'"
    ):
        flow.compose("evn")


def test_sizes_by_hand():
    """As `conserving`, of absolute values; shares lie between 0 and 1 through all layers."""
    flow = random_flow()
    attn, mlp = flow.attn.double().abs(), flow.mlp.double().abs()
    expected = (attn / attn.sum(2, keepdim=True) * mlp[:, :, None]).sum(1)
    expected.diagonal(dim1=1, dim2=2).add_((flow.skip + flow.bias).double().abs())
    torch.testing.assert_close(flow.compose("sizes").double(), expected, rtol=1e-5, atol=1e-6)
    rollout = flow.rollout(rule="sizes")
    assert bool((rollout >= 0).all())
    torch.testing.assert_close(rollout.sum(0), torch.ones(len(flow.tokens)))


def test_what_makes_all_destinations_alike_is_said():
    """No skip connection, or too many layers; and not where a rollout tells destinations apart."""
    flow = make_flow(layers=range(12), settings={"mlp_baseline": "att_itb_a0"})
    sizes = {name: getattr(flow, name).abs() for name in ("attn", "mlp")}
    none_kept = dataclasses.replace(
        flow, **sizes, skip=0 * flow.skip, bias=0 * flow.bias, total={**flow.total, "mlp": sizes["mlp"].sum(1)}
    )
    with pytest.warns(lig_lens.CollapseWarning, match=r"differ by less than 5%.*mlp_baseline='zero'"):
        none_kept.rollout()
    mixed = dataclasses.replace(none_kept, skip=0.1 * sizes["mlp"].sum(1))
    with pytest.warns(lig_lens.CollapseWarning, match="Pass fewer layers"):
        mixed.paths(dst=1, k=2)
    assert "pass fewer layers" in " ".join(compose.doubts(mixed, None, None, "conserving"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", lig_lens.CollapseWarning)
        mixed.rollout(stop=2)
        dataclasses.replace(none_kept, skip=20 * sizes["mlp"].sum(1)).rollout()
