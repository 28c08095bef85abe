"""Layers and destinations as users name them."""

import operator
from typing import Any

import numpy as np

from lig_lens.errors import InputError

Selection = Any
"""Layers or destinations: one number, several (list, array, tensor), or None for all; checked in `chosen_numbers`."""


def chosen_numbers(what: str, values: Selection, count: int) -> tuple[int, ...]:
    """Indices in `values`, made non-negative; all of `count` for None."""
    if values is None:
        return tuple(range(count))
    try:
        several = [values] if isinstance(values, (int, np.integer)) else list(values)
        chosen = [operator.index(v) for v in several]
    except TypeError as error:
        raise InputError(f"{what}s={values!r} is not a number or a list of numbers such as [0, 3].") from error
    if not chosen:
        raise InputError(f"{what}s is empty: name at least one, or leave it out for all {count}.")
    outside = [v for v in chosen if not -count <= v < count]
    if outside:
        raise InputError(
            f"{what} {outside[0]} is out of range: this {'model' if what == 'layer' else 'prompt'} has {count}, "
            f"numbered 0 to {count - 1}."
        )
    return tuple(dict.fromkeys(v % count for v in chosen))
