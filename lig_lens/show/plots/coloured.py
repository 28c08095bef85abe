"""Coloured text as HTML, which notebooks show and readers copy from."""

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lig_lens.arguments import checked
from lig_lens.errors import InputError
from lig_lens.files import write_atomic
from lig_lens.relevance.prompts import of_one_prompt
from lig_lens.relevance.relevance import Relevance
from lig_lens.show.plots.style import DIVERGING, FAINT, FONT, INK, LINE, QUIET, diverging, on_colour
from lig_lens.show.text import MINUS, readable, show_token, signed_number
from lig_lens.show.words import asked_of, certainty_of, ends_of, special_of

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
</head>
<body style="margin: 16px">
{body}
</body>
</html>
"""


@dataclass(frozen=True)
class ColouredText:
    """A text whose tokens stand on the colours of their relevance.

    Attributes:
        html: of the text with its legend; it brings its own style, and no script.
    """

    html: str

    def save(self, path: str | os.PathLike[str], title: str = "lig_lens") -> Path:
        """Write a page with it, in one step.

        Raises:
            InputError: `path` cannot be written.
        """
        return write_atomic(path, _PAGE.format(title=html.escape(title), body=self.html).encode("utf-8", "replace"))

    def _repr_html_(self) -> str:
        return self.html


@checked
def relevance_html(relevances: Relevance | Sequence[Relevance]) -> ColouredText:
    """The text on the colours of its relevance, as HTML: a notebook shows it, `.save(path)` writes it.

    Copied from there, it is the text alone, without special tokens. Numbers are told where the pointer rests. Several
    Relevances stand below each other, each with colours that end at its strongest token that is the user's own.

    Args:
        relevances: one of a text, or several of one.

    Raises:
        InputError: Relevances of an image, or of different texts.
    """
    several = of_one_prompt("relevance_html", relevances)
    if several[0].of_image:
        raise InputError(
            "relevance_html: this Relevance is of an image, with patches as positions: use relevance_image."
        )
    return ColouredText("\n".join(_block(one) for one in several))


def _block(relevance: Relevance) -> str:
    own = [abs(score) for _, _, score in relevance.words]
    top = max(own, default=0.0) or 1.0
    facts = " · ".join(filter(None, [relevance.model_name, *certainty_of(relevance), special_of(relevance)]))
    gradient = ", ".join(DIVERGING)
    ends = signed_number(top, 2)
    legend = (
        f'<span style="white-space: nowrap; user-select: none; -webkit-user-select: none">{ends.replace("+", MINUS)} '
        '<span style="display: inline-block; width: 120px; height: 8px; '
        f'background: linear-gradient(90deg, {gradient})"></span> {ends}</span>'
    )
    return (
        f'<div style="background: white; color: {INK}; font: 13px/1.5 {_quoted(FONT)}; padding: 8px 12px; '
        'max-width: 900px">\n'
        f'<div style="user-select: none; -webkit-user-select: none"><b>{_text(ends_of(relevance))}</b><br>'
        f'<span style="color: {QUIET}; font-size: 12px">{_text(asked_of(relevance))}<br>{_text(facts)}</span></div>\n'
        f'<div style="color: {QUIET}; font-size: 11px; margin: 4px 0">{legend}</div>\n'
        f'<p style="margin: 4px 0; font-size: 15px; line-height: 1.9">{_tokens(relevance, top)}</p>\n</div>'
    )


def _tokens(relevance: Relevance, top: float) -> str:
    spans = []
    for at, (text, spaced) in enumerate(readable(relevance.tokens)):
        score, special = float(relevance.scores[at]), relevance.special[at]
        if special:
            style = f"background: {FAINT}; color: {QUIET}; outline: 1px solid {LINE}; font-size: 12px; padding: 1px 3px"
            style += "; user-select: none; -webkit-user-select: none"
        else:
            share = score / top
            style = f"background: {diverging(share)}; color: {on_colour(share)}; padding: 2px 0; border-radius: 2px"
        title = f"{show_token(relevance.tokens[at])} ({at}): {signed_number(score, 4)}"
        gap = " " if spaced else ""
        spans.append(f'{gap}<span data-position="{at}" title="{_text(title)}" style="{style}">{_text(text)}</span>')
    return "".join(spans)


def _text(plain: str) -> str:
    return html.escape(plain.encode("utf-8", "replace").decode())


def _quoted(font: str) -> str:
    return html.escape(font)
