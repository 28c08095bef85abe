"""Measures for which methods explain inputs once more: under random weights, and against the clock."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lig_lens.errors import InputError
from lig_lens.relevance.faithfulness.case import Case, Subject
from lig_lens.relevance.faithfulness.measure import NAN, Explainer, OfMethod, first
from lig_lens.relevance.faithfulness.numbers import spearman


@dataclass(frozen=True)
class Randomization(OfMethod):
    """Rank correlation of an input's scores with those under random weights, put in from the head down.

    Averaged over how far down they are. What explains the model, and not the input alone, has to change: near 0 is
    good, and 1 means that the weights do not matter.

    Attributes:
        inputs: so many of them, the first ones.
        steps: the head alone, then so many parts of the blocks, up to all of them.
    """

    name, better, paper = "randomization", "lower", "Adebayo et al. 2018"
    inputs: int = 10
    steps: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or not 1 <= self.steps <= 1000:
            raise InputError(f"randomization: steps={self.steps!r}: give a whole number, at least 1.")

    def chosen(self, subjects: Sequence[Subject]) -> Sequence[Subject]:
        """See the base class."""
        return first(self.inputs, subjects)

    def values(self, explainer: Explainer, cases: Mapping[str, Sequence[Case]]) -> Mapping[str, Sequence[float]]:
        """See the base class."""
        labels = [label for label in cases if label in explainer.labels]
        found: dict[str, list[list[float]]] = {label: [] for label in labels}
        for step in range(self.steps + 1):
            with explainer.randomized(step / self.steps):
                rows: dict[str, list[float]] = {label: [] for label in labels}
                for together in zip(*(cases[label] for label in labels), strict=True):
                    subject = together[0].subject
                    after = explainer.explain(subject, labels)
                    for label, case in zip(labels, together, strict=True):
                        now = after.get(label)
                        rows[label].append(NAN if now is None else spearman(case.of_free, now[subject.free]))
            for label in labels:
                found[label].append(rows[label])
        return {label: np.mean(rows, axis=0).tolist() for label, rows in found.items()}


@dataclass(frozen=True)
class Runtime(OfMethod):
    """Seconds that a method takes for an input, by itself.

    Each explains an input before it is timed: what is looked up once, such as a model's blocks, is no method's own.

    Attributes:
        inputs: so many of them, the first ones.
    """

    name, better, paper = "runtime", "lower", "wall clock"
    inputs: int = 5

    def chosen(self, subjects: Sequence[Subject]) -> Sequence[Subject]:
        """See the base class."""
        return first(self.inputs, subjects)

    def values(self, explainer: Explainer, cases: Mapping[str, Sequence[Case]]) -> Mapping[str, Sequence[float]]:
        """See the base class."""
        found: dict[str, list[float]] = {}
        for label in cases:
            if label in explainer.labels:
                found[label] = []
                for case in cases[label][:1]:
                    explainer.explain(case.subject, [label])
                for case in cases[label]:
                    start = time.perf_counter()
                    explainer.explain(case.subject, [label])
                    found[label].append(time.perf_counter() - start)
        return found
