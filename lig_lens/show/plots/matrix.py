"""Heatmaps with labelled rows and columns: one large, or many in a grid that zoom together."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from lig_lens.show.plots.style import DIVERGING, FAINT, INK, LINE, QUIET, SEQUENTIAL, label_width, set_frame
from lig_lens.show.text import MINUS

Values = NDArray[np.floating[Any]]
_QUANTILE, _OUTLYING = 0.995, 3.0  # colours end at the largest value, at most at that many times this quantile
_WIDE = 1200  # pixels that a row of panels aims at
PRINTED = 16  # cells in a row up to which they hold their values
ROOMY = 44.0  # pixels that such a cell is wide


@dataclass(frozen=True)
class Axis:
    """What one side of a heatmap counts.

    `name` is what the hover calls an entry, if it tells it, and `title` what stands beside the labels; `numbers`, where
    there are some, are told by the hover beside the label: positions of tokens.
    """

    title: str
    labels: Sequence[str]
    name: str | None = None
    numbers: Sequence[int] | None = None


@dataclass(frozen=True, eq=False)
class Scale:
    """Colours from `low` to `high`; `ticks` are values and what is written at them, by default plotly's."""

    title: str
    low: float
    high: float
    tickformat: str = ".2~g"
    ticks: tuple[Sequence[float], Sequence[str]] | None = None

    @property
    def signed(self) -> bool:
        """Whether the scale has a middle, which is 0."""
        return self.low < 0 and self.low == -self.high


def signed_scale(title: str, *values: Values, percent: bool = False, relative: bool = False, cut: bool = True) -> Scale:
    """Colours centred on 0.

    Args:
        title: of the colour bar.
        values: to be coloured.
        percent: they are shares, and the scale ends at 100% at most.
        relative: write 1 for the strongest.
        cut: see `strongest`.
    """
    top = strongest(*values, cut=cut)
    top = min(top, 1.0) if percent else top
    return Scale(title, -top, top, _percents(top) if percent else ".2~g", relative_ticks(top) if relative else None)


def relative_ticks(top: float) -> tuple[Sequence[float], Sequence[str]]:
    """Ticks of a scale up to `top` that call it 1."""
    return [-top, -top / 2, 0.0, top / 2, top], [f"{MINUS}1", f"{MINUS}0.5", "0", "0.5", "1"]


def share_scale(title: str, *values: Values, cut: bool = True) -> Scale:
    """Colours from 0 to the largest share, at most all of it (shares of next to nothing are huge); see `strongest`."""
    top = min(strongest(*values, cut=cut), 1.0)
    return Scale(title, 0.0, top, _percents(top))


def _percents(top: float) -> str:
    """How ticks up to `top` are written, so that no two are alike."""
    return ".0%" if top >= 0.03 or not top else f".{1 - math.floor(math.log10(100 * top))}%"


def printed(values: Values, percent: bool, signed: bool = True, digits: int = 2) -> list[list[str]]:
    """Values as they stand in cells, blank where they round to 0: percents, or `digits` of the largest."""
    sizes = np.abs(values[np.isfinite(values)])
    top = float(sizes.max(initial=0.0))
    places = max(0, digits - 1 - math.floor(math.log10(top))) if top else 0
    form = (
        f"{'+' if signed else ''}.{0 if top >= 0.03 else 1}%"
        if percent
        else f".{places}f"
        if places <= 4 and top < 1e4
        else ".0e"
    )

    def write(value: float) -> str:
        text = format(value, form) if math.isfinite(value) else ""
        return text.replace("-", MINUS) if re.search("[1-9]", text.split("e")[0]) else ""

    return [[write(float(value)) for value in row] for row in values]


def strongest(*values: Values, cut: bool = True) -> float:
    """Absolute value at which the colours of some values end: the largest.

    With `cut` it is at most three times the 99.5th percentile: a few cells would else leave all others pale.
    """
    drawn = np.abs(np.concatenate([np.asarray(some, dtype=np.float64).ravel() for some in values]))
    drawn = drawn[np.isfinite(drawn) & (drawn > 0)]  # a causal model's exact zeros say nothing about the scale
    if not drawn.size:
        return 1.0
    top, most = float(drawn.max()), float(np.quantile(drawn, _QUANTILE))
    return min(top, _OUTLYING * most) if cut else top


@dataclass(frozen=True)
class Heatmap:
    """One heatmap: `values[y, x]`, their colours, the caption above, and the first and last line of the hover.

    `texts` stand in the cells, `notes` before the value in their hover; `value` may show `name` as `%{fullData.name}`,
    as it is.
    """

    values: Values
    scale: Scale
    hover: str = ""
    value: str = "%{z:+.4g}"
    caption: str = ""
    texts: Sequence[Sequence[str]] | None = None
    notes: Sequence[Sequence[str]] | None = None
    name: str | None = None


def draw(
    panels: Sequence[Heatmap],
    down: Axis,
    across: Axis,
    heading: str,
    facts: Sequence[str],
    *,
    n_columns: int = 1,
    cell: tuple[float, float] | None = None,
    upwards: bool = False,
) -> go.Figure:
    """Draw panels of one shape.

    Args:
        panels: in reading order.
        down: the rows of a panel.
        across: its columns.
        heading: markup.
        facts: escaped text.
        n_columns: panels in a row.
        cell: width and height of a cell in pixels; by default such that a row of panels fits a wide window.
        upwards: the first row is at the bottom.
    """
    size = _geometry(len(panels), n_columns, down, across, cell, any(panel.caption for panel in panels))
    figure = make_subplots(
        rows=size.n_rows,
        cols=n_columns,
        horizontal_spacing=size.gap_x / size.plot_width if n_columns > 1 else 0,
        vertical_spacing=size.gap_y / size.plot_height if size.n_rows > 1 else 0,
        subplot_titles=[panel.caption for panel in panels] if size.captions else None,
    )
    scales: list[Scale] = []
    numbers, lines = _hover_axes(down, across)
    for place, panel in enumerate(panels):
        if panel.scale not in scales:
            scales.append(panel.scale)
        number = scales.index(panel.scale) + 1
        gap = 1.0 if size.width / len(across.labels) >= 20 else 0.5 if len(across.labels) <= 24 else 0
        figure.add_trace(
            go.Heatmap(
                z=panel.values,
                # Beside a colour axis these do nothing, but the trace can be taken into another figure.
                zmin=panel.scale.low,
                zmax=panel.scale.high,
                customdata=numbers,
                coloraxis="coloraxis" if number == 1 else f"coloraxis{number}",
                hoverongaps=False,
                xgap=gap,
                ygap=gap,
                text=panel.texts,
                texttemplate=None if panel.texts is None else "%{text}",
                textfont={"size": 10},
                hovertext=panel.notes,
                name=panel.name,
                hovertemplate=_hover(panel, lines),
            ),
            row=place // n_columns + 1,
            col=place % n_columns + 1,
        )
    _style_axes(figure, size, len(panels), down, across, upwards)
    for caption in figure.layout.annotations:
        caption.update(font={"size": 10, "color": QUIET}, yshift=0)
    above = 56.0 + (16 if size.captions else 0)
    for number, scale in enumerate(scales):
        axis = coloraxis(scale, shown=number == 0, raised=22 if size.captions else 8)
        figure.update_layout({"coloraxis" if number == 0 else f"coloraxis{number + 1}": axis})
    missing = any(np.isnan(panel.values).any() for panel in panels)
    figure.update_layout(plot_bgcolor=LINE if missing else FAINT)
    set_frame(
        figure,
        heading,
        [*facts, *_beyond(panels)],
        width=size.plot_width,
        height=size.plot_height,
        left=size.left,
        bottom=size.bottom,
        above=above,
    )
    _add_titles(figure, size, down.title, across.title)
    return figure


def _add_titles(figure: go.Figure, size: "_Geometry", down: str, across: str) -> None:
    """Write what rows and columns are, once for all panels."""
    outer = {"showarrow": False, "xref": "paper", "yref": "paper", "font": {"size": 12, "color": INK}}
    figure.add_annotation(text=across, x=0.5, y=0, yanchor="bottom", yshift=8 - size.bottom, **outer)
    figure.add_annotation(text=down, x=0, y=0.5, xanchor="left", xshift=12 - size.left, textangle=-90, **outer)


def _beyond(panels: Sequence[Heatmap]) -> list[str]:
    """What a reader has to know of values outside their scales."""
    finite = [(panel.scale, panel.values[np.isfinite(panel.values)]) for panel in panels]
    tops = [(scale, float((np.abs(some) if scale.signed else some).max(initial=-np.inf))) for scale, some in finite]
    cut = {scale.high: scale for scale, top in tops if scale.high > 0 and top > 1.01 * scale.high}
    negative = any(scale.low == 0 and float(some.min(initial=0)) < -0.02 for scale, some in finite)
    facts = ["negative shares are drawn as 0"] if negative else []
    if len({scale.high for scale, _ in tops}) > 1 and cut:
        facts.append("colours of some panels saturate")
    elif cut:
        ((end, scale),) = cut.items()
        number = f"{end:.0%}" if "%" in scale.tickformat else f"{end:.2g}"
        facts.append(f"colours saturate at {'±' if scale.signed else ''}{number}")
    return facts


def large_cells(n_down: int, n_across: int) -> tuple[float, float]:
    """Width and height of the cells of one map that fills a page; up to 16 each way they hold their values."""
    width = ROOMY if max(n_down, n_across) <= PRINTED else max(4.0, min(ROOMY, 680 / n_across))
    return width, width if width < 26 else max(26.0, 0.7 * width)


def row_cells(n_across: int, height: float = 26.0) -> tuple[float, float]:
    """Width and height of the cells of a table with rows of one height."""
    return (ROOMY if n_across <= PRINTED else max(6.0, min(26.0, 900 / n_across))), height


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
    bottom: float
    angle: int
    captions: bool

    @property
    def plot_width(self) -> float:
        return self.n_columns * self.width + (self.n_columns - 1) * self.gap_x

    @property
    def plot_height(self) -> float:
        return self.n_rows * self.height + (self.n_rows - 1) * self.gap_y


def _geometry(
    n_panels: int, n_columns: int, down: Axis, across: Axis, cell: tuple[float, float] | None, captions: bool
) -> _Geometry:
    n_down, n_across, gap_x = len(down.labels), len(across.labels), 10.0
    if cell is None:
        # A row of panels should fit a wide window, but a cell keeps a size at which it is seen.
        fitting = (_WIDE / n_columns - gap_x) / n_across
        side = min(26.0, max(fitting, min(9.0, 150 / n_across), 3.0))
        width, height = max(72.0, side * n_across), max(24.0, side * n_down)
        height = width if n_down == n_across else height
    else:
        width, height = max(24.0, cell[0] * n_across), max(24.0, cell[1] * n_down)
    longest = label_width(across.labels)
    angle = 0 if longest + 6 <= width / n_across else -45 if width / n_across >= 20 else -90
    labels = {
        0: 14.0 * max(label.count("<br>") + 1 for label in across.labels),
        -45: 10 + 0.71 * longest,
        -90: longest,
    }[angle]
    return _Geometry(
        n_rows=math.ceil(n_panels / n_columns),
        n_columns=n_columns,
        width=width,
        height=height,
        gap_x=gap_x,
        gap_y=24.0,
        left=48 + label_width(down.labels),
        bottom=36 + labels,
        angle=angle,
        captions=captions,
    )


def _hover_axes(down: Axis, across: Axis) -> tuple[NDArray[np.float32] | None, list[str]]:
    """Hover lines of both axes, and the numbers of cells that these show and the axes do not count themselves."""
    shape, lines = (len(down.labels), len(across.labels)), list[str]()
    layers: list[NDArray[np.float32]] = []
    for letter, axis in (("x", across), ("y", down)):
        if axis.name is None:
            continue
        line = f"{axis.name} %{{{letter}}}"
        if axis.numbers is not None and list(axis.numbers) == list(range(len(axis.labels))):
            line += f" (%{{{letter}:d}})"
        elif axis.numbers is not None:
            line += f" (%{{customdata[{len(layers)}]:d}})"
            along = np.asarray(axis.numbers, dtype=np.float32)
            layers.append(np.broadcast_to(along if letter == "x" else along[:, None], shape))
        lines.append(line)
    return (np.stack(layers, axis=-1) if layers else None), lines


def _hover(panel: Heatmap, lines: Sequence[str]) -> str:
    head = [f"<b>{panel.hover}</b>"] if panel.hover else []
    notes = ["%{hovertext}"] if panel.notes is not None else []
    return "<br>".join(filter(None, [*head, *lines, *notes, panel.value])) + "<extra></extra>"


def _style_axes(figure: go.Figure, size: _Geometry, n_panels: int, down: Axis, across: Axis, upwards: bool) -> None:
    common = {
        "showgrid": False,
        "zeroline": False,
        "showline": True,
        "mirror": True,
        "linecolor": LINE,
        "linewidth": 1,
        "ticks": "",
        "exponentformat": "none",  # "10000", as in the aliases, not "10k"
        "showticklabels": False,
    }
    # An axis counts cells, so that equal tokens stay apart; its alias shows a count as the token in the hover, also
    # where there is no room for the tick.
    for update, axis, length, more in (
        (figure.update_xaxes, across, size.width, {"tickangle": size.angle, "matches": "x"}),
        (figure.update_yaxes, down, size.height, {"matches": "y"}),
    ):
        count, cell = len(axis.labels), length / len(axis.labels)
        font = 11 if cell >= 20 else 10 if cell >= 11 else 9
        every = range(0, count, math.ceil(font / cell))
        ends = [-0.5, count - 0.5] if axis is across or upwards else [count - 0.5, -0.5]
        update(
            **common,
            tickmode="array",
            tickvals=list(every),
            ticktext=[axis.labels[number] for number in every],
            tickfont={"size": font},
            labelalias={str(number): label for number, label in enumerate(axis.labels)},
            range=ends,
            **more,
        )
    figure.update_layout(xaxis_matches=None, yaxis_matches=None)  # the first, which all others match
    for number in range(n_panels):
        row, column = number // size.n_columns + 1, number % size.n_columns + 1
        if column == 1:
            figure.update_yaxes(showticklabels=True, row=row, col=column)
        if number + size.n_columns >= n_panels:  # nothing below it
            figure.update_xaxes(showticklabels=True, row=row, col=column)


def coloraxis(scale: Scale, shown: bool, raised: int) -> dict[str, Any]:
    """A scale with its colour bar, where that is shown, `raised` pixels above the plot."""
    ticks = {} if scale.ticks is None else {"tickvals": scale.ticks[0], "ticktext": scale.ticks[1]}
    return {
        "colorscale": DIVERGING if scale.signed else SEQUENTIAL,
        "cmin": scale.low,
        "cmax": scale.high,
        "showscale": shown,
        # Lying above the first panels, it is in sight however wide the grid is.
        "colorbar": {
            "orientation": "h",
            "title": {"text": f"{scale.title} ", "font": {"size": 11, "color": QUIET}, "side": "top"},
            "tickformat": scale.tickformat,
            "tickfont": {"size": 10},
            "thickness": 9,
            "lenmode": "pixels",
            "len": 220,
            "x": 0,
            "xanchor": "left",
            "xpad": 0,
            "y": 1,
            "yanchor": "bottom",
            "ypad": raised,
            "outlinewidth": 0,
            "nticks": 5,
            **ticks,
        },
    }
