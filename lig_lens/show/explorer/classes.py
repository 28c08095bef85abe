"""What the page of relevance holds of some Relevances: labels as JSON, numbers as base64 of floats."""

import json
import math
from collections.abc import Mapping
from typing import TypedDict

from torch import Tensor

from lig_lens.names import patch_place
from lig_lens.relevance.prompts import prompt_key
from lig_lens.relevance.relevance import Relevance
from lig_lens.show.explorer.packed import Packed, encoded
from lig_lens.show.plots.style import DARK, DIVERGING, INK
from lig_lens.show.text import readable, show_token
from lig_lens.show.words import asked_of, certainty_of, ends_of, special_of


class Token(TypedDict):
    """A token: its text as it was written, whether a space stands before it, how it is shown, and of which kind."""

    text: str
    spaced: bool
    shown: str
    special: bool


class Sum(TypedDict):
    """What the numbers of a boundary have to add up to, and how far they are from that."""

    total: float
    gap: float | None
    converged: bool


class View(TypedDict):
    """One Relevance: what is explained and how, names of the rows of its parts, and their arrays."""

    label: str
    what: str
    facts: str
    settings: str
    names: dict[str, list[str]]
    totals: list[Sum] | None
    arrays: dict[str, Packed]


class Sample(TypedDict):
    """One prompt and its Relevances; `grid` and `image` where it is an image."""

    label: str
    tokens: list[Token]
    grid: list[int] | None
    image: str | None
    views: list[View]


class Header(TypedDict):
    """All that the page holds beside its arrays."""

    schema: int
    samples: list[Sample]
    colours: list[str]
    dark: float
    ink: str


def class_contents(relevances: Mapping[str, Relevance]) -> tuple[Header, dict[str, str]]:
    """Pack Relevances, those of one prompt under one entry.

    Args:
        relevances: by the label under which they are to be chosen.

    Returns:
        the header, and the arrays by their element's id.
    """
    arrays: dict[str, str] = {}
    samples: dict[tuple[tuple[str, ...], str], Sample] = {}
    for number, (label, relevance) in enumerate(relevances.items()):
        prompt = prompt_key(relevance)
        if prompt not in samples:
            samples[prompt] = _sample(relevance)
        samples[prompt]["views"].append(_view(label, relevance, f"a{number}", arrays))
    header: Header = {"schema": 1, "samples": list(samples.values()), "colours": DIVERGING, "dark": DARK, "ink": INK}
    return header, arrays


def _sample(relevance: Relevance) -> Sample:
    # Half a surrogate pair, which some tokens are, cannot be written.
    tokens: list[Token] = [
        {"text": _written(text), "spaced": spaced, "shown": _written(show_token(token, 24)), "special": special}
        for (text, spaced), token, special in zip(
            readable(relevance.tokens), relevance.tokens, relevance.special, strict=True
        )
    ]
    text = "".join(" " * token["spaced"] + token["text"] for token in tokens if not token["special"]).strip()
    places = [place for place in map(patch_place, relevance.tokens) if place is not None]
    pixels = relevance.settings.get("pixels")
    image = pixels.get("image") if isinstance(pixels, dict) else None
    return {
        "label": "an image" if places else text if len(text) <= 90 else f"{text[:88]}…",
        "tokens": tokens,
        "grid": [1 + max(place[axis] for place in places) for axis in (0, 1)] if places else None,
        "image": image if isinstance(image, str) and image.startswith("data:image/png;base64,") else None,
        "views": [],
    }


def _view(label: str, relevance: Relevance, prefix: str, arrays: dict[str, str]) -> View:
    last = len(relevance.layers)
    rows: dict[str, tuple[list[str], Tensor | None]] = {
        "scores": (["scores"], relevance.scores[None]),
        "rolled": ([str(layer) for layer in relevance.layers], relevance.rolled),
        "token": (["output" if at == last else str(at) for at in relevance.boundaries], relevance.token),
    }
    packed: dict[str, Packed] = {}
    for name, (_, values) in rows.items():
        if values is not None:
            arrays[f"{prefix}-{name}"], packed[name] = encoded(f"{prefix}-{name}", values.numpy())
    said = [relevance.model_name, asked_of(relevance), *certainty_of(relevance), special_of(relevance)]
    return {
        "label": label,
        "what": ends_of(relevance),
        "facts": " · ".join(filter(None, said)),
        "settings": json.dumps(_without_images(relevance.settings), ensure_ascii=False, indent=1),
        "names": {name: rows[name][0] for name in packed},
        "totals": _totals(relevance),
        "arrays": packed,
    }


def _totals(relevance: Relevance) -> list[Sum] | None:
    if relevance.total is None or relevance.gap is None or relevance.converged is None:
        return None
    ends = zip(relevance.total.tolist(), relevance.gap.tolist(), relevance.converged.tolist(), strict=True)
    return [
        {"total": total, "gap": gap if math.isfinite(gap) else None, "converged": converged}
        for total, gap, converged in ends
    ]


def _without_images(settings: object) -> object:
    """Settings without pictures, which are no text."""
    if isinstance(settings, dict):
        return {name: _without_images(value) for name, value in settings.items()}
    return "…" if isinstance(settings, str) and settings.startswith("data:image") else settings


def _written(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
