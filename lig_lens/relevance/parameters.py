"""Parameters as they are written: `mix=0.3`, `every_layer=true`. Loads no torch."""

import ast
from collections.abc import Iterable
from typing import Any

from lig_lens.errors import InputError


def read_parameters(given: Iterable[str], where: str) -> dict[str, Any]:
    """Parameters by name: values of Python where they can be read as such, and true or false; words otherwise.

    Args:
        given: each one of the form name=value.
        where: they stand, for messages.

    Raises:
        InputError: one that is not of that form, or a name that comes twice.

    >>> read_parameters(["mix=0.25", "heads=max", "every_layer=true"], "here")
    {'mix': 0.25, 'heads': 'max', 'every_layer': True}
    """
    found: dict[str, Any] = {}
    for one in given:
        name, _, text = (part.strip() for part in one.partition("="))
        if not name.isidentifier() or not text:
            raise InputError(f"{where}: {one!r} is not of the form name=value, such as mix=0.3.")
        if name in found:
            raise InputError(f"{where}: {name!r} is given twice: leave one out.")
        found[name] = _value(text)
    return found


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
