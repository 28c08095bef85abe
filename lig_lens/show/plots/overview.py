"""A Flow at a glance: how much each head matters, and where the integral is least certain."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor

from lig_lens.arguments import checked
from lig_lens.choose import find_places, of_flow
from lig_lens.errors import InputError, check_choice
from lig_lens.flow.describe import describe
from lig_lens.flow.flow import Flow
from lig_lens.names import head_name
from lig_lens.show.plots.facts import about, baselines, cancelling_fact, unit, worst_gap
from lig_lens.show.plots.matrix import (
    PRINTED,
    ROOMY,
    Axis,
    Heatmap,
    Scale,
    Values,
    draw,
    printed,
    row_cells,
    share_scale,
    signed_scale,
    strongest,
)
from lig_lens.show.plots.select import cancelling, pick, token_axis
from lig_lens.show.plots.style import INK, LINE, QUALITATIVE, short
from lig_lens.show.text import MINUS, TIMES
from lig_lens.show.words import change, moving

_BESIDE = "beside the heads greys have a scale of their own"
_DECADES = 5  # that a scale of gaps spans at most


@dataclass(frozen=True)
class _Table:
    """Numbers of heads, [layer, head], and what stands `beside` them, [layer, ...], in words of the figure.

    `cancels`, [layer], are the layers without shares, whose numbers are NaN.
    """

    heads: Tensor
    rest: Tensor
    beside: tuple[str, ...]
    title: str
    unit: str
    facts: tuple[str, ...]
    percent: bool = True
    signed: bool = False
    cancels: Tensor | None = None


@checked
def importance(
    flow: Flow,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    map: str = "attn",
    share: bool = False,
    tokens: Sequence[int] | None = None,
) -> go.Figure:
    """How much each head matters: layers upwards, heads across. The subtitle says what is drawn.

    - With a metric: the sum of `attn` over sources and destinations, signed, in the metric's units, and beside the
      heads the sum of `skip`, so that a layer adds up to the metric's change. With `share` divided by that change, or
      grey where what is added up is more than `compose.CANCELS` times as large.
    - Without, map `mlp`: |mlp| of a head as a share of the absolute values of all heads, skip and bias, mean over
      destinations, with `share` or without.
    - Without, map `attn`: how far a head's output moves (`total["attn"]`, mean over destinations), relative to the
      layer's largest, or with `share` to the sum over the layer's heads.

    Colours end at the strongest head; what stands beside the heads has greys of its own, by absolute value.

    Args:
        flow: where the numbers come from.
        layers: block numbers, from the bottom upwards; all by default.
        heads: head numbers, in the order to draw; all by default.
        map: attn or mlp.
        share: see above.
        tokens: destinations over which the sum or mean goes, and for `skip` the positions; all by default.

    Raises:
        InputError: a map, layer, head or position that the Flow does not have.
    """
    check_choice("map", map, ("attn", "mlp"))
    flow.columns(map)
    shown = pick("importance", flow, tokens)
    if flow.metric is not None:
        table = _of_metric(flow, share, shown.places, shown.sources)
    else:
        table = _of_output(flow, shown.places) if map == "mlp" else _of_movement(flow, share, shown.places)
    layers = flow.layers if layers is None else tuple(layers)
    rows, n_heads = find_places(layers, flow.layers, of_flow("layer")), table.heads.shape[1]
    columns = find_places(heads, range(n_heads), of_flow("head"))
    of_heads, rest = table.heads[rows][:, columns].numpy(), table.rest[rows].numpy()
    if table.signed or bool((of_heads < 0).any()):
        scale = signed_scale(table.unit, of_heads, percent=table.percent, cut=False)
    else:
        scale = share_scale(table.unit, of_heads, cut=False)
    labels = [*(str(head) for head in columns), *table.beside]
    roomy = len(labels) <= 20
    number = ("%{z:+.2%}" if table.signed else "%{z:.2%}") if table.percent else "%{z:+.4g}"
    figure = draw(
        [
            Heatmap(
                of_heads,
                scale,
                value=f"{table.unit}: {number}",
                texts=printed(of_heads, table.percent, table.signed, digits=3) if roomy else None,
                notes=[[f"<b>{head_name(layer, head)}</b>" for head in columns] for layer in layers],
            )
        ],
        Axis("layer", [str(layer) for layer in layers]),
        Axis("head", labels),
        f"<b>{table.title}</b>",
        [
            *about(flow, target=False),
            *table.facts,
            *([] if tokens is None else [f"{len(shown.places)} of {len(flow.destinations)} destinations"]),
            *baselines(flow, [map]),
            worst_gap([flow], [map]),
            *([] if table.cancels is None else cancelling_fact(table.cancels[rows])),
        ],
        cell=(ROOMY if roomy else 26.0, 26.0),
        upwards=True,
    )
    if table.beside:
        _add_beside(figure, table, rest, layers, len(columns), number)
    return figure


def _add_beside(
    figure: go.Figure, table: _Table, rest: Values, layers: Sequence[int], n_heads: int, number: str
) -> None:
    """Draw what stands beside the heads, on greys of its own."""
    top = strongest(rest, cut=False)
    figure.add_trace(
        go.Heatmap(
            x=list(range(n_heads, n_heads + len(table.beside))),
            z=rest,
            colorscale=[LINE, "white", LINE],
            zmin=-top,
            zmax=top,
            showscale=False,
            hoverongaps=False,
            xgap=1,
            ygap=1,
            text=printed(rest, table.percent, table.signed, digits=3),
            texttemplate="%{text}",
            textfont={"size": 10},
            hovertext=[[f"<b>layer {layer}, {name}</b>" for name in table.beside] for layer in layers],
            hovertemplate=f"%{{hovertext}}<br>{table.unit}: {number}<extra></extra>",
        )
    )
    figure.add_vline(x=n_heads - 0.5, line={"color": "white", "width": 6})


def _of_metric(flow: Flow, share: bool, places: Sequence[int], positions: Sequence[int]) -> _Table:
    known = describe(flow)
    if share and known.hold == "others":
        raise InputError(
            "importance: share=True with hold='others': each head is the whole of its own shares. Draw contributions, "
            "or take a Flow of hold='skip'."
        )
    past = flow.skip if flow.skip is not None else torch.zeros(len(flow.layers), len(flow.tokens))
    heads, rest = flow.columns("attn")[..., places].sum((2, 3)), past[:, positions].sum(1, keepdim=True)
    cancels = torch.zeros(len(flow.layers), dtype=torch.bool)
    if share:
        all_heads, all_past = flow.columns("attn").sum((2, 3)), past.sum(1)
        total = all_heads.sum(1, keepdim=True) + all_past[:, None]
        cancels = cancelling(flow, "attn")
        heads, rest = (_divided(part, total).masked_fill(cancels[:, None], torch.nan) for part in (heads, rest))
    title = f"Contribution of each head to {short(flow.metric or '', 40)}"
    changed = "what patching them all does" if known.hold else f"the metric's change{change(known)}"
    added = "all heads of a layer" + ("" if known.hold else " and skip")
    if known.hold == "others":
        added, changed = "each head", "what patching it alone does"
    everywhere = "" if len(places) == len(flow.destinations) else ", at all positions,"
    facts = (
        "sum over sources and destinations" + (f", divided by {changed}" if share else ", in the metric's units"),
        f"{added}{everywhere} add{'s' if known.hold == 'others' else ''} up to {'100%' if share else changed}",
        *([moving(known).removeprefix(", ")] if known.hold else [_BESIDE]),
    )
    of, beside = "share" if share else unit(flow), () if known.hold else ("skip",)
    return _Table(heads, rest, beside, title, of, facts, percent=share, signed=True, cancels=cancels)


def _of_output(flow: Flow, places: Sequence[int]) -> _Table:
    sizes = flow.columns("mlp")[..., places].abs()
    shares = _divided(sizes, sizes.sum(1, keepdim=True)).mean(2)
    facts = (
        "|head| / (sum over heads |head| + |skip| + |bias|), mean over destinations",
        "all parts of a layer add up to 100%",
        _BESIDE,
    )
    title = "How much of each block's output comes through each head"
    return _Table(shares[:, :-2], shares[:, -2:], ("skip", "bias"), title, "absolute share", facts)


def _of_movement(flow: Flow, share: bool, places: Sequence[int]) -> _Table:
    moved = flow.total["attn"][..., places].mean(2)
    whole = moved.sum(1, keepdim=True) if share else moved.abs().amax(1, keepdim=True)
    what = "share of the sum over the layer's heads" if share else "relative to the layer's largest"
    target = short(describe(flow).target or "the target")
    facts = (f"L(x) {MINUS} L(x0) of {target}, mean over destinations, {what}",)
    return _Table(_divided(moved, whole), moved[:, :0], (), "How far each head's output moves", what, facts)


def _divided(part: Tensor, total: Tensor) -> Tensor:
    """Shares, 0 where there is nothing to share."""
    return torch.where(total == 0, 0.0, part / total.masked_fill(total == 0, 1.0))


@checked
def gap_map(
    flow: Flow,
    map: str | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
) -> go.Figure:
    """Where the integral is least certain: the relative completeness gap, layers upwards and destinations across.

    Of the attn map the head with the largest gap is shown; a Flow with a metric has one gap for each layer. The scale
    is logarithmic and has `tol` on it; a cross marks what has not converged (gap or a single contribution's error).

    Args:
        flow: where the gaps come from.
        map: attn, mlp or block; by default the one with the worst gap.
        layers: block numbers, from the bottom upwards; all by default.
        heads: of the attn map, those among which the worst is shown; all by default.
        tokens: positions of destinations to show; see `head_grid`.

    Raises:
        InputError: a map, layer, head or position that the Flow does not have, or heads or tokens where gaps are not
            those of single ones.
    """
    map = max(flow.maps, key=flow.worst_gap) if map is None else map
    flow.columns(map)
    layers = flow.layers if layers is None else tuple(layers)
    rows = find_places(layers, flow.layers, of_flow("layer"))
    gaps, missed = flow.gap[map][rows], ~flow.converged[map][rows]
    shown, axes = pick("gap_map", flow, tokens), flow.axes.cells[map]
    per_head, per_destination = "head" in axes, "dst" in axes
    if (tokens is not None and not per_destination) or (heads is not None and not per_head):
        raise InputError(
            f"gap_map: the gaps of this {map} map are those of whole "
            f"{flow.axes.counted if not per_destination else 'destinations'}: "
            f"leave out {'heads' if per_destination else 'tokens' if per_head else 'tokens and heads'}."
        )
    numbers = [*range(gaps.shape[1])] if per_head else []
    if heads is not None:
        numbers = find_places(heads, numbers, of_flow("head"))
        gaps, missed = gaps[:, numbers], missed[:, numbers]
    if per_destination:
        gaps, missed = gaps[..., shown.places], missed[..., shown.places]
    tol = describe(flow).tol
    within = "the tolerance" if tol is None else f"tol {tol:g}"
    count = f"all {missed.numel():,} {flow.axes.counted} within {within}"
    if missed.any():
        count = f"{int(missed.sum()):,} of {missed.numel():,} {flow.axes.counted} miss {within} ({TIMES})"
    if per_destination:
        across, cell = token_axis(flow, shown.destinations, "destination"), row_cells(gaps.shape[-1])
    else:
        across, cell = Axis("", [f"all {'' if per_head else 'heads and '}destinations"]), (200.0, 26.0)
    worst = gaps.argmax(1).reshape(len(rows), -1).tolist() if per_head else None
    # As tables of layers and destinations: the gap, and how many heads have not converged.
    gaps, missed = (gaps.amax(1), missed.sum(1)) if per_head else (gaps, missed.long())
    gaps, missed = (one.reshape(len(rows), -1) for one in (gaps, missed))
    table = [list(zip(*both, strict=True)) for both in zip(gaps.tolist(), missed.tolist(), strict=True)]
    notes = [
        [
            f"gap {gap:.2e}<br>"
            + (f"largest in {head_name(layers[row], numbers[worst[row][column]])}<br>" if worst is not None else "")
            + _convergence(miss, per_head)
            for column, (gap, miss) in enumerate(line)
        ]
        for row, line in enumerate(table)
    ]
    texts = [["" if miss else _short_gap(gap) for gap, miss in line] for line in table]
    scale = _log_scale(gaps, tol if tol is not None and tol > 0 else None)
    values = np.maximum(np.log10(np.maximum(gaps.numpy(), 1e-30)), scale.low)
    printed_texts = texts if values.shape[1] <= PRINTED else None
    figure = draw(
        [Heatmap(values, scale, value="", texts=printed_texts, notes=notes)],
        Axis("layer", [str(layer) for layer in layers], "layer"),
        across,
        f"<b>Completeness gaps</b> of the {map} map" + (", the worst head of each cell" if per_head else ""),
        [*about(flow), *baselines(flow, [map]), f"|sum of contributions {MINUS} total| / |total|", count],
        cell=cell,
        upwards=True,
    )
    _add_crosses(figure, missed, cell[0])
    return figure


def _add_crosses(figure: go.Figure, missed: Tensor, width: float) -> None:
    """Mark cells, `width` pixels wide, in which something has not converged."""
    marked = missed.nonzero().tolist()
    if not marked:
        return
    figure.add_trace(
        go.Scatter(
            x=[column for _, column in marked],
            y=[row for row, _ in marked],
            mode="markers",
            marker={
                "symbol": "x",
                "size": max(3.0, min(9.0, 0.5 * width)),
                "color": QUALITATIVE[4],
                "line": {"color": INK, "width": 1 if width >= 12 else 0},
            },
            hoverinfo="skip",
            showlegend=False,
            name="not converged",
        )
    )


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
    low = float(np.floor(min(low, high - 1)))  # so that two ticks at least are on the scale
    ticks = {float(decade): f"1e{decade}" for decade in range(int(np.ceil(low)), int(np.floor(high)) + 1)}
    if tol:
        own = float(np.log10(tol))
        ticks = {at: text for at, text in ticks.items() if abs(at - own) > 0.4} | {own: f"tol {tol:g}"}
    return Scale("relative completeness gap", low, high, ticks=(list(ticks), list(ticks.values())))
