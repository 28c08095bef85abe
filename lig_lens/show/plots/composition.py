"""Maps put together: whose residual it is after some layers, and how far compositions are from the block map."""

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from lig_lens.arguments import checked
from lig_lens.choose import find_places, of_flow
from lig_lens.errors import InputError, check_choice
from lig_lens.flow.compose import doubts
from lig_lens.flow.consistency import Consistency
from lig_lens.flow.flow import Flow
from lig_lens.show.plots.facts import about, baselines, worst_gap
from lig_lens.show.plots.matrix import PRINTED, Heatmap, Values, draw, large_cells, printed, share_scale, signed_scale
from lig_lens.show.plots.select import pick, token_axis
from lig_lens.show.plots.style import FAINT, INK, LINE, QUALITATIVE, plain_text, set_frame, short

_NOTABLE = -0.02  # negative shares from here on get colours of their own
_MEASURES = {
    "l2": "|difference|, in the block map's units",
    "l2_normalised": "relative difference (0 = perfect agreement)",
    "pearson": "Pearson correlation (1 = perfect agreement)",
}
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")


@checked
def rollout_map(
    flow: Flow,
    start: int | None = None,
    stop: int | None = None,
    rule: str = "conserving",
    tokens: Sequence[int] | None = None,
) -> go.Figure:
    """How much of each residual leaving the last layer is which input token's: destinations down, sources across.

    Shares are drawn on a sequential scale, or on a diverging one where some are below -2%.

    Args:
        flow: with attn and mlp maps of all destinations.
        start: number of the first block, see `Flow.rollout`.
        stop: number of the block before which to stop.
        rule: of composition, see `Flow.compose`.
        tokens: positions to show; see `head_grid`.

    Raises:
        InputError: see `Flow.rollout`; a position outside the prompt.
    """
    shares = flow.rollout(start, stop, rule)
    shown = pick("rollout_map", flow, tokens)
    values = shares[shown.sources][:, shown.places].T.numpy()
    first = flow.layers[0] if start is None else start
    last = flow.layers[-1] if stop is None else stop - 1
    scale = (
        signed_scale("share of the residual", values, percent=True)
        if bool((values < _NOTABLE).any())
        else share_scale("share of the residual", values)
    )
    layers = f"layer {first}" if first == last else f"layers {first} to {last}"
    facts = [
        *about(flow, target=False),
        *baselines(flow, ("attn", "mlp")),
        f"rule {rule}",
        worst_gap([flow], ("attn", "mlp")),
        *doubts(flow, start, stop, rule),
        "a row adds up to 100%"
        if tokens is None
        else f"{len(shown.sources)} of {len(flow.tokens)} source tokens shown",
    ]
    return draw(
        [
            Heatmap(
                values,
                scale,
                value=f"{'%{z:+.2%}' if scale.signed else '%{z:.2%}'} of the residual",
                texts=printed(values, percent=True, signed=False) if max(values.shape) <= PRINTED else None,
            )
        ],
        token_axis(flow, shown.destinations, "destination", numbered=True),
        token_axis(flow, shown.sources, "source", numbered=True),
        f"<b>Which input token does each final vector come from?</b> Rollout through {layers}",
        facts,
        cell=large_cells(*values.shape),
    )


@checked
def consistency_plot(
    results: Consistency | Sequence[Consistency], measure: str = "pearson", layers: Sequence[int] | None = None
) -> go.Figure:
    """How far compositions are from the measured block map, layer by layer: one line for each result.

    Points are medians over destinations (NaN left out), bars their interquartile range. The legend has the
    labels that differ between results, the subtitle those that all share.

    Args:
        results: of `Flow.consistency`, one or several.
        measure: l2, l2_normalised (0 is perfect) or pearson (1 is perfect).
        layers: block numbers to show; all by default.

    Raises:
        InputError: an unknown measure, no result, or a layer that a result does not have.
    """
    check_choice("measure", measure, tuple(_MEASURES))
    listed = [results] if isinstance(results, Consistency) else list(results)
    if not listed:
        raise InputError("consistency_plot: no result: give what Flow.consistency() returned, one or several.")
    keys = list(dict.fromkeys(key for result in listed for key in result.labels))
    apart = [key for key in keys if len({result.labels.get(key) for result in listed}) > 1]
    figure = go.Figure()
    taken, drawn = dict[str, int](), set[int]()
    for number, result in enumerate(listed):
        name = ", ".join(f"{_words(key)} {short(str(result.labels.get(key)))}" for key in apart) or "result"
        taken[name] = taken.get(name, 0) + 1
        # Beside each other, so that bars of several results are told apart.
        aside = (number - (len(listed) - 1) / 2) * min(0.1, 0.6 / len(listed))
        shown = result.layers if layers is None else tuple(sorted(layers))
        values = getattr(result, measure).double().numpy()[find_places(shown, result.layers, of_flow("layer"))]
        named = name if taken[name] == 1 else f"{name} ({taken[name]})"
        figure.add_traces(_line(values, shown, named, number, aside))
        drawn |= set(shown)
    first, last = min(drawn), max(drawn)
    n_layers = last - first + 1
    common = {"zeroline": False, "gridcolor": FAINT, "linecolor": LINE, "showline": True, "ticks": ""}
    figure.update_xaxes(
        title="layer",
        range=[first - 0.5, last + 0.5],
        dtick=max(1, n_layers // 15),
        **common,
    )
    figure.update_yaxes(title=plain_text(_MEASURES[measure]), **common)
    if measure == "l2_normalised":
        figure.update_yaxes(rangemode="tozero")
    legend_rows = len(listed) if len(listed) > 1 else 0
    same = [f"{_words(key)} {short(str(listed[0].labels.get(key)))}" for key in keys if key not in apart]
    height, below = 340.0, 56.0
    set_frame(
        figure,
        f"<b>Composition against the block map</b>: {_words(measure)}",
        [*same, "points are medians over destinations, bars their interquartile range"],
        width=max(420.0, min(900.0, 60.0 * n_layers)),
        height=height,
        left=76.0,
        bottom=below + 20 * legend_rows,
    )
    figure.update_layout(
        plot_bgcolor="white",
        showlegend=legend_rows > 0,
        legend={
            "x": 0,
            "xanchor": "left",
            "y": -below / height,
            "yanchor": "top",
            "tracegroupgap": 0,
            "font": {"size": 12, "color": INK},
        },
    )
    return figure


def _words(key: str) -> str:
    return key.replace("_", " ")


def _line(values: Values, layers: Sequence[int], name: str, number: int, aside: float) -> list[go.Scatter]:
    """Medians over destinations and their interquartile range; the number picks colour and symbol."""
    kept = [row[np.isfinite(row)] for row in values]
    low, middle, high = (
        [float(np.quantile(row, part)) if row.size else math.nan for row in kept] for part in (0.25, 0.5, 0.75)
    )
    places = [layer + aside for layer in layers]
    colour = QUALITATIVE[number % len(QUALITATIVE)]
    bars = go.Scatter(
        x=[x for place in places for x in (place, place, None)],
        y=[y for ends in zip(low, high, strict=True) for y in (*ends, None)],
        mode="lines",
        line={"color": colour, "width": 6},
        opacity=0.3,
        legendgroup=str(number),
        showlegend=False,
        hoverinfo="skip",
    )
    line = go.Scatter(
        x=places,
        y=middle,
        mode="lines+markers",
        name=name,
        legendgroup=str(number),
        line={"color": colour, "width": 1.5, "dash": ("solid", "dot", "dash")[number // len(QUALITATIVE) % 3]},
        marker={"size": 9, "symbol": _SYMBOLS[number % len(_SYMBOLS)], "line": {"color": "white", "width": 1}},
        customdata=list(zip(layers, low, high, strict=True)),
        hovertemplate="<b>%{fullData.name}</b><br>layer %{customdata[0]}: %{y:.3f}<br>"
        "interquartile range %{customdata[1]:.3f} to %{customdata[2]:.3f}<extra></extra>",
    )
    return [bars, line]
