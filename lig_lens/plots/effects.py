"""Figures of Effects: heatmaps of what interventions find, and a score against it."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from lig_lens.agreement import compare, points
from lig_lens.effects import Effects
from lig_lens.errors import InputError, MissingPackageError
from lig_lens.flow import Flow
from lig_lens.plots.matrix import PRINTED, Axis, Panel, Values, draw, printed, row_cells, signed_scale
from lig_lens.plots.select import averaged, chosen_positions
from lig_lens.plots.style import DIVERGING, FAINT, LINE, QUIET, plain_text, set_frame, short, signed_number, token_label


def effects_map(
    effects: Effects,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
) -> go.Figure:
    """Heatmap of effects on a diverging scale centred on 0.

    Layers stand upwards, heads or positions across; heads at positions have one row for each head, edges are shown as
    the strongest of each head, which the hover names. What was not measured is left grey.

    Args:
        effects: what an intervention found, or a score.
        layers: block numbers, from the bottom upwards; all by default.
        heads: head numbers, in the order to draw; all by default.
        tokens: positions to show, or between which edges are shown; negative ones count from the end. All by default.

    Raises:
        InputError: a layer, head or position that is missing, or a selection on an axis that the Effects do not have.
    """
    chosen = {"layer": _places(effects, "layers", layers, effects.layers)}
    if "head" in effects.axes:
        chosen["head"] = _places(effects, "heads", heads, range(effects.values.shape[1]))
    elif heads is not None:
        raise _no_axis(effects, "heads", heads)
    if effects.on == "heads":
        if tokens is not None:
            raise _no_axis(effects, "tokens", tokens)
    else:
        positions = chosen_positions("effects_map", tokens, len(effects.tokens))
        chosen |= dict.fromkeys(("pos", "src", "dst"), positions)
    values = effects.values.numpy()[np.ix_(*(chosen[axis] for axis in effects.axes))]
    numbers = [effects.layers[place] for place in chosen["layer"]]
    notes = None
    if effects.on == "edges":
        values, notes = _strongest_edges(effects, values, chosen)
    rows, side = [str(layer) for layer in numbers], Axis("layer", [], "layer")
    if effects.on == "heads_by_pos":
        rows, side = [f"{layer}.{head}" for layer in numbers for head in chosen["head"]], Axis("head", [], "head")
        values = values.reshape(len(rows), -1)
    if effects.on in ("heads", "edges"):
        across = Axis("head", [str(head) for head in chosen["head"]], "head")
    else:
        labels = [token_label(effects.tokens[at], position=at) for at in chosen["pos"]]
        across = Axis("position", labels, "position")
    few = len(across.labels) <= PRINTED and len(rows) <= 40
    facts = [short(effects.metric, 100), "change of the metric, in its units"]
    facts += [averaged(effects.settings)] if averaged(effects.settings) else []
    if math.isfinite(effects.reference):
        facts.append(f"without the intervention it is {signed_number(effects.reference)}")
    missing = int(np.isnan(values).sum())
    return draw(
        [
            Panel(
                values,
                signed_scale("change of the metric", values, cut=False),
                value="effect %{z:+.3g}",
                texts=printed(values, percent=False, digits=3) if few else None,
                notes=notes,
            )
        ],
        dataclasses.replace(side, labels=rows),
        across,
        f"<b>{short(effects.name, 80)}</b>" + (", strongest edge of each head" if effects.on == "edges" else ""),
        [*facts, *([f"{missing:,} not measured (grey)"] if missing else [])],
        cell=row_cells(len(across.labels), 26.0 if len(rows) <= 40 else 10.0),
        upwards=True,
    )


def _places(effects: Effects, what: str, wanted: Sequence[int] | None, present: Sequence[int]) -> list[int]:
    """Where the wanted layers or heads stand on their axis."""
    wanted = present if wanted is None else wanted
    missing = [number for number in wanted if number not in present]
    if missing or len(wanted) == 0:
        raise InputError(
            f"effects_map: {what}={list(wanted)}: use some of {list(present)}"
            + (f", which has no {missing[0]}." if missing else ", or leave it out for all.")
        )
    return [list(present).index(number) for number in wanted]


def _no_axis(effects: Effects, what: str, given: Sequence[int]) -> InputError:
    return InputError(
        f"effects_map: {what}={list(given)} selects on an axis that effects on {effects.on.replace('_', ' ')} do not "
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


def agreement_scatter(
    score: Flow | Effects, effects: Effects, *, name: str | None = None, labels: int = 8
) -> go.Figure:
    """A score against what an intervention found, one dot for each head, position or edge that was measured.

    Correlations are in the heading where scipy is installed. Contributions to the metric itself have its unit: a dashed
    line shows where they would equal the effects.

    Args:
        score: a Flow or Effects, see `compare`.
        effects: what was measured.
        name: of the score; by default that of the Effects, or "LIG".
        labels: how many outliers are named at most: the dots that are furthest from 0 on either axis.

    Raises:
        InputError: see `compare`.
    """
    if labels < 0:
        raise InputError(f"agreement_scatter: labels={labels}: give 0 or more.")
    x, y = (side.numpy() for side in points(score, effects))
    named = [
        plain_text(effects.label((effects.layers[layer], *rest)))
        for layer, *rest in (~effects.values.isnan()).nonzero().tolist()
    ]
    shown = _outliers(x, y, named, labels)
    title = name or (score.name if isinstance(score, Effects) else "LIG")
    figure = go.Figure(
        go.Scatter(
            x=x,
            y=y,
            mode="markers+text",
            text=shown,
            textposition="top center",
            textfont={"size": 10, "color": QUIET},
            customdata=named,
            hovertemplate="%{customdata}<br>score %{x:+.3g}<br>effect %{y:+.3g}<extra></extra>",
            marker={"size": 7, "color": DIVERGING[0], "opacity": 0.6, "line": {"width": 0}},
            cliponaxis=False,
        )
    )
    axis = {"zeroline": True, "zerolinecolor": LINE, "gridcolor": FAINT}
    figure.update_xaxes(title=f"score: {short(title)}", **axis)
    figure.update_yaxes(title="effect of the intervention, in the metric's units", **axis)
    facts = [
        short(effects.metric, 100),
        f"{len(x):,} {effects.on.replace('heads_by_pos', 'heads at positions')} measured",
    ]
    with contextlib.suppress(MissingPackageError):
        agreement = compare(score, effects)
        facts.append(f"Spearman {agreement.spearman:.2f}, Pearson {agreement.pearson:.2f}")
    if isinstance(score, Flow) and score.metric == effects.metric:
        # As far as both axes reach, so that the line does not widen the picture.
        low, high = min(0.0, max(x.min(), y.min())), max(0.0, min(x.max(), y.max()))
        dashes = {"color": QUIET, "width": 1, "dash": "dash"}
        figure.add_shape(type="line", x0=low, y0=low, x1=high, y1=high, layer="below", line=dashes)
        facts.append("equal on the dashed line")
    heading = f"{short(title)} against {short(effects.name, 80)}"
    set_frame(figure, heading, facts, width=600.0, height=500.0, left=80.0, right=80.0, above=28.0)
    return figure.update_layout(plot_bgcolor="white")


def _outliers(x: NDArray[np.float64], y: NDArray[np.float64], names: list[str], count: int) -> list[str]:
    """Names of the dots that are furthest from 0 on either axis; "" for others, and for those too near one of them."""
    x, y = x / (np.abs(x).max() or 1.0), y / (np.abs(y).max() or 1.0)
    size = np.maximum(np.abs(x), np.abs(y))
    shown, placed = [""] * len(names), list[tuple[float, float]]()
    for place in np.argsort(-size, kind="stable"):
        if len(placed) == count or size[place] < 0.2:
            break
        if all(abs(x[place] - a) > 0.2 or abs(y[place] - b) > 0.05 for a, b in placed):
            placed.append((x[place], y[place]))
            shown[place] = names[place]
    return shown
