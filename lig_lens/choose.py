"""Numbers that a caller names on an axis (layers, heads, positions) and the places where they stand on it."""

import operator
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lig_lens.errors import InputError, check_whole


@dataclass(frozen=True)
class Words:
    """What is said of numbers that cannot be used.

    All are templates, in which `{wanted}` are the numbers that were given and `{present}` those that there are.

    Attributes:
        missing: where one, `{number}`, is not there.
        none: where none is given.
        whole: what a number is called that is no whole one.
    """

    missing: str
    none: str = ""
    whole: str = ""


def of_flow(what: str, some: str = "some") -> Words:
    """For an axis of a Flow, `layer` say. `some` is `one` where one number is wanted."""
    return Words(
        missing=f"This Flow has no {what} {{number}}: use {some} of {{present}}.",
        none=f"Selection: no {what} is named: name at least one, or leave it out for all.",
    )


def of_argument(call: str, name: str) -> Words:
    """For an argument of a function that takes results with other axes too."""
    said = f"{call}: {name}={{wanted}}: use some of {{present}}"
    return Words(missing=f"{said}, which has no {{number}}.", none=f"{said}, or leave it out for all.")


def of_tokens(call: str, n_pos: int) -> Words:
    """For the argument `tokens` of a figure, which are positions of a prompt."""
    return Words(
        missing=f"{call}: tokens={{wanted}}: {{number}} is outside the prompt's {n_pos} tokens.",
        none=f"{call}: tokens={{wanted}} shows nothing: name a position, or leave it out for all.",
        whole=f"{call}: a position of tokens",
    )


def find_places(
    wanted: Sequence[int] | None, present: Sequence[int], words: Words, *, from_end: bool = False
) -> list[int]:
    """Where the wanted numbers stand among those that are present, in the order in which they are wanted.

    Args:
        wanted: numbers; None stands for all.
        present: labels of the axis, each once.
        words: of the error.
        from_end: `present` are positions 0, 1, ..., and negative numbers count from its end.

    Raises:
        InputError: a number that is not present, or none at all; with `from_end` also one that is not whole.
    """
    labels = list(present)
    numbers = labels if wanted is None else list(wanted)
    found = []
    for given in numbers:
        number = check_whole(words.whole, given) if from_end else given
        label = number + len(labels) if from_end and -len(labels) <= number < 0 else number
        if label not in labels:
            raise InputError(words.missing.format(wanted=numbers, present=labels, number=number))
        found.append(labels.index(label))
    if not found:
        raise InputError(words.none.format(wanted=numbers, present=labels))
    return found


Selection = Any
"""Layers or destinations: one number, several (list, array, tensor), or None for all; checked in `chosen_numbers`."""


def chosen_numbers(what: str, values: Selection, count: int) -> tuple[int, ...]:
    """Numbers of layers or positions as users give them, made non-negative, each once; all of `count` for None.

    Raises:
        InputError: none, no whole numbers, or one that is out of range.
    """
    if isinstance(values, bool):
        raise InputError(f"{what}s={values} is no number: leave it out for all, or name some, such as [0, 3].")
    try:
        several = None if values is None else [values] if isinstance(values, int) else list(values)
        chosen = None if several is None else [operator.index(value) for value in several]
    except TypeError as error:
        with suppress(TypeError):  # a whole number of NumPy's, or of torch's
            return chosen_numbers(what, operator.index(values), count)
        raise InputError(f"{what}s={values!r} is not a number or a list of numbers such as [0, 3].") from error
    whole = "model" if what == "layer" else "prompt"
    words = Words(
        missing=f"{what} {{number}} is out of range: this {whole} has {count}, numbered 0 to {count - 1}.",
        none=f"{what}s is empty: name at least one, or leave it out for all {count}.",
    )
    return tuple(dict.fromkeys(find_places(chosen, range(count), words, from_end=True)))
