"""The strongest paths to a token, as a graph: tokens along x, layers upwards."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise

import numpy as np
import plotly.graph_objects as go

from lig_lens.arguments import checked
from lig_lens.flow.compose import doubts
from lig_lens.flow.flow import Flow
from lig_lens.flow.routes import Path
from lig_lens.names import head_name
from lig_lens.show.plots.facts import about, baselines, worst_gap
from lig_lens.show.plots.style import (
    INK,
    LINE,
    QUALITATIVE,
    QUIET,
    label_width,
    quiet,
    set_frame,
    token_label,
)
from lig_lens.show.text import signed_percent

_ALL = 32  # tokens up to which also those are shown that no path visits
_WIDEST, _THINNEST = 9.0, 1.2  # pixels of an edge
_STEPS = np.linspace(0.0, 1.0, 25)  # along a curve
# In pixels: plotly's named dashes grow with the line's width, and thick ones look like broken lines.
_DASHES = ("solid", "2px,3px", "12px,4px,2px,4px")  # one for each round through the colours
_NEGATIVE = "6px,4px"
_PAST = "#b6bdc6"  # colour of skip and bias
_NAMED = 0.2  # of the widest edge: from there on an edge has its head's name on it
_ABOVE, _BELOW = 34.0, 12.0  # pixels beyond the first and the last residual vectors
_LOW = 9.0  # pixels of a layer where no path goes through a head


@dataclass(eq=False)
class _Link:
    """An edge that paths share: its share of the step, and the weights of the paths through it."""

    layer: int
    head: int | None
    src: int
    dst: int
    share: float
    weights: list[float] = field(default_factory=list)

    @property
    def weight(self) -> float:
        return sum(self.weights)


@dataclass(frozen=True)
class _Canvas:
    """Where things stand, in pixels: shown positions along x, and the residual stream entering each layer along y.

    `busy` are the layers where a path goes through a head; the others are low.
    """

    x: dict[int, float]
    y: dict[int, float]
    busy: frozenset[int]
    spacing: float


@checked
def paths_graph(
    flow: Flow,
    dst: int = -1,
    k: int = 20,
    start: int | None = None,
    stop: int | None = None,
    rule: str = "conserving",
) -> go.Figure:
    """The k strongest paths to one destination, drawn together: tokens along x, layers upwards.

    A line passes a layer, through a head (coloured, strong ones with its name) or by skip connection and bias (grey).
    Its width is the sum of the weights of the paths through it; where that is negative it is dashed. Of long prompts
    only the tokens that paths visit are shown, with gaps for the others.

    Args:
        flow: with attn and mlp maps of all destinations.
        dst: position of the destination; negative ones count from the end.
        k: how many paths.
        start: number of the first block, see `Flow.rollout`.
        stop: number of the block before which to stop.
        rule: of composition, see `Flow.compose`.

    Raises:
        InputError: see `Flow.paths`.
    """
    paths = flow.paths(dst, k, start, stop, rule)
    dst %= len(flow.tokens)
    first = flow.layers[0] if start is None else start
    stop = flow.layers[-1] + 1 if stop is None else stop
    links, nodes = _links(paths), _nodes(paths)
    canvas = _canvas(len(flow.tokens), range(first, stop), {position for _, position in nodes} | {dst}, links)
    heads = sorted({link.head for link in links if link.head is not None})
    figure = go.Figure()
    # Skip and bias first, and weak ones before strong ones, which so lie on top.
    links.sort(key=lambda link: (link.head is not None, abs(link.weight)))
    curves = [_curve(link, links, canvas) for link in links]
    widest = max((abs(link.weight) for link in links), default=1.0)
    for link, (along, upwards) in zip(links, curves, strict=True):
        colour, dash = _look(link.head, heads)
        pixels = max(_THINNEST, _WIDEST * abs(link.weight) / widest)
        figure.add_trace(
            go.Scatter(
                x=along,
                y=upwards,
                mode="lines",
                line={"color": colour, "dash": _NEGATIVE if link.weight < 0 else dash, "width": pixels},
                opacity=0.9,
                name=_name(link.head),
                showlegend=False,
                hovertext=_hover(flow, link),
                hoverinfo="text",
            )
        )
    _add_nodes(figure, flow, nodes, canvas, (stop, dst))
    _add_names(figure, links, curves, heads)
    _add_legend(figure, links, heads)
    _style(figure, flow, canvas, range(first, stop), dst)
    n_layers, held = stop - first, sum(path.weight for path in paths)
    layers = f"layer {first}" if n_layers == 1 else f"layers {first} to {stop - 1}"
    labels = [token_label(flow.tokens[at], position=at) for at in canvas.x]
    set_frame(
        figure,
        f"<b>Strongest paths to {token_label(flow.tokens[dst], flow.special[dst], dst)}</b> through {layers}",
        [
            *about(flow, target=False),
            *baselines(flow, ("attn", "mlp")),
            f"rule {rule}",
            worst_gap([flow], ("attn", "mlp")),
            *doubts(flow, first, stop, rule),
            f"{len(paths)} paths, together {signed_percent(held)} of the total",
            "width: weight of the paths through an edge",
        ],
        width=max(canvas.x.values()) + canvas.spacing,
        height=canvas.y[stop] + _ABOVE + _BELOW,
        left=76.0,
        right=185.0,
        bottom=44.0 + (14.0 if label_width(labels) < canvas.spacing else 0.71 * label_width(labels)),
        above=20.0,
    )
    return figure.update_layout(plot_bgcolor="white", hovermode="closest", hoverdistance=12)


def _links(paths: Sequence[Path]) -> list[_Link]:
    found: dict[tuple[int, int | None, int, int], _Link] = {}
    for path in paths:
        for step in path.steps:
            key = (step.layer, step.head, step.src, step.dst)
            found.setdefault(key, _Link(*key, step.weight)).weights.append(path.weight)
    return list(found.values())


def _nodes(paths: Sequence[Path]) -> dict[tuple[int, int], float]:
    """Weights of the paths through each residual vector: (number of the layer that it enters, position)."""
    found: dict[tuple[int, int], float] = defaultdict(float)
    for path in paths:
        for step in path.steps:
            found[step.layer, step.src] += path.weight
        found[path.steps[-1].layer + 1, path.steps[-1].dst] += path.weight
    return dict(found)


def _canvas(n_pos: int, layers: range, visited: Collection[int], links: Sequence[_Link]) -> _Canvas:
    """Lay tokens and layers out. In long prompts only visited tokens are shown, with room for what is left out."""
    shown = range(n_pos) if n_pos <= _ALL else sorted(visited)
    x = dict(zip(shown, accumulate([0.0, *(1.0 if b == a + 1 else 1.6 for a, b in pairwise(shown))]), strict=True))
    spacing = max(26.0, min(48.0, 1100 / (max(x.values()) + 1)), 420 / (max(x.values()) + 1))
    busy = frozenset(link.layer for link in links if link.head is not None) or frozenset(layers)
    high = max(36.0, min(90.0, 640 / len(busy)))
    heights = accumulate([0.0, *(high if layer in busy else _LOW for layer in layers)])
    y = dict(zip((*layers, layers[-1] + 1), heights, strict=True))
    return _Canvas({position: at * spacing for position, at in x.items()}, y, busy, spacing)


def _curve(link: _Link, links: Sequence[_Link], canvas: _Canvas) -> tuple[list[float], list[float]]:
    """Points of an edge, which leaves and enters upright; several between the same tokens stand side by side."""
    beside = [other for other in links if (other.layer, other.src, other.dst) == (link.layer, link.src, link.dst)]
    through = [other for other in beside if other.head is not None]
    slot = 0.0
    if link.head is not None:
        order = through.index(link)
        slot = order - (len(through) - 1) / 2
        if len(through) < len(beside):  # the straight one is taken
            slot = (order // 2 + 1) * (1 if order % 2 == 0 else -1)
    from_x, to_x, below, above = canvas.x[link.src], canvas.x[link.dst], canvas.y[link.layer], canvas.y[link.layer + 1]
    along = from_x + (to_x - from_x) * _STEPS**2 * (3 - 2 * _STEPS) + 16 * slot * np.sin(np.pi * _STEPS)
    return along.tolist(), (below + (above - below) * _STEPS).tolist()


def _look(head: int | None, heads: Sequence[int]) -> tuple[str, str]:
    """Colour and dash of a head among those that are drawn."""
    if head is None:
        return _PAST, "solid"
    rank = heads.index(head)
    return QUALITATIVE[rank % len(QUALITATIVE)], _DASHES[rank // len(QUALITATIVE) % len(_DASHES)]


def _name(head: int | None) -> str:
    return "skip and bias" if head is None else f"head {head}"


def _hover(flow: Flow, link: _Link) -> str:
    ends = [f"{token_label(flow.tokens[at], flow.special[at])} ({at})" for at in (link.src, link.dst)]
    count = f"{len(link.weights)} path{'s' if len(link.weights) > 1 else ''}"
    return "<br>".join(
        [
            f"<b>{head_name(link.layer, link.head)}</b>" + (f", {_name(None)}" if link.head is None else ""),
            " → ".join(ends) if link.head is not None else ends[0],
            f"{signed_percent(link.share)} of this step",
            f"{count} through it, together {signed_percent(link.weight)} of the total",
        ]
    )


def _add_nodes(
    figure: go.Figure, flow: Flow, nodes: dict[tuple[int, int], float], canvas: _Canvas, last: tuple[int, int]
) -> None:
    def where(layer: int) -> str:
        return f"leaving layer {layer - 1}" if layer == last[0] else f"entering layer {layer}"

    figure.add_trace(
        go.Scatter(
            x=[canvas.x[position] for _, position in nodes],
            y=[canvas.y[layer] for layer, _ in nodes],
            mode="markers",
            name="residual stream",
            marker={
                "size": [13 if node == last else 7 if {node[0] - 1, node[0]} & canvas.busy else 4 for node in nodes],
                "opacity": 1,
                "color": [INK if node == last else "white" for node in nodes],
                "line": {"color": INK, "width": 1.2},
            },
            text=[
                f"<b>{token_label(flow.tokens[at], flow.special[at])} ({at})</b>, {where(layer)}<br>"
                f"paths through it: {signed_percent(weight)}"
                for (layer, at), weight in nodes.items()
            ],
            hovertemplate="%{text}<extra></extra>",
            showlegend=False,
            cliponaxis=False,
        )
    )


def _add_names(
    figure: go.Figure,
    links: Sequence[_Link],
    curves: Sequence[tuple[list[float], list[float]]],
    heads: Sequence[int],
) -> None:
    """Write the heads' names on strong edges, where there is room."""
    taken: list[tuple[float, float]] = []
    widest = max((abs(link.weight) for link in links), default=0.0)
    for link, (along, upwards) in reversed(list(zip(links, curves, strict=True))):
        if link.head is None or abs(link.weight) < _NAMED * widest:
            continue
        for point in (12, 8, 16, 5, 19):
            x, y = along[point], upwards[point]
            if all(abs(x - a) > 42 or abs(y - b) > 17 for a, b in taken):
                taken.append((x, y))
                figure.add_annotation(
                    x=x,
                    y=y,
                    text=head_name(link.layer, link.head),
                    showarrow=False,
                    font={"size": 10, "color": INK},
                    bgcolor="rgba(255,255,255,0.9)",
                    bordercolor=_look(link.head, heads)[0],
                    borderpad=1,
                )
                break


def _add_legend(figure: go.Figure, links: Sequence[_Link], heads: Sequence[int]) -> None:
    entries = [(_name(head), *_look(head, heads)) for head in heads]
    if any(link.head is None for link in links):
        entries.append((_name(None), *_look(None, heads)))
    if any(link.weight < 0 for link in links):
        entries.append(("negative", QUIET, _NEGATIVE))
    for name, colour, dash in entries:
        figure.add_trace(
            go.Scatter(x=[None], y=[None], mode="lines", name=name, line={"color": colour, "dash": dash, "width": 3})
        )


def _style(figure: go.Figure, flow: Flow, canvas: _Canvas, layers: range, dst: int) -> None:
    ticks = {at: token_label(flow.tokens[p], flow.special[p], p) for p, at in canvas.x.items()}
    ticks[canvas.x[dst]] = f"<b>{ticks[canvas.x[dst]]}</b>"
    for left, right in pairwise(canvas.x):
        if right > left + 1:
            ticks[(canvas.x[left] + canvas.x[right]) / 2] = quiet("⋯")
    common = {"showgrid": False, "zeroline": False, "ticks": ""}
    figure.update_xaxes(
        title="token",
        tickvals=list(ticks),
        ticktext=list(ticks.values()),
        tickangle=0 if label_width(list(ticks.values())) < canvas.spacing else -45,
        tickfont={"size": 11},
        range=[-canvas.spacing / 2, max(canvas.x.values()) + canvas.spacing / 2],
        **common,
    )
    runs = [list(run) for _, run in groupby(layers, key=lambda layer: layer if layer in canvas.busy else -1)]
    figure.update_yaxes(
        title="layer",
        tickvals=[(canvas.y[run[0]] + canvas.y[run[-1] + 1]) / 2 for run in runs],
        ticktext=[str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs],
        range=[-_BELOW, canvas.y[layers[-1] + 1] + _ABOVE],
        **common,
    )
    for boundary in (*(run[0] for run in runs), layers[-1] + 1):
        figure.add_hline(y=canvas.y[boundary], line={"color": LINE, "width": 1}, layer="below")
    figure.add_annotation(
        x=canvas.x[dst],
        y=canvas.y[layers[-1] + 1],
        yshift=20,
        text=f"<b>{token_label(flow.tokens[dst], flow.special[dst], dst)}</b>",
        showarrow=False,
    )
    figure.update_layout(
        legend={"x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top", "tracegroupgap": 0, "itemclick": False},
    )
