"""The head grid: right numbers in the right panels, tokens as text, a page that needs no network."""

import re

import numpy as np
import pytest
from flows import make_flow
from plot_cases import metric_flow

from lig_lens.errors import InputError
from lig_lens.flow.compose import CANCELS
from lig_lens.show.plots import head_grid, show_token, write_html
from lig_lens.show.plots.matrix import strongest

pytestmark = [
    pytest.mark.filterwarnings("ignore::lig_lens.CancellationWarning"),  # random Flows
]


def _alias(figure, axis, position):
    return getattr(figure.layout, axis).labelalias[str(position)]


def test_one_panel_per_layer_and_head_with_destinations_down():
    flow = make_flow()
    figure = head_grid(flow, scale="shared")
    assert len(figure.data) == 6
    np.testing.assert_array_equal(figure.data[4].z, flow.attn[1, 1].T.numpy())
    captions = [note.text for note in figure.layout.annotations]
    assert captions[4] == "L3H1" and {"source token", "destination token"} <= set(captions)
    low, high = figure.layout.yaxis.range
    assert low > high  # the first destination is on top
    assert "<b>L3H1</b>" in figure.data[4].hovertemplate


def test_equal_tokens_keep_their_places():
    figure = head_grid(make_flow())
    assert _alias(figure, "xaxis", 1) == _alias(figure, "xaxis", 4) == "the"
    assert figure.layout.xaxis.tickvals == tuple(range(7)) and figure.layout.xaxis.type != "category"


def test_layers_heads_and_destinations_can_be_chosen():
    flow = make_flow(destinations=(2, 6))
    figure = head_grid(flow, layers=[3], heads=[2, 0], scale="shared")
    np.testing.assert_array_equal(figure.data[0].z, flow.attn[1, 2].T.numpy())
    assert _alias(figure, "yaxis", 1) == "<i><span style='color:#6e7781'>[SEP]</span></i>"
    assert figure.data[0].customdata[1][0][0] == 6 and "(%{customdata[0]:d})" in figure.data[0].hovertemplate
    assert "source %{x} (%{x:d})" in figure.data[0].hovertemplate  # all sources: the axis counts them


def test_signed_values_diverge_around_zero_and_shares_run_up_from_it():
    flow = make_flow()
    scale = head_grid(flow, scale="shared").layout.coloraxis
    assert scale.cmin == -scale.cmax and scale.cmax <= float(flow.attn.abs().max())
    flow.attn.abs_()  # no total cancels
    shares = head_grid(flow, share=True)
    assert shares.layout.coloraxis.cmin == 0 and shares.layout.coloraxis.cmax <= 1
    np.testing.assert_array_equal(shares.data[0].z, flow.shares()[0, 0].T.numpy())


def test_every_layer_has_its_own_scale_and_the_hover_the_exact_values():
    flow = make_flow()
    flow.attn[1] *= 1000
    figure = head_grid(flow)
    scales = (figure.layout.coloraxis, figure.layout.coloraxis2)
    for first, layer, scale in ((0, 0, scales[0]), (3, 1, scales[1])):
        panels = figure.data[first : first + 3]
        np.testing.assert_array_equal(panels[1].z, flow.attn[layer, 1].T.numpy())
        assert {panel.coloraxis for panel in panels} == {"coloraxis" if layer == 0 else "coloraxis2"}
        assert 1 / 3 < scale.cmax / float(flow.attn[layer].abs().max()) <= 1  # the strongest cells may be cut
        assert scale.cmin == -scale.cmax
    assert scales[1].cmax > 100 * scales[0].cmax and (scales[0].showscale, scales[1].showscale) == (True, False)
    assert scales[0].colorbar.ticktext[-1] == "1" and scales[0].colorbar.tickvals[-1] == scales[0].cmax


def test_layers_of_a_metric_share_one_scale():
    flow = metric_flow()
    flow.attn[1] *= 3
    figure = head_grid(flow)
    assert {panel.coloraxis for panel in figure.data} == {"coloraxis"}
    assert figure.layout.coloraxis.cmax == float(flow.attn.abs().max())
    assert {panel.coloraxis for panel in head_grid(flow, scale="layer").data} == {"coloraxis", "coloraxis2"}


def test_colours_end_at_the_strongest_cell_unless_it_stands_alone():
    values = np.ones(1000)
    values[0] = -2.5
    assert strongest(values) == 2.5
    values[0] = -50.0
    assert strongest(values) == 3.0 and strongest(values, cut=False) == 50.0
    flow = make_flow(tokens=tuple("abcdefghijklmnopqrst"))
    flow.attn.clamp_(-1, 1)[0, 0, 3, 4] = 90.0
    figure = head_grid(flow, scale="shared")
    assert figure.layout.coloraxis.cmax == 3.0 and "colours saturate at ±3<" in _heading(figure)
    assert "colours of some panels saturate" in _heading(head_grid(flow))


def test_shares_of_totals_that_nearly_cancel_are_grey():
    flow = make_flow()
    flow.attn.abs_()
    flow.attn[1, 2, 0, 3] -= 0.87 * flow.attn[1, 2, :, 3].sum()  # now the terms are more than ten times the sum
    terms = flow.attn[1, 2, :, 3]
    assert CANCELS < float(terms.abs().sum() / terms.sum()) < 2 * CANCELS
    figure = head_grid(flow, share=True)
    grey = np.stack([np.isnan(panel.z) for panel in figure.data])
    assert grey[5, 3].all() and grey.sum() == 7
    assert "1 of 42 totals nearly cancel: shares not shown (grey)" in _heading(figure)
    assert figure.layout.plot_bgcolor != head_grid(flow).layout.plot_bgcolor
    assert "cancel" not in _heading(head_grid(flow)) + _heading(head_grid(flow, share=True, layers=[0]))
    assert "cancel" not in _heading(head_grid(flow, share=True, heads=[0, 1], tokens=[3, 4]))
    flow.attn[1, 2, :, 3] = 0
    assert "cancel" not in _heading(head_grid(flow, share=True))  # nothing is divided there


def test_a_metric_whose_change_nearly_cancels_has_no_shares():
    flow = metric_flow()
    flow.attn.abs_()
    flow.skip.abs_()
    flow.total["attn"][:] = flow.attn.sum((1, 2, 3)) + flow.skip.sum(1)
    assert "cancel" not in _heading(head_grid(flow, share=True))
    flow.total["attn"][1] *= 0.9 / CANCELS
    figure = head_grid(flow, share=True)
    assert [bool(np.isnan(panel.z).all()) for panel in figure.data] == [False] * 3 + [True] * 3
    assert "1 of 2 totals nearly cancel" in _heading(figure)


def test_the_other_maps_have_a_panel_per_layer():
    flow = make_flow()
    block, mlp = (head_grid(flow, map=name, scale="shared") for name in ("block", "mlp"))
    np.testing.assert_array_equal(block.data[1].z, flow.block[1].T.numpy())
    np.testing.assert_array_equal(mlp.data[1].z, flow.columns("mlp")[1].numpy())
    assert _alias(mlp, "yaxis", 3) == "skip" and _alias(mlp, "yaxis", 4) == "bias"


def test_many_tokens_get_thinner_labels_and_a_bounded_figure():
    figure = head_grid(make_flow(tokens=tuple(f"w{i}" for i in range(64)), n_heads=12))
    assert len(figure.layout.xaxis.tickvals) < 64 and figure.layout.width < 3000
    assert len(figure.layout.xaxis.labelalias) == 64  # the hover still knows all of them


def test_all_zero_values_can_be_drawn():
    flow = make_flow(maps=("block",))
    flow.block.zero_()
    assert head_grid(flow, map="block").layout.coloraxis.cmax == 1


def test_tokens_are_shown_as_sources_and_destinations():
    flow = make_flow(destinations=(2, 4, 6))
    figure = head_grid(flow, tokens=[4, -1, 0], scale="shared")
    panel = figure.data[4]
    np.testing.assert_array_equal(panel.z, flow.attn[1, 1][[4, 6, 0]][:, [1, 2]].T.numpy())
    assert [_alias(figure, "yaxis", place) for place in (0, 1)] == ["the", _alias(figure, "xaxis", 1)]
    # Which positions a cell means: source, destination.
    assert "(%{customdata[0]:d})" in panel.hovertemplate and "(%{customdata[1]:d})" in panel.hovertemplate
    assert panel.customdata.tolist() == [[[4, 4], [6, 4], [0, 4]], [[4, 6], [6, 6], [0, 6]]]
    mlp = head_grid(flow, map="mlp", tokens=[6, 2])
    np.testing.assert_array_equal(mlp.data[0].z, flow.columns("mlp")[0][:, [2, 0]].numpy())


def test_a_flow_is_subtracted():
    settings = {"attn_baseline": "zero", "target": "l2", "tol": 1e-3}
    flow, other = make_flow(), make_flow(seed=1, settings=settings)
    figure = head_grid(flow, minus=other, scale="shared")
    np.testing.assert_array_equal(figure.data[5].z, (flow.attn[1, 2] - other.attn[1, 2]).T.numpy())
    heading = _heading(figure)
    assert "difference of contributions" in heading and "attn baseline: itb minus zero" in heading
    assert f"gap {max(flow.worst_gap('attn'), other.worst_gap('attn')):.1e}" in heading
    assert "difference of contributions %{z" in figure.data[0].hovertemplate
    for side in (flow, other):  # no total cancels
        for tensor in (side.mlp, side.skip, side.bias):
            tensor.abs_()
    shares = head_grid(flow, minus=other, share=True, map="mlp")
    np.testing.assert_array_equal(shares.data[0].z, (flow.shares("mlp") - other.shares("mlp"))[0].numpy())
    scale = shares.layout.coloraxis
    assert scale.cmin == -scale.cmax >= -1 and "difference of shares" in scale.colorbar.title.text
    assert np.abs(head_grid(flow, minus=flow).data[0].z).max() == 0
    assert "minus another Flow of the same settings" in _heading(head_grid(flow, minus=make_flow(seed=1)))


def _heading(figure):
    return figure.layout.annotations[-3].text


@pytest.mark.parametrize(
    ("other", "arguments", "message"),
    [
        ({"tokens": tuple("abcdefg")}, {}, "minus= has other tokens"),
        ({"layers": (0, 2)}, {}, "minus= has other layers"),
        ({"destinations": (0, 1)}, {}, r"minus= has other destinations.*Flow\.select"),
        ({"n_heads": 2}, {}, r"map of shape \[2, 2, 7, 7\], not \[2, 3, 7, 7\]"),
        ({"settings": {"target": "direction"}}, {}, "target direction, not l2.*or compare shares"),
        ({"maps": ("block",)}, {}, "no 'attn' map"),
    ],
)
def test_flows_that_cannot_be_subtracted(other, arguments, message):
    with pytest.raises(InputError, match=message):
        head_grid(make_flow(), minus=make_flow(**other), **arguments)


def test_shares_of_other_targets_can_be_subtracted():
    figure = head_grid(make_flow(), minus=make_flow(settings={"target": "direction"}), share=True)
    assert "target: l2 minus direction" in _heading(figure)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [1]}, r"no layer 1: use some of \[0, 3\]"),
        ({"heads": [3]}, r"no head 3: use some of \[0, 1, 2\]"),
        ({"heads": []}, "no head is named"),
        ({"map": "attention"}, "Unknown map 'attention'"),
        ({"map": "block", "heads": [0]}, "picks panels of the 'attn' map"),
        ({"tokens": [7]}, "7 is outside the prompt's 7 tokens"),
        ({"tokens": []}, "shows nothing"),
    ],
)
def test_what_the_flow_does_not_have(arguments, message):
    with pytest.raises(InputError, match=message):
        head_grid(make_flow(), **arguments)


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("Ġcat", "·cat"),
        ("▁cat", "·cat"),
        (" a b", "·a·b"),
        ("\n\t", "↵⇥"),
        ("##ing", "\u2011ing"),
        ("###", "###"),
        ("", "∅"),
    ],
)
def test_tokens_are_shown_for_people(token, shown):
    assert show_token(token) == shown


def test_tokens_that_do_not_print_or_never_end():
    assert show_token("\x00\u200b") == "\\x00\\u200b"
    assert show_token("a" * 99, longest=5) == "aaaa…"


def test_token_text_is_never_markup(tmp_path):
    tokens = ("<b>x</b>", "a&amp;", "</script><script>alert(1)</script>", "%{z}", "x", "y", "z")
    figure = head_grid(make_flow(tokens=tokens))
    assert _alias(figure, "xaxis", 0) == "&lt;b&gt;x&lt;/b&gt;"
    assert _alias(figure, "xaxis", 1) == "a&amp;amp;"
    assert all("%{z}" not in trace.hovertemplate for trace in figure.data)
    page = write_html(figure, tmp_path / "x.html", title="</title><script>alert(2)</script>").read_text()
    assert "<script>alert(" not in page and "&lt;/title&gt;" in page


def test_page_needs_no_network(tmp_path):
    flow = make_flow()
    path = write_html([head_grid(flow, map=name) for name in flow.maps], tmp_path / "x.html")
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"<(?:script|img|iframe)[^>]*\ssrc=", page) and "<link" not in page.split("<script")[0]
    assert "cdn.plot.ly" not in page.split("<body>")[0]
    assert page.count('id="figure-') == 3 and page.count("plotly.js v") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["x.html"]


def test_same_flow_same_page(tmp_path):
    flow = make_flow()
    first = write_html(head_grid(flow), tmp_path / "a.html").read_bytes()
    assert write_html(head_grid(flow), tmp_path / "b.html").read_bytes() == first


def test_page_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        write_html(head_grid(make_flow()), tmp_path / "none" / "x.html")
    with pytest.raises(InputError, match="no figure"):
        write_html([], tmp_path / "x.html")


def test_positions_without_a_destination():
    with pytest.raises(InputError, match=r"none of this Flow's destinations \[2, 6\]"):
        head_grid(make_flow(destinations=(2, 6)), tokens=[0, 1])


def test_marks_of_whitespace_are_quiet():
    figure = head_grid(make_flow(tokens=("Ġcat", "##s", "[X]", "a", "b", "c", "d")))
    assert _alias(figure, "xaxis", 0) == "<span style='color:#6e7781'>·</span>cat"
    assert _alias(figure, "xaxis", 1) == "<span style='color:#6e7781'>\u2011</span>s"
