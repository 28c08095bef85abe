"""One input, what its positions are worth, and which sets of them are removed."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from lig_lens.inputs.inputs import Inputs


@dataclass(frozen=True, eq=False)
class Subject:
    """An input, whoever explains it.

    Attributes:
        number: which of the inputs it is.
        prompt: as its user gave it.
        inputs: as the model takes it.
        intact: logits of the classes.
        ties: order in which equal scores are ranked, drawn once for all methods.
        words: text and positions of each word, where the lexicon is asked; positions among all.
        valence: of words, by their lower-case text.
    """

    number: int
    prompt: Any
    inputs: Inputs
    intact: Float[np.ndarray, "class"]
    ties: Int[np.ndarray, "free"]
    words: tuple[tuple[str, tuple[int, ...]], ...] = ()
    valence: Mapping[str, float] | None = None

    @property
    def target(self) -> int:
        """The class that is explained: the one that the model predicts on the intact input."""
        return int(self.intact.argmax())

    @functools.cached_property
    def free(self) -> Int[np.ndarray, "free"]:
        """Positions that may be removed: all that are not special."""
        return np.flatnonzero(~np.array(self.inputs.special, dtype=bool))

    def without(self, chosen: Bool[np.ndarray, "variant free"]) -> Bool[np.ndarray, "variant pos"]:
        """Sets of removed positions, among all, of sets among those that may be removed."""
        removed = np.zeros((len(chosen), len(self.inputs)), dtype=bool)
        removed[:, self.free] = chosen
        return removed


@dataclass(frozen=True, eq=False)
class Case:
    """An input as one method explains it.

    Attributes:
        subject: the input.
        scores: of all its positions, signed towards the class.
        fractions: shares of the positions that are removed, or kept.
    """

    subject: Subject
    scores: Float[np.ndarray, "pos"]
    fractions: tuple[float, ...]

    @functools.cached_property
    def of_free(self) -> Float[np.ndarray, "free"]:
        """Scores of the positions that may be removed."""
        scores: Float[np.ndarray, free] = self.scores[self.subject.free]
        return scores

    @functools.cached_property
    def ranks(self) -> Int[np.ndarray, "free"]:
        """Of each position that may be removed its place, the most relevant first, from 0."""
        order = np.lexsort((self.subject.ties, -self.of_free))
        ranks = np.empty(len(order), dtype=np.int64)
        ranks[order] = np.arange(len(order))
        return ranks

    @functools.cached_property
    def counts(self) -> tuple[int, ...]:
        """How many positions each fraction is, rounded, at least one."""
        n = len(self.ranks)
        return tuple(min(n, max(1, int(fraction * n + 0.5))) for fraction in self.fractions)

    @functools.cached_property
    def steps(self) -> tuple[int, ...]:
        """How many positions curves are measured at: none, each fraction and as many from the other end, and all.

        Only where steps lie alike from both ends do a curve and the one read backwards have the same area, and does a
        ranking by chance get the same from both.
        """
        n = len(self.ranks)
        return tuple(sorted({0, n, *self.counts, *(n - count for count in self.counts)}))

    def without_first(self, counts: Sequence[int]) -> Bool[np.ndarray, "count pos"]:
        """So many of the most relevant positions removed."""
        return self.subject.without(np.less(self.ranks, np.array(counts)[:, None]))

    def first_alone(self, counts: Sequence[int]) -> Bool[np.ndarray, "count pos"]:
        """All but so many of the most relevant removed."""
        return self.subject.without(np.greater_equal(self.ranks, np.array(counts)[:, None]))

    @functools.cached_property
    def removed(self) -> Bool[np.ndarray, "fraction pos"]:
        """The most relevant positions removed, as many as each fraction is."""
        return self.without_first(self.counts)

    @functools.cached_property
    def kept(self) -> Bool[np.ndarray, "fraction pos"]:
        """All but the most relevant removed."""
        return self.first_alone(self.counts)

    @functools.cached_property
    def empty(self) -> Bool[np.ndarray, "1 pos"]:
        """All removed that may be."""
        return self.subject.without(np.ones((1, len(self.ranks)), dtype=bool))
