"""Figures of Effects: heatmaps of what interventions find, and a score against it."""

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from lig_lens.agreement import points
from lig_lens.effects import Effects
from lig_lens.errors import InputError
from lig_lens.flow import Flow
from lig_lens.plots.heads import DIVERGING, FONT, INK, LINE, QUIET, plain_text, show_token

_CELL, _MARGIN = 26, 120  # pixels
_LAYOUT = {
    "font": {"family": FONT, "color": INK, "size": 12},
    "plot_bgcolor": "white",
    "paper_bgcolor": "white",
    "title": {"x": 0, "xanchor": "left", "xref": "paper", "font": {"size": 16}},
}


def effects_map(effects: Effects) -> go.Figure:
    """Heatmap of effects on a diverging scale centred on 0.

    Layers stand upwards, heads or positions across; heads at positions have one row for each head, edges are shown as
    the strongest of each head.

    Args:
        effects: what an intervention found, or a score.
    """
    values = effects.values.numpy()
    tokens = [f"{plain_text(show_token(token, 12))} {place}" for place, token in enumerate(effects.tokens)]
    rows = [str(layer) for layer in effects.layers]
    across, side, below = tokens, "layer", "position"
    what = effects.name
    if effects.on == "edges":
        flat = values.reshape(*values.shape[:2], -1)
        known = np.nan_to_num(np.abs(flat), nan=-1.0)
        values = np.take_along_axis(flat, known.argmax(-1)[..., None], -1)[..., 0]
        what += ", strongest edge of each head"
    if effects.on in ("heads", "edges"):
        across, below = [str(head) for head in range(values.shape[1])], "head"
    if effects.on == "heads_by_pos":
        rows = [f"{layer}.{head}" for layer in effects.layers for head in range(values.shape[1])]
        values, side = values.reshape(len(rows), -1), "head"
    drawn = np.abs(values[np.isfinite(values)])
    top = float(drawn.max()) if drawn.any() else 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=list(range(len(across))),
            y=list(range(len(rows))),
            text=[[f"{row}, {column}" for column in across] for row in rows],
            hovertemplate="%{text}: %{z:+.3g}<extra></extra>",
            colorscale=DIVERGING,
            zmin=-top,
            zmax=top,
            colorbar={"title": {"text": "change of the metric", "side": "right"}, "thickness": 10, "outlinewidth": 0},
        )
    )
    height = _CELL if len(rows) <= 40 else 9
    step = 1 if len(rows) <= 40 else max(1, len(rows) // 40)
    figure.update_layout(
        **_LAYOUT,
        width=max(420, _CELL * len(across) + 2 * _MARGIN),
        height=max(260, height * len(rows) + 2 * _MARGIN),
        margin={"l": 70, "r": 40, "t": 90, "b": 90},
    )
    figure.update_layout(title_text=f"{plain_text(what)}<br><sup>{plain_text(effects.metric)}</sup>")
    figure.update_xaxes(
        title=below, tickvals=list(range(len(across))), ticktext=across, tickangle=-45, showgrid=False, ticks=""
    )
    figure.update_yaxes(
        title=side, tickvals=list(range(0, len(rows), step)), ticktext=rows[::step], showgrid=False, zeroline=False
    )
    return figure


def agreement_scatter(
    score: Flow | Effects, effects: Effects, *, name: str | None = None, labels: int = 8
) -> go.Figure:
    """A score against what an intervention found, one dot for each head, position or edge that was measured.

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
    named = [plain_text(effects.label(tuple(index))) for index in (~effects.values.isnan()).nonzero().tolist()]
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
    figure.update_layout(**_LAYOUT, width=720, height=620, margin={"l": 80, "r": 60, "t": 90, "b": 70})
    subtitle = f"{plain_text(effects.metric)}, {len(x)} {effects.on.replace('_', ' ')}"
    figure.update_layout(title_text=f"{plain_text(title)} against {plain_text(effects.name)}<br><sup>{subtitle}</sup>")
    axis = {"zeroline": True, "zerolinecolor": LINE, "gridcolor": "#f0f2f4"}
    figure.update_xaxes(title=f"score: {plain_text(title)}", **axis)
    figure.update_yaxes(title="effect of the intervention", **axis)
    return figure


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
