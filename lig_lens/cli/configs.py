"""What the commands are asked: flags, and keys of the YAML files that `--config` reads. Loads no torch.

They have the fields of `lig_lens.settings`, and below those that are a flag and a key alone.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, StrictStr, ValidationError

from lig_lens.errors import InputError
from lig_lens.fields import Flag, Names, PositiveInt, Section, Seed, Shares, Switch, fields_of, flag_of, key_error
from lig_lens.files import real
from lig_lens.interventions import NODES
from lig_lens.names import DTYPES
from lig_lens.relevance import METHODS
from lig_lens.relevance.parameters import read_parameters
from lig_lens.settings import FRACTIONS, Asked, Attribution, ByLayer, Explanation, Integrated, Settings

# What `patch --at` names: an activation by its node, whole heads, or edges.
PATCHED = (*NODES.names(), "heads", "edges", "edges_patched")


class RunConfig(Asked):
    """Settings that all commands share: every flag, under its name with `_` for `-`."""

    model: Annotated[StrictStr, Flag(Section.MODEL)] = Field(
        "minilm", description="minilm, smollm2, sentiment, digits (of images), a local folder or a hub id."
    )
    device: Annotated[StrictStr | None, Flag(Section.MACHINE)] = Field(None, description="cpu, cuda, cuda:1, mps.")
    dtype: Annotated[StrictStr | None, Flag(Section.MACHINE, shown="float32", choices=lambda: DTYPES)] = None

    def files(self) -> dict[str, str | None]:
        """Paths of the files to write, under their flags."""
        return {f"--{key}": getattr(self, name) for key, name in _files(type(self)).items()}

    def files_read(self) -> dict[str, str | None]:
        """Paths of files that are read beside the config, under what messages call them."""
        return {}

    def check_together(self) -> None:
        """See the base class; also two outputs with one path."""
        super().check_together()
        paths = [path for path in self.files().values() if path is not None]
        if len({real(path) for path in paths}) < len(paths):
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


class PromptConfig(RunConfig):
    """What commands that explain one prompt are asked: a text, or an image."""

    text: Annotated[StrictStr | None, Flag(Section.QUESTION, argument="TEXT")] = Field(
        None, description="The prompt; of an encoder and a decoder, the source."
    )
    image: Annotated[StrictStr | None, Flag(Section.QUESTION)] = Field(
        None, description="Image file in place of TEXT, for models of images; --corrupted is another then."
    )

    def of_text(self) -> tuple[str, ...]:
        """Settings that go with a text, and with no image."""
        return ("text",)

    def check_prompt(self) -> None:
        """Check that there is one prompt, and what it goes with.

        Raises:
            InputError: none, or more than one.
        """
        if self.image is not None:
            for name in self.of_text():
                if getattr(self, name) is not None:
                    shown = "TEXT" if name == "text" else f"--{name.replace('_', '-')}"
                    raise InputError(
                        f"{shown} goes with models of text, and --image {self.image!r} is given: drop one."
                    )
        elif self.text is None:
            raise InputError("There is no prompt: give TEXT, or --image FILE for a model of images.")
        elif not self.text.strip():
            raise InputError(f"TEXT is empty ({self.text!r}): give a prompt, such as 'The cat sat on the mat.'")

    def files_read(self) -> dict[str, str | None]:
        """See the base class."""
        other = None if self.image is None else getattr(self, "corrupted", None)
        return {"the image to be explained": self.image, "the second image": other}

    @property
    def title(self) -> str:
        """The prompt in a line."""
        return str(self.text) if self.image is None else Path(self.image).name


class ExplainConfig(PromptConfig, Attribution):
    """Settings of one `lig-lens explain` run."""

    target_text: Annotated[StrictStr | None, Flag(Section.QUESTION)] = Field(
        None, description="Of a decoder beside an encoder, what it has written so far; '' for nothing yet."
    )
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

    def of_text(self) -> tuple[str, ...]:
        """See the base class."""
        return ("text", "target_text", "stream")

    def check_prompt(self) -> None:
        """See the base class; also a decoder's stream without what the decoder has written."""
        super().check_prompt()
        if self.image is None and self.stream not in (None, "encoder") and self.target_text is None:
            raise InputError(
                f"--stream {self.stream} needs a target: add --target-text TEXT, what the decoder has written so far, "
                "'' for nothing yet."
            )

    @property
    def title(self) -> str:
        """The prompt in a line."""
        return f"{super().title} → {self.target_text}" if self.target_text else super().title


class ClassifyConfig(PromptConfig, Explanation):
    """Settings of one `lig-lens classify` run."""

    model: Annotated[StrictStr, Flag(Section.MODEL)] = Field(
        "sentiment", description="A classifier: sentiment, digits (of images), a local folder or a hub id."
    )
    method: Annotated[Names, Flag(shown="ca_lig", choices=METHODS.names)] = Field(
        ("ca_lig",), description="How to explain it; several, with commas, stand side by side."
    )
    parameters: Annotated[Names | None, Flag()] = Field(
        None, description="Of the method, such as mix=0.3,keep=positive."
    )
    top: Annotated[PositiveInt | None, Flag(shown="all")] = Field(
        None, description="Positions to print: those with the largest scores."
    )
    out: Annotated[StrictStr | None, Flag(Section.FILES)] = Field(
        None, description="Write the Relevance here, as safetensors."
    )
    json_path: Annotated[StrictStr | None, Flag(Section.FILES)] = Field(
        None, alias="json", description="Write the Relevance here, as JSON."
    )
    html: Annotated[StrictStr | None, Flag(Section.FILES)] = Field(
        None, description="Write a page to explore it in here."
    )

    def check_together(self) -> None:
        """See the base class; also one file for several methods, and a baseline beside a second prompt."""
        for flag, path in (("--out", self.out), ("--json", self.json_path)):
            if path is not None and len(self.method) > 1:
                raise InputError(
                    f"{flag} holds one Relevance, and there are {len(self.method)} methods ({', '.join(self.method)}): "
                    "name one, or write a page of all with --html."
                )
        if self.corrupted is not None and self.baseline is not None:
            raise InputError(
                f"--baseline {self.baseline} and --corrupted {self.corrupted!r}: paths start in one place, drop one."
            )
        self.method_parameters()
        super().check_together()

    def method_parameters(self) -> dict[str, Any]:
        """Parameters of the method by name.

        Raises:
            InputError: one that is not of the form name=value.
        """
        return read_parameters(self.parameters or (), "--parameters")

    def explain_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `lig_lens.explain_class`."""
        asked = {name: getattr(self, name) for name in Explanation.model_fields}
        for name in ("target", "against"):
            asked[name] = _class(asked[name]) if isinstance(asked[name], str) else asked[name]
        method = self.method[0] if len(self.method) == 1 else list(self.method)
        return {**asked, "method": method, **self.method_parameters()}


def _class(text: str) -> int | str:
    """A class's number where a text is one; its name otherwise, be that 'true' or '1e3'."""
    return int(text) if re.fullmatch(r"\s*[+-]?[0-9]+\s*", text) else text


class CircuitConfig(RunConfig, ByLayer):
    """Settings of one `lig-lens patch` or `lig-lens compare` run."""

    model: Annotated[StrictStr, Flag(Section.MODEL)] = Field(
        "induction", description="induction, minilm, smollm2, sentiment, a folder or a hub id."
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


class LeagueConfig(RunConfig, Integrated):
    """Settings of one `lig-lens league` run."""

    model: Annotated[StrictStr, Flag(Section.MODEL)] = Field(
        "sentiment", description="sentiment, digits, a local folder or a hub id: a classifier."
    )
    inputs: Annotated[StrictStr, Flag(Section.QUESTION)] = Field(
        "movie_sentences", description="movie_sentences, digit_images, or a file with a text in each line."
    )
    split: Annotated[StrictStr, Flag(Section.QUESTION)] = Field("held_out", description="Part of a named set.")
    count: Annotated[PositiveInt | None, Flag(Section.QUESTION, shown="all")] = Field(
        None, description="How many inputs, drawn by the seed."
    )
    lexicon: Annotated[StrictStr | None, Flag(Section.QUESTION)] = Field(
        None, description="sentiment, or a file with a word, a tab and its valence in each line."
    )
    methods: Annotated[Names | None, Flag(Section.INTERVENTION, shown="all")] = Field(
        None, description="Methods, with parameters behind them: 'ig,ca_lig mix=0.25'."
    )
    replacers: Annotated[Names | None, Flag(Section.INTERVENTION, shown="all")] = Field(
        None, description="What takes a removed position's place: mask,unk,pad,mean,dropped or mean,black,blurred."
    )
    measures: Annotated[Names | None, Flag(Section.INTERVENTION, shown="all")] = Field(
        None, description="Measures, with parameters behind them: 'deletion,shapley positions=6'."
    )
    fractions: Annotated[Shares, Flag(Section.INTERVENTION, shown=",".join(map(str, FRACTIONS)))] = Field(
        FRACTIONS, description="Shares of the positions that are removed, or kept."
    )
    baseline: Annotated[StrictStr | None, Flag(Section.INTERVENTION, shown="the model's")] = Field(
        None, description="Where paths start: mask, pad or unk; of images blurred, mean or black; zero."
    )
    seed: Annotated[Seed, Flag(Section.ACCURACY)] = Field(
        0, description="Of the inputs drawn, ties, random weights and intervals."
    )
    json_path: Annotated[StrictStr | None, Flag(Section.FILES)] = Field(
        None, alias="json", description="Write the league here, as JSON."
    )
    markdown: Annotated[StrictStr | None, Flag(Section.FILES)] = Field(None, description="Write the tables here.")

    def files_read(self) -> dict[str, str | None]:
        """See the base class."""
        return {"the file of inputs": self.inputs, "the lexicon": self.lexicon}


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
