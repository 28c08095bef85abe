"""Figures of Effects: heatmaps of what interventions find, and a score against it."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import torch
from numpy.typing import NDArray

from lig_lens.arguments import checked
from lig_lens.choose import find_places, of_argument, of_tokens
from lig_lens.errors import InputError, MissingPackageError
from lig_lens.flow.describe import averaged
from lig_lens.flow.effects import Effects
from lig_lens.flow.flow import Flow
from lig_lens.interventions.agreement import compare, points
from lig_lens.names import head_name
from lig_lens.show.plots.labels import place_names
from lig_lens.show.plots.matrix import PRINTED, Axis, Heatmap, Values, draw, printed, row_cells, signed_scale
from lig_lens.show.plots.style import (
    DIVERGING,
    FAINT,
    LINE,
    QUIET,
    plain_text,
    set_frame,
    short,
    token_label,
)
from lig_lens.show.text import MINUS, signed_number
from lig_lens.show.words import mean_of

_SIZE, _RIGHT = (600.0, 500.0), 90.0  # of the scatter plot, and its margin, into which names may reach; in pixels
_OUTLYING, _NEAR = 0.2, 0.01  # shares of the largest: from the one on dots are named, below the other they count as 0


@checked
def effects_map(
    effects: Effects,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
) -> go.Figure:
    """Heatmap of effects on a diverging scale centred on 0.

    The colour bar says what a positive value means. Layers stand upwards, heads or positions across; heads at positions
    have one row for each head, edges are shown as the strongest of each head, which the hover names. What was not
    measured is left grey.

    Args:
        effects: what an intervention found, or a score.
        layers: block numbers, from the bottom upwards; all by default.
        heads: head numbers, in the order to draw; all by default.
        tokens: positions to show, or between which edges are shown; negative ones count from the end. All by default.

    Raises:
        InputError: a layer, head or position that is missing, or a selection on an axis that the Effects do not have.
    """
    chosen = _chosen("effects_map", effects, layers, heads, tokens)
    values = effects.values.numpy()[np.ix_(*(chosen[axis] for axis in effects.axes))]
    numbers = [effects.layers[place] for place in chosen["layer"]]
    notes = None
    if effects.on == "edges":
        values, notes = _strongest_edges(effects, values, chosen)
    rows, side = [str(layer) for layer in numbers], Axis("layer", [], "layer")
    if effects.on == "heads_by_pos":
        rows, side = [head_name(layer, head) for layer in numbers for head in chosen["head"]], Axis("head", [], "head")
        values = values.reshape(len(rows), -1)
    if effects.on in ("heads", "edges"):
        across = Axis("head", [str(head) for head in chosen["head"]], "head")
    else:
        labels = [token_label(effects.tokens[at], position=at) for at in chosen["pos"]]
        across = Axis("position", labels, "position")
    few = len(across.labels) <= PRINTED and len(rows) <= 40
    facts = [short(effects.metric, 100), _measured(effects)]
    facts += mean_of(averaged(effects.settings))
    if math.isfinite(effects.reference):
        facts.append(f"metric without any intervention {signed_number(effects.reference)}")
    missing, name = int(np.isnan(values).sum()), short(effects.name[:1].upper() + effects.name[1:], 80)
    return draw(
        [
            Heatmap(
                values,
                signed_scale(_measured(effects), values, cut=False),
                name=_measured(effects),
                value="%{fullData.name} %{z:+.3g}",
                texts=printed(values, percent=False, digits=3) if few else None,
                notes=notes,
            )
        ],
        dataclasses.replace(side, labels=rows),
        across,
        f"<b>{name}</b>" + (", strongest edge of each head" if effects.on == "edges" else ""),
        [*facts, *([f"{missing:,} not measured (grey)"] if missing else [])],
        cell=row_cells(len(across.labels), 26.0 if len(rows) <= 40 else 10.0),
        upwards=True,
    )


def _chosen(
    call: str,
    effects: Effects,
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
    tokens: Sequence[int] | None,
) -> dict[str, list[int]]:
    """Places along each axis of some effects that a figure shows.

    Raises:
        InputError: a layer, head or position that is missing, or a selection on an axis that there is not.
    """
    chosen = {"layer": find_places(layers, effects.layers, of_argument(call, "layers"))}
    if "head" in effects.axes:
        chosen["head"] = find_places(heads, range(effects.values.shape[1]), of_argument(call, "heads"))
    elif heads is not None:
        raise _no_axis(call, effects, "heads", heads)
    if effects.on != "heads":
        n_pos = len(effects.tokens)
        positions = find_places(tokens, range(n_pos), of_tokens(call, n_pos), from_end=True)
        chosen |= dict.fromkeys(("pos", "src", "dst"), positions)
    elif tokens is not None:
        raise _no_axis(call, effects, "tokens", tokens)
    return chosen


def _no_axis(call: str, effects: Effects, what: str, given: Sequence[int]) -> InputError:
    return InputError(
        f"{call}: {what}={list(given)} selects on an axis that effects on {effects.on.replace('_', ' ')} do not "
        f"have ({', '.join(effects.axes)}): leave it out."
    )


def _strongest_edges(effects: Effects, values: Values, chosen: dict[str, list[int]]) -> tuple[Values, list[list[str]]]:
    """The strongest edge of each head, and its name for the hover."""
    flat = values.reshape(*values.shape[:2], -1)
    best = np.nan_to_num(np.abs(flat), nan=-1.0).argmax(-1)
    found = np.take_along_axis(flat, best[..., None], -1)[..., 0]
    ends = np.array(chosen["src"])[best // len(chosen["dst"])], np.array(chosen["dst"])[best % len(chosen["dst"])]

    def name(row: int, column: int) -> str:
        src, dst = (int(end[row, column]) for end in ends)
        return f"{token_label(effects.tokens[src])} ({src}) → {token_label(effects.tokens[dst])} ({dst})"

    return found, [[name(row, column) for column in range(best.shape[1])] for row in range(best.shape[0])]


@checked
def agreement_scatter(
    score: Flow | Effects,
    effects: Effects,
    *,
    name: str | None = None,
    labels: int = 8,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
) -> go.Figure:
    """A score against what an intervention found, one dot for each head, position or edge that was measured.

    Correlations are in the heading where scipy is installed, and how many dots lie near 0, which say little.
    Contributions to the metric itself have its unit: a dashed line shows where they would equal the effects.

    Args:
        score: a Flow or Effects, see `compare`.
        effects: what was measured.
        name: of the score; by default that of the Effects, or "LIG".
        labels: how many outliers are named at most: the dots that are furthest from 0 on either axis and have room.
        layers: block numbers whose dots are drawn, and counted in all numbers of the heading; all by default.
        heads: the same for heads.
        tokens: the same for positions; of edges both ends have to be among them.

    Raises:
        InputError: see `compare` and `effects_map`.
    """
    if labels < 0:
        raise InputError(f"agreement_scatter: labels={labels}: give 0 or more.")
    effects = _only(effects, _chosen("agreement_scatter", effects, layers, heads, tokens))
    x, y = (side.numpy() for side in points(score, effects))
    plain = [
        effects.label((effects.layers[layer], *rest)) for layer, *rest in (~effects.values.isnan()).nonzero().tolist()
    ]
    named = [plain_text(name) for name in plain]
    title = name or (score.name if isinstance(score, Effects) else "LIG")
    same_unit = isinstance(score, Flow) and score.metric == effects.metric
    # As far as both axes reach, so that the line does not widen the picture.
    low, high = min(0.0, max(x.min(), y.min())), max(0.0, min(x.max(), y.max()))
    line = np.linspace(low, high, 200) if same_unit else np.empty(0)
    ranges = [_range(x), _range(y)]
    pixels, on_line = (
        np.stack([_SIZE[n] * (side - ends[0]) / (ends[1] - ends[0]) for n, (side, ends) in enumerate(both)], -1)
        for both in (zip((x, y), ranges, strict=True), zip((line, line), ranges, strict=True))
    )
    sizes = np.maximum(_relative(x), _relative(y))
    outliers = [int(place) for place in np.argsort(-sizes, kind="stable") if sizes[place] >= _OUTLYING]
    placed = place_names(pixels, plain, outliers, labels, on_line, (_SIZE[0] + _RIGHT, _SIZE[1]))
    figure = go.Figure(
        go.Scatter(
            x=x,
            y=y,
            mode="markers+text",
            name=_measured(effects),
            text=[named[place] if place in placed else "" for place in range(len(named))],
            textposition=[placed.get(place, "middle right") for place in range(len(named))],
            textfont={"size": 10, "color": QUIET},
            customdata=named,
            hovertemplate="%{customdata}<br>score %{x:+.3g}<br>%{fullData.name} %{y:+.3g}<extra></extra>",
            marker={"size": 7, "color": DIVERGING[0], "opacity": 0.6, "line": {"width": 0}},
            cliponaxis=False,
        )
    )
    axis = {"zeroline": True, "zerolinecolor": LINE, "gridcolor": FAINT}
    of_score = f" ({_measured(score)})" if isinstance(score, Effects) and score.measures != effects.measures else ""
    figure.update_xaxes(title=f"{short(title)}{of_score}", range=ranges[0], **axis)
    figure.update_yaxes(title=_measured(effects), range=ranges[1], **axis)
    facts = [
        short(effects.metric, 100),
        f"{len(x):,} {effects.on.replace('heads_by_pos', 'heads at positions')} measured",
        f"{int((sizes < _NEAR).sum()):,} of {len(x):,} near 0 (within {_NEAR:.0%} of the largest on both axes)",
    ]
    with contextlib.suppress(MissingPackageError):
        agreement = compare(score, effects)
        facts.append(f"Spearman {agreement.spearman:.2f}, Pearson {agreement.pearson:.2f}")
    if same_unit:
        dashes = {"color": QUIET, "width": 1, "dash": "dash"}
        figure.add_shape(type="line", x0=low, y0=low, x1=high, y1=high, layer="below", line=dashes)
        facts.append("equal on the dashed line")
    heading = f"<b>{short(title)}</b> against {short(effects.name, 80)}"
    set_frame(figure, heading, facts, width=_SIZE[0], height=_SIZE[1], left=80.0, right=_RIGHT, above=28.0)
    return figure.update_layout(plot_bgcolor="white", showlegend=False)


def _only(effects: Effects, chosen: dict[str, list[int]]) -> Effects:
    """Effects of which only some places of each axis were measured."""
    kept = torch.zeros_like(effects.values, dtype=torch.bool)
    kept[np.ix_(*(chosen[axis] for axis in effects.axes))] = True
    return dataclasses.replace(effects, values=effects.values.masked_fill(~kept, torch.nan))


def _measured(effects: Effects) -> str:
    """What positive values mean, as escaped text."""
    return short(effects.measures, 80).replace(" - ", f" {MINUS} ")


def _relative(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Absolute values as shares of the largest."""
    sizes: NDArray[np.float64] = np.abs(values)
    return sizes / (sizes.max() or 1.0)


def _range(values: NDArray[np.float64]) -> tuple[float, float]:
    """Ends of an axis: all values and some room for dots at the edge and their names."""
    low, high = float(values.min()), float(values.max())
    room = 0.08 * (high - low) or 1.0
    return low - room, high + room
