"""What can be asked of `attribute`: names, types, defaults and texts. Loads no torch.

Each setting is said once, as a field of a model. A field of `Attribution` is checked as an argument of `attribute` and
is a flag and a key of config files as well (`lig_lens.cli.configs` adds those that are nothing else); one of
`Settings` is an argument alone.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
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
    flag_of,
    type_of,
)
from lig_lens.names import ENGINES, EXPERTS, HOLDS, MAPS, SPLITS, STREAMS
from lig_lens.paths import BASELINES, baselines_of
from lig_lens.targets import TARGETS

# Integration nodes that may be spent on one cell, and tokens that are run through a block at once.
MAX_NODES = 2048
MAX_BATCH_TOKENS = 4096
FRACTIONS = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Shares of an input that `faithfulness` removes, or keeps."""
# What `maps` and `attn_baseline` are when they are left open, and with a metric as target.
_OPEN: Any = None
_LEFT_OPEN: dict[str, Any] = {"maps": MAPS, "attn_baseline": "itb"}
_LEFT_OPEN_WITH_METRIC: dict[str, Any] = {"maps": ("attn",), "attn_baseline": "corrupted"}
_LEFT_OPEN_ACROSS: dict[str, Any] = {"maps": ("attn",), "attn_baseline": "zero"}


class Asked(BaseModel):
    """What `attribute`, `explain_class` and all commands that run a model are asked.

    Unknown keys and values of the wrong type are errors, in a YAML file as on the command line. `None` means
    all layers, TransformerLens' device, no file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    # Types of the values that have to be one of the names.
    _named: ClassVar[Any] = str

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


class ByLayer(Asked):
    """What is also asked where layers can be chosen."""

    layers: Annotated[Positions | None, Flag(shown="all")] = Field(
        None, description="Block numbers: 0,3 or 0-5; -1 is the last."
    )


class Integrated(Asked):
    """What is also asked where integrals are computed."""

    max_nodes: Annotated[Nodes, Flag(Section.ACCURACY, wrong=f"is too few: give at least {FEWEST_NODES}")] = Field(
        MAX_NODES, description="Integration nodes spent on one cell at most."
    )


class Explanation(Integrated):
    """What `explain_class` and `classify` are asked, but for the methods."""

    target: Annotated[Any, Flag(Section.QUESTION, shown="what the model predicts")] = Field(
        None, description="Class to explain, by name or number; of a language model, the next token."
    )
    against: Annotated[Any, Flag(Section.QUESTION)] = Field(
        None, description="A second class, whose logit is taken off: negative."
    )
    baseline: Annotated[StrictStr | None, Flag(shown="mask; blurred")] = Field(
        None, description="Where paths start: a token for all others, such as pad; of images mean, say; or zero."
    )
    corrupted: Annotated[Any, Flag()] = Field(None, description="A second prompt in place of a baseline.")


class Attribution(ByLayer, Integrated):
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
    stream: Annotated[StrictStr | None, Flag(choices=lambda: STREAMS)] = Field(
        None,
        description=f"Of an encoder and a decoder, whose attention is explained: {', '.join(STREAMS)}.",
    )
    engine: Annotated[StrictStr, Flag(Section.ACCURACY, choices=lambda: ENGINES)] = "auto"
    out: Annotated[StrictStr | None, Flag(Section.FILES)] = Field(
        None, description="Write the Flow here, as safetensors."
    )

    @model_validator(mode="after")
    def _fill_in(self) -> "Attribution":
        """Say what was left open; the model is frozen for everybody else."""
        left_open = _LEFT_OPEN_WITH_METRIC if self.per_metric else _LEFT_OPEN_ACROSS if self.crosses else _LEFT_OPEN
        for name, value in left_open.items():
            if getattr(self, name) is None:
                self.__dict__[name] = value
        return self

    @property
    def per_metric(self) -> bool:
        """Whether the target is a metric of the logits."""
        return bool(getattr(getattr(self, "target", None), "per_metric", False))

    @property
    def crosses(self) -> bool:
        """Whether contributions go from an encoder's output to a decoder."""
        return self.stream == "cross"

    def check_together(self) -> None:
        """See the base class; also what cross-attention goes with."""
        if self.crosses:
            self._check_across()
        super().check_together()

    def _check_across(self) -> None:
        if self.maps != ("attn",):
            raise InputError(
                f"maps={self.maps}: for stream='cross' there is the attn map alone, from the encoder's output to the "
                "heads of cross-attention: use maps='attn', or leave maps out."
            )
        if isinstance(self.attn_baseline, str) and not self.baseline_fact("attn", "shared"):
            raise InputError(
                f"attn_baseline={self.attn_baseline!r} starts where sources are like the destination, and for "
                "stream='cross' they are tokens of another text: use 'zero', 'corrupted' with another source, or a "
                "tensor."
            )

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
    hold: Annotated[StrictStr | None, Flag(choices=lambda: HOLDS)] = None
    noising: Annotated[Switch, Flag(off="denoising")] = False
    experts: Annotated[StrictStr, Flag(choices=lambda: EXPERTS)] = "free"
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
        return validated(cls, asked)

    @classmethod
    def _called(cls, name: str) -> str:
        return name

    @model_validator(mode="before")
    @classmethod
    def _read(cls, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Take what Python may hand over beyond what a file can hold."""
        read = {name: value for name, value in asked.items() if value is not None or name not in _LEFT_OPEN}
        maps = read.get("maps")
        if isinstance(maps, Iterable) and getattr(maps, "ndim", 1) == 1:
            read["maps"] = tuple(dict.fromkeys([maps] if isinstance(maps, str) else maps))
            if not read["maps"]:
                raise InputError(f"maps is empty: name at least one of {', '.join(repr(name) for name in MAPS)}.")
        return plain_numbers(read)

    @field_validator("layers", "destinations", "corrupted", "out", mode="wrap")
    @classmethod
    def _keep(cls, value: Any, _: Callable[[Any], Any]) -> Any:
        """Arrays, prompts and paths are read with the model at hand."""
        return value

    def check_together(self) -> None:
        """See the base class; also what a metric goes with, and baselines without their second prompt."""
        if self.crosses and self.per_metric:
            raise InputError(
                f"stream='cross' goes with a target of each destination's vector, not with a metric "
                f"({self.target.name}): the encoder's output enters every block, so no block's part of it adds up to "
                "the change of the metric. Use stream='encoder' or 'decoder'."
            )
        super().check_together()
        if self.per_metric:
            self._check_metric()
            if self.experts != "free":
                raise InputError(
                    f"experts={self.experts!r} goes with targets at one block, and a metric has all blocks after it in "
                    "the path: leave it out."
                )
        elif self.hold is not None:
            raise InputError(
                f"hold={self.hold!r} goes with a metric as target: within a block nothing else moves anyway. Leave it "
                "out, or give a metric such as logit_difference(...)."
            )
        elif self.split != "source":
            raise InputError(
                f"split={self.split!r} goes with a metric as target: contributions to a head's output are those of "
                "sources (split='source')."
            )
        if self.noising and self.hold is None:
            raise InputError(
                "noising says in which run the rest stays, and nothing stays: give hold='skip' or hold='others' too."
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


def plain_numbers(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with the numbers of NumPy and torch in them as Python's."""
    read = dict(asked)
    for name in ("max_nodes", "max_batch_tokens"):
        with suppress(TypeError, KeyError):
            read[name] = operator.index(read[name])
    tol = read.get("tol")
    if hasattr(tol, "__float__") and not isinstance(tol, (str, bool)):
        with suppress(TypeError, ValueError, RuntimeError):
            read["tol"] = float(tol)  # type: ignore[arg-type]  # whatever has a float
    if "progress" in read:
        with suppress(TypeError, ValueError, RuntimeError):
            read["progress"] = bool(read["progress"])
    return read


M = TypeVar("M", bound=Asked)


def validated(kind: type[M], asked: Mapping[str, Any]) -> M:
    """Settings of a kind from a function's keyword arguments.

    Raises:
        InputError: a value that cannot be used, or settings that do not go together.
    """
    try:
        settings = kind.model_validate(asked)
    except ValidationError as error:
        raise InputError(argument_error(error, kind)) from None
    settings.check_together()
    return settings


# The defaults of the signatures of `attribute` and `explain_class`. In the first, `maps` and `attn_baseline` are None,
# for what they are left open to be.
DEFAULTS = Settings.model_construct()
EXPLANATION = Explanation.model_construct()
