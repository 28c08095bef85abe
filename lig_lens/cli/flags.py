"""Flags from a model of settings: a field has a flag, and flags win over a config file."""

import inspect
import re
from collections.abc import Callable, Collection
from typing import Annotated, Any, TypeVar

import typer
from pydantic.fields import FieldInfo

from lig_lens.cli.configs import RunConfig, load_config, merge_settings, parse_settings
from lig_lens.errors import InputError
from lig_lens.fields import Section, fields_of, flag_of, help_of, type_of
from lig_lens.files import check_apart, check_writable

_Config = TypeVar("_Config", bound=RunConfig)


def with_flags(
    kind: type[RunConfig], without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function that takes settings: one with all their flags, and --config.

    Args:
        kind: of settings. They are the function's first argument; its other ones are the command's own.
        without: keys that the command has no use for: files may hold them for another command, it has no flags.
    """

    def decorate(action: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(action).parameters.values())[1:]
        parameters = [*own, *_parameters(kind, without)]

        def command(**given: Any) -> None:
            of_action = {one.name: given.pop(one.name) for one in own}
            action(read_settings(kind, given.pop("config"), given), **of_action)

        command.__doc__, command.__name__ = action.__doc__, action.__name__
        # What typer reads in place of **given.
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        command.__dict__["__signature__"] = inspect.Signature(parameters)
        return command

    return decorate


def read_settings(kind: type[_Config], config: str | None, flags: dict[str, Any]) -> _Config:
    """Settings from flags and a file, checked as far as it can be before any work.

    Args:
        kind: of settings.
        config: path of a YAML file.
        flags: text, or a boolean, under each key; None where a flag was not given.

    Raises:
        InputError: a value or a file that cannot be used.
    """
    fields = fields_of(kind)
    given = {key: _read(key, fields[key], value) for key, value in flags.items() if value is not None}
    named = parse_settings(given, "--", kind)
    settings = merge_settings(kind, {} if config is None else load_config(config, kind), named)
    for flag, path in settings.files().items():
        if path is not None:
            check_writable(path, flag)
            check_apart(path, flag, {"the config that was read": config, **settings.files_read()})
    return settings


def option(*names: str, default: str | bool = False, help: str) -> Any:
    """Declare a flag that is None unless given, so that a file can tell; --help shows `default`."""
    return typer.Option(*names, show_default=default, help=help)


def _parameters(kind: type[RunConfig], without: Collection[str]) -> list[inspect.Parameter]:
    """What typer is to read: the arguments and flags in the order of `--help`, with --config before the files."""
    fields = fields_of(kind)
    found = [
        (flag_of(field).section, key, _declared(key, field)) for key, field in fields.items() if key not in without
    ]
    config = option("--config", help="YAML file with any of these settings; flags win over it.")
    found.append((Section.MACHINE, "config", Annotated[str | None, config]))
    found.sort(key=lambda item: item[0])
    return [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for _, key, annotation in found
    ]


def _declared(key: str, field: FieldInfo) -> Any:
    """Typer's annotation of a field."""
    flag, name = flag_of(field), key.replace("_", "-")
    if flag.argument is not None:
        return Annotated[str | None, typer.Argument(metavar=flag.argument, help=help_of(field), show_default=False)]
    if type_of(field)[0] is bool:
        off = flag.off or f"no-{name}"
        shown = name if field.default else off
        return Annotated[bool | None, option(f"--{name}/--{off}", default=shown, help=help_of(field))]
    default = flag.shown or (False if field.default is None else str(field.default))
    return Annotated[str | None, option(f"--{name}", default=default, help=help_of(field))]


def _read(key: str, field: FieldInfo, value: Any) -> Any:
    """A flag's text as the type that a file would give it."""
    flag, (kind, several) = f"--{key.replace('_', '-')}", type_of(field)
    if several:
        if kind is int:
            return parse_numbers(flag, value)
        return tuple(_number(flag, kind, part.strip()) for part in value.split(","))
    return _number(flag, kind, value)


def _number(flag: str, kind: Any, value: Any) -> Any:
    """A flag's value as a number where that is wanted."""
    if kind not in (int, float):
        return value
    try:
        return kind(value)
    except ValueError:
        example = "4096" if kind is int else "0.001"
        raise InputError(f"{flag}: {value!r} is not a number: write for example {example}.") from None


def parse_numbers(what: str, text: str) -> tuple[int, ...]:
    """Numbers from a flag: `"0,3"`, with inclusive ranges `"0-2,5"`, or counted from the end `"-1"`.

    Raises:
        InputError: anything else.

    >>> parse_numbers("--layers", "0-2,-1")
    (0, 1, 2, -1)
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d{1,9}|(?P<from>\d{1,9})\s*-\s*(?P<to>\d{1,9}))\s*", part, flags=re.ASCII)
        if match and match["from"] is None:
            numbers.append(int(match[1]))
            continue
        first, last = (int(match["from"]), int(match["to"])) if match else (0, 0)
        if match is None or last < first or last - first > 100_000:
            raise InputError(f"{what}: cannot read {part!r} in {text!r}: write numbers like 0,3 or ranges like 0-5.")
        numbers.extend(range(first, last + 1))
    return tuple(numbers)
