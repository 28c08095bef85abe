"""What a setting is, beside its type and default: its flag, its texts, its errors. Loads no torch."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
)
from pydantic.fields import FieldInfo
from pydantic.types import Strict
from pydantic_core import PydanticCustomError

from lig_lens.errors import InputError

# One panel of the rule, `integrate.rules.NODES_PER_PANEL`; said here too, as reading it there loads torch.
FEWEST_NODES = 7


class Section(IntEnum):
    """Where `--help` lists a flag; within a section, in the order of the fields."""

    QUESTION = 0
    MODEL = 1
    INTERVENTION = 2
    SCOPE = 3
    ACCURACY = 4
    MACHINE = 5
    FILES = 6
    DISPLAY = 7


@dataclass(frozen=True)
class Flag:
    """What the command line and messages need to know of a setting beside its type, default and description.

    Attributes:
        section: where `--help` lists it.
        shown: what `--help` shows as default, where that is not the field's.
        choices: gives the names that are valid; asked at each check, so that names may be added.
        argument: name of the positional argument that it is, in place of a flag.
        off: name of the flag that switches it off, in place of `no-...`.
        wrong: what `attribute` says of a value out of range.
    """

    section: Section = Section.SCOPE
    shown: str | None = None
    choices: Callable[[], Sequence[str]] | None = None
    argument: str | None = None
    off: str | None = None
    wrong: str | None = None


def flag_of(field: FieldInfo) -> Flag:
    """What was said of a field beside its type, default and description."""
    return next((extra for extra in field.metadata if isinstance(extra, Flag)), Flag())


def fields_of(kind: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields of a model under their keys in files, in the order of `--help`."""
    fields = {field.alias or name: field for name, field in kind.model_fields.items()}
    return dict(sorted(fields.items(), key=lambda item: flag_of(item[1]).section))


def type_of(field: FieldInfo) -> tuple[Any, bool]:
    """Type of a field's values without None and without its checks, and whether it takes a list of them."""
    annotation, several = field.annotation, False
    while get_origin(annotation) is not None:
        arguments = get_args(annotation)
        several = several or get_origin(annotation) is tuple
        is_union = get_origin(annotation) in (Union, UnionType)
        annotation = next(one for one in arguments if one is not NoneType) if is_union else arguments[0]
    return annotation, several


def help_of(field: FieldInfo) -> str:
    """What `--help` says of a field: its description, or the names that are valid."""
    choices = flag_of(field).choices
    if field.description is not None or choices is None:
        return field.description or ""
    return f"{'Any of ' if type_of(field)[1] else ''}{', '.join(choices())}."


def _no_repeats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise InputError("The list is empty: name at least one, or leave it out for all.")
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise InputError(f"{repeated[0]!r} is given twice: name each once.")
    return values


def _a_panel(value: int) -> int:
    if value < FEWEST_NODES:
        raise PydanticCustomError("too_few", f"Input should be greater than or equal to {FEWEST_NODES}")
    return value


def _on_or_off(value: Any) -> Any:
    """YAML 1.2 reads yes and no as text, 1.1 read them as booleans: files keep their meaning."""
    words = {"yes": True, "on": True, "no": False, "off": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


PositiveInt = Annotated[StrictInt, Field(ge=1, le=10**12)]
Nodes = Annotated[StrictInt, Field(le=10**6), AfterValidator(_a_panel)]
Share = Annotated[float, Strict(), Field(gt=0, lt=1, allow_inf_nan=False)]
Shares = Annotated[tuple[Share, ...], AfterValidator(_no_repeats)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**32)]
Switch = Annotated[StrictBool, BeforeValidator(_on_or_off)]
Positions = Annotated[tuple[StrictInt, ...], AfterValidator(_no_repeats)]
Names = Annotated[tuple[StrictStr, ...], AfterValidator(_no_repeats)]


def argument_error(error: ValidationError, kind: type[BaseModel]) -> str:
    """The first error as `attribute` says it."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return str(cause)
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"Unknown setting {name!r}.{_nearest(name, list(kind.model_fields))}"
    wrong = flag_of(kind.model_fields[name]).wrong
    if wrong is None or first["type"] == "int_type":
        return f"{name}={first['input']!r}: {first['msg']}."
    return f"{name}={first['input']!r} {wrong}."


def key_error(error: ValidationError, origin: str, kind: type[BaseModel]) -> str:
    """The first error as the command line says it, of flags or of a file."""
    problems = error.errors()
    first = problems[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    flag = origin.startswith("-")
    shown = f"{origin}{key.replace('_', '-')}" if flag else f"{origin}{key}"
    cause = first.get("ctx", {}).get("error")
    if first["type"] == "extra_forbidden":
        message = f"{origin}unknown key {key!r}.{_nearest(key, list(fields_of(kind)))}"
    elif isinstance(cause, InputError):
        message = f"{shown}: {cause}"
    else:
        example = {(int, True): "[0, 3]", (str, True): "[attn, mlp]", (float, True): "[0.1, 0.5]"}.get(
            type_of(fields_of(kind)[key])
        )
        hint = f"; write a list such as {example}" if example else ""
        message = f"{shown}: {first['msg']}, not {first['input']!r}{hint}."
    return message + (f" ({len(problems) - 1} more wrong.)" if len(problems) > 1 else "")


def _nearest(key: str, valid: Sequence[str]) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), valid, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else f" Valid keys: {', '.join(valid)}."
