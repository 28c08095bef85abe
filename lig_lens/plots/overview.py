"""A Flow at a glance: how much each head matters, and where the integral is least certain."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor

from lig_lens.axes import axis_places
from lig_lens.errors import check_choice
from lig_lens.flow import Flow
from lig_lens.plots.matrix import (
    PRINTED,
    ROOMY,
    Axis,
    Panel,
    Scale,
    draw,
    printed,
    row_cells,
    share_scale,
    signed_scale,
)
from lig_lens.plots.select import describe, metric_change, token_axis, unit
from lig_lens.plots.style import INK, MINUS, TIMES, short

_DECADES = 5  # that a scale of gaps spans at most


@dataclass(frozen=True)
class _Table:
    """Numbers of heads, [layer, head], and what stands `beside` them, [layer, ...], in words of the figure."""

    heads: Tensor
    rest: Tensor
    beside: tuple[str, ...]
    title: str
    unit: str
    facts: tuple[str, ...]
    percent: bool = True
    signed: bool = False


def importance(
    flow: Flow,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    map: str = "attn",
    share: bool = False,
) -> go.Figure:
    """How much each head matters: layers upwards, heads across. The subtitle says what is drawn.

    - With a metric: the sum of `attn` over sources and destinations, signed, in the metric's units, and beside the
      heads what passes them by (the sum of `skip`), so that a layer adds up to the metric's change. With `share`
      divided by that change.
    - Without, map `mlp`: |mlp| of a head as a share of the absolute values of all heads, skip and bias, mean over
      destinations, with `share` or without.
    - Without, map `attn`: how far a head's output moves (`total["attn"]`, mean over destinations), relative to the
      layer's largest, or with `share` to the sum over the layer's heads.

    Colours end at the strongest head; what stands beside the heads may lie beyond, and has its number in the cell.

    Args:
        flow: where the numbers come from.
        layers: block numbers, from the bottom upwards; all by default.
        heads: head numbers, in the order to draw; all by default.
        map: attn or mlp.
        share: see above.

    Raises:
        InputError: a map, layer or head that the Flow does not have.
    """
    check_choice("map", map, ("attn", "mlp"))
    flow.columns(map)
    if flow.metric is not None:
        table = _of_metric(flow, share)
    else:
        table = _of_output(flow) if map == "mlp" else _of_movement(flow, share)
    layers = flow.layers if layers is None else tuple(layers)
    rows, n_heads = axis_places("layer", layers, flow.layers), table.heads.shape[1]
    columns = axis_places("head", range(n_heads) if heads is None else heads, range(n_heads))
    of_heads, rest = table.heads[rows][:, columns].numpy(), table.rest[rows].numpy()
    apart = np.full((len(rows), 1 if table.beside else 0), np.nan, dtype=of_heads.dtype)
    if table.signed or bool((of_heads < 0).any()):
        scale = signed_scale(table.unit, of_heads, percent=table.percent)
    else:
        scale = share_scale(table.unit, of_heads)
    labels = [str(head) for head in columns] + ([""] if table.beside else []) + list(table.beside)
    names = [f"head {head}" for head in columns] + labels[len(columns) :]
    roomy = len(labels) <= 20
    values = np.concatenate([of_heads, apart, rest], 1)
    texts = printed(values, table.percent, table.signed, digits=3)
    if not roomy:
        texts = [[""] * len(columns) + row[len(columns) :] for row in texts]
    number = ("%{z:+.2%}" if table.signed else "%{z:.2%}") if table.percent else "%{z:+.4g}"
    figure = draw(
        [
            Panel(
                values,
                scale,
                value=f"{table.unit}: {number}",
                texts=texts,
                notes=[[f"<b>layer {layer}, {name.replace('<br>', ' ')}</b>" for name in names] for layer in layers],
            )
        ],
        Axis("layer", [str(layer) for layer in layers]),
        Axis("head", labels),
        f"<b>{table.title}</b>",
        [*describe(flow, target=False), *table.facts],
        cell=(ROOMY if roomy else 26.0, 26.0),
        upwards=True,
    )
    return figure.update_layout(plot_bgcolor="white")  # between heads and the rest is nothing, not a missing value


def _of_metric(flow: Flow, share: bool) -> _Table:
    past = flow.skip if flow.skip is not None else torch.zeros(len(flow.layers), 1)
    heads, rest = flow.columns("attn").sum((2, 3)), past.sum(1, keepdim=True)
    if share:
        total = heads.sum(1, keepdim=True) + rest
        heads, rest = _divided(heads, total), _divided(rest, total)
    title = f"What each head gives to {short(flow.metric or '', 40)}"
    change = f"the metric's change{metric_change(flow)}"
    facts = (
        "sum over sources and destinations" + (f", divided by {change}" if share else ", in the metric's units"),
        f"all heads of a layer and what goes past them add up to {'100%' if share else change}",
    )
    return _Table(
        heads, rest, ("past<br>heads",), title, "share" if share else unit(flow), facts, percent=share, signed=True
    )


def _of_output(flow: Flow) -> _Table:
    sizes = flow.columns("mlp").abs()
    shares = _divided(sizes, sizes.sum(1, keepdim=True)).mean(2)
    facts = (
        "|head| / (sum over heads |head| + |skip| + |bias|), mean over destinations",
        "all parts of a layer add up to 100%",
    )
    title = "How much of each block's output comes through each head"
    return _Table(shares[:, :-2], shares[:, -2:], ("skip", "bias"), title, "absolute share", facts)


def _of_movement(flow: Flow, share: bool) -> _Table:
    moved = flow.total["attn"].mean(2)
    whole = moved.sum(1, keepdim=True) if share else moved.abs().amax(1, keepdim=True)
    what = "share of the sum over the layer's heads" if share else "relative to the layer's largest"
    target = short(str(flow.settings.get("target", "the target")))
    facts = (f"L(x) {MINUS} L(x0) of {target}, mean over destinations, {what}",)
    return _Table(_divided(moved, whole), moved[:, :0], (), "How far each head's output moves", what, facts)


def _divided(part: Tensor, total: Tensor) -> Tensor:
    """Shares, 0 where there is nothing to share."""
    return torch.where(total == 0, 0.0, part / total.masked_fill(total == 0, 1.0))


def gap_map(flow: Flow, map: str | None = None, layers: Sequence[int] | None = None) -> go.Figure:
    """Where the integral is least certain: the relative completeness gap, layers upwards and destinations across.

    Of the attn map the head with the largest gap is shown; a Flow with a metric has one gap for each layer. The scale
    is logarithmic and has `tol` on it; a cross marks what has not converged (gap or a single contribution's error).

    Args:
        flow: where the gaps come from.
        map: attn, mlp or block; by default the one with the worst gap.
        layers: block numbers, from the bottom upwards; all by default.

    Raises:
        InputError: a map or layer that the Flow does not have.
    """
    map = max(flow.maps, key=flow.worst_gap) if map is None else map
    flow.columns(map)
    layers = flow.layers if layers is None else tuple(layers)
    rows = axis_places("layer", layers, flow.layers)
    gaps, missed = flow.gap[map][rows], ~flow.converged[map][rows]
    tol = flow.settings.get("tol")
    within = f"tol {tol:g}" if isinstance(tol, float) else "the tolerance"
    counted = "columns" if flow.metric is None else "layers"
    count = f"all {missed.numel():,} {counted} within {within}"
    if missed.any():
        count = f"{int(missed.sum()):,} of {missed.numel():,} {counted} miss {within} ({TIMES})"
    if flow.metric is None:
        across, cell = token_axis(flow, flow.destinations, "destination"), row_cells(gaps.shape[-1])
    else:
        across, cell = Axis("", ["all heads and destinations"]), (200.0, 26.0)
    per_head = gaps.ndim == 3
    worst = gaps.argmax(1).tolist() if per_head else None
    # As tables of layers and destinations: the gap, and how many heads have not converged.
    gaps = gaps.amax(1) if per_head else gaps.reshape(len(rows), -1)
    missed = missed.sum(1) if per_head else missed.reshape(len(rows), -1).long()
    table = [list(zip(*both, strict=True)) for both in zip(gaps.tolist(), missed.tolist(), strict=True)]
    notes = [
        [
            f"gap {gap:.2e}<br>"
            + (f"largest in head {worst[row][column]}<br>" if worst is not None else "")
            + _convergence(miss, per_head)
            for column, (gap, miss) in enumerate(line)
        ]
        for row, line in enumerate(table)
    ]
    texts = [["" if miss else _short_gap(gap) for gap, miss in line] for line in table]
    scale = _log_scale(gaps, tol if isinstance(tol, float) and tol > 0 else None)
    values = np.maximum(np.log10(np.maximum(gaps.numpy(), 1e-30)), scale.low)
    printed_texts = texts if values.shape[1] <= PRINTED else None
    figure = draw(
        [Panel(values, scale, value="", texts=printed_texts, notes=notes)],
        Axis("layer", [str(layer) for layer in layers], "layer"),
        across,
        f"<b>Completeness gaps</b> of the {map} map" + (", the worst head of each cell" if per_head else ""),
        [*describe(flow), f"|sum of contributions {MINUS} total| / |total|", count],
        cell=cell,
        upwards=True,
    )
    marked = missed.nonzero().tolist()
    if marked:
        figure.add_trace(
            go.Scatter(
                x=[column for _, column in marked],
                y=[row for row, _ in marked],
                mode="markers",
                marker={
                    "symbol": "x",
                    "size": 9 if cell[0] >= ROOMY else 7,
                    "color": INK,
                    "line": {"color": "white", "width": 1},
                },
                hoverinfo="skip",
                showlegend=False,
                name="not converged",
            )
        )
    return figure


def _short_gap(gap: float) -> str:
    return f"{gap:.0e}".replace("e-0", "e-") if gap else "0"


def _convergence(missed: int, per_head: bool) -> str:
    if not missed:
        return "converged"
    return "not converged" + (f" in {missed} head{'s' if missed > 1 else ''}" if per_head else "")


def _log_scale(gaps: Tensor, tol: float | None) -> Scale:
    """Decades of gaps, up to tol at least: what is pale is far below it."""
    positive = gaps[(gaps > 0) & gaps.isfinite()].log10()
    ends = ([float(positive.max())] if positive.numel() else []) + ([float(np.log10(tol))] if tol else [])
    high = max(ends, default=0.0)
    low = max(float(positive.min()) if positive.numel() else high - 1, high - _DECADES)
    low = min(float(np.floor(low)), high - 1)
    ticks = {float(decade): f"1e{decade}" for decade in range(int(np.ceil(low)), int(np.floor(high)) + 1)}
    if tol:
        own = float(np.log10(tol))
        ticks = {at: text for at, text in ticks.items() if abs(at - own) > 0.4} | {own: f"tol {tol:g}"}
    return Scale("relative completeness gap", low, high, ticks=(list(ticks), list(ticks.values())))
