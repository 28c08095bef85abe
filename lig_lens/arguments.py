"""Arguments of public functions, checked by what their signatures say, with one kind of message for all."""

import functools
import inspect
import math
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import numpy as np

from lig_lens.errors import InputError

C = TypeVar("C", bound=Callable[..., Any])


def checked(function: C) -> C:
    """Check a function's arguments before it runs: numbers, switches, names, lists of numbers, Flows and Effects.

    Whole numbers of NumPy and torch become int, and one number where a list of them is wanted a list. What a signature
    does not say, a function checks itself.
    """
    signature = inspect.signature(function)
    readers = {
        name: reader for name, one in signature.parameters.items() if (reader := _reader(one.annotation)) is not None
    }

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        for name, reader in readers.items():
            if name in given.arguments:
                value = given.arguments[name]
                try:
                    given.arguments[name] = reader.read(value)
                except (TypeError, ValueError, RuntimeError, OverflowError):
                    raise InputError(f"{function.__name__}: {name}={_shown(value)}: give {reader.wanted}.") from None
        return function(*given.args, **given.kwargs)

    return call  # type: ignore[return-value]


def _shown(value: object) -> str:
    text = f"a {type(value).__name__}" if hasattr(value, "shape") and getattr(value, "ndim", False) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


@dataclass(frozen=True)
class _Reader:
    """How a value is read, and what a message asks for."""

    read: Callable[[Any], Any]
    wanted: str


def _reader(annotation: Any) -> _Reader | None:
    """How to read values of an annotation; None for one that says nothing that is checked here."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    optional, kinds = NoneType in kinds, tuple(kind for kind in kinds if kind is not NoneType)
    if len(kinds) == 1:
        found = _simple(kinds[0])
    elif any((get_origin(kind) or kind) is os.PathLike for kind in kinds):
        found = _Reader(_path, "a path")
    else:
        found = _ours(kinds)
    if found is None or not optional:
        return found
    return _Reader(lambda value: None if value is None else found.read(value), f"{found.wanted}, or None")


def _simple(kind: Any) -> _Reader | None:
    if kind in _SIMPLE:
        return _SIMPLE[kind]
    if get_origin(kind) is Mapping:
        return _Reader(_mapping, "a dictionary")
    inner = _items(kind)
    if inner is int:
        made = tuple if get_origin(kind) is tuple else list
        return _Reader(lambda value: made(_whole_numbers(value)), "a list of whole numbers, such as [0, 3]")
    if inner is str:
        return _Reader(_names, "a list of names")
    return _ours((kind,))


def _items(kind: Any) -> Any:
    """What a sequence holds; None for anything else."""
    inner = [one for one in get_args(kind) if one is not Ellipsis]
    return inner[0] if get_origin(kind) in (Sequence, tuple) and len(inner) == 1 else None


def _ours(kinds: tuple[Any, ...]) -> _Reader | None:
    """For Flows, Effects and what is made of them: one, a list, or either."""
    single = tuple(kind for kind in kinds if _items(kind) is None)
    listed = tuple(_items(kind) for kind in kinds if _items(kind) is not None)
    if not all(isinstance(kind, type) and kind.__module__.startswith("lig_lens.flow") for kind in single + listed):
        return None

    def read(value: Any) -> Any:
        if isinstance(value, single):
            return value
        if not listed:
            raise TypeError
        items = _listed(value)
        if not all(isinstance(one, listed) for one in items):
            raise TypeError
        return items

    words = [f"a {_called(single)}"] * bool(single) + [f"a list of {_called(listed)}"] * bool(listed)
    return _Reader(read, " or ".join(words))


def _called(kinds: tuple[type, ...]) -> str:
    return " or ".join(kind.__name__.removesuffix("Data") for kind in kinds)


def _listed(value: Any) -> list[Any]:
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise TypeError
    return list(value)


def _mapping(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise TypeError
    return value


def _path(value: Any) -> Any:
    if not isinstance(os.fspath(value), str):
        raise TypeError
    return value


def _whole(value: Any) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError
    return operator.index(value)


def _whole_numbers(value: Any) -> list[int]:
    try:
        return [_whole(value)]
    except TypeError:
        return [_whole(one) for one in _listed(value)]


def _names(value: Any) -> list[str]:
    return [_name(one) for one in _listed(value)]


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _number(value: Any) -> float:
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()  # of NumPy or torch
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise TypeError
    return float(value)


def _switch(value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError
    return bool(value)


_SIMPLE: dict[Any, _Reader] = {
    int: _Reader(_whole, "a whole number"),
    float: _Reader(_number, "a finite number"),
    bool: _Reader(_switch, "True or False"),
    str: _Reader(_name, "a text"),
}
