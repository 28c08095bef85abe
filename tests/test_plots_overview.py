"""head_map, importance and gap_map: the tensor's numbers in labelled cells, on scales that say what they are."""

import dataclasses

import numpy as np
import pytest
import torch
from flows import make_flow
from plot_cases import metric_flow

from lig_lens.errors import InputError
from lig_lens.show.plots import gap_map, head_map, importance
from lig_lens.show.text import MINUS

pytestmark = [
    pytest.mark.filterwarnings("ignore::lig_lens.CancellationWarning"),  # random Flows
]

WORDS = tuple(f"w{number}" for number in range(40))


def ticks(figure, axis):
    return getattr(figure.layout, axis).ticktext


def heading(figure):
    return next(note.text for note in figure.layout.annotations if note.text.startswith("<b>"))


# One head.


def test_one_head_with_positions_and_printed_values():
    flow = make_flow(destinations=(1, 5))
    figure = head_map(flow, 3, 2)
    (panel,) = figure.data
    np.testing.assert_array_equal(panel.z, flow.attn[1, 2].T.numpy())
    assert ticks(figure, "yaxis")[0] == "the <span style='color:#6e7781'>1</span>"
    assert len(ticks(figure, "xaxis")) == 7
    assert panel.text[0][3].replace(MINUS, "-") == f"{float(flow.attn[1, 2, 3, 0]):.1f}"
    assert "<b>L3H2</b>: source tokens → heads" in heading(figure) and "target l2" in heading(figure)
    low, high = figure.layout.yaxis.range
    assert low > high


def test_shares_are_printed_as_percents_on_a_sequential_scale():
    flow = make_flow()
    flow.attn.abs_()  # no total cancels
    figure = head_map(flow, 0, 1, share=True, tokens=[1, 2, -1])
    shares = flow.shares()[0, 1][[1, 2, 6]][:, [1, 2, 6]].T
    np.testing.assert_array_equal(figure.data[0].z, shares.numpy())
    assert figure.data[0].text[0][1].replace(MINUS, "-") == f"{float(shares[0, 1]):.0%}"
    scale = figure.layout.coloraxis
    assert scale.cmin == 0 and scale.cmax <= 1 and scale.colorscale[0][1] == "#fcfbfd"
    assert "share of each destination's total" in heading(figure)


def test_many_tokens_are_not_printed():
    figure = head_map(make_flow(tokens=WORDS), 0, 0)
    assert figure.data[0].text is None and figure.layout.width < 1000
    assert len(figure.layout.xaxis.labelalias) == 40


def test_zeros_are_blank():
    flow = make_flow()
    flow.attn[0, 0, 2:, 1] = 0
    texts = head_map(flow, 0, 0).data[0].text
    assert set(texts[1][2:]) == {""} and texts[0][0]


@pytest.mark.parametrize("map", ["block", "mlp"])
def test_one_map_of_a_layer(map):
    flow = make_flow()
    figure = head_map(flow, 3, map=map)
    expected = flow.block[1].T if map == "block" else flow.columns("mlp")[1]
    np.testing.assert_array_equal(figure.data[0].z, expected.numpy())
    if map == "mlp":
        assert list(ticks(figure, "yaxis")) == ["head 0", "head 1", "head 2", "skip", "bias"]


def test_difference_of_one_head():
    flow, other = make_flow(), make_flow(seed=1)
    for side in (flow, other):  # no total cancels
        side.attn.abs_()
    figure = head_map(flow, 0, 1, share=True, minus=other)
    np.testing.assert_array_equal(figure.data[0].z, (flow.shares() - other.shares())[0, 1].T.numpy())
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax
    assert "difference of shares" in heading(figure)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 1, "head": 0}, r"no layer 1: use some of \[0, 3\]"),
        ({"layer": 0, "head": 3}, r"no head 3: use some of \[0, 1, 2\]"),
        ({"layer": 0}, "head=None with the 'attn' map: name one, or draw the layer with map='block'"),
        ({"layer": 0, "head": 1, "map": "mlp"}, "head=1 with the 'mlp' map: leave it out"),
        ({"layer": 0, "head": 1, "map": "att"}, "Unknown map 'att'"),
        ({"layer": 0, "head": 1, "tokens": [9]}, "9 is outside"),
    ],
)
def test_one_head_that_is_not_there(arguments, message):
    with pytest.raises(InputError, match=message):
        head_map(make_flow(), **arguments)


# Importance.


def test_importance_for_a_metric_adds_up_with_skip():
    flow = metric_flow(metric="logit_difference(' a', ' b')")
    figure = importance(flow)
    heads, rest = figure.data
    np.testing.assert_allclose(heads.z[1, 2], float(flow.attn[1, 2].sum()), rtol=1e-5)
    np.testing.assert_allclose(rest.z[0, 0], float(flow.skip[0].sum()), rtol=1e-5)
    np.testing.assert_allclose(heads.z.sum(1) + rest.z[:, 0], flow.total["attn"].numpy(), rtol=1e-4)
    assert ticks(figure, "xaxis") == ("0", "1", "2", "skip") and rest.x == (3,)
    assert heads.hovertext[1][2] == "<b>L1H2</b>" and rest.hovertext[0][-1] == "<b>layer 0, skip</b>"
    scale = figure.layout.coloraxis
    # The scale is that of heads, and skip is grey: it would outshine them.
    assert scale.cmin == -scale.cmax == -np.abs(heads.z).max()
    assert rest.coloraxis is None and rest.zmin == -rest.zmax and rest.colorscale[0][1] == rest.colorscale[-1][1]
    assert "in the metric's units" in heading(figure) and f"({MINUS}1.5 → +3)" in heading(figure)


def test_importance_as_share_of_the_metrics_change():
    flow = metric_flow()
    flow.skip.add_(20)  # no total cancels
    flow.total["attn"][:] = flow.attn.sum((1, 2, 3)) + flow.skip.sum(1)
    figure = importance(flow, share=True)
    np.testing.assert_allclose(figure.data[0].z.sum(1) + figure.data[1].z[:, 0], 1, rtol=1e-4)
    assert "add up to 100%" in heading(figure) and figure.layout.coloraxis.cmin < 0
    flow.skip[0] -= (flow.attn[0].sum() + flow.skip[0].sum() - 0.1) / flow.skip.shape[1]
    flow.total["attn"][0] = 0.1
    figure = importance(flow, share=True)
    for trace in figure.data:
        assert np.isnan(trace.z[0]).all() and np.isfinite(trace.z[1]).all()
    assert "1 of 2 totals nearly cancel: shares not shown (grey)" in heading(figure)
    assert np.isfinite(importance(flow).data[0].z).all()


def test_means_of_several_prompts_say_so():
    flow = metric_flow()
    settings = flow.settings | {"averaged": 5, "metric": {"clean": 2.0, "corrupted": None}}
    shown = heading(importance(dataclasses.replace(flow, settings=settings)))
    assert (
        "mean of 5 prompts" in shown and "all heads of a layer and skip add up to the metric's change</span>" in shown
    )


def test_importance_for_the_output_by_hand():
    flow = make_flow()
    figure = importance(flow, map="mlp", layers=[3], heads=[2, 0])
    sizes = flow.columns("mlp").abs()[1]
    expected = (sizes / sizes.sum(0)).mean(1)
    np.testing.assert_allclose(figure.data[0].z[0], expected[[2, 0]].numpy(), rtol=1e-5)
    np.testing.assert_allclose(figure.data[1].z[0], expected[[3, 4]].numpy(), rtol=1e-5)
    assert ticks(figure, "xaxis") == ("2", "0", "skip", "bias") and ticks(figure, "yaxis") == ("3",)
    assert figure.layout.coloraxis.cmin == 0
    assert "|head| / (sum over heads |head| + |skip| + |bias|), mean over destinations" in heading(figure)


def test_importance_by_movement():
    flow = make_flow()
    flow.total["attn"].abs_()
    moved = flow.total["attn"].mean(2)
    np.testing.assert_allclose(importance(flow).data[0].z, (moved / moved.amax(1, keepdim=True)).numpy(), rtol=1e-5)
    shared = importance(flow, share=True)
    np.testing.assert_allclose(shared.data[0].z.sum(1), 1, rtol=1e-5)
    assert "relative to the layer's largest" in heading(importance(flow))
    low, high = shared.layout.yaxis.range
    assert low < high  # layers upwards


def test_signed_movement_gets_a_signed_scale():
    flow = make_flow()
    flow.total["attn"][0, 0] = -5.0
    scale = importance(flow).layout.coloraxis
    assert scale.cmin == -scale.cmax


def test_many_heads_have_numbers_in_the_hover_alone():
    heads, rest = importance(make_flow(n_heads=32), map="mlp").data
    assert heads.text is None and rest.text[0][1].endswith("%")


def test_colours_end_at_the_strongest_head_of_many():
    flow = metric_flow(layers=tuple(range(40)), n_heads=12)
    flow.attn[7, 3] += 20
    figure = importance(flow)
    assert figure.layout.coloraxis.cmax == np.abs(figure.data[0].z).max() and "saturate" not in heading(figure)


@pytest.mark.parametrize(("map", "baseline"), [("attn", "itb"), ("mlp", "zero")])
def test_importance_names_baseline_and_gap(map, baseline):
    flow = make_flow()
    shown = heading(importance(flow, map=map))
    assert f"{map} baseline {baseline}" in shown and f"worst completeness gap {flow.worst_gap(map):.1e}" in shown


@pytest.mark.parametrize(
    ("flow", "arguments", "message"),
    [
        (make_flow(), {"map": "block"}, "Unknown map 'block'"),
        (make_flow(maps=("block",)), {}, "no 'attn' map"),
        (metric_flow(), {"map": "mlp"}, "no 'mlp' map"),
        (make_flow(), {"layers": [2]}, "no layer 2"),
        (make_flow(), {"heads": [5]}, "no head 5"),
    ],
)
def test_importance_of_what_is_not_there(flow, arguments, message):
    with pytest.raises(InputError, match=message):
        importance(flow, **arguments)


# Gaps.


def test_gaps_of_the_worst_head_on_a_logarithmic_scale():
    flow = make_flow()
    figure = gap_map(flow, "attn")
    panel, crosses = figure.data
    np.testing.assert_allclose(10**panel.z, flow.gap["attn"].amax(1).numpy(), rtol=1e-5)
    assert f"largest in L3H{int(flow.gap['attn'][1, :, 2].argmax())}<br>" in panel.hovertext[1][2]
    missed = (~flow.converged["attn"]).any(1)
    marked = set(zip(crosses.y, crosses.x, strict=True))
    assert marked == {tuple(place) for place in missed.nonzero().tolist()} and marked
    assert f"{int((~flow.converged['attn']).sum())} of 42 columns miss tol 0.001" in heading(figure)
    assert "tol 0.001" in figure.layout.coloraxis.colorbar.ticktext
    assert all(
        bool(text) != bool(miss)
        for row, m in zip(panel.text, missed, strict=True)
        for text, miss in zip(row, m, strict=True)
    )


def test_marks_fit_into_their_cells():
    small, large = (gap_map(make_flow(tokens=WORDS * times)).data[1].marker for times in (4, 1))
    assert small.size < 5 < large.size <= 9


@pytest.mark.parametrize("gap", [10**-2.5, 1e-3, 10**-3.2, 10**-2.7, 3.0])
@pytest.mark.parametrize("tol", [1e-3, 10**-2.6, None])
def test_the_scale_of_gaps_has_two_ticks_at_least(gap, tol):
    flow = make_flow()
    gaps = {name: torch.full_like(value, gap) for name, value in flow.gap.items()}
    flow = dataclasses.replace(flow, gap=gaps, settings={"target": "l2"} | ({} if tol is None else {"tol": tol}))
    axis = gap_map(flow, "attn").layout.coloraxis
    inside = [tick for tick in axis.colorbar.tickvals if axis.cmin <= tick <= axis.cmax]
    assert len(inside) >= 2


def test_gaps_that_are_all_within_tol():
    flow = make_flow(tol=1.0)
    flow.gap["block"].mul_(1e-3)[0, 0] = 0
    figure = gap_map(flow, "block", layers=[3, 0])
    assert len(figure.data) == 1 and "all 14 columns within tol 1" in heading(figure)
    assert figure.layout.coloraxis.cmax == 0  # tol is on the scale, so that colours tell how far below it gaps are
    assert figure.data[0].text[1][0] == "0" and ticks(figure, "yaxis") == ("3", "0")


def test_the_worst_map_is_the_default():
    flow = make_flow()
    flow.gap["mlp"][0, 3] = 0.5
    figure = gap_map(flow)
    assert "of the mlp map" in heading(figure) and "head" not in figure.data[0].hovertext[0][3]
    np.testing.assert_allclose(figure.data[0].z[0, 3], np.log10(0.5), rtol=1e-5)


def test_a_metric_has_one_gap_for_each_layer():
    figure = gap_map(metric_flow())
    assert figure.data[0].z.shape == (2, 1) and figure.data[1].y == (1,)
    assert "1 of 2 layers miss tol 0.001" in heading(figure)


def test_gaps_of_all_zeros_and_no_tol():
    flow = make_flow()
    zeros = {name: torch.zeros_like(gap) for name, gap in flow.gap.items()}
    settings = {"target": "l2"}
    flow = dataclasses.replace(flow, gap=zeros, converged={n: g == 0 for n, g in zeros.items()}, settings=settings)
    figure = gap_map(flow, "attn")
    assert np.isfinite(figure.data[0].z).all() and "within the tolerance" in heading(figure)


def test_gaps_that_are_not_there():
    with pytest.raises(InputError, match="no 'attn' map"):
        gap_map(make_flow(maps=("block",)), "attn")
    with pytest.raises(InputError, match="Unknown map 'gap'"):
        gap_map(make_flow(), "gap")
    with pytest.raises(InputError, match="no layer 5"):
        gap_map(make_flow(), layers=[5])
