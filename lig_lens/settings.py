"""What can be asked of `attribute` and of the commands: names, types, defaults and texts. Loads no torch.

Each setting is said once, as a field of a model. A field of `Attribution` is checked as an argument of `attribute` and
is a flag (`lig_lens.cli.flags`) and a key of config files; one of `Settings` is an argument alone, and one of
`ExplainConfig` or `CircuitConfig` a flag and a key alone.
"""

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lig_lens.errors import InputError, check_choice
from lig_lens.fields import (
    FEWEST_NODES,
    Flag,
    Names,
    Nodes,
    Positions,
    PositiveInt,
    Section,
    Share,
    Switch,
    argument_error,
    fields_of,
    flag_of,
    key_error,
    type_of,
)
from lig_lens.names import DTYPES, ENGINES, MAPS, SPLITS
from lig_lens.paths import BASELINES, baselines_of
from lig_lens.targets import TARGETS

PATCHED_NODES = ("hook_z", "resid_pre", "resid_mid")
PATCHED = (*PATCHED_NODES, "heads", "edges", "edges_patched")
# Integration nodes that may be spent on one cell, and tokens that are run through a block at once.
MAX_NODES = 2048
MAX_BATCH_TOKENS = 4096
# What `maps` and `attn_baseline` are when they are left open, and with a metric as target.
_OPEN: Any = None
_LEFT_OPEN: dict[str, Any] = {"maps": MAPS, "attn_baseline": "itb"}
_LEFT_OPEN_WITH_METRIC: dict[str, Any] = {"maps": ("attn",), "attn_baseline": "corrupted"}


class Asked(BaseModel):
    """What `attribute`, `explain`, `patch` and `compare` are all asked.

    Unknown keys and values of the wrong type are errors, in a YAML file as on the command line. `None` means
    all layers, TransformerLens' device, no file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    # Types of the values that have to be one of the names.
    _named: ClassVar[Any] = str

    layers: Annotated[Positions | None, Flag(shown="all")] = Field(
        None, description="Block numbers: 0,3 or 0-5; -1 is the last."
    )
    tol: Annotated[
        Share, Flag(Section.ACCURACY, wrong="is not between 0 and 1: it is a relative gap, such as 1e-3")
    ] = Field(1e-3, description="Largest completeness gap of a column, relative.")
    max_batch_tokens: Annotated[PositiveInt, Flag(Section.MACHINE, wrong="is too few: give at least 1")] = Field(
        MAX_BATCH_TOKENS, description="Tokens run through a block at once; bounds memory."
    )
    progress: Annotated[Switch, Flag(Section.DISPLAY)] = Field(True, description="Show a progress bar.")

    @classmethod
    def _called(cls, name: str) -> str:
        """How messages call a setting."""
        return name.replace("_", " ")

    @field_validator("*", mode="before")
    @classmethod
    def _check_names(cls, value: Any, info: Any) -> Any:
        name = str(info.field_name)
        field = cls.model_fields[name]
        choices, several = flag_of(field).choices, type_of(field)[1]
        if choices is None or (value is None and NoneType in get_args(field.annotation)):
            return value
        if several:
            for one in value if isinstance(value, (list, tuple)) else ():
                if isinstance(one, cls._named):
                    check_choice(name.removesuffix("s"), one, choices())
        elif isinstance(value, cls._named):
            check_choice(cls._called(name), value, choices())
        elif cls._named is str:
            raise PydanticCustomError("string_type", "Input should be a valid string")
        return value

    def check_together(self) -> None:
        """Check what no single setting shows; called once flags and file are merged.

        Raises:
            InputError: settings that do not go together.
        """


class Attribution(Asked):
    """What `attribute` and `explain` are asked."""

    maps: Annotated[Names, Flag(shown=",".join(MAPS), choices=lambda: MAPS)] = _OPEN
    destinations: Annotated[Positions | None, Flag(shown="all")] = Field(
        None, description="Positions whose columns are computed: 4 or 2-6."
    )
    attn_baseline: Annotated[Any, Flag(shown=_LEFT_OPEN["attn_baseline"], choices=lambda: baselines_of("attn"))] = _OPEN
    mlp_baseline: Annotated[Any, Flag(choices=lambda: baselines_of("mlp"))] = "att_itb_a0"
    block_baseline: Annotated[Any, Flag(choices=lambda: baselines_of("block"))] = "itb"
    corrupted: StrictStr | None = Field(
        None, description="Second prompt of the same length, for the corrupted baselines."
    )
    engine: Annotated[StrictStr, Flag(Section.ACCURACY, choices=lambda: ENGINES)] = "auto"
    max_nodes: Annotated[Nodes, Flag(Section.ACCURACY, wrong=f"is too few: give at least {FEWEST_NODES}")] = Field(
        MAX_NODES, description="Integration nodes spent on one cell at most."
    )
    out: Annotated[StrictStr | None, Flag(Section.FILES)] = Field(
        None, description="Write the Flow here, as safetensors."
    )

    @model_validator(mode="after")
    def _fill_in(self) -> "Attribution":
        """Say what was left open; the model is frozen for everybody else."""
        for name, value in (_LEFT_OPEN_WITH_METRIC if self.per_metric else _LEFT_OPEN).items():
            if getattr(self, name) is None:
                self.__dict__[name] = value
        return self

    @property
    def per_metric(self) -> bool:
        """Whether the target is a metric of the logits."""
        return bool(getattr(getattr(self, "target", None), "per_metric", False))

    def baseline_of(self, map_name: str) -> Any:
        """Where a map's path starts: a name, or a tensor."""
        return getattr(self, f"{map_name}_baseline")

    def baseline_fact(self, map_name: str, fact: str) -> bool:
        """Something that the entry of a map's baseline says; tensors have none."""
        baseline = self.baseline_of(map_name)
        return isinstance(baseline, str) and bool(getattr(BASELINES.entry(baseline), fact))

    def from_second_prompt(self) -> tuple[str, ...]:
        """Maps whose path starts from the second prompt."""
        return tuple(name for name in self.maps if self.baseline_fact(name, "second_prompt"))


class Settings(Attribution):
    """What `attribute` was asked, checked as far as it can be without a model and a prompt.

    Made by `of`. Layers, destinations, prompts, tensors and target objects are kept as they were given.
    """

    # Anything else stands for itself, such as a tensor.
    _named = (str, int, float, list, tuple, dict, NoneType)
    if TYPE_CHECKING:
        layers: Any
        destinations: Any
        corrupted: Any
        out: Any

    target: Annotated[Any, Flag(choices=TARGETS.names)] = Field("l2", description="What contributions add up to.")
    split: Annotated[StrictStr, Flag(choices=lambda: SPLITS)] = "source"
    prepend_bos: Any = Field(None, description="Handed to the model's tokenizer.")
    attention_mask: Any = Field(None, description="For token ids, 0 marks padding.")

    @classmethod
    def of(cls, **asked: Any) -> "Settings":
        """Settings from `attribute`'s keyword arguments.

        Raises:
            InputError: a value that cannot be used, or settings that do not go together.

        >>> Settings.of(maps="attn", tol=0.01).maps
        ('attn',)
        >>> Settings.of(max_nodes=3)
        Traceback (most recent call last):
            ...
        lig_lens.errors.InputError: max_nodes=3 is too few: give at least 7.
        """
        try:
            settings = cls.model_validate(asked)
        except ValidationError as error:
            raise InputError(argument_error(error, cls)) from None
        settings.check_together()
        return settings

    @classmethod
    def _called(cls, name: str) -> str:
        return name

    @model_validator(mode="before")
    @classmethod
    def _read(cls, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Take what Python may hand over beyond what a file can hold."""
        read = {name: value for name, value in asked.items() if value is not None or name not in _LEFT_OPEN}
        maps = read.get("maps")
        if isinstance(maps, Iterable):
            read["maps"] = tuple(dict.fromkeys([maps] if isinstance(maps, str) else maps))
            if not read["maps"]:
                raise InputError(f"maps is empty: name at least one of {', '.join(repr(name) for name in MAPS)}.")
        for name in ("max_nodes", "max_batch_tokens"):
            with suppress(TypeError, KeyError):
                read[name] = operator.index(read[name])  # of NumPy's whole numbers
        if "progress" in read:
            read["progress"] = bool(read["progress"])
        return read

    @field_validator("layers", "destinations", "corrupted", "out", mode="wrap")
    @classmethod
    def _keep(cls, value: Any, _: Callable[[Any], Any]) -> Any:
        """Arrays, prompts and paths are read with the model at hand."""
        return value

    def check_together(self) -> None:
        """See the base class; also what a metric goes with, and baselines without their second prompt."""
        if self.per_metric:
            self._check_metric()
        elif self.split != "source":
            raise InputError(
                f"split={self.split!r} goes with a metric as target: contributions to a head's output are those of "
                "sources (split='source')."
            )
        used = self.from_second_prompt()
        if used and self.corrupted is None:
            raise InputError(
                f"{used[0]}_baseline={self.baseline_of(used[0])!r} needs a second prompt: pass corrupted=... as well."
            )
        if self.corrupted is not None and not used:
            raise InputError(
                f"corrupted is given, but no baseline of the maps {', '.join(self.maps)} is 'corrupted': set one, or "
                "leave corrupted out."
            )
        if self.per_metric and self.destinations is not None:
            raise InputError(
                f"destinations={self.destinations}: contributions to a metric add up over all of them: leave it out."
            )
        super().check_together()

    def _check_metric(self) -> None:
        name, baseline = self.target.name, self.attn_baseline
        if self.maps != ("attn",):
            raise InputError(
                f"maps={self.maps}: contributions to a metric ({name}) are an attn map, and what bypasses the "
                "heads comes with it: use maps='attn', or leave maps out."
            )
        if isinstance(baseline, str) and not self.baseline_fact("attn", "shared"):
            raise InputError(
                f"attn_baseline={baseline!r} has a path for each destination, and a metric ({name}) is one "
                "number for all of them: use 'corrupted' with a second prompt, 'zero' or a tensor."
            )


# The defaults of `attribute`'s signature: `maps` and `attn_baseline` are None there, for what they are left open to be.
DEFAULTS = Settings.model_construct()


class RunConfig(Asked):
    """Settings that all commands share: every flag, under its name with `_` for `-`."""

    model: Annotated[StrictStr, Flag(Section.MODEL)] = Field(
        "minilm", description="minilm, smollm2, a local folder or a hub id."
    )
    device: Annotated[StrictStr | None, Flag(Section.MACHINE)] = Field(None, description="cpu, cuda, cuda:1, mps.")
    dtype: Annotated[StrictStr | None, Flag(Section.MACHINE, shown="float32", choices=lambda: DTYPES)] = None

    def files(self) -> dict[str, str | None]:
        """Paths of the files to write, under their flags."""
        return {f"--{key}": getattr(self, name) for key, name in _files(type(self)).items()}

    def check_together(self) -> None:
        """See the base class; also two outputs with one path."""
        super().check_together()
        paths = [path for path in self.files().values() if path is not None]
        if len({Path(path).absolute() for path in paths}) < len(paths):
            raise InputError(f"Two of {', '.join(self.files())} name one path, {paths[0]!r}: give each its own.")

    def attribute_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `lig_lens.attribute`; the command itself writes files, once there is something."""
        shared = Settings.model_fields.keys() & type(self).model_fields.keys() - _files(type(self)).values()
        return {name: getattr(self, name) for name in type(self).model_fields if name in shared}


def _files(kind: type[RunConfig]) -> dict[str, str]:
    """Names of the fields that are paths of files to write, by key."""
    fields = kind.model_fields.items()
    names = {field.alias or name: name for name, field in fields if flag_of(field).section is Section.FILES}
    return {key: names[key] for key in fields_of(kind) if key in names}


class ExplainConfig(RunConfig, Attribution):
    """Settings of one `lig-lens explain` run."""

    # `json` is a name of BaseModel's
    json_path: Annotated[StrictStr | None, Flag(Section.FILES)] = Field(
        None, alias="json", description="Write the Flow here, as JSON."
    )
    html: Annotated[StrictStr | None, Flag(Section.FILES)] = Field(
        None, description="Write a page to explore the Flow in here."
    )

    def check_together(self) -> None:
        """See the base class; also a `corrupted` baseline without a second prompt, or the other way round."""
        used = self.from_second_prompt()
        if used and self.corrupted is None:
            raise InputError(
                f"The {used[0]} baseline is {self.baseline_of(used[0])!r}, but there is no second prompt: "
                "add --corrupted TEXT2."
            )
        if self.corrupted is not None and not used:
            raise InputError(
                f"--corrupted {self.corrupted!r} is given, but no baseline of the maps "
                f"{', '.join(self.maps)} is 'corrupted': add for example --attn-baseline corrupted."
            )
        super().check_together()


class CircuitConfig(RunConfig):
    """Settings of one `lig-lens patch` or `lig-lens compare` run."""

    model: Annotated[StrictStr, Flag(Section.MODEL)] = Field(
        "induction", description="induction, minilm, smollm2, a folder or a hub id."
    )
    clean: Annotated[StrictStr | None, Flag(Section.QUESTION, argument="CLEAN")] = Field(
        None, description="The prompt."
    )
    corrupted: Annotated[StrictStr | None, Flag(Section.QUESTION, argument="CORRUPTED")] = Field(
        None, description="A prompt of as many tokens."
    )
    answer: Annotated[StrictStr | None, Flag(Section.QUESTION)] = Field(
        None, description="Right next token, such as ' Mary'; mind the space."
    )
    wrong: Annotated[StrictStr | None, Flag(Section.QUESTION)] = Field(
        None, description="Other token: then the metric is the difference of logits."
    )
    at: Annotated[StrictStr, Flag(Section.INTERVENTION, choices=lambda: PATCHED)] = "hook_z"
    noising: Annotated[Switch, Flag(Section.INTERVENTION, off="denoising")] = Field(
        False, description="Patch corrupted values into the clean run."
    )
    edges: Annotated[PositiveInt, Flag(Section.INTERVENTION)] = Field(
        200, description="Strongest edges of each score to knock out."
    )
    top: Annotated[PositiveInt, Flag(Section.SCOPE)] = Field(
        10, description="Strongest effects to print; k of top-k overlap."
    )
    json_path: Annotated[StrictStr | None, Flag(Section.FILES)] = Field(
        None, alias="json", description="Write the effects, or the table, here as JSON."
    )
    html: Annotated[StrictStr | None, Flag(Section.FILES)] = Field(None, description="Write a page of figures here.")

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
        raise InputError(key_error(error, origin, kind)) from None
    return config.model_dump(exclude_unset=True, by_alias=True)


def merge_settings(kind: type[_Config], *layers: Mapping[str, Any]) -> _Config:
    """One config from settings that `parse_settings` returned; later ones win.

    Raises:
        InputError: settings that do not go together.
    """
    config = kind.model_validate({key: value for layer in layers for key, value in layer.items()})
    config.check_together()
    return config


def load_config(path: str | Path, kind: type[RunConfig] = ExplainConfig) -> dict[str, Any]:
    """Read settings from a YAML file.

    Raises:
        InputError: no such file, no valid YAML, not a mapping, a key given twice, or what `parse_settings`
            refuses.
    """
    from ruamel.yaml import YAML  # late: `--help` reads no file
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import YAMLError

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"Cannot read the config {str(path)!r}: {reason}. Give a YAML file.") from error
    try:
        values = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError) as error:
        where = " ".join(str(error).split())
        if isinstance(error, DuplicateKeyError):
            mark = error.problem_mark
            key = text.splitlines()[mark.line][mark.column :].partition(":")[0].strip()
            where = f"the key {key!r} is given twice, again in line {mark.line + 1}"
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
