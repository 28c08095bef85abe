"""Contributions of heads: a grid of all of them, and one of them large."""

from collections.abc import Sequence

import plotly.graph_objects as go

from lig_lens.arguments import checked
from lig_lens.choose import find_places, of_flow
from lig_lens.errors import InputError, check_choice
from lig_lens.flow.flow import Flow
from lig_lens.names import MAPS, head_name
from lig_lens.show.plots.facts import cancelling_fact, unit, whole
from lig_lens.show.plots.matrix import (
    PRINTED,
    Axis,
    Heatmap,
    Scale,
    Values,
    draw,
    large_cells,
    printed,
    share_scale,
    signed_scale,
    strongest,
)
from lig_lens.show.plots.select import Drawn, Positions, drawn, pick, token_axis

_TITLES = {
    "attn": "Source tokens → heads",
    "mlp": "Heads → block output",
    "block": "Source tokens → block output",
}


@checked
def head_grid(
    flow: Flow,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    map: str = "attn",
    share: bool = False,
    scale: str | None = None,
    tokens: Sequence[int] | None = None,
    minus: Flow | None = None,
) -> go.Figure:
    """Grid of heatmaps, read like attention patterns: destinations down, sources across.

    attn has a row of panels per layer and a column per head; block has one panel per layer, and so has mlp,
    with the heads, skip and bias down and the destinations across. Colours end at the strongest cell, at most at three
    times the 99.5th percentile of the absolute values; then the subtitle says so. The panels zoom together.

    Args:
        flow: where the numbers come from: `[layer, head, src, dst]`; a panel is the transpose, `[dst, src]`.
        layers: block numbers, in the order to draw; all layers of the Flow by default.
        heads: head numbers, in the order to draw (attn only); all by default.
        map: attn, block or mlp.
        share: draw `flow.shares(map)`, without unit, on a sequential scale (negative shares are drawn as 0), rather
            than signed contributions in units of the target on a diverging scale centred on 0. Where what is added up
            in a total is more than `compose.CANCELS` times as large as the total, shares mean nothing, and are grey.
        scale: `layer` gives every layer its own scale, since vectors grow along a model's layers; `shared` draws
            all panels on one, in the target's unit. By default `shared` for a metric, whose unit all layers share, and
            `layer` otherwise. Shares are on one scale always.
        tokens: positions to show, as sources and as destinations, in the order to draw; negative ones count from the
            end, and those that are no destination of the Flow are shown as sources only. All by default.
        minus: another Flow of the same tokens, layers and destinations, which is subtracted: the difference of
            contributions, or with `share` of shares, on a diverging scale.

    Raises:
        InputError: a map, layer, head or position that the Flow does not have, or a Flow to subtract that does not
            belong to this one.
    """
    check_choice("map", map, MAPS)
    scale = ("layer" if flow.metric is None else "shared") if scale is None else scale
    check_choice("scale", scale, ("layer", "shared"))
    given = drawn("head_grid", flow, map, share, minus)
    layers = flow.layers if layers is None else tuple(layers)
    places = find_places(layers, flow.layers, of_flow("layer"))
    if map != "attn" and heads is not None:
        raise InputError(
            f"head_grid: heads={list(heads)} picks panels of the 'attn' map, not of {map!r}: leave it out."
        )
    shown = pick("head_grid", flow, tokens)
    heads_of_rows: list[int | None] = [None]
    if map == "attn":
        n_heads = given.terms.shape[1]
        heads_of_rows = [*find_places(heads, range(n_heads), of_flow("head"))]
    values = [[_values(given, shown, place, head) for head in heads_of_rows] for place in places]
    if scale == "layer" and not share:
        cut = any(strongest(*row) < strongest(*row, cut=False) for row in values)
        relative = "relative to where each layer's colours end" if cut else "relative to each layer's strongest"
        scales = [_scale(flow, given, row, relative) for row in values]
    else:
        scales = [_scale(flow, given, [panel for row in values for panel in row])] * len(layers)
    panels = [
        Heatmap(
            panel,
            scales[number],
            hover=head_name(layer, head),
            value=given.hover,
            caption=head_name(layer, head),
        )
        for number, layer in enumerate(layers)
        for head, panel in zip(heads_of_rows, values[number], strict=True)
    ]
    down, across = _axes(flow, given, shown)
    columns = len(heads_of_rows) if map == "attn" else min(len(panels), 6 if len(across.labels) <= 16 else 3)
    facts = [*given.facts, *_cancelling(given, shown, places, heads_of_rows)]
    return draw(panels, down, across, f"<b>{_TITLES[map]}</b>: {given.what}", facts, n_columns=columns)


@checked
def head_map(
    flow: Flow,
    layer: int,
    head: int | None = None,
    map: str = "attn",
    share: bool = False,
    tokens: Sequence[int] | None = None,
    minus: Flow | None = None,
) -> go.Figure:
    """One head's map large, or one layer's: destinations down, sources across, with the positions of tokens.

    Up to 16 tokens the values stand in the cells (blank where they round to 0), beyond that in the hover alone.

    Args:
        flow: where the numbers come from.
        layer: block number.
        head: head number, for the attn map; block and mlp have one map for a layer.
        map: attn, block or mlp.
        share: see `head_grid`.
        tokens: see `head_grid`.
        minus: see `head_grid`.

    Raises:
        InputError: see `head_grid`; a head that is missing, or one of a map that has none.
    """
    check_choice("map", map, MAPS)
    given = drawn("head_map", flow, map, share, minus)
    (place,) = find_places([layer], flow.layers, of_flow("layer"))
    if (map == "attn") != (head is not None):
        remedy = "name one, or draw the layer with map='block'" if head is None else "leave it out"
        raise InputError(f"head_map: head={head} with the {map!r} map: {remedy}.")
    if head is not None:
        find_places([head], range(given.terms.shape[1]), of_flow("head"))
    shown = pick("head_map", flow, tokens)
    values = _values(given, shown, place, head)
    down, across = _axes(flow, given, shown, numbered=True)
    where = head_name(layer, head)
    texts = printed(values, given.share, given.minus) if max(values.shape) <= PRINTED else None
    panel = Heatmap(values, _scale(flow, given, [values]), hover=where, value=given.hover, texts=texts)
    heading = f"<b>{where[0].upper()}{where[1:]}</b>: {_TITLES[map].lower()}, {given.what}"
    facts = [*given.facts, *_cancelling(given, shown, [place], [head])]
    return draw([panel], down, across, heading, facts, cell=large_cells(*values.shape))


def _values(given: Drawn, shown: Positions, place: int, head: int | None) -> Values:
    """What one panel shows, rows first."""
    terms = given.terms[place] if head is None else given.terms[place, head]
    terms = terms[..., shown.places]
    chosen: Values = (terms if given.map == "mlp" else terms[shown.sources].T).numpy()
    return chosen


def _cancelling(given: Drawn, shown: Positions, places: Sequence[int], heads: Sequence[int | None]) -> list[str]:
    """How many of the totals that are shown have no shares."""
    cancels = given.cancels[places]
    if "head" in given.cells:
        cancels = cancels[:, [head for head in heads if head is not None]]
    if "dst" in given.cells:
        cancels = cancels[..., shown.places]
    return cancelling_fact(cancels)


def _scale(flow: Flow, given: Drawn, values: Sequence[Values], relative: str = "") -> Scale:
    if not given.signed:
        return share_scale(f"share of the {whole(flow)}", *values)
    if given.share:
        return signed_scale(f"difference of shares of the {whole(flow)}", *values, percent=True)
    return signed_scale(relative or unit(flow), *values, relative=bool(relative))


def _axes(flow: Flow, given: Drawn, shown: Positions, numbered: bool = False) -> tuple[Axis, Axis]:
    """Rows and columns of a panel."""
    destinations = token_axis(flow, shown.destinations, "destination", numbered)
    if given.map == "mlp":
        parts = [f"head {head}" for head in range(given.terms.shape[1] - 2)] + ["skip", "bias"]
        return Axis("part", parts, "part"), destinations
    return destinations, token_axis(flow, shown.sources, "source", numbered)
