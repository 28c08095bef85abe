"""What a measure is, and how it is asked for."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from lig_lens.errors import InputError, check_whole
from lig_lens.relevance.faithfulness.case import Case, Subject
from lig_lens.relevance.parameters import read_parameters

NAN = float("nan")


def first(inputs: int, subjects: Sequence[Subject]) -> Sequence[Subject]:
    """So many inputs, for measures that cost much.

    Raises:
        InputError: fewer than one.
    """
    if check_whole("inputs", inputs) < 1:
        raise InputError(f"inputs={inputs}: a measure looks at 1 input at least.")
    return subjects[:inputs]


@dataclasses.dataclass(frozen=True)
class Measure(ABC):
    """How good an explanation is, by one number for each input. A frozen dataclass whose fields are its parameters.

    Attributes:
        name: in tables.
        better: whether `higher` or `lower` values are.
        paper: where it is from.
    """

    name: ClassVar[str]
    better: ClassVar[str]
    paper: ClassVar[str]

    def chosen(self, subjects: Sequence[Subject]) -> Sequence[Subject]:
        """Inputs that it looks at.

        Raises:
            InputError: it can say nothing of any of these.
        """
        return subjects

    @property
    def label(self) -> str:
        """Its name with the parameters that are not the usual ones."""
        return label_of(self)


class OfOutputs(Measure):
    """A measure of what the model does when positions are removed."""

    @abstractmethod
    def removed(self, case: Case) -> Bool[np.ndarray, "variant pos"]:
        """Sets of positions to remove."""

    @abstractmethod
    def value(self, case: Case, logits: Float[np.ndarray, "variant class"]) -> float:
        """The measure, from the model's logits without them; NaN where this input says nothing."""


class OfScores(Measure):
    """A measure of scores by themselves."""

    @abstractmethod
    def value(self, case: Case) -> float:
        """The measure; NaN where this input says nothing."""


@runtime_checkable
class Explainer(Protocol):
    """What explains inputs again, for measures that need it."""

    seed: int
    labels: tuple[str, ...]
    """Of the methods that can explain again."""

    def explain(self, subject: Subject, labels: Sequence[str]) -> Mapping[str, Float[np.ndarray, "pos"]]:
        """Scores of an input's positions, by method."""

    def randomized(self, share: float) -> Any:
        """A context manager in which the last share of the blocks, and what follows them, have random weights."""


class OfMethod(Measure):
    """A measure for which methods explain some inputs once more."""

    @abstractmethod
    def values(self, explainer: Explainer, cases: Mapping[str, Sequence[Case]]) -> Mapping[str, Sequence[float]]:
        """The measure by method, for each of some cases."""


def named(text: str) -> tuple[str, dict[str, Any]]:
    """A name with parameters behind it.

    Raises:
        InputError: something behind the name that is no parameter.

    >>> named("ca_lig mix=0.25 heads=max")
    ('ca_lig', {'mix': 0.25, 'heads': 'max'})
    """
    name, *rest = text.split() or [""]
    return name, read_parameters(rest, repr(text))


def label_of(thing: Any) -> str:
    """The name of a method or a measure with the parameters that are not the usual ones, as `named` reads it."""
    fields = [(one.name, getattr(thing, one.name), one.default) for one in dataclasses.fields(thing)]
    return " ".join([thing.name, *(f"{name}={value}" for name, value, usual in fields if value != usual)])
