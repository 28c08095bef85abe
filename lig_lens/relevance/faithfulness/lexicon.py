"""Measures against people's judgements: a lexicon that says which words are positive, which negative, and how much."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from lig_lens.errors import InputError, check_whole
from lig_lens.inputs.token_ids import TokenIds
from lig_lens.relevance.faithfulness.case import Case, Subject
from lig_lens.relevance.faithfulness.measure import NAN, OfScores
from lig_lens.relevance.faithfulness.numbers import spearman


@dataclass(frozen=True)
class _Lexicon(OfScores):
    """Agreement with a lexicon's valence, whose sign is turned where the class is not the positive one.

    A word's relevance is the sum of its pieces'.

    Attributes:
        positive: number of the class that positive words speak for.
    """

    positive: int = 1

    def __post_init__(self) -> None:
        check_whole(f"{self.name}: positive", self.positive)

    def chosen(self, subjects: Sequence[Subject]) -> Sequence[Subject]:
        """See the base class."""
        if all(one.valence is None for one in subjects):
            raise InputError(f"{self.name} needs a lexicon: give lexicon={{'good': 1.9, ...}}.")
        return subjects

    def found(self, case: Case) -> tuple[Float[np.ndarray, "word"], Float[np.ndarray, "word"]]:
        """Relevance and valence, towards the class, of the words that the lexicon has."""
        side = 1 if case.subject.target == self.positive else -1
        known = case.subject.valence or {}
        pairs = [
            (case.scores[list(at)].sum(), side * known[word]) for word, at in case.subject.words if known.get(word)
        ]
        relevance, valence = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
        return relevance, valence


@dataclass(frozen=True)
class LexiconSign(_Lexicon):
    """Share of the lexicon's words in an input whose relevance has their sign; 0.5 is what chance gets."""

    name, better, paper = "lexicon_sign", "higher", "Hutto and Gilbert 2014 (the lexicon)"

    def value(self, case: Case) -> float:
        """See the base class."""
        relevance, valence = self.found(case)
        return float((np.sign(relevance) == np.sign(valence)).mean()) if len(valence) else NAN


@dataclass(frozen=True)
class LexiconRank(_Lexicon):
    """Spearman's correlation of relevance and valence over the lexicon's words in an input, where it has three."""

    name, better, paper = "lexicon_rank", "higher", "Hutto and Gilbert 2014 (the lexicon)"

    def value(self, case: Case) -> float:
        """See the base class."""
        return spearman(*self.found(case))


def words_of(tokenizer: Any, inputs: TokenIds) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Words of a prompt in lower case without what encloses them, and the positions of their pieces.

    A word ends where the tokenizer, as it puts pieces together, writes a space.
    """
    places = [number for number, special in enumerate(inputs.special) if not special]
    ids = inputs.ids[0].tolist()
    words: list[list[int]] = []
    text = ""
    for number, place in enumerate(places):
        longer = str(tokenizer.decode([ids[one] for one in places[: number + 1]], clean_up_tokenization_spaces=False))
        if not words or longer[len(text) :][:1].isspace() or text[-1:].isspace():
            words.append([])
        words[-1].append(place)
        text = longer
    shown = [str(tokenizer.decode([ids[one] for one in word], clean_up_tokenization_spaces=False)) for word in words]
    cleaned = [one.strip().lower().strip(string.punctuation) for one in shown]
    return tuple((one, tuple(word)) for one, word in zip(cleaned, words, strict=True) if one)
