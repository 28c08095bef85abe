"""Tokens and numbers as people read them; plain text."""

import re
from collections.abc import Sequence

from lig_lens.arguments import checked

MINUS, TIMES, JOINS = "\u2212", "\u00d7", "\u2011"
_CONTINUES = re.compile(r"^##(?=\w)")  # of BERT's tokens, what stands before one that continues a word
_SPACES = ("Ġ", "▁", " ")
_MARKS = {"Ġ": "·", "▁": "·", " ": "·", "\u00a0": "·", "Ċ": "↵", "\n": "↵", "\r": "↵", "\t": "⇥", "ĉ": "⇥"}


@checked
def show_token(token: str, longest: int = 40) -> str:
    """Write a token for people: spaces (also `Ġ` and `▁`) as `·`, line breaks as `↵`, the rest as it is.

    The result is plain text. BERT's `##ing`, which continues a word, is written with a (non-breaking) hyphen, and
    characters that do not print as their escapes.

    >>> show_token("Ġcat"), show_token("##ing"), show_token("")
    ('·cat', '‑ing', '∅')
    """
    token = _CONTINUES.sub(JOINS, token)
    shown = "".join(_MARKS.get(char, _printed(char)) for char in token)
    if len(shown) > longest:
        shown = shown[: longest - 1] + "…"
    return shown or "∅"


def signed_number(value: float, digits: int = 3) -> str:
    """A number with its sign, as people write it."""
    return f"{value:+.{digits}g}".replace("-", MINUS)


def signed_percent(value: float) -> str:
    """A share with its sign, to a tenth of a percent where that matters, and one digit of what is smaller."""
    if value == 0:
        return "0%"
    if abs(value) < 0.0005:
        return f"{100 * value:+.1g}%".replace("-", MINUS)
    return f"{value:+.{0 if abs(value) >= 0.0995 else 1}%}".replace("-", MINUS)


def readable(tokens: Sequence[str]) -> list[tuple[str, bool]]:
    """The text of each token without marks, and whether a space stands before it: what a reader would have written.

    Of tokenizers whose tokens keep the space that they begin with (also as `Ġ` or `▁`), a token without one continues
    the word before it; of BERT's, one that begins with `##`.

    >>> readable(["a", "wonder", "##ful", "film"])
    [('a', False), ('wonder', True), ('ful', False), ('film', True)]
    >>> readable(["a", " wonder", "ful"])
    [('a', False), ('wonder', True), ('ful', False)]
    """
    keeps = any(token[:1] in _SPACES for token in tokens)
    found = []
    for number, token in enumerate(tokens):
        spaced = token[:1] in _SPACES if keeps else not _CONTINUES.match(token)
        text = token[1:] if token[:1] in _SPACES else _CONTINUES.sub("", token)
        found.append(("".join(_read(char) for char in text), spaced and number > 0))
    return found


def _read(char: str) -> str:
    """A character of a text as it was written: spaces are spaces, and line breaks are told."""
    mark = _MARKS.get(char, char)
    return " " if mark == "·" else mark if mark != char else _printed(char)


def _printed(char: str) -> str:
    """A character, or its escape where it does not print."""
    return char if char.isprintable() else char.encode("unicode_escape").decode()
