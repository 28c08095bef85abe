"""rollout_map, consistency_plot, paths_graph and to_circuitsvis: what compose gives, drawn."""

import dataclasses
import math
import re
import sys
import types

import numpy as np
import pytest
import torch
from flows import make_flow
from plot_cases import HOSTILE, metric_flow

import lig_lens
from lig_lens.errors import InputError, MissingPackageError
from lig_lens.flow.consistency import Consistency
from lig_lens.show.plots import consistency_plot, paths_graph, rollout_map, to_circuitsvis

pytestmark = [
    pytest.mark.filterwarnings("ignore::lig_lens.CancellationWarning"),  # random Flows
]


@pytest.fixture(scope="module")
def induction():
    model = lig_lens.load_model("induction")
    (pair,) = lig_lens.induction_pairs(1, n_words=8)
    return lig_lens.attribute(model, pair.clean, progress=False), pair


def text_of(figure):
    title = figure.layout.title.text or ""
    return title + " ".join(note.text for note in figure.layout.annotations)


# Rollout.


def test_rollout_rows_are_destinations(induction):
    flow, _ = induction
    figure = rollout_map(flow, stop=1, rule="product")
    np.testing.assert_array_equal(figure.data[0].z, flow.rollout(stop=1, rule="product").T.numpy())
    np.testing.assert_allclose(figure.data[0].z.sum(1), 1, rtol=1e-4)
    assert "layer 0" in text_of(figure) and "rule product" in text_of(figure)
    assert "a row adds up to 100%" in text_of(figure)
    worst = max(flow.worst_gap(name) for name in ("attn", "mlp"))
    for shown in (text_of(figure), text_of(paths_graph(flow))):
        assert "attn baseline itb" in shown and f"mlp baseline {flow.settings['mlp_baseline']}" in shown
        assert f"worst completeness gap {worst:.1e} (tol 0.001)" in shown


def test_rollout_of_some_tokens():
    flow = make_flow(layers=(4, 5, 6))
    figure = rollout_map(flow, start=5, tokens=[6, 1])
    np.testing.assert_array_equal(figure.data[0].z, flow.rollout(5)[[6, 1]][:, [6, 1]].T.numpy())
    assert "layers 5 to 6" in text_of(figure) and "adds up" not in text_of(figure)


def test_rollout_scale_follows_the_signs():
    flow = make_flow(layers=(0, 1))
    assert rollout_map(flow).layout.coloraxis.cmin < 0
    positive = dataclasses.replace(
        flow, attn=flow.attn.abs(), **{name: getattr(flow, name).abs() for name in ("mlp", "skip", "bias")}
    )
    scale = rollout_map(positive).layout.coloraxis
    assert scale.cmin == 0 and scale.cmax <= 1


def test_rollout_without_the_maps():
    with pytest.raises(InputError, match="need every block between"):
        rollout_map(make_flow())
    with pytest.raises(InputError, match="outside the prompt"):
        rollout_map(make_flow(layers=(0, 1)), tokens=[7])


# Consistency.


def consistent(values, **labels):
    values = torch.tensor(values)
    layers = tuple(range(4, 4 + len(values)))
    return Consistency(values, 2 * values, 3 * values, {"attn_baseline": "itb", "rule": "product"} | labels, layers)


def lines(figure):
    return [trace for trace in figure.data if trace.name]


def test_one_line_for_each_result_with_medians_and_interquartile_ranges():
    first = consistent([[0.0, 1.0, 2.0, 5.0], [1.0, math.nan, 3.0, 1.0]])
    second = consistent([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]], rule="conserving")
    figure = consistency_plot([first, second], "l2")
    one, two = lines(figure)
    np.testing.assert_allclose(one.y, [1.5, 1])
    np.testing.assert_allclose(one.customdata[0], [4, 0.75, 2.75])
    assert (one.name, two.name) == ("rule product", "rule conserving")
    assert "attn baseline itb" in text_of(figure) and "rule" not in figure.layout.title.text.split("<br>")[1]
    assert one.line.color != two.line.color and one.marker.symbol != two.marker.symbol
    assert all(abs(x - layer) < 0.5 for trace in (one, two) for layer, x in enumerate(trace.x, 4))
    assert one.x[0] < two.x[0]
    bars = figure.data[0]
    assert bars.y[:3] == (0.75, 2.75, None) and bars.hoverinfo == "skip"


@pytest.mark.parametrize(("measure", "factor"), [("l2", 1), ("l2_normalised", 2), ("pearson", 3)])
def test_measures(measure, factor):
    figure = consistency_plot(consistent([[0.25, 0.25]]), measure)
    assert lines(figure)[0].y == (0.25 * factor,) and figure.layout.showlegend is False
    assert measure.replace("_", " ") in figure.layout.title.text and figure.layout.yaxis.title.text


def test_equal_labels_are_numbered_and_colours_go_round_with_other_dashes():
    figure = consistency_plot([consistent([[0.5]])] * 10)
    assert [trace.name for trace in lines(figure)][:2] == ["result", "result (2)"]
    looks = {(trace.line.color, trace.line.dash) for trace in lines(figure)}
    assert len(looks) == 10


def test_consistency_of_nothing():
    with pytest.raises(InputError, match="no result"):
        consistency_plot([])
    with pytest.raises(InputError, match="Unknown measure 'spearman'"):
        consistency_plot(consistent([[1.0]]), "spearman")


# Paths.


def edges(figure):
    return [trace for trace in figure.data if trace.hovertext]


def test_induction_is_seen(induction):
    flow, pair = induction
    figure = paths_graph(flow, k=5)
    (src, dst), *_ = pair.edges["previous"]
    widest = sorted(edges(figure), key=lambda trace: -trace.line.width)[:2]
    assert {round(trace.line.width, 6) for trace in widest} == {9.0} or widest[0].line.width > widest[1].line.width
    texts = " ".join(trace.hovertext for trace in widest)
    assert "<b>L0H" in texts and "<b>L1H" in texts and f"({src}) → " in texts and f"({dst})" in texts
    held = sum(path.weight for path in flow.paths(-1, 5))
    assert f"5 paths, together {held:+.0%} of the total" in figure.layout.title.text


def test_widths_are_sums_over_paths_and_colours_heads():
    flow = make_flow(layers=(0, 1))
    figure = paths_graph(flow, dst=3, k=12)
    sums: dict[tuple, float] = {}
    for path in flow.paths(3, 12):
        for step in path.steps:
            key = (step.layer, step.head, step.src, step.dst)
            sums[key] = sums.get(key, 0.0) + path.weight
    assert len(edges(figure)) == len(sums)
    assert (
        sum(trace.line.dash == "6px,4px" for trace in edges(figure)) == sum(weight < 0 for weight in sums.values()) > 0
    )
    widths = sorted(trace.line.width for trace in edges(figure))
    top = max(abs(weight) for weight in sums.values())
    np.testing.assert_allclose(widths, sorted(max(1.2, 9 * abs(weight) / top) for weight in sums.values()), rtol=1e-6)
    looks = {}
    for trace in edges(figure):
        looks.setdefault(trace.name, set()).add(trace.line.color)
    assert all(len(colours) == 1 for colours in looks.values())
    assert len({next(iter(colours)) for colours in looks.values()}) == len(looks)
    legend = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert set(looks) | {"negative"} == set(legend)


def test_heads_are_named_and_what_skips_them():
    figure = paths_graph(make_flow(layers=(5, 6), n_heads=12), k=20)
    named = [note.text for note in figure.layout.annotations if note.bordercolor]
    assert named and all(re.fullmatch(r"L[56]H\d+", name) for name in named)
    hovers = " ".join(trace.hovertext for trace in edges(figure))
    assert "<b>L5H" in hovers and set(re.findall(r"<b>layer \d</b>, (.*?)<br>", hovers)) <= {"skip and bias"}


def test_nodes_are_where_paths_pass():
    flow = make_flow(layers=(0, 1))
    figure = paths_graph(flow, dst=-2, k=4)
    (nodes,) = (trace for trace in figure.data if trace.mode == "markers")
    visited = {(step.layer, step.src) for path in flow.paths(-2, 4) for step in path.steps} | {(2, 5)}
    assert len(nodes.x) == len(visited)
    assert sum(size == max(nodes.marker.size) for size in nodes.marker.size) == 1
    place = nodes.marker.size.index(max(nodes.marker.size))
    assert nodes.y[place] == max(nodes.y) and "(5)" in nodes.text[place] and "leaving layer 1" in nodes.text[place]
    spacing = nodes.x[place] / 5
    assert all(abs(x / spacing - round(x / spacing)) < 1e-6 for x in nodes.x)
    assert "<b><span style='color:#6e7781'>\u2011</span>s" in figure.layout.xaxis.ticktext[5]


def test_edges_lead_from_layer_to_layer():
    for trace in edges(paths_graph(make_flow(layers=(3, 4)), k=8)):
        assert trace.y[0] < trace.y[-1] and len(trace.x) == len(trace.y)
        src, dst = (int(part.split(")")[0]) for part in trace.hovertext.replace("<br>", " ").split("(")[1:3])
        assert (trace.x[0] < trace.x[-1]) == (src < dst)


def test_long_prompts_show_the_tokens_that_are_visited():
    flow = make_flow(tokens=tuple(f"w{number}" for number in range(100)), layers=(0, 1))
    figure = paths_graph(flow, dst=50, k=3)
    labels = figure.layout.xaxis.ticktext
    assert len(labels) < 30 and any("⋯" in label for label in labels) and figure.layout.width < 1500
    assert any("w50" in label and label.startswith("<b>") for label in labels)


def test_layers_that_all_paths_skip_are_low():
    flow = make_flow(layers=(0, 1, 2, 3))
    still = dataclasses.replace(flow, mlp=flow.mlp * torch.tensor([0.0, 0.0, 0.0, 1.0])[:, None, None])
    figure = paths_graph(still, k=3)
    assert list(figure.layout.yaxis.ticktext) == ["0 to 2", "3"]
    heights = {round(trace.y[-1] - trace.y[0], 3) for trace in edges(figure)}
    assert len(heights) == 2 and min(heights) < 0.5 * max(heights)


def test_heads_beyond_the_palette_differ_in_dash():
    flow = make_flow(layers=(0,), n_heads=20)
    legend = [trace for trace in paths_graph(flow, k=150).data if trace.name and trace.name.startswith("head")]
    looks = {(trace.name, trace.line.color, trace.line.dash) for trace in legend if trace.x == (None,)}
    assert len(looks) == len({look[1:] for look in looks}) > 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dst": 9}, "destination 9 is outside"),
        ({"k": 0}, "k is 0"),
        ({"rule": "sum"}, "Unknown rule 'sum'"),
        ({"start": 2}, "need every block between"),
    ],
)
def test_paths_that_are_not_there(arguments, message):
    with pytest.raises(InputError, match=message):
        paths_graph(make_flow(layers=(0, 1)), **arguments)


def test_paths_need_both_maps():
    with pytest.raises(InputError, match="attn and mlp maps"):
        paths_graph(metric_flow())


# CircuitsVis.


@pytest.fixture
def given(monkeypatch):
    """What CircuitsVis is given."""
    found = {}
    package = types.ModuleType("circuitsvis")
    package.attention = types.SimpleNamespace(attention_heads=lambda **given: found.update(given) or "html")
    monkeypatch.setitem(sys.modules, "circuitsvis", package)
    return found


def test_circuitsvis_gets_shares_of_heads_with_destinations_first(given):
    flow = make_flow(tokens=HOSTILE)
    assert to_circuitsvis(flow, 3, heads=[2, 0]) == "html"
    torch.testing.assert_close(given["attention"], flow.shares()[1, [2, 0]].mT)
    assert given["attention_head_names"] == ["L3H2", "L3H0"] and given["mask_upper_tri"] is False
    assert given["min_value"] == -given["max_value"] == -1.0
    assert not any("</" in token or "<script" in token for token in given["tokens"])
    assert given["tokens"][1] == "\"quoted\"·&·'more'" and given["tokens"][-1] == "↵"


def test_circuitsvis_masks_what_comes_later_only_in_causal_models(given):
    flow = make_flow()
    to_circuitsvis(dataclasses.replace(flow, attn=flow.attn.triu(), total=flow.total), 0)
    assert given["mask_upper_tri"] is True


def test_circuitsvis_itself():
    package = pytest.importorskip("circuitsvis", reason="pip install circuitsvis")
    shown = to_circuitsvis(make_flow(tokens=HOSTILE), 0)
    assert isinstance(shown, package.utils.render.RenderedHTML)
    assert shown.local_src.count("</script>") == 1 and "L0H2" in shown.cdn_src


def test_circuitsvis_that_cannot_be(monkeypatch):
    monkeypatch.setitem(sys.modules, "circuitsvis", None)
    with pytest.raises(MissingPackageError, match="pip install circuitsvis"):
        to_circuitsvis(make_flow(), 0)
    with pytest.raises(InputError, match="square patterns, and this Flow has 2 destinations of 7"):
        to_circuitsvis(make_flow(destinations=(1, 2)), 0)
    with pytest.raises(InputError, match="no layer 1"):
        to_circuitsvis(make_flow(), 1)
    with pytest.raises(InputError, match="no head 4"):
        to_circuitsvis(make_flow(), 0, [4])
