"""Figures of some layers, heads and tokens show these, and nothing of the others."""

import dataclasses

import numpy as np
import pytest
import torch
from flows import make_flow
from plot_cases import make_effects, metric_flow

from lig_lens.errors import InputError
from lig_lens.show.plots import agreement_scatter, consistency_plot, gap_map, importance

WORDS = ("a", "b", "c", "d")


def test_gaps_of_some_heads_and_tokens():
    flow = make_flow(layers=(3, 4))
    figure = gap_map(flow, "attn", layers=[4], heads=[2, 0], tokens=[5, 1])
    expected = flow.gap["attn"][1][[2, 0]][:, [5, 1]]
    found = 10 ** np.asarray(figure.data[0].z, dtype=float)
    np.testing.assert_allclose(found, expected.amax(0, keepdim=True).numpy(), rtol=1e-4)
    worst = [f"L4H{(2, 0)[int(number)]}" for number in expected.argmax(0)]
    assert all(name in note for name, note in zip(worst, figure.data[0].hovertext[0], strict=True))
    crosses = [trace for trace in figure.data if trace.name == "not converged"]
    missed = (~flow.converged["attn"][1][[2, 0]][:, [5, 1]]).any(0).nonzero().flatten().tolist()
    assert (list(crosses[0].x) if crosses else []) == missed
    with pytest.raises(InputError, match="those of whole destinations: leave out heads"):
        gap_map(flow, "mlp", heads=[0])
    with pytest.raises(InputError, match="whole layers: leave out tokens and heads"):
        gap_map(metric_flow(WORDS), tokens=[0])
    with pytest.raises(InputError, match="no head 9"):
        gap_map(flow, "attn", heads=[9])


def test_importance_at_some_destinations():
    flow = make_flow(layers=(3, 4))
    figure = importance(flow, tokens=[2, -1], share=True)
    moved = flow.total["attn"][:, :, [2, 6]].mean(2)
    np.testing.assert_allclose(figure.data[0].z, (moved / moved.sum(1, keepdim=True)).numpy(), rtol=1e-5)
    assert "2 of 7 destinations" in figure.layout.annotations[0].text
    metric = metric_flow(WORDS)
    figure = importance(metric, tokens=[1, 3])
    np.testing.assert_allclose(figure.data[0].z, metric.attn[..., [1, 3]].sum((2, 3)).numpy(), rtol=1e-5)
    np.testing.assert_allclose(np.ravel(figure.data[1].z), metric.skip[:, [1, 3]].sum(1).numpy(), rtol=1e-5)


def test_consistency_of_some_layers():
    result = make_flow(layers=(3, 4, 5)).consistency()
    figure = consistency_plot(result, layers=[5, 3])
    (line,) = (trace for trace in figure.data if trace.mode == "lines+markers")
    assert [round(x) for x in line.x] == [3, 5]
    np.testing.assert_allclose(line.y, result.pearson[[0, 2]].nanquantile(0.5, dim=1).numpy(), rtol=1e-5)
    with pytest.raises(InputError, match="no layer 9"):
        consistency_plot(result, layers=[9])


def test_scatter_of_some_heads_and_positions():
    effects = make_effects("heads_by_pos", WORDS, layers=(3, 4))
    score = dataclasses.replace(effects, values=torch.randn(effects.values.shape, generator=torch.manual_seed(5)))
    figure = agreement_scatter(score, effects, layers=[4], heads=[2, 1], tokens=[0, -1])
    kept = [(1, head, pos) for head in (1, 2) for pos in (0, 3)]
    np.testing.assert_allclose(figure.data[0].y, [float(effects.values[place]) for place in kept], rtol=1e-6)
    np.testing.assert_allclose(figure.data[0].x, [float(score.values[place]) for place in kept], rtol=1e-6)
    assert "4 heads at positions measured" in figure.layout.title.text
    pearson = np.corrcoef(figure.data[0].x, figure.data[0].y)[0, 1]
    assert f"Pearson {pearson:.2f}" in figure.layout.title.text
    with pytest.raises(InputError, match="agreement_scatter: tokens="):
        agreement_scatter(make_effects("heads", WORDS), make_effects("heads", WORDS), tokens=[0])
    edges = make_effects("edges", WORDS, layers=(3, 4))
    assert len(agreement_scatter(edges, edges, tokens=[0, 2]).data[0].x) == 2 * 3 * 2 * 2
