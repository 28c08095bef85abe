"""Contributions at one point of a path, against finite differences of attention as it is said to be.

Kinds of attention that no model here combines: vectors of relative positions, norms before and after biases.
"""

from dataclasses import replace

import pytest
import torch
from at_blocks import values_at
from test_coverage import bridge_in
from torch import Tensor

from lig_lens.blocks.formula import FormulaValues
from lig_lens.blocks.pairing import Pairing, per_query_head
from lig_lens.blocks.relative import Relative
from lig_lens.integrate.attention_path import AttentionPath, OwnPaths, SharedPath

IDS = [5, 12, 30, 7, 22]
AT, STEP = 0.37, 1e-5


def attention(relative: bool) -> FormulaValues:
    """Of a block with a bias before the norms of its queries and keys, in float64."""
    values = values_at(bridge_in("stablelm_normed", torch.float64), IDS, [1])[1].heads.closed
    if not relative:
        return values
    generator, places = torch.Generator().manual_seed(0), torch.arange(len(IDS))
    n_heads, _, d_head = values.formula.b_q.shape
    vectors = torch.randn(2, n_heads, 2 * len(IDS), d_head, generator=generator, dtype=torch.float64)
    apart = len(IDS) + places[:, None] - places
    return replace(values, pairing=Pairing(Relative(*vectors, apart, 2 * len(IDS) - apart)))


def heads_of(values: FormulaValues, resid: Tensor) -> Tensor:
    """Head outputs, [head dst d_value]."""
    tokens, formula = values.tokens(resid), values.formula
    q = sum(part.divided for part in tokens.q) + formula.b_q
    k = sum(part.divided for part in tokens.k) + formula.b_k
    scores = formula.score.scale * values.pairing.products(q, k) + values.bias
    return scores.softmax(-1) @ per_query_head(tokens.v.divided + formula.b_v, formula.n_heads)


@pytest.mark.parametrize("relative", [False, True], ids=["without positions", "relative positions"])
@pytest.mark.parametrize("own", [False, True], ids=["shared path", "itb"])
def test_contributions_are_derivatives_of_attention(own: bool, relative: bool) -> None:
    values, every = attention(relative), torch.arange(len(IDS))
    end, generator = values.call.resid_pre, torch.Generator().manual_seed(1)
    start = torch.randn(end.shape, generator=generator, dtype=torch.float64)
    path: AttentionPath = OwnPaths(values, every) if own else SharedPath(values, every, values.tokens(start))
    gradient = torch.randn(path.z_start.shape, generator=generator, dtype=torch.float64)
    found = torch.zeros(values.formula.n_heads, len(IDS), len(IDS), dtype=torch.float64)
    moved = torch.zeros_like(path.z_start)
    for panels in path.work(every, torch.full((len(IDS), 1), AT), None, 10**6):
        at, dst = path.move(panels), panels.dst[0]
        moved[:, dst] = at.displacement[:, :, 0]
        found[:, dst, : panels.n_src] = at.contributions(gradient[:, dst, None])[:, :, 0]
    expected = torch.zeros_like(found)
    for dst in every:
        first = end[dst].expand_as(end) if own else start
        here = torch.lerp(first, end, torch.tensor(AT).double())
        torch.testing.assert_close((path.z_start + moved)[:, dst], heads_of(values, here)[:, dst], rtol=0, atol=1e-6)
        for src in every:
            step = torch.zeros_like(end)
            step[src] = STEP * (end - first)[src]
            change = heads_of(values, here + step) - heads_of(values, here - step)
            expected[:, dst, src] = (gradient * change).sum(-1)[:, dst] / (2 * STEP)
    assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
