"""Inputs and lexicons that a config names: sets that are shipped or fetched, or files."""

import random
from pathlib import Path
from typing import Any

from lig_lens.errors import InputError
from lig_lens.inputs.digit_images import digit_images as digit_images
from lig_lens.inputs.movie_sentences import movie_sentences as movie_sentences
from lig_lens.inputs.movie_sentences import sentiment_lexicon as sentiment_lexicon
from lig_lens.relevance.faithfulness import DATA, LEXICONS


def inputs_of(name: str, split: str, count: int | None, seed: int) -> list[Any]:
    """Prompts of a set, or lines of a text file; some of them drawn, in the order in which they stand.

    Args:
        name: of a set in `DATA`, or the path of a file.
        split: which part of a set.
        count: how many; None for all.
        seed: of the draw.

    Raises:
        InputError: neither a set nor a file, or fewer inputs than are wanted.
    """
    if name in DATA.names():
        prompts = [pair[0] for pair in DATA.home(name)(split)]
    else:
        prompts = [line.strip() for line in _lines(name, "inputs", DATA.names()) if line.strip()]
    if not prompts:
        raise InputError(f"inputs {name!r} is empty: write a text in each line.")
    if count is not None and count > len(prompts):
        raise InputError(f"count={count} is more than the {len(prompts)} inputs that {name!r} has: give at most those.")
    drawn = sorted(random.Random(seed).sample(range(len(prompts)), len(prompts) if count is None else count))
    return [prompts[number] for number in drawn]


def lexicon_of(name: str) -> dict[str, float]:
    """Valence of words: a lexicon of `LEXICONS`, or a text file with a word, a tab and a number in each line.

    Raises:
        InputError: neither, or a line that is not so.
    """
    if name in LEXICONS.names():
        known: dict[str, float] = LEXICONS.home(name)()
        return known
    found = {}
    for number, line in enumerate(_lines(name, "lexicon", LEXICONS.names()), 1):
        word, _, rest = line.partition("\t")
        if line.strip():
            try:
                found[word.strip().lower()] = float(rest.partition("\t")[0])
            except ValueError:
                raise InputError(
                    f"lexicon {name!r}, line {number}: {line!r}: write a word, a tab and a number."
                ) from None
    return found


def _lines(path: str, what: str, known: tuple[str, ...]) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{what} {path!r}: {reason}. Name one of {', '.join(known)}, or a text file.") from error
