"""Measures of faithfulness, against hand-made toys that share no code with them."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lig_lens import settings
from lig_lens.errors import InputError
from lig_lens.inputs.token_ids import TokenIds
from lig_lens.models.packaged import PACKAGED
from lig_lens.relevance.faithfulness import MEASURES
from lig_lens.relevance.faithfulness.case import Case, Subject
from lig_lens.relevance.faithfulness.curves import Between, Deletion, Insertion
from lig_lens.relevance.faithfulness.games import LeaveOneOut, Shapley, shapley_weights
from lig_lens.relevance.faithfulness.lexicon import LexiconRank, LexiconSign, words_of
from lig_lens.relevance.faithfulness.measure import OfOutputs
from lig_lens.relevance.faithfulness.numbers import intervals, pearson, spearman

FRACTIONS = (0.25, 0.5, 0.75)
Game = Callable[[frozenset[int]], float]
"""The logit of class 1, from the free positions that are there; class 0 has 0."""


def subject_of(n: int, worth: Game, number: int = 0, **more: Any) -> Subject:
    """An input of n free positions between two special ones."""
    ids = TokenIds(torch.arange(n + 2)[None], tuple("abcdefghijkl"[: n + 2]), (True, *[False] * n, True))
    intact = np.array([0.0, worth(frozenset(range(n)))])
    return Subject(number, None, ids, intact, np.arange(n), **more)


def value(measure: OfOutputs, worth: Game, scores: Any, fractions: tuple[float, ...] = FRACTIONS) -> float:
    n = len(scores)
    subject = subject_of(n, worth)
    case = Case(subject, np.array([0.0, *scores, 0.0]), fractions)
    removed = measure.removed(case)
    assert not removed[:, [0, -1]].any()
    there = [frozenset(np.flatnonzero(~row[1:-1]).tolist()) for row in removed]
    return measure.value(case, np.array([[0.0, worth(one)] for one in there]))


def linear(weights: Any) -> Game:
    return lambda there: 0.7 + sum(weights[i] for i in there)


def curved(there: frozenset[int]) -> float:
    """A game in which positions matter together."""
    return 1.5 + math.sin(1 + sum((i + 1) ** 2 for i in there)) + 0.4 * len(there)


def p(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


SCORES = (0.3, -0.2, 2.0, 0.9)  # the most relevant first: 2, 3, 0, 1
BY_HAND = {
    "comprehensiveness": lambda f: p(f("0123")) - (p(f("013")) + p(f("01")) + p(f("1"))) / 3,
    "sufficiency": lambda f: p(f("0123")) - (p(f("2")) + p(f("23")) + p(f("023"))) / 3,
    "aopc": lambda f: (0 + f("0123") - f("013") + f("0123") - f("01") + f("0123") - f("1")) / 4,
    "log_odds": lambda f: (f("013") + f("01") + f("1")) / 3 - f("0123"),  # of two classes: the difference of logits
    "deletion": lambda f: (p(f("0123")) / 2 + p(f("013")) + p(f("01")) + p(f("1")) + p(f("")) / 2) / 4,
    "insertion": lambda f: (p(f("")) / 2 + p(f("2")) + p(f("23")) + p(f("023")) + p(f("0123")) / 2) / 4,
    "between": lambda f: (p(f("2")) + p(f("23")) + p(f("023")) - p(f("013")) - p(f("01")) - p(f("1"))) / 4,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_curves_by_hand(name: str):
    by_hand = BY_HAND[name](lambda there: curved(frozenset(map(int, there))))
    assert value(MEASURES[name], curved, SCORES) == pytest.approx(by_hand, abs=1e-12)


def test_fractions_that_round_to_the_same_positions_count_once_under_a_curve():
    # 0.3 and 0.4 of three positions are one, 0.6 two.
    f = linear([1.0, 2.0, 3.0])
    y = [p(f(frozenset(there))) for there in ([0, 1, 2], [0, 1], [0], [])]
    by_hand = ((y[0] + y[1]) / 2 + (y[1] + y[2]) / 2 + (y[2] + y[3]) / 2) / 3
    assert value(Deletion(), f, (1.0, 2.0, 3.0), (0.3, 0.4, 0.6)) == pytest.approx(by_hand, abs=1e-12)


def test_what_a_model_really_does_is_the_best_ranking():
    weights = (1.1, -0.4, 2.3, 0.2)
    areas = {order: value(Deletion(), linear(weights), order) for order in itertools.permutations(range(4))}
    best = value(Deletion(), linear(weights), weights)
    assert best == pytest.approx(min(areas.values()), abs=1e-12)
    assert value(Deletion(), linear(weights), [-w for w in weights]) == pytest.approx(max(areas.values()), abs=1e-12)
    middle = sum(areas.values()) / len(areas)
    assert best < middle - 0.01 and middle < max(areas.values()) - 0.01


@pytest.mark.parametrize("fractions", [FRACTIONS, settings.FRACTIONS, (0.1, 0.2, 0.3, 0.5, 0.75)])
@pytest.mark.parametrize("n", [3, 4, 5])
def test_chance_is_at_zero_between_the_curves(n: int, fractions: tuple[float, ...]):
    found = [value(Between(), curved, order, fractions) for order in itertools.permutations(range(n))]
    assert sum(found) / len(found) == pytest.approx(0, abs=1e-12) and max(found) > 0.01


@pytest.mark.parametrize("fractions", [FRACTIONS, settings.FRACTIONS, (0.1, 0.2, 0.3, 0.5, 0.75)])
@pytest.mark.parametrize("scores", [SCORES, (*SCORES, 0.1)])
def test_least_relevant_first_is_the_other_curve(scores: tuple[float, ...], fractions: tuple[float, ...]):
    back = [-one for one in scores]
    for one, other in ((Deletion(), Insertion()), (Insertion(), Deletion())):
        there = value(other, curved, scores, fractions)
        assert value(one, curved, back, fractions) == pytest.approx(there, abs=1e-12)


@pytest.mark.parametrize("measure", [LeaveOneOut, Shapley])
def test_of_a_linear_model_weights_are_exact(measure: Any):
    weights = (1.1, -0.4, 2.3, 0.2)
    for by in ("spearman", "pearson"):
        assert value(measure(by), linear(weights), weights) == pytest.approx(1, abs=1e-12)
        assert value(measure(by), linear(weights), [-w for w in weights]) == pytest.approx(-1, abs=1e-12)
    assert value(measure("pearson"), linear(weights), (1.0, 0.0, 0.0, 0.0)) == pytest.approx(
        np.corrcoef(weights, (1, 0, 0, 0))[0, 1]
    )


@pytest.mark.parametrize("n", [1, 3, 5])
def test_shapley_values_are_means_over_orders(n: int):
    naive = np.zeros(n)
    for order in itertools.permutations(range(n)):
        for at, member in enumerate(order):
            naive[member] += curved(frozenset(order[: at + 1])) - curved(frozenset(order[:at]))
    worths = [curved(frozenset(i for i in range(n) if number >> i & 1)) for number in range(2**n)]
    np.testing.assert_allclose(shapley_weights(n) @ worths, naive / math.factorial(n), atol=1e-12)


def test_shapley_of_a_game_that_is_not_linear():
    naive = np.zeros(4)
    for order in itertools.permutations(range(4)):
        for at, member in enumerate(order):
            naive[member] += curved(frozenset(order[: at + 1])) - curved(frozenset(order[:at]))
    assert value(Shapley("pearson"), curved, SCORES) == pytest.approx(np.corrcoef(naive, SCORES)[0, 1], abs=1e-12)


def test_shapley_takes_the_first_short_inputs():
    some = [subject_of(n, curved, number) for number, n in enumerate((9, 4, 2, 5, 3, 8))]
    assert [one.number for one in Shapley(positions=5, inputs=2).chosen(some)] == [1, 3]
    with pytest.raises(InputError, match="No input has 3 to 7 positions"):
        Shapley(positions=7).chosen(some[:1])


def test_correlations():
    scipy = pytest.importorskip("scipy.stats")
    a = np.array([0.3, 0.3, -1.0, 5.0, 2.0, 2.0, 2.0])
    b = np.array([1.0, 0.0, -2.0, 0.5, 0.5, 9.0, 0.1])
    assert spearman(a, b) == pytest.approx(scipy.spearmanr(a, b).statistic, abs=1e-12)
    assert pearson(a, b) == pytest.approx(scipy.pearsonr(a, b).statistic, abs=1e-12)
    assert math.isnan(spearman(a, np.ones(7))) and math.isnan(pearson(a[:2], b[:2]))


def test_intervals():
    values = np.random.default_rng(3).normal(2.0, 1.5, size=(2, 400))
    values[1, ::2] = np.nan
    mean, low, high = intervals(values, seed=0)
    for row in range(2):
        some = values[row][~np.isnan(values[row])]
        assert mean[row] == pytest.approx(some.mean())
        spread = 1.96 * some.std() / math.sqrt(len(some))
        np.testing.assert_allclose(
            [low[row], high[row]], [some.mean() - spread, some.mean() + spread], atol=0.15 * spread
        )
    again, other = intervals(values, seed=0), intervals(values, seed=1)
    assert all((one == two).all() for one, two in zip((mean, low, high), again, strict=True))
    assert (other[1] != low).any()
    nothing = intervals(np.full((1, 4), np.nan), seed=0)
    assert all(math.isnan(one[0]) for one in nothing)


def test_intervals_hold_the_mean():
    mean, low, high = intervals(np.array([[one] * 7 for one in (0.1, 0.7, 1 / 3, -0.123456789)]), seed=0)
    assert (low <= mean).all() and (mean <= high).all()


# Words


@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_words(name: str):
    tokenizer = transformers.AutoTokenizer.from_pretrained(PACKAGED[name]())
    ids = tokenizer("An unfathomably charming, (GOOD) film.")["input_ids"]
    special = tuple(one in tokenizer.all_special_ids for one in ids)
    inputs = TokenIds(torch.tensor([ids]), tuple(map(str, ids)), special)
    words = words_of(tokenizer, inputs)
    found = {word: tokenizer.decode([ids[at] for at in places]).strip() for word, places in words}
    assert [word for word, _ in words] == ["an", "unfathomably", "charming", "good", "film"]
    assert found["unfathomably"] == "unfathomably" and len(dict(words)["unfathomably"]) > 1


def test_lexicon():
    words = (("good", (1, 2)), ("awful", (3,)), ("plot", (4,)), ("fine", (5,)))
    lexicon = {"good": 2.0, "awful": -3.0, "fine": 0.5, "plot": 0.0}
    scores = np.array([9.0, 1.0, -0.2, -0.5, 3.0, -0.1, 9.0])
    happy = subject_of(5, lambda _: 1.0, words=words, valence=lexicon)
    sad = subject_of(5, lambda _: -1.0, words=words, valence=lexicon)
    assert happy.target == 1 and sad.target == 0
    assert LexiconSign().value(Case(happy, scores, FRACTIONS)) == pytest.approx(2 / 3)
    assert LexiconSign().value(Case(sad, scores, FRACTIONS)) == pytest.approx(1 / 3)
    assert LexiconSign(positive=0).value(Case(sad, scores, FRACTIONS)) == pytest.approx(2 / 3)
    assert LexiconRank().value(Case(happy, scores, FRACTIONS)) == pytest.approx(1)
    assert LexiconRank().value(Case(sad, scores, FRACTIONS)) == pytest.approx(-1)
    silent = subject_of(5, lambda _: 1.0, words=words[2:3], valence=lexicon)
    assert math.isnan(LexiconSign().value(Case(silent, scores, FRACTIONS)))
