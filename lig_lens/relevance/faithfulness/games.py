"""Measures against what removing positions really does: each alone, and in all sets of others."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float

from lig_lens.errors import InputError, check_choice, check_whole
from lig_lens.relevance.faithfulness.case import Case, Subject
from lig_lens.relevance.faithfulness.measure import OfOutputs, first
from lig_lens.relevance.faithfulness.numbers import CORRELATIONS

_FEWEST = 3  # of two positions a correlation is 1 or -1
_MOST = 16


@dataclass(frozen=True)
class _Correlation(OfOutputs):
    """Correlation of scores with something exact, within each input.

    Attributes:
        by: `spearman`, of ranks, or `pearson`, of values.
    """

    better: ClassVar[str] = "higher"
    by: str = "spearman"

    def __post_init__(self) -> None:
        check_choice("by", self.by, tuple(CORRELATIONS))

    @property
    def label(self) -> str:
        """Which correlation is always said."""
        return " ".join([self.name, self.by, *super().label.split()[1 + (self.by != "spearman") :]])


@dataclass(frozen=True)
class LeaveOneOut(_Correlation):
    """Correlation with exact leave-one-out: what the class's logit loses without each position alone."""

    name, paper = "leave_one_out", "Li et al. 2016 (erasure); Jain and Wallace 2019"

    def removed(self, case: Case) -> Bool[np.ndarray, "variant pos"]:
        """See the base class."""
        return case.subject.without(np.eye(len(case.ranks), dtype=bool))

    def value(self, case: Case, logits: Float[np.ndarray, "variant class"]) -> float:
        """See the base class."""
        target = case.subject.target
        return CORRELATIONS[self.by](case.of_free, case.subject.intact[target] - logits[:, target])


@dataclass(frozen=True)
class Shapley(_Correlation):
    """Correlation with exact Shapley values of the class's logit, over all sets of positions; of short inputs alone.

    Attributes:
        positions: inputs of at most so many positions that may be removed; 2 to the power of it runs for each.
        inputs: so many of them, the first ones.
    """

    name, paper = "shapley", "Shapley 1953; Lundberg and Lee 2017"
    positions: int = 8
    inputs: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _FEWEST <= check_whole("shapley: positions", self.positions) <= _MOST:
            raise InputError(f"shapley: positions={self.positions}: give a number from {_FEWEST} to {_MOST}.")

    def chosen(self, subjects: Sequence[Subject]) -> Sequence[Subject]:
        """See the base class."""
        short = [one for one in subjects if _FEWEST <= len(one.free) <= self.positions]
        if not short:
            raise InputError(f"No input has {_FEWEST} to {self.positions} positions that may be removed.")
        return first(self.inputs, short)

    def removed(self, case: Case) -> Bool[np.ndarray, "variant pos"]:
        """See the base class: set number k keeps what is 1 in k's binary digits, the last first."""
        return case.subject.without(~_sets(len(case.ranks)))

    def value(self, case: Case, logits: Float[np.ndarray, "variant class"]) -> float:
        """See the base class."""
        exact = shapley_weights(len(case.ranks)) @ logits[:, case.subject.target]
        return CORRELATIONS[self.by](case.of_free, exact)


def _sets(n: int) -> Bool[np.ndarray, "set member"]:
    """All sets of n members."""
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(bool)


@functools.cache
def shapley_weights(n: int) -> Float[np.ndarray, "member set"]:
    """What each set's worth counts for each member's Shapley value; sets in the order of their binary digits.

    A set of s members counts (s - 1)! (n - s)! / n! for those in it, and - s! (n - s - 1)! / n! for the others.
    """
    inside = _sets(n)
    sizes = inside.sum(1)
    joined = np.array([0.0, *(1 / (n * math.comb(n - 1, size - 1)) for size in range(1, n + 1))])
    missed = np.array([*(1 / (n * math.comb(n - 1, size)) for size in range(n)), 0.0])
    weights: Float[np.ndarray, "member set"] = np.where(inside, joined[sizes][:, None], -missed[sizes][:, None]).T
    return weights
