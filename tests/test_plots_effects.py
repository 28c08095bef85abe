"""effects_map and agreement_scatter: selections, and what the hover says."""

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from plot_cases import make_effects, metric_flow

from lig_lens.errors import InputError
from lig_lens.show.plots import agreement_scatter, effects_map
from lig_lens.show.plots.labels import place_names
from lig_lens.show.text import MINUS

WORDS = ("a", "b", "c", "d")


def test_layers_and_heads_are_chosen():
    effects = make_effects("heads", WORDS, layers=(3, 4, 5))
    figure = effects_map(effects, layers=[5, 3], heads=[2, 1])
    np.testing.assert_array_equal(figure.data[0].z, effects.values[[2, 0]][:, [2, 1]].numpy())
    assert figure.layout.yaxis.ticktext == ("5", "3") and figure.layout.xaxis.ticktext == ("2", "1")
    assert figure.layout.yaxis.labelalias == {"0": "5", "1": "3"}
    scale = figure.layout.coloraxis
    assert scale.cmin == -scale.cmax == figure.data[0].zmin == -float(np.abs(figure.data[0].z).max())


def test_the_map_says_what_a_positive_value_means():
    effects = dataclasses.replace(
        make_effects("heads", WORDS), measures="metric lost: clean - ablated", reference=3.25, name="mean ablation"
    )
    figure = effects_map(effects)
    expected = f"metric lost: clean {MINUS} ablated"
    assert figure.layout.coloraxis.colorbar.title.text.strip() == expected == figure.data[0].name
    assert "%{fullData.name}" in figure.data[0].hovertemplate
    facts = figure.layout.annotations[0].text
    assert expected in facts and "metric without any intervention +3.25" in facts
    scatter = agreement_scatter(make_effects("heads", WORDS, seed=1), effects)
    assert scatter.layout.yaxis.title.text == expected == scatter.data[0].name
    assert scatter.layout.xaxis.title.text.endswith("(score)")


def test_heads_at_chosen_positions():
    effects = make_effects("heads_by_pos", WORDS)
    figure = effects_map(effects, layers=[1], heads=[0, 2], tokens=[-1, 0])
    np.testing.assert_array_equal(figure.data[0].z, effects.values[1][[0, 2]][:, [3, 0]].numpy())
    assert figure.layout.yaxis.ticktext == ("L1H0", "L1H2")
    assert [label[0] for label in figure.layout.xaxis.ticktext] == ["d", "a"]


def test_the_strongest_edge_between_chosen_tokens():
    effects = make_effects("edges", WORDS)
    figure = effects_map(effects, tokens=[1, 3])
    inner = effects.values[:, :, [1, 3]][..., [1, 3]].flatten(2)
    best = inner.abs().argmax(-1)
    np.testing.assert_array_equal(figure.data[0].z, inner.gather(2, best[..., None])[..., 0].numpy())
    src, dst = divmod(int(best[1, 2]), 2)
    assert (
        figure.data[0].hovertext[1][2] == f"{WORDS[1 + 2 * src]} ({1 + 2 * src}) → {WORDS[1 + 2 * dst]} ({1 + 2 * dst})"
    )


def test_what_was_not_measured_is_said():
    effects = make_effects("positions", WORDS)
    effects.values[0, 2] = math.nan
    figure = effects_map(effects)
    assert math.isnan(figure.data[0].z[0, 2]) and "1 not measured (grey)" in figure.layout.annotations[0].text
    assert figure.data[0].text[0][2] == ""
    effects.values[:] = math.nan
    assert effects_map(effects).layout.coloraxis.cmax == 1


def test_heads_at_positions_of_many_layers_stay_bounded():
    effects = make_effects("heads_by_pos", tuple("w" * 9 for _ in range(64)), layers=tuple(range(20)), n_heads=8)
    figure = effects_map(effects)
    assert figure.layout.height < 2200 and len(figure.layout.yaxis.ticktext) <= 160


@pytest.mark.parametrize(
    ("on", "arguments", "message"),
    [
        ("heads", {"layers": [7]}, r"layers=\[7\]: use some of \[0, 1\], which has no 7"),
        ("heads", {"heads": []}, "heads=.*leave it out for all"),
        (
            "heads",
            {"tokens": [1]},
            r"tokens=\[1\] selects on an axis that effects on heads do not have \(layer, head\)",
        ),
        ("positions", {"heads": [1]}, "effects on positions do not have"),
        ("edges", {"tokens": [4]}, "4 is outside the prompt's 4 tokens"),
    ],
)
def test_selections_that_do_not_fit(on, arguments, message):
    with pytest.raises(InputError, match=message):
        effects_map(make_effects(on, WORDS), **arguments)


def test_scatter_says_how_many_and_of_what():
    effects = make_effects("heads", WORDS)
    figure = agreement_scatter(make_effects("heads", WORDS, seed=1), effects, labels=2)
    assert "6 heads measured" in figure.layout.title.text and "&lt;b&gt;m&lt;/b&gt;" in figure.layout.title.text
    torch.testing.assert_close(torch.tensor(figure.data[0].y), effects.values.flatten().double())
    assert sum(bool(text) for text in figure.data[0].text) <= 2
    assert not figure.layout.shapes  # a score of another kind need not have the metric's unit


def test_scatter_says_how_many_lie_near_0():
    values = torch.tensor([[3.0, 0.002, 0.0], [0.5, 0.0, 4.0]])
    effects = dataclasses.replace(make_effects("heads", WORDS), values=values)
    score = dataclasses.replace(effects, values=torch.tensor([[1.0, 0.005, 0.1], [0.0, 0.0, 1.0]]))
    facts = agreement_scatter(score, effects).layout.title.text
    assert "2 of 6 near 0 (within 1% of the largest on both axes)" in facts


def test_names_cover_no_dot_no_other_name_and_no_line():
    generator = np.random.default_rng(0)
    points = generator.uniform(0, 500, (60, 2))
    names = [f"L{number}H1 at ' to'" for number in range(60)]
    line = np.stack([np.linspace(0, 500, 200)] * 2, -1)
    placed = place_names(points, names, range(60), 15, line, (500.0, 500.0))
    assert 5 < len(placed) <= 15 and len(set(placed.values())) > 1
    centres = {"left": -1, "center": 0, "right": 1, "bottom": -1, "middle": 0, "top": 1}
    boxes = {}
    for place, side in placed.items():
        upright, along = side.split()
        half = np.array([2.8 * len(names[place]), 6.5])
        middle = points[place] + np.array([centres[along], centres[upright]]) * (half + 5)
        assert (middle - half > 0).all() and (middle + half < 500).all()
        for others in (points, line):
            assert not (np.abs(others - middle) < half).all(1).any()
        boxes[place] = middle, half
    for one, (middle, half) in boxes.items():
        for other, (there, size) in boxes.items():
            assert one == other or (np.abs(middle - there) >= half + size).any()


def test_a_dot_without_room_leaves_its_turn_to_the_next():
    crowd = np.array([[x, y] for x in range(200, 260, 4) for y in range(200, 260, 4)], dtype=float)
    points = np.concatenate([[[230.0, 230.0], [400.0, 400.0]], crowd])
    names = ["name"] * len(points)
    arguments = (np.empty((0, 2)), (600.0, 500.0))
    assert place_names(points, names, [0, 1], 1, *arguments) == {1: "middle right"}
    assert place_names(points, names, [0, 1], 0, *arguments) == {}


def test_scatter_says_how_well_they_agree(monkeypatch):
    values = torch.tensor([[3.0, 1.0, -2.0], [0.5, 0.25, 4.0]])
    effects = dataclasses.replace(make_effects("heads", WORDS), values=values)
    score = dataclasses.replace(effects, values=-(values**3))
    pearson = np.corrcoef(values.flatten().numpy(), -(values**3).flatten().numpy())[0, 1]
    assert f"Spearman -1.00, Pearson {pearson:.2f}" in agreement_scatter(score, effects).layout.title.text
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert "Spearman" not in agreement_scatter(score, effects).layout.title.text


def test_scatter_of_contributions_to_the_metric_has_a_line_of_equal_values():
    flow = metric_flow(WORDS, metric="logit difference")
    effects = dataclasses.replace(make_effects("heads", WORDS), values=flow.attn.sum((2, 3)) / 2, metric=flow.metric)
    figure = agreement_scatter(flow, effects)
    (line,) = figure.layout.shapes
    assert (line.x0, line.x1) == (line.y0, line.y1) and line.x0 <= 0 <= line.x1
    assert line.x1 == pytest.approx(max(0.0, float(effects.values.max()))) and "dashed line" in figure.layout.title.text
