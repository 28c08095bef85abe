"""Relevance of tokens and patches: coloured text, layers, methods side by side, images."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from rich.cells import cell_len

from lig_lens.arguments import checked
from lig_lens.choose import Words, find_places
from lig_lens.errors import InputError, check_choice
from lig_lens.relevance.prompts import of_one_prompt
from lig_lens.relevance.relevance import Relevance
from lig_lens.show.plots.matrix import (
    Axis,
    Heatmap,
    Scale,
    Values,
    coloraxis,
    draw,
    relative_ticks,
    row_cells,
    signed_scale,
)
from lig_lens.show.plots.overlay import background_of, grid_of, over_image
from lig_lens.show.plots.style import (
    FAINT,
    LINE,
    MONOSPACE,
    QUIET,
    on_colour,
    plain_text,
    set_frame,
    short,
    token_label,
)
from lig_lens.show.text import readable, show_token, signed_number
from lig_lens.show.words import asked_of, certainty_of, ends_of, names_of, special_of

_WIDE, _CELL, _LINE, _BOX = 860.0, 8.45, 32.0, 0.76  # pixels: a line of text, a letter, a line's height; a box's share
_SPACE, _EDGE = 5.0, 3.0  # pixels between words, and between a word and the edge of its box
_PARTS = {"rolled": "followed back through the blocks", "token": "of the vectors at each boundary"}


@checked
def relevance_text(relevance: Relevance) -> go.Figure:
    """The text, each token on the colour of its relevance: red what raises the number, blue what lowers it.

    Colours end at the strongest token that is the user's own; special ones are grey, and the subtitle has their scores.
    A page for notebooks, from which the text can be copied, is `relevance_html`.

    Args:
        relevance: of a text.

    Raises:
        InputError: a Relevance of an image.
    """
    _check_text("relevance_text", relevance)
    scores = relevance.scores.double().numpy()
    own = [at for at, special in enumerate(relevance.special) if not special]
    scale = own_scale(_unit(relevance), relevance, scores)
    boxes = _boxes(relevance)
    figure = go.Figure()
    for places, special in ((own, False), ([at for at, one in enumerate(relevance.special) if one], True)):
        colours = [on_colour(float(scores[at]) / scale.high) for at in places]
        figure.add_trace(
            go.Bar(
                base=[boxes[at].left for at in places],
                x=[boxes[at].width for at in places],
                y=[boxes[at].line for at in places],
                orientation="h",
                width=_BOX,
                text=[plain_text(boxes[at].text) for at in places],
                textposition="inside",
                insidetextanchor="middle",
                constraintext="none",
                textangle=0,
                textfont={"family": MONOSPACE, "size": 14, "color": QUIET if special else colours},
                marker={"color": FAINT, "line": {"color": LINE, "width": 1}}
                if special
                else {
                    "color": [scores[at] for at in places],
                    "coloraxis": "coloraxis",
                    "line": {"width": 0},
                },
                customdata=[[plain_text(show_token(relevance.tokens[at])), at, scores[at]] for at in places],
                hovertemplate="<b>%{customdata[0]}</b> (%{customdata[1]:d})<br>relevance %{customdata[2]:+.4g}"
                "<extra></extra>",
                showlegend=False,
            )
        )
    lines = max(box.line for box in boxes) + 1
    hidden = {"visible": False, "fixedrange": True}
    width = max(box.left + box.width for box in boxes)
    figure.update_xaxes(range=[0, width], **hidden)
    figure.update_yaxes(range=[lines - 0.5, -0.5], **hidden)
    figure.update_layout(barmode="overlay", coloraxis=coloraxis(scale, shown=True, raised=10), plot_bgcolor="white")
    set_frame(
        figure,
        _heading("What each token does to", relevance),
        _facts(relevance),
        width=width,
        height=lines * _LINE,
        left=16.0,
        right=16.0,
        bottom=14.0,
        above=62.0,
    )
    return figure


@checked
def relevance_layers(relevance: Relevance, parts: str | Sequence[str] | None = None) -> go.Figure:
    """Relevance by layer: heat maps with the layers upwards and the tokens across, all on one scale.

    `rolled` is what is followed back through the blocks, as it enters each; `token` what the vectors at each boundary
    between blocks contribute, which adds up to the number's change in every row. The row `output` is what leaves the
    last block. Colours end at the strongest token that is the user's own: a special one that holds more, as [CLS] does
    behind the last block, has the colour at the end.

    Args:
        relevance: of a method that has numbers by layer.
        parts: `rolled`, `token` or both; by default those that there are.

    Raises:
        InputError: a part that the Relevance does not have, or no numbers by layer.
    """
    there = [name for name in _PARTS if getattr(relevance, name) is not None]
    if not there:
        raise InputError(
            f"relevance_layers: {relevance.method} gives one number for each position and none by layer: use "
            f"{'relevance_image' if relevance.of_image else 'relevance_text'}."
        )
    chosen = there if parts is None else [parts] if isinstance(parts, str) else list(parts)
    for name in chosen:
        check_choice("part of a Relevance", name, there)
    numbers = {"rolled": relevance.layers, "token": relevance.boundaries}
    rows = sorted({number for name in chosen for number in numbers[name]})
    values = {}
    for name in chosen:
        values[name] = np.full((len(rows), len(relevance.tokens)), np.nan)
        values[name][[rows.index(number) for number in numbers[name]]] = getattr(relevance, name).double().numpy()
    scale = own_scale(_unit(relevance), relevance, *values.values())
    labels = [token_label(token, special) for token, special in zip(relevance.tokens, relevance.special, strict=True)]
    n_columns = len(chosen) if len(labels) * len(chosen) <= 56 else 1
    cell = row_cells(len(labels) * n_columns, 26.0 if len(rows) <= 16 else 14.0)
    panels = [
        Heatmap(values[name], scale, value="relevance %{z:+.4g}", hover=name, caption=f"{name}: {_PARTS[name]}")
        for name in chosen
    ]
    return draw(
        panels,
        Axis("layer", ["output" if number == len(relevance.layers) else str(number) for number in rows], "layer"),
        Axis("position" if relevance.of_image else "token", labels, "token", range(len(labels))),
        _heading("Layer by layer: what each token does to", relevance),
        _facts(relevance),
        n_columns=n_columns,
        cell=(min(cell[0], 30.0), cell[1]),
        upwards=True,
    )


@checked
def compare_relevance(
    relevances: Sequence[Relevance], names: Sequence[str] | None = None, special: bool = False
) -> go.Figure:
    """Several methods on one prompt, a row for each and the tokens across.

    Methods have units of their own: the colours of each row end at its own strongest token that is the user's own. The
    hover has the numbers.

    Args:
        relevances: of one prompt, in the order of the rows.
        names: of the rows; by default the methods, with what differs between them.
        special: colour special positions too; they are grey otherwise.

    Raises:
        InputError: none, Relevances of different prompts, or another number of names.
    """
    several = of_one_prompt("compare_relevance", relevances)
    if names is not None and len(names) != len(several):
        raise InputError(f"compare_relevance: {len(names)} names for {len(several)} Relevances: give one each.")
    first, shown = several[0], list(names_of(several) if names is None else names)
    values, notes = [], []
    for one in several:
        scores = one.scores.double().numpy()
        top = own_scale("", one, scores).high
        hidden = np.asarray(one.special) & (not special)
        values.append(np.where(hidden, np.nan, scores / top))
        notes.append([f"relevance {signed_number(float(score), 4)}" for score in scores])
    # Methods without a path say of the same number only where it ends.
    targets = {one.target: ends_of(one) for one in sorted(several, key=lambda one: one.reference is not None)}
    facts = [short(first.model_name), *(short(target, 90) for target in list(targets.values())[:2])]
    facts += [] if special or not any(first.special) else ["special tokens grey"]
    labels = [token_label(token, grey) for token, grey in zip(first.tokens, first.special, strict=True)]
    scale = Scale("relative to each row's strongest token", -1.0, 1.0)
    figure = draw(
        [Heatmap(np.stack(values), scale, notes=notes, value="%{z:+.0%} of the row's strongest")],
        Axis("method", [short(name, 44) for name in shown], "method"),
        Axis("position" if first.of_image else "token", labels, "token", range(len(labels))),
        f"<b>{'The same prompt by several methods' if len(several) > 1 else 'One prompt by one method'}</b>",
        [fact for fact in facts if fact],
        cell=row_cells(len(labels), 28.0),
    )
    return figure.update_traces(ygap=2)  # rows are what is compared


@checked
def relevance_image(
    relevances: Relevance | Sequence[Relevance],
    layers: Sequence[int] | None = None,
    part: str = "rolled",
    image: object = None,
) -> go.Figure:
    """What the patches of an image do to the number, over the image: red what raises it, blue what lowers it.

    The first panel is the image itself. Special positions, such as [CLS], are on no patch: the captions give them,
    beside the sum of all patches. Every method has colours of its own, and all layers of one share theirs.

    Args:
        relevances: one of an image, or several of one image, which then stand side by side.
        layers: numbers of blocks, or of boundaries with `part="token"`, in the order to draw, in place of the scores.
        part: which numbers by layer those are, `rolled` or `token`.
        image: of Pillow, or an array [channel, height, width]; by default the one that the Relevance keeps.

    Raises:
        InputError: no Relevance of an image, a layer that it does not have, or an image that cannot be drawn.
    """
    several = of_one_prompt("relevance_image", relevances)
    first = several[0]
    grid = grid_of("relevance_image", first.tokens, "Relevance", "relevance_text")
    if layers is None:
        names = names_of(several)
        drawn = [(name, one.scores) for name, one in zip(names, several, strict=True)]
        scales = [own_scale(_unit(one), one, one.scores.double().numpy()) for one in several]
        if len(several) > 1:
            title = "relative to each one's strongest patch"
            scales = [dataclasses.replace(one, title=title, ticks=relative_ticks(one.high)) for one in scales]
    else:
        if len(several) > 1:
            raise InputError("relevance_image: layers goes with one Relevance: leave it out, or give one.")
        check_choice("part of a Relevance", part, [name for name in _PARTS if getattr(first, name) is not None])
        numbers, rows = first.layers if part == "rolled" else first.boundaries, getattr(first, part)
        words = Words(
            missing="relevance_image: this Relevance has no layer {number}: use some of {present}.",
            none="relevance_image: no layer is named: name at least one, or leave layers out.",
            whole="relevance_image: a layer",
        )
        places = find_places(layers, numbers, words)
        last = len(first.layers)
        drawn = [("output" if numbers[at] == last else f"layer {numbers[at]}", rows[at]) for at in places]
        scales = [own_scale(_unit(first), first, rows[places].double().numpy())] * len(places)
    panels = [
        Heatmap(
            grid.spread(values),
            scale,
            name=short(name),
            value="%{fullData.name}<br>relevance %{z:+.4g}",
            caption=f"{short(name, 40)} · {grid.sums(values, signed_number)}",
        )
        for (name, values), scale in zip(drawn, scales, strict=True)
    ]
    return over_image(
        panels,
        grid,
        background_of("relevance_image", first.settings, "Relevance", image),
        _heading("What each patch does to", first),
        _facts(first, special=False) if len(several) == 1 else [short(first.model_name)],
    )


def own_scale(title: str, relevance: Relevance, *values: Values) -> Scale:
    """Colours that end at the strongest position that is not special; `values` have the positions last."""
    own = ~np.asarray(relevance.special)
    return signed_scale(title, *(one[..., own] if own.any() else one for one in values), cut=False)


@dataclass(frozen=True)
class _Box:
    """Where a token stands: its text, its line, and its left edge and width in pixels."""

    text: str
    line: int
    left: float
    width: float


def _boxes(relevance: Relevance) -> list[_Box]:
    """Break a text into lines, between words where these fit, and give each token a box."""
    pieces = [(text or "∅", spaced) for text, spaced in readable(relevance.tokens)]
    words: list[list[str]] = []
    for text, spaced in pieces:
        if spaced or not words:
            words.append([])
        words[-1].append(text)
    boxes: list[_Box] = []
    line, left = 0, 0.0
    for word in words:
        widths = [_CELL * cell_len(text) for text in word]
        widths[0] += _EDGE
        widths[-1] += _EDGE
        if left and left + min(sum(widths), _WIDE) > _WIDE:
            line, left = line + 1, 0.0
        for text, width in zip(word, widths, strict=True):
            if left and left + width > _WIDE:  # a word that is longer than a line
                line, left = line + 1, 0.0
            boxes.append(_Box(text, line, left, width))
            left += width
        left += _SPACE
    return boxes


def _check_text(call: str, relevance: Relevance) -> None:
    if relevance.of_image:
        raise InputError(f"{call}: this Relevance is of an image, with patches as positions: use relevance_image.")


def _heading(words: str, relevance: Relevance) -> str:
    return f"<b>{words} {short(relevance.target, 70)}</b>"


def _unit(relevance: Relevance) -> str:
    return "relevance" if relevance.total is None else "relevance, in the target's units"


def _facts(relevance: Relevance, special: bool = True) -> list[str]:
    """What stands below a heading: model, method and its settings, ends, special positions, certainty."""
    said = [relevance.model_name, asked_of(relevance), ends_of(relevance), *certainty_of(relevance)]
    apart = special_of(relevance) if special else ""
    return [short(fact, 140) for fact in (*said, apart) if fact]
