"""Measures from what the class's probability does as positions are removed or kept, the most relevant first.

Removing the least relevant first is not measured apart: what is left then is what is kept of the most relevant first,
so the area of deletion, least relevant first, is that of insertion, most relevant first, and the other way round.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from lig_lens.relevance.faithfulness.case import Case
from lig_lens.relevance.faithfulness.measure import OfOutputs
from lig_lens.relevance.faithfulness.numbers import area, log_odds, probability

Logits = Float[np.ndarray, "variant class"]


@dataclass(frozen=True)
class Comprehensiveness(OfOutputs):
    """What the class's probability loses without the most relevant positions, averaged over fractions."""

    name, better, paper = "comprehensiveness", "higher", "DeYoung et al. 2020 (ERASER)"

    def removed(self, case: Case) -> Bool[np.ndarray, "variant pos"]:
        """See the base class."""
        return case.removed

    def value(self, case: Case, logits: Logits) -> float:
        """See the base class."""
        return _lost(case, logits)


@dataclass(frozen=True)
class Sufficiency(OfOutputs):
    """What the class's probability loses when the most relevant positions alone are kept, averaged over fractions."""

    name, better, paper = "sufficiency", "lower", "DeYoung et al. 2020 (ERASER)"

    def removed(self, case: Case) -> Bool[np.ndarray, "variant pos"]:
        """See the base class."""
        return case.kept

    def value(self, case: Case, logits: Logits) -> float:
        """See the base class."""
        return _lost(case, logits)


@dataclass(frozen=True)
class Aopc(OfOutputs):
    """Area over the perturbation curve: what the class's logit, the number that is explained, loses on the way.

    The mean over the intact input, which loses nothing, and the steps of the fractions: 1 / (L + 1) times their sum.
    """

    name, better, paper = "aopc", "higher", "Samek et al. 2017"

    def removed(self, case: Case) -> Bool[np.ndarray, "variant pos"]:
        """See the base class."""
        return case.removed

    def value(self, case: Case, logits: Logits) -> float:
        """See the base class."""
        target, intact = case.subject.target, case.subject.intact
        return float((intact[target] - logits[:, target]).sum() / (len(logits) + 1))


@dataclass(frozen=True)
class LogOdds(OfOutputs):
    """How the log-odds of the class, log(p / (1 - p)), change without the most relevant, averaged over fractions."""

    name, better, paper = "log_odds", "lower", "Shrikumar et al. 2017; Chen et al. 2019 (L-Shapley)"

    def removed(self, case: Case) -> Bool[np.ndarray, "variant pos"]:
        """See the base class."""
        return case.removed

    def value(self, case: Case, logits: Logits) -> float:
        """See the base class."""
        target, intact = case.subject.target, case.subject.intact
        return float((log_odds(logits, target) - log_odds(intact, target)).mean())


@dataclass(frozen=True)
class Deletion(OfOutputs):
    """Area under the probability of the class as positions are removed, the most relevant first, until none is left.

    Also that of insertion, the least relevant first.
    """

    name, better, paper = "deletion", "lower", "Petsiuk et al. 2018 (RISE)"

    def removed(self, case: Case) -> Bool[np.ndarray, "variant pos"]:
        """See the base class."""
        return case.without_first(case.steps[1:])

    def value(self, case: Case, logits: Logits) -> float:
        """See the base class."""
        return _under(case, [case.subject.intact, *logits])


@dataclass(frozen=True)
class Insertion(OfOutputs):
    """Area under the probability of the class as positions are put back into nothing, the most relevant first.

    Also that of deletion, the least relevant first.
    """

    name, better, paper = "insertion", "higher", "Petsiuk et al. 2018 (RISE)"

    def removed(self, case: Case) -> Bool[np.ndarray, "variant pos"]:
        """See the base class."""
        return case.first_alone(case.steps[:-1])

    def value(self, case: Case, logits: Logits) -> float:
        """See the base class."""
        return _under(case, [*logits, case.subject.intact])


@dataclass(frozen=True)
class Between(OfOutputs):
    """Area between the curves of deletion, least and most relevant first: `insertion` minus `deletion`.

    What a replacer does by itself, as an input that is none any more, is in both and cancels. 0 is what a ranking by
    chance gets on average.
    """

    name, better, paper = "between", "higher", "Blücher et al. 2024 (symmetric relevance gain)"

    def removed(self, case: Case) -> Bool[np.ndarray, "variant pos"]:
        """See the base class."""
        return np.concatenate([Deletion().removed(case), Insertion().removed(case)])

    def value(self, case: Case, logits: Logits) -> float:
        """See the base class."""
        deleted, inserted = np.split(logits, 2)
        return Insertion().value(case, inserted) - Deletion().value(case, deleted)


def _lost(case: Case, logits: Logits) -> float:
    """What of the class's probability is lost, averaged over variants."""
    target = case.subject.target
    return float(probability(case.subject.intact, target) - probability(logits, target).mean())


def _under(case: Case, logits: list[Any]) -> float:
    """Area under the class's probability, at each of the case's steps, over the share of positions."""
    x = np.array(case.steps, dtype=np.float64)
    return area(x / len(case.ranks), probability(np.array(logits), case.subject.target))
