"""How faithful methods are: curves of what is left of a number, and the league of methods."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from lig_lens.arguments import checked
from lig_lens.errors import InputError, check_choice
from lig_lens.relevance.faithfulness.league import League
from lig_lens.show.plots.of_league import Scores, Standing, curves_of, facts_of
from lig_lens.show.plots.style import (
    FAINT,
    INK,
    LETTER,
    LINE,
    QUALITATIVE,
    QUIET,
    label_width,
    plain_text,
    set_frame,
    short,
)

_WIDTH, _HEIGHT = 560.0, 340.0  # pixels, of the plot of curves
_ROW, _PANEL, _GAP = 24.0, 150.0, 26.0  # pixels, of the league: a method's row, a measure's width, between two
# Kinds of lines, and what stands before a name to tell them.
_DASHES = {"solid": "", "dash": "╌ ", "dot": "┈ ", "dashdot": "╌· "}
_KINDS = {
    "removed": "What is left when tokens go, the most relevant first",
    "kept": "What the most relevant tokens give",
}
_DIRECTIONS = {"higher": "higher is better →", "lower": "← lower is better"}
_NAME = 14.0  # pixels from one curve's name to the next
Array = NDArray[np.float64]


@checked
def deletion_curves(
    curves: League | Mapping[str, Sequence[Any]],
    heading: str | None = None,
    across: str | None = None,
    down: str | None = None,
    facts: Sequence[str] = (),
    floor: str | None = "random",
    *,
    replacer: str | None = None,
    kind: str = "removed",
) -> go.Figure:
    """Curves of several methods with bands around them; names stand where the curves end.

    Args:
        curves: a League; or by method fractions, means, and the lower and upper ends of an interval, of equal length
            each.
        heading: of the figure, as text.
        across: what fractions are of.
        down: what the means are of.
        facts: what stands below the heading.
        floor: the method that others have to beat, drawn in grey.
        replacer: of a League with several, whose curves.
        kind: whether the most relevant tokens are `removed`, or nothing else is `kept`.

    Raises:
        InputError: no curve, arrays of different lengths, numbers that are not finite, or a replacer that is not there.
    """
    check_choice("kind of curves", kind, list(_KINDS))
    if isinstance(curves, League):
        down, facts = down or "probability of the class", [*facts_of(curves, replacer), *facts]
        curves = curves_of(curves, replacer, kind)
    else:
        _check_no_league("deletion_curves", replacer)
    heading, across, down = heading or _KINDS[kind], across or f"share of tokens {kind}", down or "model output"
    read = {name: _read_curve(name, given) for name, given in curves.items()}
    if not read:
        raise InputError("deletion_curves: no curve: give at least one method.")
    colours = _colours(list(read), floor)
    figure = go.Figure()
    for name, (fractions, mean, low, high) in read.items():
        colour, dash = colours[name]
        figure.add_trace(
            go.Scatter(
                x=np.concatenate([fractions, fractions[::-1]]),
                y=np.concatenate([high, low[::-1]]),
                fill="toself",
                fillcolor=colour,
                opacity=0.12,
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
                name=f"{plain_text(name)}: interval",
            )
        )
        figure.add_trace(
            go.Scatter(
                x=fractions,
                y=mean,
                mode="lines",
                line={"color": colour, "width": 2, "dash": dash},
                customdata=np.stack([low, high], -1),
                name=plain_text(name),
                hovertemplate="%{y:.3g} (%{customdata[0]:.3g} to %{customdata[1]:.3g})",
                showlegend=False,
            )
        )
    ends = [np.concatenate([one[2], one[3], one[1]]) for one in read.values()]
    bottom, top = min(float(one.min()) for one in ends), max(float(one.max()) for one in ends)
    room = 0.05 * (top - bottom) or 1.0
    y_range = (bottom - room, top + room)
    starts, stops = ([float(edge(curve[0])) for curve in read.values()] for edge in (np.min, np.max))
    x_range = (min(starts), max(stops))
    figure.update_xaxes(title=plain_text(across), range=x_range, tickformat=".0%", gridcolor=FAINT, zeroline=False)
    figure.update_yaxes(title=plain_text(down), range=y_range, gridcolor=FAINT, zerolinecolor=LINE)
    figure.update_layout(hovermode="x unified", plot_bgcolor="white")
    _name_ends(figure, read, colours, x_range[1], y_range)
    right = 56.0 + label_width(list(map(plain_text, read))) * 1.15
    shown = [short(fact, 140) for fact in facts]
    title = f"<b>{short(heading, 90)}</b>"
    set_frame(figure, title, shown, width=_WIDTH, height=_HEIGHT, left=76.0, right=right, above=20.0)
    return figure


@checked
def league(
    scores: League | Mapping[str, Mapping[str, Sequence[float]]],
    better: Mapping[str, str] | None = None,
    heading: str = "Which method is faithful",
    facts: Sequence[str] = (),
    floor: str | None = "random",
    *,
    replacer: str | None = None,
    measures: Sequence[str] | None = None,
) -> go.Figure:
    """The league: for each measure a panel, and for each method a dot with its interval; the best one is marked.

    A filled dot is the best method of a measure. A pale one is as good as that, as far as one can tell: in a League the
    interval of their difference, input by input, reaches 0; elsewhere the interval of one reaches that of the other.
    Methods stand in the order of how often they are best or as good, and then of their mean rank.

    Args:
        scores: a League; or by measure and then by method the value and the lower and upper ends of its interval, where
            a method may be absent from a measure.
        better: by measure `higher` or `lower`, which is better; `higher` by default. A League knows.
        heading: of the figure, as text.
        facts: what stands below the heading.
        floor: the method that others have to beat: its value is a line through each panel.
        replacer: of a League with several, which is shown; measures that remove nothing are beside it.
        measures: of a League, which are shown and in what order; all by default.

    Raises:
        InputError: no measure, one without methods, values that are not finite or outside their intervals, or what a
            League does not have.
    """
    standing = None
    if isinstance(scores, League):
        if better is not None:
            raise InputError("league: better is given beside a League, which knows it: leave it out.")
        facts, standing = [*facts_of(scores, replacer), *facts], Standing(scores, replacer, measures)
        scores, better = standing.scores, standing.better
    else:
        _check_no_league("league", replacer, measures)
    if not scores or not all(scores.values()):
        raise InputError("league: no measure, or one without methods: give at least one of each.")
    better = dict.fromkeys(scores, "higher") | dict(better or {})
    for measure, word in better.items():
        if measure not in scores or word not in ("higher", "lower"):
            raise InputError(f"league: better={{{measure!r}: {word!r}}}: say 'higher' or 'lower' of {list(scores)}.")
    table = {measure: _read_scores(measure, row) for measure, row in scores.items()}
    tops = {measure: _best(measure, row, better[measure], standing) for measure, row in table.items()}
    methods = _in_order(table, tops, better)
    names = [plain_text(name) for name in methods]
    # Measures have names of their own length.
    panel = max(_PANEL, *(LETTER * len(measure) + 24 for measure in table))
    width = len(table) * panel + (len(table) - 1) * _GAP
    height = _ROW * len(methods)
    figure = make_subplots(
        cols=len(table),
        shared_yaxes=True,
        horizontal_spacing=_GAP / width if len(table) > 1 else 0,
        subplot_titles=[f"<b>{plain_text(measure)}</b>" for measure in table],
    )
    for column, (measure, row) in enumerate(table.items(), 1):
        best, near = tops[measure]
        there = [name for name in methods if name in row]
        values, low, high = (np.array([row[name][at] for name in there]) for at in range(3))
        fill = [QUALITATIVE[0] if name == best else "#9ecae1" if name in near else "white" for name in there]
        figure.add_trace(
            go.Scatter(
                x=values,
                y=[methods.index(name) for name in there],
                mode="markers",
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": high - values,
                    "arrayminus": values - low,
                    "color": QUIET,
                    "thickness": 1.2,
                    "width": 3,
                },
                marker={
                    "size": [11 if name == best else 8 for name in there],
                    "color": fill,
                    "opacity": 1.0,
                    "line": {"color": QUALITATIVE[0], "width": 1.5},
                },
                customdata=[[plain_text(name), *row[name]] for name in there],
                hovertemplate="<b>%{customdata[0]}</b><br>%{x:.4g} (%{customdata[2]:.4g} to %{customdata[3]:.4g})"
                "<extra></extra>",
                name=plain_text(measure),
                showlegend=False,
            ),
            row=1,
            col=column,
        )
        figure.update_xaxes(title=_DIRECTIONS[better[measure]], row=1, col=column)
        if floor in row:
            line = {"color": QUIET, "width": 1, "dash": "dot"}
            figure.add_vline(x=row[floor][0], line=line, layer="below", row=1, col=column)
    for caption in figure.layout.annotations:
        caption.update(font={"size": 11, "color": INK})
    figure.update_xaxes(gridcolor=FAINT, zeroline=False, nticks=4, tickfont={"size": 10}, showline=True, linecolor=LINE)
    figure.update_layout(yaxis_title="method")
    figure.update_yaxes(
        tickvals=list(range(len(methods))),
        ticktext=[f"<i>{name}</i>" if plain == floor else name for plain, name in zip(methods, names, strict=True)],
        range=[len(methods) - 0.5, -0.5],
        gridcolor=FAINT,
        zeroline=False,
    )
    said = [short(fact, 140) for fact in facts]
    reaches = "its interval reaches that of the best" if standing is None else "not told from it, input by input"
    said.append(f"filled: the best of a measure; pale: {reaches}")
    said += [f"dotted: {short(floor, 30)}"] if floor is not None and any(floor in row for row in table.values()) else []
    left = 56.0 + 1.1 * label_width(names)
    title = f"<b>{short(heading, 90)}</b>"
    set_frame(figure, title, said, width=width, height=height, left=left, right=24.0, bottom=56.0, above=34.0)
    return figure.update_layout(plot_bgcolor="white")


def _read_curve(name: str, given: Sequence[Any]) -> tuple[Array, Array, Array, Array]:
    try:
        read = [np.asarray(one, dtype=np.float64) for one in given]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"deletion_curves: the curve of {name!r} is no numbers ({error}): give four arrays."
        ) from error
    shapes = [list(one.shape) for one in read]
    if len(read) != 4 or any(one.ndim != 1 or one.shape != read[0].shape or not one.size for one in read):
        raise InputError(
            f"deletion_curves: the curve of {name!r} has shapes {shapes}: give fractions, means, and lower and upper "
            "ends, of one length."
        )
    if not all(np.isfinite(one).all() for one in read):
        raise InputError(f"deletion_curves: the curve of {name!r} has numbers that are not finite: leave them out.")
    return read[0], read[1], read[2], read[3]


def _colours(names: Sequence[str], floor: str | None) -> dict[str, tuple[str, str]]:
    """A colour and a kind of line for each name, no two alike; grey for the floor."""
    others = [name for name in names if name != floor]
    found = {
        name: (QUALITATIVE[number % len(QUALITATIVE)], list(_DASHES)[number // len(QUALITATIVE) % len(_DASHES)])
        for number, name in enumerate(others)
    }
    return found | ({floor: (QUIET, "dot")} if floor in names and floor is not None else {})


def _name_ends(
    figure: go.Figure,
    read: Mapping[str, tuple[Array, Array, Array, Array]],
    colours: Mapping[str, tuple[str, str]],
    last: float,
    y_range: tuple[float, float],
) -> None:
    """Write each name beside its curve's end, moved up or down where names would cover each other."""
    pixel = (y_range[1] - y_range[0]) / _HEIGHT
    ends = sorted((_value_at_end(curve, last), name) for name, curve in read.items())
    wanted = np.array([value / pixel for value, _ in ends])
    places = _apart(wanted, _NAME)
    for (value, name), place in zip(ends, places, strict=True):
        figure.add_annotation(
            x=last,
            y=value,
            text=_DASHES[colours[name][1]] + plain_text(name),
            font={"color": colours[name][0], "size": 12},
            xanchor="left",
            yanchor="middle",
            # A thin line leads from where the curve ends to where its name stands.
            ax=22,
            ay=float(value / pixel - place),
            axref="pixel",
            ayref="pixel",
            showarrow=True,
            arrowhead=0,
            arrowwidth=0.7,
            arrowcolor=colours[name][0],
        )


def _value_at_end(curve: tuple[Array, Array, Array, Array], last: float) -> float:
    return float(np.interp(last, curve[0], curve[1]))


def _apart(wanted: Array, least: float) -> Array:
    """Places as near to the wanted ones, which are sorted, as they can be with `least` between any two.

    What is too close becomes a group that stands around the mean of what its members want.
    """
    groups: list[list[int]] = []
    middles: list[float] = []
    for number, value in enumerate(wanted):
        groups.append([number])
        middles.append(float(value))
        while len(groups) > 1 and middles[-1] - middles[-2] < least * (len(groups[-1]) + len(groups[-2])) / 2:
            merged = groups[-2] + groups[-1]
            groups[-2:], middles[-2:] = [merged], [float(np.mean(wanted[merged]))]
    places = np.empty(len(wanted))
    for group, middle in zip(groups, middles, strict=True):
        places[group] = middle + least * (np.arange(len(group)) - (len(group) - 1) / 2)
    return places


def _check_no_league(call: str, *given: object) -> None:
    if any(one is not None for one in given):
        raise InputError(f"{call}: replacer and measures choose from a League: leave them out, or give one.")


def _read_scores(measure: str, row: Mapping[str, Sequence[float]]) -> Scores:
    found: Scores = {}
    for method, given in row.items():
        numbers = [float(number) for number in given]
        if len(numbers) != 3 or not np.isfinite(numbers).all() or not numbers[1] <= numbers[0] <= numbers[2]:
            raise InputError(
                f"league: {method!r} has {numbers} in {measure!r}: give a value and the lower and upper ends of its "
                "interval."
            )
        found[method] = (numbers[0], numbers[1], numbers[2])
    return found


def _best(measure: str, row: Scores, better: str, standing: Standing | None) -> tuple[str, list[str]]:
    """The best method of a measure, and those that are as good as far as one can tell."""
    best = max(row, key=lambda name: row[name][0]) if better == "higher" else min(row, key=lambda name: row[name][0])
    if standing is not None:
        return best, standing.near(measure, best)
    low, high = row[best][1:]
    return best, [name for name in row if name != best and row[name][2] >= low and row[name][1] <= high]


def _in_order(
    table: Mapping[str, Scores], tops: Mapping[str, tuple[str, list[str]]], better: Mapping[str, str]
) -> list[str]:
    methods = list(dict.fromkeys(name for row in table.values() for name in row))
    ranks: dict[str, list[float]] = {name: [] for name in methods}
    for measure, row in table.items():
        ordered = sorted(row, key=lambda name: row[name][0], reverse=better[measure] == "higher")
        for place, name in enumerate(ordered):
            ranks[name].append(place / max(1, len(row) - 1))
    wins = {name: sum(name == best or name in near for best, near in tops.values()) for name in methods}
    return sorted(methods, key=lambda name: (-wins[name], float(np.mean(ranks[name]))))
