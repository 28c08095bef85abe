"""Grids of heatmaps, one per head, and the page that holds them."""

import html
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io
import torch
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from lig_lens.axes import axis_places
from lig_lens.config import MAPS
from lig_lens.errors import InputError, check_choice
from lig_lens.files import write_atomic
from lig_lens.flow import Flow

# ColorBrewer's RdBu and Purples: told apart under the common kinds of colour blindness.
DIVERGING = [
    "#2166ac",
    "#4393c3",
    "#92c5de",
    "#d1e5f0",
    "#fafafa",
    "#fddbc7",
    "#f4a582",
    "#d6604d",
    "#b2182b",
]
_SEQUENTIAL = [
    "#fcfbfd",
    "#efedf5",
    "#dadaeb",
    "#bcbddc",
    "#9e9ac8",
    "#807dba",
    "#6a51a3",
    "#54278f",
    "#3f007d",
]
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
INK, QUIET, LINE = "#24292f", "#6e7781", "#d0d7de"
_QUANTILE = 0.995
_WIDE = 1200  # pixels that a row of panels aims at
_TITLES = {
    "attn": "Source tokens → heads",
    "mlp": "Heads → block output",
    "block": "Source tokens → block output",
}
_MARKS = {"Ġ": "·", "▁": "·", " ": "·", "\u00a0": "·", "Ċ": "↵", "\n": "↵", "\r": "↵", "\t": "⇥", "ĉ": "⇥"}


def show_token(token: str, longest: int = 40) -> str:
    """Write a token for people: spaces (also `Ġ` and `▁`) as `·`, line breaks as `↵`, the rest as it is.

    The result is plain text. Characters that do not print are written as their escapes; `##ing` stays, as
    BERT's readers know it.

    >>> show_token("Ġcat"), show_token("##ing"), show_token("")
    ('·cat', '##ing', '∅')
    """
    shown = "".join(
        _MARKS.get(char, char if char.isprintable() else char.encode("unicode_escape").decode()) for char in token
    )
    if len(shown) > longest:
        shown = shown[: longest - 1] + "…"
    return shown or "∅"


def plain_text(plain: str) -> str:
    """`plain` so that plotly, which renders a small HTML, shows it letter by letter."""
    return html.escape(plain, quote=False)


@dataclass(frozen=True)
class _Panel:
    """One heatmap: `values[y, x]`, the caption above it, and what its hover says before the numbers.

    `layer` is the block that it belongs to: with `scale="layer"` its panels share one scale.
    """

    layer: int
    caption: str
    values: NDArray[np.float32]
    hover: str


def head_grid(
    flow: Flow,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    map: str = "attn",
    share: bool = False,
    scale: str = "layer",
) -> go.Figure:
    """Grid of heatmaps, read like attention patterns: destinations down, sources across.

    attn has a row of panels per layer and a column per head; block has one panel per layer, and so has mlp,
    with the heads, skip and bias down and the destinations across. A colour scale is cut at the 99.5th
    percentile of the absolute values (the hover gives the exact ones). The panels zoom together.

    Args:
        flow: where the numbers come from: `[layer, head, src, dst]`; a panel is the transpose, `[dst, src]`.
        layers: block numbers, in the order to draw; all layers of the Flow by default.
        heads: head numbers, in the order to draw (attn only); all by default.
        map: attn, block or mlp.
        share: draw `flow.shares(map)`, without unit, on a sequential scale (negative shares get the colour
            of 0), rather than signed contributions in units of the target on a diverging scale centred on 0.
        scale: `layer` gives every layer its own scale, since vectors grow along a model's layers; `shared` draws
            all panels on one, in the target's unit. Shares are on one scale always.

    Raises:
        InputError: a map, layer or head that the Flow does not have.
    """
    check_choice("map", map, MAPS)
    check_choice("scale", scale, ("layer", "shared"))
    terms = flow.shares(map) if share else flow.columns(map)
    layers = flow.layers if layers is None else tuple(layers)
    places = axis_places("layer", layers, flow.layers)
    if map != "attn" and heads is not None:
        raise InputError(
            f"head_grid: heads={list(heads)} picks panels of the 'attn' map, not of {map!r}: leave it out."
        )
    if map == "attn":
        n_heads = terms.shape[1]
        rows = axis_places("head", range(n_heads) if heads is None else heads, range(n_heads))
        panels = [
            _attn_panel(terms, layer, place, head) for layer, place in zip(layers, places, strict=True) for head in rows
        ]
        n_columns = len(rows)
    else:
        panels = [_layer_panel(map, terms, layer, place) for layer, place in zip(layers, places, strict=True)]
        n_columns = min(len(panels), 6 if terms.shape[-1] <= 16 else 3)
    labels = [_tick(token, special) for token, special in zip(flow.tokens, flow.special, strict=True)]
    destinations = [labels[j] for j in flow.destinations]
    if map == "mlp":
        down, across = [f"head {h}" for h in range(terms.shape[1] - 2)] + ["skip", "bias"], destinations
        titles = ("part", "destination token")
    else:
        down, across, titles = destinations, labels, ("destination token", "source token")
    return _draw(flow, panels, n_columns, down, across, titles, map, share, per_layer=scale == "layer" and not share)


def _attn_panel(terms: torch.Tensor, layer: int, place: int, head: int) -> _Panel:
    return _Panel(layer, f"L{layer} · H{head}", terms[place, head].T.numpy(), f"layer {layer}, head {head}")


def _layer_panel(map: str, terms: torch.Tensor, layer: int, place: int) -> _Panel:
    values = terms[place].T if map == "block" else terms[place]
    return _Panel(layer, f"layer {layer}", values.numpy(), f"layer {layer}")


def _tick(token: str, special: bool) -> str:
    text = plain_text(show_token(token, longest=14))
    return f"<i><span style='color:{QUIET}'>{text}</span></i>" if special else text


@dataclass(frozen=True)
class _Geometry:
    """Sizes in pixels of a grid of equal panels."""

    n_rows: int
    n_columns: int
    width: float
    height: float
    gap_x: float
    gap_y: float
    left: float
    right: float
    top: float
    bottom: float

    @property
    def plot_width(self) -> float:
        return self.n_columns * self.width + (self.n_columns - 1) * self.gap_x

    @property
    def plot_height(self) -> float:
        return self.n_rows * self.height + (self.n_rows - 1) * self.gap_y


def _geometry(n_panels: int, n_columns: int, down: Sequence[str], across: Sequence[str]) -> _Geometry:
    longest_down, longest_across = (max(len(_bare(label)) for label in labels) for labels in (down, across))
    n_cells, gap_x = len(across), 10.0
    # A row of panels should fit a wide window, but a cell keeps a size at which it is seen.
    fitting = (_WIDE / n_columns - gap_x) / n_cells
    cell = min(26.0, max(fitting, min(9.0, 150 / n_cells), 3.0))
    return _Geometry(
        n_rows=math.ceil(n_panels / n_columns),
        n_columns=n_columns,
        width=max(72.0, cell * n_cells),
        height=max(24.0, cell * len(down)) if len(down) != n_cells else max(72.0, cell * n_cells),
        gap_x=gap_x,
        gap_y=24.0,
        left=48 + 5.6 * longest_down,
        right=28.0,
        top=132.0,
        bottom=36 + 5.6 * longest_across,
    )


def _bare(label: str) -> str:
    """Strip a tick label of its markup, to estimate its width."""
    return html.unescape(label.split("'>")[-1].removesuffix("</span></i>"))


def _draw(
    flow: Flow,
    panels: Sequence[_Panel],
    n_columns: int,
    down: Sequence[str],
    across: Sequence[str],
    titles: tuple[str, str],
    map: str,
    share: bool,
    per_layer: bool,
) -> go.Figure:
    size = _geometry(len(panels), n_columns, down, across)
    figure = make_subplots(
        rows=size.n_rows,
        cols=size.n_columns,
        horizontal_spacing=size.gap_x / size.plot_width if size.n_columns > 1 else 0,
        vertical_spacing=size.gap_y / size.plot_height if size.n_rows > 1 else 0,
        subplot_titles=[panel.caption for panel in panels],
    )
    value = f"share of the {_whole(flow)} %{{customdata[1]:.2%}}" if share else "contribution %{customdata[1]:+.4g}"
    tops = {
        layer: _top([p for p in panels if p.layer == layer or not per_layer]) for layer in {p.layer for p in panels}
    }
    numbers = _position_numbers(flow, map, len(down), len(across))
    for number, panel in enumerate(panels):
        figure.add_trace(
            go.Heatmap(
                z=panel.values / np.float32(tops[panel.layer]) if per_layer else panel.values,
                customdata=np.stack([numbers, panel.values], axis=-1),
                coloraxis="coloraxis",
                hoverongaps=False,
                xgap=0.5 if len(across) <= 24 else 0,
                ygap=0.5 if len(across) <= 24 else 0,
                hovertemplate=_hover(panel.hover, map, value),
            ),
            row=number // n_columns + 1,
            col=number % n_columns + 1,
        )
    _style_axes(figure, size, len(panels), down, across)
    _style_page(figure, size, flow, titles, map, share)
    figure.update_layout(coloraxis=_coloraxis(_whole(flow), 1.0 if per_layer else _top(panels), share, per_layer))
    return figure


def _whole(flow: Flow) -> str:
    """What shares are shares of."""
    return "column" if flow.metric is None else "layer"


def _position_numbers(flow: Flow, map: str, n_down: int, n_across: int) -> NDArray[np.float32]:
    """Position of each cell's destination, which the axis does not tell when only some are drawn."""
    positions = np.asarray(flow.destinations, dtype=np.float32)
    along = positions[None, :] if map == "mlp" else positions[:, None]
    return np.ascontiguousarray(np.broadcast_to(along, (n_down, n_across)))


def _hover(head: str, map: str, value: str) -> str:
    if map == "mlp":
        lines = [f"<b>{head}</b>, %{{y}}", "destination %{x} (%{customdata[0]:d})"]
    else:
        lines = [f"<b>{head}</b>", "source %{x} (%{x:d})", "destination %{y} (%{customdata[0]:d})"]
    return "<br>".join([*lines, value]) + "<extra></extra>"


def _style_axes(figure: go.Figure, size: _Geometry, n_panels: int, down: Sequence[str], across: Sequence[str]) -> None:
    common = {
        "showgrid": False,
        "zeroline": False,
        "showline": True,
        "mirror": True,
        "linecolor": LINE,
        "linewidth": 1,
        "ticks": "",
        "tickmode": "linear",
        "tick0": 0,
        "exponentformat": "none",  # "10000", as in the aliases, not "10k"
        "showticklabels": False,
    }
    # An axis counts cells, so that equal tokens stay apart; its alias shows a count as the token, on the
    # ticks and in the hover alike, also where the tick itself is left out.
    figure.update_xaxes(
        **common,
        tickangle=-90,
        tickfont={"size": _label_size(size.width / len(across))},
        dtick=_label_step(size.width / len(across)),
        labelalias={str(i): label for i, label in enumerate(across)},
        range=[-0.5, len(across) - 0.5],
        matches="x",
    )
    figure.update_yaxes(
        **common,
        tickfont={"size": _label_size(size.height / len(down))},
        dtick=_label_step(size.height / len(down)),
        labelalias={str(j): label for j, label in enumerate(down)},
        range=[len(down) - 0.5, -0.5],
        matches="y",
    )
    for number in range(n_panels):
        row, column = number // size.n_columns + 1, number % size.n_columns + 1
        if column == 1:
            figure.update_yaxes(showticklabels=True, row=row, col=column)
        if number + size.n_columns >= n_panels:  # nothing below it
            figure.update_xaxes(showticklabels=True, row=row, col=column)


def _label_step(cell: float) -> int:
    """Every how many cells a label fits."""
    return math.ceil(_label_size(cell) / cell)


def _label_size(cell: float) -> int:
    return 10 if cell >= 11 else 9


def _style_page(figure: go.Figure, size: _Geometry, flow: Flow, titles: tuple[str, str], map: str, share: bool) -> None:
    for caption in figure.layout.annotations:
        caption.update(font={"size": 10, "color": QUIET}, yshift=0)
    what = f"share of each {_whole(flow)}" if share else "signed contribution"
    baseline = flow.settings.get(f"{map}_baseline")
    tol = flow.settings.get("tol")
    facts = [plain_text(flow.model_name), f"{len(flow.tokens)} tokens"]
    facts += [f"baseline {plain_text(str(baseline))}"] if baseline else []
    facts += [
        f"worst completeness gap {flow.worst_gap(map):.1e}" + (f" (tol {tol:g})" if isinstance(tol, float) else "")
    ]
    width, height = size.left + size.plot_width + size.right, size.top + size.plot_height + size.bottom
    figure.update_layout(
        template="plotly_white",
        width=max(560, round(width)),
        height=round(height),
        margin={
            "l": size.left,
            "r": size.right + max(0, 560 - width),
            "t": size.top,
            "b": size.bottom,
            "pad": 0,
        },
        font={"family": FONT, "size": 12, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="#f3f4f6",
        hoverlabel={
            "bgcolor": "white",
            "bordercolor": LINE,
            "font": {"family": FONT, "size": 12, "color": INK},
        },
    )
    outer = {"showarrow": False, "xref": "paper", "yref": "paper", "font": {"size": 12, "color": INK}}
    # An annotation, because plotly moves a figure's own title when a colour bar lies below it.
    figure.add_annotation(
        text=f"<b>{_TITLES[map]}</b>: {what}<br><span style='font-size:12px;color:{QUIET}'>{' · '.join(facts)}</span>",
        **{**outer, "font": {"size": 16, "color": INK}},
        x=0,
        xanchor="left",
        xshift=-size.left + 12,
        y=1,
        yanchor="top",
        yshift=size.top - 8,
        align="left",
    )
    figure.add_annotation(text=titles[1], x=0.5, y=0, yanchor="bottom", yshift=-size.bottom + 8, **outer)
    figure.add_annotation(text=titles[0], x=0, y=0.5, xanchor="left", xshift=-size.left + 12, textangle=-90, **outer)


def _top(panels: Sequence[_Panel]) -> float:
    """Absolute value at which the colours of some panels end."""
    values = np.concatenate([panel.values.ravel() for panel in panels])
    values = np.abs(values[np.isfinite(values)])
    drawn = values[values > 0]  # a causal model's exact zeros say nothing about the scale
    return float(np.quantile(drawn, _QUANTILE)) if drawn.size else 1.0


def _coloraxis(whole: str, top: float, share: bool, per_layer: bool) -> dict[str, Any]:
    title = (
        f"share of the {whole}"
        if share
        else "relative to each layer's strongest"
        if per_layer
        else "in the target's unit"
    )
    return {
        "colorscale": _SEQUENTIAL if share else DIVERGING,
        "cmin": 0.0 if share else -top,
        "cmax": min(top, 1.0) if share else top,
        # Lying above the first panels, it is in sight however wide the grid is.
        "colorbar": {
            "orientation": "h",
            "title": {"text": f" {title}", "font": {"size": 11, "color": QUIET}, "side": "right"},
            "tickformat": ".0%" if share else ".2~g",
            "tickfont": {"size": 10},
            "thickness": 9,
            "lenmode": "pixels",
            "len": 260,
            "x": 0,
            "xanchor": "left",
            "xpad": 0,
            "y": 1,
            "yanchor": "bottom",
            "ypad": 22,
            "outlinewidth": 0,
            "nticks": 5,
        },
    }


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 0; padding: 12px 16px 32px; background: white; color: {ink}; font-family: {font}; }}
.figure {{ overflow-x: auto; margin-bottom: 24px; }}
</style>
</head>
<body>
{figures}
</body>
</html>
"""


def write_html(figures: go.Figure | Sequence[go.Figure], path: str | os.PathLike[str], title: str = "lig_lens") -> Path:
    """Write one page with the figures below each other, everything inlined: it opens without network.

    Args:
        figures: one figure or several.
        path: replaced in one step; plotly's script makes the page about 5 MB.
        title: of the page, as text.

    Raises:
        InputError: no figure, or `path` cannot be written.
    """
    listed = [figures] if isinstance(figures, go.Figure) else list(figures)
    if not listed:
        raise InputError(f"write_html: no figure for {os.fspath(path)!r}: give at least one.")
    parts = [
        plotly.io.to_html(
            figure,
            full_html=False,
            include_plotlyjs=number == 0,
            include_mathjax=False,
            div_id=f"figure-{number}",
            config={"displaylogo": False, "responsive": False},
        )
        for number, figure in enumerate(listed)
    ]
    body = "\n".join(f'<div class="figure">{part}</div>' for part in parts)
    page = _PAGE.format(title=html.escape(title), ink=INK, font=FONT, figures=body)
    return write_atomic(path, page.encode("utf-8"))
