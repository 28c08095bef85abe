"""Figures of relevance: what is drawn is what the Relevance holds."""

import html
import re
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from relevances import PATCHES, make_relevance

import lig_lens as ll
from lig_lens.errors import InputError
from lig_lens.inputs.pictures import picture_of
from lig_lens.relevance.faithfulness.league import Curve, League, Row
from lig_lens.relevance.relevance import Relevance
from lig_lens.show.plots import (
    compare_relevance,
    deletion_curves,
    league,
    relevance_html,
    relevance_image,
    relevance_layers,
    relevance_text,
)
from lig_lens.show.plots.style import DIVERGING, diverging
from lig_lens.show.text import readable

LONG = ("[CLS]", *(f"word{'y' * (number % 9)}" for number in range(120)), "##ing", "[SEP]")
# What a method gives that has no path and nothing by layer.
SCORES = dict.fromkeys(("rolled", "token", "attention", "fused", "total", "gap", "converged", "reference"))


def scores_alone(**more: Any) -> Relevance:
    return make_relevance(scores=torch.randn(len(more.get("tokens", range(7)))), boundaries=(), **{**SCORES, **more})


def own_top(relevance: Relevance, *values: torch.Tensor) -> float:
    own = ~torch.tensor(relevance.special)
    return max(float(one[..., own].abs().max()) for one in values or [relevance.scores])


def heading(figure: go.Figure) -> str:
    notes = [figure.layout.title.text or "", *(note.text for note in figure.layout.annotations)]
    return " ".join(re.sub("<[^>]*>", " ", html.unescape(note)) for note in notes)


# Text.


def test_every_token_stands_on_its_own_colour() -> None:
    relevance = make_relevance()
    figure = relevance_text(relevance)
    own, special = figure.data
    places = [1, 2, 3, 4, 5]
    assert [datum[1] for datum in own.customdata] == places and [datum[1] for datum in special.customdata] == [0, 6]
    np.testing.assert_allclose(own.marker.color, relevance.scores[places], rtol=1e-6)
    assert list(own.text) == ["what", "a", "wonder", "ful", "film"] and list(special.text) == ["[CLS]", "[SEP]"]
    axis = figure.layout.coloraxis
    assert axis.cmax == pytest.approx(own_top(relevance)) and axis.cmin == -axis.cmax
    assert own.marker.coloraxis == "coloraxis" and [colour for _, colour in axis.colorscale] == DIVERGING
    np.testing.assert_allclose([datum[2] for datum in special.customdata], relevance.scores[[0, 6]], rtol=1e-6)
    said = heading(figure)
    for fact in ("class_logit(1) 'positive'", "ca_lig, mix 0.5", "worst gap 2.0e-04 (tol 0.001)", "from mask", "tiny"):
        assert fact in said, fact
    assert f"[CLS] {float(relevance.scores[0]):+.3g}".replace("-", "−") in said


def test_a_long_text_is_broken_between_words() -> None:
    figure = relevance_text(make_relevance(LONG))
    found = {
        datum[1]: (y, base, base + x)
        for trace in figure.data
        for datum, y, base, x in zip(trace.customdata, trace.y, trace.base, trace.x, strict=True)
    }
    width = figure.layout.xaxis.range[1]
    lines = [found[at][0] for at in range(len(LONG))]
    assert lines == sorted(lines) and len(set(lines)) > 5
    for one, other in zip(range(len(LONG) - 1), range(1, len(LONG)), strict=True):
        if found[one][0] == found[other][0]:
            assert found[one][2] <= found[other][1] + 1e-6  # side by side
    assert max(right for _, _, right in found.values()) <= width <= 860
    # A word's pieces touch.
    assert found[len(LONG) - 2][:2] == (found[len(LONG) - 3][0], pytest.approx(found[len(LONG) - 3][2]))
    assert figure.layout.height > 8 * 32


def test_letters_can_be_read_on_their_colour() -> None:
    relevance = make_relevance(scores=torch.tensor([9.0, 1.0, -1.0, 0.5, 0.0, -0.2, 9.0]))
    figure = relevance_text(relevance)
    assert list(figure.data[0].textfont.color) == ["white", "white", "#24292f", "#24292f", "#24292f"]


def test_diverging_colours_are_those_of_the_scale() -> None:
    for number, colour in enumerate(DIVERGING):
        assert diverging(number / 4 - 1) == colour
    assert diverging(7.0) == DIVERGING[-1] and diverging(-7.0) == DIVERGING[0]
    assert diverging(0.125) == "#fcebe1"  # halfway from the middle to the next


# HTML.


def test_text_as_html_can_be_copied() -> None:
    relevance = make_relevance()
    shown = relevance_html(relevance).html
    spans = re.findall(r'( ?)<span data-position="(\d+)" title="([^"]*)" style="([^"]*)">([^<]*)</span>', shown)
    assert [int(at) for _, at, *_ in spans] == list(range(7))
    copied = "".join(gap + text for gap, _, _, style, text in spans if "user-select: none" not in style)
    assert copied.strip() == "what a wonderful film"
    top = own_top(relevance)
    for _, at, title, style, _ in spans:
        score = float(relevance.scores[int(at)])
        assert title.endswith(f"({at}): {score:+.4g}".replace("-", "−"))
        if relevance.special[int(at)]:
            assert "#f3f4f6" in style
        else:
            assert f"background: {diverging(score / top)};" in style
    assert relevance._repr_html_() == shown and ll.plots.relevance_html(relevance).html == shown
    assert relevance_html([relevance, make_relevance(seed=1)]).html.count("<p ") == 2


def test_html_of_hostile_text_stays_text() -> None:
    hostile = ('<img src=x onerror="alert(1)">', "\"'&", "a\nb", "\ud83d")
    relevance = make_relevance(hostile, method="<script>", target="<b>", model_name="</p>")
    shown = relevance_html(relevance).html
    assert "<img" not in shown and "<script" not in shown and "onerror=&quot;" in shown
    assert "http" not in shown


def test_a_page_of_coloured_text(tmp_path: Any) -> None:
    path = relevance_html(make_relevance()).save(tmp_path / "a.html", title="<b>")
    page = path.read_text(encoding="utf-8")
    assert "<title>&lt;b&gt;</title>" in page and page.rstrip().endswith("</html>")


@pytest.mark.parametrize(
    "tokens, expected",
    [
        (("[CLS]", "un", "##like", "##ly", "!"), "[CLS] unlikely !"),
        (("Ġun", "likely", "Ġcat", "Ċ"), "unlikely cat↵"),
        (("▁un", "likely", "▁cat"), "unlikely cat"),
        (("un", "likely", " cat"), "unlikely cat"),
        (("", "##", "a"), " ## a"),
    ],
)
def test_text_is_put_together_as_it_was_written(tokens: tuple[str, ...], expected: str) -> None:
    assert "".join(" " * spaced + text for text, spaced in readable(tokens)) == expected


# Layers.


def test_layers_of_both_kinds_on_one_scale() -> None:
    relevance = make_relevance()
    assert relevance.rolled is not None and relevance.token is not None
    figure = relevance_layers(relevance)
    rolled, token = figure.data
    np.testing.assert_allclose(rolled.z[:2], relevance.rolled, rtol=1e-6)
    assert np.isnan(rolled.z[2]).all()  # nothing is followed back behind the last block
    np.testing.assert_allclose(token.z, relevance.token, rtol=1e-6)
    assert figure.layout.coloraxis.cmax == pytest.approx(own_top(relevance, relevance.rolled, relevance.token))
    assert rolled.coloraxis == token.coloraxis == "coloraxis"
    assert [figure.layout.yaxis.labelalias[str(row)] for row in range(3)] == ["0", "1", "output"]
    low, high = figure.layout.yaxis.range
    assert low < high  # upwards
    (only,) = relevance_layers(relevance, "token").data
    np.testing.assert_allclose(only.z, relevance.token, rtol=1e-6)


def test_some_boundaries_alone() -> None:
    relevance = make_relevance(
        boundaries=(0, 2), token=torch.randn(2, 7), total=None, gap=None, converged=None, rolled=None
    )
    assert relevance.token is not None
    (panel,) = relevance_layers(relevance).data
    np.testing.assert_allclose(panel.z, relevance.token, rtol=1e-6)
    with pytest.raises(InputError, match="Unknown part of a Relevance 'rolled': use one of 'token'"):
        relevance_layers(relevance, ["token", "rolled"])
    with pytest.raises(InputError, match="gives one number for each position and none by layer: use relevance_text"):
        relevance_layers(scores_alone())


# Several methods.


def test_methods_stand_in_rows_with_their_own_colours() -> None:
    several = [make_relevance(), make_relevance(seed=1, scores=torch.arange(7.0) * 100), make_relevance(seed=2)]
    figure = compare_relevance(several, names=["one", "two", "three"])
    (panel,) = figure.data
    for row, one in enumerate(several):
        expected = (one.scores / own_top(one)).double().numpy()
        np.testing.assert_allclose(panel.z[row, 1:6], expected[1:6], rtol=1e-6)
        assert np.isnan(panel.z[row, [0, 6]]).all()
        told = [float(note.removeprefix("relevance ").replace("−", "-")) for note in panel.hovertext[row]]
        np.testing.assert_allclose(told, one.scores, rtol=1e-3)
    assert [figure.layout.yaxis.labelalias[str(row)] for row in range(3)] == ["one", "two", "three"]
    (panel,) = compare_relevance(several, special=True).data
    assert panel.z[1, 6] == pytest.approx(6 / 5)
    assert "special tokens grey" in heading(figure)


def test_rows_are_named_by_what_differs() -> None:
    def asked(**parameters: Any) -> Relevance:
        return make_relevance(settings={"parameters": parameters, "baseline": "mask"})

    several = [asked(mix=0.1, keep="signed"), asked(mix=0.2, keep="signed"), make_relevance(method="rollout")]
    figure = compare_relevance(several)
    names = [figure.layout.yaxis.labelalias[str(row)] for row in range(3)]
    assert names == ["ca_lig, mix 0.1", "ca_lig, mix 0.2", "rollout"]
    alike = compare_relevance([asked(mix=0.1), asked(mix=0.1)]).layout.yaxis.labelalias
    assert [alike["0"], alike["1"]] == ["ca_lig (1)", "ca_lig (2)"]


def test_what_cannot_be_compared_is_named() -> None:
    with pytest.raises(InputError, match=r"are of different prompts, .*'other words'"):
        compare_relevance([make_relevance(), make_relevance(("other", "words"))])
    with pytest.raises(InputError, match="1 names for 2 Relevances"):
        compare_relevance([make_relevance(), make_relevance()], names=["a"])
    with pytest.raises(InputError, match="compare_relevance: got none: give a Relevance"):
        compare_relevance([])


# Images.


def of_image(seed: int = 0, image: int = 0) -> Relevance:
    picture = picture_of(torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(image)))
    return make_relevance(PATCHES, seed, settings={"pixels": {"grid": [2, 3], "image": picture}, "baseline": "zero"})


def test_patches_over_their_image() -> None:
    relevance = of_image()
    figure = relevance_image(relevance)
    image, panel = figure.data
    assert np.isnan(image.z).all() and len(figure.layout.images) == 2
    np.testing.assert_allclose(panel.z, relevance.scores[1:].reshape(2, 3), rtol=1e-6)
    assert figure.layout.coloraxis.cmax == pytest.approx(own_top(relevance))
    (caption,) = (note.text for note in figure.layout.annotations if "patches" in note.text and "ca_lig ·" in note.text)
    assert f"patches {float(relevance.scores[1:].sum()):+.3g}".replace("-", "−") in caption
    assert f"{float(relevance.scores[0]):+.3g}".replace("-", "−") in caption  # [CLS], apart


def test_layers_and_methods_over_an_image() -> None:
    relevance = of_image()
    assert relevance.token is not None
    _, first, second = relevance_image(relevance, layers=[2, 0], part="token").data
    np.testing.assert_allclose(first.z, relevance.token[2, 1:].reshape(2, 3), rtol=1e-6)
    np.testing.assert_allclose(second.z, relevance.token[0, 1:].reshape(2, 3), rtol=1e-6)
    several = [relevance, of_image(1)]
    figure = relevance_image(several)
    for panel, one, axis in zip(figure.data[1:], several, ("coloraxis", "coloraxis2"), strict=True):
        np.testing.assert_allclose(panel.z, one.scores[1:].reshape(2, 3), rtol=1e-6)
        assert figure.layout[panel.coloraxis].cmax == pytest.approx(own_top(one)) and panel.coloraxis == axis
    with pytest.raises(InputError, match="this Relevance has no layer 7: use some of"):
        relevance_image(relevance, layers=[7])
    with pytest.raises(InputError, match="layers goes with one Relevance"):
        relevance_image(several, layers=[0])


def test_two_images_are_two_prompts() -> None:
    for draw in (compare_relevance, relevance_image):
        assert draw([of_image(), of_image(1)]).data
        with pytest.raises(InputError, match="different prompts, whose tokens are alike, but not the pixels"):
            draw([of_image(), of_image(1, image=1)])
    bytes_of = [make_relevance(("\ufffd",), settings={"token_ids": [number]}) for number in (3, 4)]
    with pytest.raises(InputError, match=r"relevance_html: .* whose tokens are alike, but not the token ids"):
        relevance_html(bytes_of)


def test_texts_and_images_have_figures_of_their_own() -> None:
    with pytest.raises(InputError, match="are no patches of an image: use relevance_text"):
        relevance_image(make_relevance())
    for draw in (relevance_text, relevance_html):
        with pytest.raises(InputError, match="is of an image, with patches as positions: use relevance_image"):
            draw(of_image())
    assert of_image()._repr_html_() is None


# Faithfulness.


def curve(seed: int) -> tuple[np.ndarray[Any, Any], ...]:
    fractions = np.linspace(0, 1, 6)
    mean = np.random.default_rng(seed).random(6)
    return fractions, mean, mean - 0.1, mean + 0.2


def test_curves_are_the_arrays() -> None:
    curves = {name: curve(seed) for seed, name in enumerate(("ca_lig", "random", "ig"))}
    figure = deletion_curves(curves)
    bands, lines = figure.data[::2], figure.data[1::2]
    for band, line, (name, (fractions, mean, low, high)) in zip(bands, lines, curves.items(), strict=True):
        assert line.name == name
        np.testing.assert_array_equal(line.x, fractions)
        np.testing.assert_array_equal(line.y, mean)
        np.testing.assert_array_equal(line.customdata, np.stack([low, high], -1))
        np.testing.assert_array_equal(band.y, np.concatenate([high, low[::-1]]))
        assert band.fillcolor == line.line.color
    assert len({line.line.color for line in lines}) == 3 and lines[1].line.color == "#6e7781"
    bottom, top = figure.layout.yaxis.range
    assert bottom < min(c[2].min() for c in curves.values()) and top > max(c[3].max() for c in curves.values())


def test_names_beside_curves_cover_no_other() -> None:
    curves = {
        f"method {number}": (f, m + 1e-3 * number, lo, hi) for number, (f, m, lo, hi) in enumerate([curve(0)] * 12)
    }
    figure = deletion_curves(curves, floor=None)
    per_pixel = np.diff(figure.layout.yaxis.range)[0] / 340
    heights = sorted(note.y / per_pixel - note.ay for note in figure.layout.annotations if note.showarrow)
    assert len(heights) == 12 and np.diff(heights).min() >= 14 - 1e-6
    kinds = {(line.line.color, line.line.dash) for line in figure.data[1::2]}
    assert len(kinds) == 12


@pytest.mark.parametrize(
    "curves, message",
    [
        ({}, "no curve"),
        ({"a": curve(0)[:3]}, "'a' has shapes .*: give fractions, means, and lower and upper"),
        ({"a": ([0, 1], [1, 1, 1], [0, 0], [1, 1])}, "of one length"),
        ({"a": ([0, 1], [1, np.nan], [0, 0], [1, 1])}, "not finite"),
        ({"a": (["x"], ["y"], ["z"], ["w"])}, "is no numbers"),
    ],
)
def test_curves_that_cannot_be_drawn(curves: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        deletion_curves(curves)


SCORED = {
    "AOPC": {"a": (0.5, 0.4, 0.6), "b": (0.55, 0.5, 0.6), "c": (0.1, 0.05, 0.2), "random": (0.0, -0.1, 0.1)},
    "deletion": {"a": (0.2, 0.1, 0.3), "b": (0.5, 0.45, 0.6), "random": (0.9, 0.8, 1.0)},
}


def test_the_league_marks_the_best_of_each_measure() -> None:
    figure = league(SCORED, {"deletion": "lower"})
    order = [re.sub("<[^>]*>", "", name) for name in figure.layout.yaxis.ticktext]
    assert order == ["a", "b", "c", "random"]  # a is best or as good as that twice
    for trace, row in zip(figure.data, SCORED.values(), strict=True):
        names = [datum[0] for datum in trace.customdata]
        assert set(names) == set(row) and [order.index(name) for name in names] == list(trace.y)
        for at, name in enumerate(names):
            value, low, high = row[name]
            assert trace.x[at] == value
            assert trace.x[at] + trace.error_x.array[at] == pytest.approx(high)
            assert trace.x[at] - trace.error_x.arrayminus[at] == pytest.approx(low)
    fills = [dict(zip([d[0] for d in t.customdata], t.marker.color, strict=True)) for t in figure.data]
    filled, pale, empty = "#0072b2", "#9ecae1", "white"
    assert fills[0] == {"b": filled, "a": pale, "c": empty, "random": empty}
    assert fills[1] == {"a": filled, "b": empty, "random": empty}
    titles = [note.text for note in figure.layout.annotations][:2]
    assert titles == ["<b>AOPC</b>", "<b>deletion</b>"]
    assert figure.layout.xaxis.title.text == "higher is better →"
    assert figure.layout.xaxis2.title.text == "← lower is better"
    assert [line.x0 for line in figure.layout.shapes] == [0.0, 0.9]  # random, in each panel


@pytest.mark.parametrize(
    "scores, better, message",
    [
        ({}, None, "no measure"),
        ({"m": {}}, None, "one without methods"),
        ({"m": {"a": (0.5, 0.6, 0.7)}}, None, "give a value and the lower and upper ends"),
        ({"m": {"a": (0.5, 0.4)}}, None, "'a' has"),
        (SCORED, {"AOPC": "up"}, "say 'higher' or 'lower'"),
        (SCORED, {"other": "lower"}, "say 'higher' or 'lower'"),
    ],
)
def test_leagues_that_cannot_be_drawn(scores: Any, better: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        league(scores, better)


# Of 4 inputs. That "b" is below "a" is the same in each, though their intervals overlap.
PAIRED = np.array([0.1, 0.4, 0.6, 0.9])
NAN = float("nan")
ROWS = [
    Row("a", "mask", "aopc", "higher", tuple(PAIRED)),
    Row("b", "mask", "aopc", "higher", tuple(PAIRED - 0.05)),
    Row("random", "mask", "aopc", "higher", tuple(PAIRED[::-1] - 0.02)),
    Row("a", "mask", "deletion", "lower", tuple(PAIRED)),
    Row("b", "mask", "deletion", "lower", tuple(PAIRED - 0.05)),
    Row("random", "mask", "deletion", "lower", (NAN,) * 4),
    Row("a", None, "runtime", "lower", (2.0, 2.1, 2.2, 2.3)),
    Row("b", None, "runtime", "lower", (1.0, 1.1, 1.2, 1.3)),
]
ALONG = ((0.0, 0.5, 1.0), (0.9, 0.5, 0.4), (0.8, 0.4, 0.3), (1.0, 0.6, 0.5))
CURVES = [Curve(name, "mask", kind, *ALONG) for name in ("a", "b") for kind in ("removed", "kept")]


def a_league(*more: Row) -> League:
    return League(rows=(*ROWS, *more), curves=tuple(CURVES), inputs=("one", "two", "three", "four"), model_name="tiny")


def test_of_a_league_the_differences_by_input_say_what_is_as_good() -> None:
    found = a_league()
    low, high = ({one.method: one for one in found.table if one.measure == "aopc"}[name] for name in "ba")
    assert low.high > high.low  # what does not look at pairs calls them alike
    figure = league(found)
    fills = [dict(zip([d[0] for d in t.customdata], t.marker.color, strict=True)) for t in figure.data]
    filled, pale, empty = "#0072b2", "#9ecae1", "white"
    assert fills == [
        {"a": filled, "b": empty, "random": pale},
        {"b": filled, "a": empty},
        {"b": filled, "a": empty},
    ]
    for trace, measure in zip(figure.data, ("aopc", "deletion", "runtime"), strict=True):
        means = {one.method: one.mean for one in found.table if one.measure == measure}
        assert dict(zip([d[0] for d in trace.customdata], trace.x, strict=True)) == {
            name: mean for name, mean in means.items() if np.isfinite(mean)
        }
    assert [axis.title.text[0] for axis in (figure.layout.xaxis, figure.layout.xaxis2)] == ["h", "←"]
    assert "tiny · 4 inputs · removed: mask" in heading(figure) and "input by input" in heading(figure)
    titles = [note.text for note in league(found, measures=["runtime", "aopc"]).layout.annotations]
    assert titles == ["<b>runtime</b>", "<b>aopc</b>"]


def test_curves_of_a_league() -> None:
    for kind in ("removed", "kept"):
        figure = deletion_curves(a_league(), kind=kind)
        assert [line.name for line in figure.data[1::2]] == ["a", "b"]
        np.testing.assert_array_equal(figure.data[1].y, ALONG[1])
        assert figure.layout.xaxis.title.text == f"share of tokens {kind}"
        assert figure.layout.yaxis.title.text == "probability of the class"
        assert "tiny · 4 inputs · removed: mask" in heading(figure)


def test_what_a_league_does_not_have_is_named() -> None:
    two = a_league(Row("a", "unk", "aopc", "higher", (0.1,) * 4))
    for draw in (league, deletion_curves):
        with pytest.raises(InputError, match="has several replacers, mask, unk: name one"):
            draw(two)
        with pytest.raises(InputError, match="Unknown replacer 'pad'"):
            draw(two, replacer="pad")
    assert len(league(two, replacer="unk").data) == 2
    with pytest.raises(InputError, match="the League has no curve"):
        deletion_curves(two, replacer="unk")
    with pytest.raises(InputError, match="Unknown kind of curves 'left'"):
        deletion_curves(two, kind="left")
    with pytest.raises(InputError, match="Unknown measure 'best'"):
        league(a_league(), measures=["best"])
    with pytest.raises(InputError, match="better is given beside a League"):
        league(a_league(), {"aopc": "higher"})
    with pytest.raises(InputError, match="choose from a League"):
        league(SCORED, measures=["AOPC"])
    with pytest.raises(InputError, match="choose from a League"):
        deletion_curves({"a": curve(0)}, replacer="mask")


# Lines.


def test_a_table_of_scores() -> None:
    relevance = make_relevance()
    lines = relevance.table().splitlines()
    assert lines[0] == "7 tokens, 2 layers of tiny" and lines[1] == "[CLS] what a wonder ‑ful film [SEP]"
    assert "class_logit(1) 'positive' −0.5 → +1.25, from mask" in lines[2] and "worst gap 2.0e-04" in lines[2]
    rows = [line.split() for line in lines[5:]]
    assert [int(row[0]) for row in rows] == list(range(7))
    np.testing.assert_allclose([float(row[2]) for row in rows], relevance.scores, rtol=5e-3)
    short = relevance.table(2).splitlines()
    assert sorted(int(line.split()[0]) for line in short[5:7]) == sorted(at for at, _, _ in relevance.top(2))
    assert short[-1] == "5 positions with smaller scores not shown."
    both = ll.relevance_table([relevance, make_relevance(seed=1, method="rollout")]).splitlines()
    assert both[5].split() == ["position", "token", "ca_lig", "rollout"]
    with pytest.raises(InputError, match="k is 0"):
        relevance.table(0)
