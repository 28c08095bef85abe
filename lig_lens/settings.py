"""Names and settings that the library, the command line and the YAML files share. Loads no torch."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
)
from pydantic.types import Strict

from lig_lens.errors import InputError, check_choice
from lig_lens.names import DTYPES, ENGINES, MAPS
from lig_lens.paths import baselines_of

PATCHED_NODES = ("hook_z", "resid_pre", "resid_mid")
PATCHED = (*PATCHED_NODES, "heads", "edges", "edges_patched")
# Integration nodes that may be spent on one cell, and tokens that are run through a block at once.
MAX_NODES = 2048
MAX_BATCH_TOKENS = 4096


def _no_repeats(values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    if values is not None:
        if not values:
            raise InputError("The list is empty: name at least one, or leave it out for all.")
        repeated = sorted({value for value in values if values.count(value) > 1})
        if repeated:
            raise InputError(f"{repeated[0]!r} is given twice: name each once.")
    return values


PositiveInt = Annotated[StrictInt, Field(ge=1)]
Positions = Annotated[tuple[StrictInt, ...], AfterValidator(_no_repeats)]


class RunConfig(BaseModel):
    """Settings that all commands share: every flag, under its name with `_` for `-`.

    Unknown keys and values of the wrong type are errors, in a YAML file as on the command line. `None` means
    all layers, TransformerLens' device, no file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    model: StrictStr = "minilm"
    layers: Positions | None = None
    tol: Annotated[float, Strict(), Field(gt=0, lt=1, allow_inf_nan=False)] = 1e-3
    max_batch_tokens: PositiveInt = MAX_BATCH_TOKENS
    device: StrictStr | None = None
    dtype: StrictStr | None = None
    progress: StrictBool = True
    json_path: StrictStr | None = Field(default=None, alias="json")  # `json` is a name of BaseModel's
    html: StrictStr | None = None

    @field_validator("dtype")
    @classmethod
    def _check_dtype(cls, value: str | None) -> str | None:
        return value if value is None else check_choice("dtype", value, DTYPES)

    def check_together(self) -> None:
        """Check what no single key shows; called once flags and file are merged.

        Raises:
            InputError: keys that do not go together, or two outputs with one path.
        """
        named = {"--out": getattr(self, "out", None), "--json": self.json_path, "--html": self.html}
        paths = [path for path in named.values() if path is not None]
        if len({Path(path).absolute() for path in paths}) < len(paths):
            raise InputError(f"Two of --out, --json, --html name one path, {paths[0]!r}: give each its own.")


class ExplainConfig(RunConfig):
    """Settings of one `lig-lens explain` run."""

    maps: Annotated[tuple[StrictStr, ...], AfterValidator(_no_repeats)] = MAPS
    destinations: Positions | None = None
    attn_baseline: StrictStr = "itb"
    mlp_baseline: StrictStr = "att_itb_a0"
    block_baseline: StrictStr = "itb"
    corrupted: StrictStr | None = None
    engine: StrictStr = "auto"
    max_nodes: PositiveInt = MAX_NODES
    out: StrictStr | None = None

    @field_validator("maps")
    @classmethod
    def _check_maps(cls, maps: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_choice("map", name, MAPS) for name in maps)

    @field_validator("attn_baseline", "mlp_baseline", "block_baseline", "engine")
    @classmethod
    def _check_choices(cls, value: str, info: Any) -> str:
        what = info.field_name.replace("_", " ")
        valid = {"engine": ENGINES} | {f"{m}_baseline": baselines_of(m) for m in MAPS}
        return check_choice(what, value, valid[info.field_name])

    def check_together(self) -> None:
        """See the base class; also a `corrupted` baseline without a second prompt, or the other way round."""
        used = [name for name in self.maps if getattr(self, f"{name}_baseline") == "corrupted"]
        if used and self.corrupted is None:
            raise InputError(
                f"The {used[0]} baseline is 'corrupted', but there is no second prompt: add --corrupted TEXT2."
            )
        if self.corrupted is not None and not used:
            raise InputError(
                f"--corrupted {self.corrupted!r} is given, but no baseline of the maps "
                f"{', '.join(self.maps)} is 'corrupted': add for example --attn-baseline corrupted."
            )
        super().check_together()

    def attribute_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `lig_lens.attribute`."""
        arguments: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("maps", "layers", "destinations", "corrupted", "tol", "engine", "progress")
        }
        arguments |= {"max_nodes": self.max_nodes, "max_batch_tokens": self.max_batch_tokens}
        return arguments | {f"{name}_baseline": getattr(self, f"{name}_baseline") for name in MAPS}


class CircuitConfig(RunConfig):
    """Settings of one `lig-lens patch` or `lig-lens compare` run."""

    model: StrictStr = "induction"
    clean: StrictStr | None = None
    corrupted: StrictStr | None = None
    answer: StrictStr | None = None
    wrong: StrictStr | None = None
    at: StrictStr = "hook_z"
    noising: StrictBool = False
    edges: PositiveInt = 200
    top: PositiveInt = 10

    @field_validator("at")
    @classmethod
    def _check_at(cls, value: str) -> str:
        return check_choice("at", value, PATCHED)

    def check_together(self) -> None:
        """See the base class; also prompts and answers that are missing."""
        if self.noising and self.at.startswith("edges"):
            raise InputError(f"--noising goes with activations, not with --at {self.at}: leave it out.")
        for name in ("clean", "corrupted"):
            if not (getattr(self, name) or "").strip():
                raise InputError(f"The {name} prompt is missing: give CLEAN and CORRUPTED, or both keys in the config.")
        if self.wrong is not None and self.answer is None:
            raise InputError(f"--wrong {self.wrong!r} is given without --answer: name the right answer as well.")
        super().check_together()


_Config = TypeVar("_Config", bound=RunConfig)


def parse_settings(
    values: Mapping[str, Any], origin: str = "", kind: type[RunConfig] = ExplainConfig
) -> dict[str, Any]:
    """Check some settings by themselves and return them with their final types.

    Args:
        values: keys of `kind` and their values; keys that are absent stay absent.
        origin: put before the key in messages: `"--"` for flags, `"x.yaml: "` for a file.
        kind: of config.

    Raises:
        InputError: an unknown key (with the nearest valid one), a wrong type or value.

    >>> parse_settings({"layers": [0, 3]})
    {'layers': (0, 3)}
    >>> parse_settings({"layer": [0]}, "x.yaml: ")
    Traceback (most recent call last):
        ...
    lig_lens.errors.InputError: x.yaml: unknown key 'layer'. Did you mean 'layers'?
    """
    try:
        config = kind.model_validate(dict(values))
    except ValidationError as error:
        raise InputError(_one_line(error, origin, kind)) from None
    return config.model_dump(exclude_unset=True, by_alias=True)


def merge_settings(kind: type[_Config], *layers: Mapping[str, Any]) -> _Config:
    """One config from settings that `parse_settings` returned; later ones win."""
    merged: dict[str, Any] = {}
    for settings in layers:
        merged |= settings
    config = kind.model_validate(merged)
    config.check_together()
    return config


def load_config(path: str | Path, kind: type[RunConfig] = ExplainConfig) -> dict[str, Any]:
    """Read settings from a YAML file.

    Raises:
        InputError: no such file, no valid YAML, not a mapping, a key given twice, or what `parse_settings`
            refuses.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"Cannot read the config {str(path)!r}: {reason}. Give a YAML file.") from error
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise InputError(f"The config {str(path)!r} is not valid YAML: {where}. Correct it.") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(
            f"The config {str(path)!r} holds {type(values).__name__}, "
            "not 'key: value' lines: write for example 'tol: 0.001'."
        )
    return parse_settings(values, f"{path}: ", kind)


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


def parse_number(what: str, text: str, kind: type[float] | type[int]) -> float | int:
    """One number from a flag.

    Raises:
        InputError: anything else.

    >>> parse_number("--tol", "1e-3", float)
    0.001
    """
    try:
        return kind(text)
    except ValueError:
        example = "4096" if kind is int else "0.001"
        raise InputError(f"{what}: {text!r} is not a number: write for example {example}.") from None


def parse_names(text: str) -> tuple[str, ...]:
    """Names from a flag: `"attn, mlp"` gives `("attn", "mlp")`."""
    return tuple(part.strip() for part in text.split(","))


def _one_line(error: ValidationError, origin: str, kind: type[RunConfig]) -> str:
    problems = error.errors()
    first = problems[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    flag = origin.startswith("-")
    shown = f"{origin}{key.replace('_', '-')}" if flag else f"{origin}{key}"
    cause = first.get("ctx", {}).get("error")
    if first["type"] == "extra_forbidden":
        message = f"{origin}unknown key {key!r}.{_nearest(key, _keys(kind))}"
    elif isinstance(cause, InputError):
        message = f"{shown}: {cause}"
    else:
        hint = _type_hint(key)
        message = f"{shown}: {first['msg']}, not {first['input']!r}{hint}."
    return message + (f" ({len(problems) - 1} more wrong.)" if len(problems) > 1 else "")


def _keys(kind: type[RunConfig]) -> list[str]:
    return [field.alias or name for name, field in kind.model_fields.items()]


def _nearest(key: str, valid: Sequence[str]) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), valid, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else f" Valid keys: {', '.join(valid)}."


def _type_hint(key: str) -> str:
    """Say what a list-valued key wants, for people who write one number or a comma list."""
    if key in ("layers", "destinations"):
        return "; write a list such as [0, 3]"
    if key == "maps":
        return "; write a list such as [attn, mlp]"
    return ""


class _StrictLoader(yaml.SafeLoader):
    """YAML without its two traps: a repeated key is an error, and 1e-3 is a number (YAML 1.1 reads text)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(str(key_node.value))
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
