"""Quadrature rules by themselves: what they integrate exactly, and whether they know their own error."""

import math

import numpy as np
import pytest
import torch
from test_quadrature import Analytic, boundary_layer, run
from torch import Tensor

import lig_lens
from lig_lens.integrate.rules import ADDED, NODES_PER_PANEL, SHORT, Asked, long_rule
from lig_lens.relevance.explained import Explained


def step(middle: float, width: float):
    """A smooth step and its slope."""
    return (lambda a: torch.tanh((a - middle) / width)), (lambda a: torch.cosh((a - middle) / width) ** -2 / width)


@pytest.mark.parametrize("n", [8, 9, 15, 30, 64])
def test_long_rules_have_positive_weights_and_integrate_constants(n: int) -> None:
    rule = long_rule(n)
    nodes, weights = rule.nodes.numpy(), rule.factors[:, 0].numpy()
    assert len(rule) == n and nodes.min() > 0 and nodes.max() < 1 and (np.diff(np.sort(nodes)) > 0).all()
    assert weights.min() > 0 and math.isclose(weights.sum(), 1, rel_tol=1e-12)
    # Symmetric: odd functions about the middle vanish.
    assert abs((weights * (nodes - 0.5)).sum()) < 1e-14


def test_nodes_are_moved_towards_the_middle() -> None:
    gauss = 0.5 * (np.polynomial.legendre.leggauss(20)[0] + 1)
    moved = np.sort(long_rule(20).nodes.numpy())
    # Away from the ends, and further apart there.
    assert (moved[:5] > gauss[:5]).all() and moved[1] - moved[0] > 1.2 * (gauss[1] - gauss[0])


def test_a_step_in_the_middle_needs_fewer_nodes_than_with_gauss() -> None:
    function, slope = step(0.45, 0.07)
    exact = float(function(torch.tensor(1.0).double()) - function(torch.tensor(0.0).double()))

    def missed(nodes: np.ndarray, weights: np.ndarray) -> float:
        return abs(float((torch.as_tensor(weights) * slope(torch.as_tensor(nodes))).sum()) - exact) / exact

    gauss, moved = [], []
    for n in range(8, 40):
        x, w = np.polynomial.legendre.leggauss(n)
        gauss.append(missed(0.5 * (x + 1), 0.5 * w))
        moved.append(missed(long_rule(n).nodes.numpy(), long_rule(n).factors[:, 0].numpy()))
    first = [next(n for n, error in enumerate(errors, 8) if error < 1e-3) for errors in (gauss, moved)]
    assert first[1] <= 0.85 * first[0]


@pytest.mark.parametrize("guess", [1, 8, 12, 25, 40, 10**6])
def test_a_wrong_guess_costs_nodes_and_no_accuracy(guess: int) -> None:
    function, slope = step(0.6, 0.08)
    result = run(Analytic([function], [slope]), tol=1e-5, first_nodes=guess)
    assert bool(result.converged.all())
    exact = float(function(torch.tensor(1.0).double()) - function(torch.tensor(0.0).double()))
    np.testing.assert_allclose(result.parts[0, 0], [0.25 * exact, 0.75 * exact], rtol=1e-5)


def test_a_right_guess_saves_nodes_and_is_found_from_an_easier_path() -> None:
    (easy, slope_easy), (hard, slope_hard) = step(0.5, 0.15), step(0.5, 0.12)
    before = run(Analytic([easy], [slope_easy]), tol=1e-3, first_nodes=12)
    guess = math.ceil(1.5 * float(before.needed)) + 2
    plain, guessed = (run(Analytic([hard], [slope_hard]), tol=1e-3, first_nodes=one) for one in (None, guess))
    assert NODES_PER_PANEL < guess == int(guessed.nodes) < int(plain.nodes)


def test_what_is_needed_does_not_depend_much_on_the_guess() -> None:
    function, slope = step(0.5, 0.12)
    needed = [float(run(Analytic([function], [slope]), tol=1e-4, first_nodes=n).needed) for n in (20, 24, 28, 32)]
    assert max(needed) <= 1.5 * min(needed)


def test_a_guess_does_not_overdraw_the_budget() -> None:
    function, slope = step(0.5, 0.02)
    for most in (NODES_PER_PANEL, 20, 50):
        result = run(Analytic([function], [slope]), tol=1e-9, first_nodes=40, max_nodes=most)
        assert int(result.nodes) <= most and not bool(result.converged.any())


def test_parts_that_cancel_in_the_sum_are_not_taken_for_right() -> None:
    class Cancelling(Analytic):
        def parts(self, dst: Tensor, a: Tensor, groups: Tensor) -> Tensor:
            values = super().parts(dst, a, groups)
            bump = step(0.5, 0.07)[1](a)
            return values + torch.stack([bump, -bump], -1)[:, None]

    smooth, rule = Cancelling([lambda a: a], [torch.ones_like]), long_rule(14)
    exact, one = 0.25 + 2 * math.tanh(0.5 / 0.07), torch.ones(1, 1, dtype=torch.bool)
    # In float32 squares of what is small vanish.
    for unit, dtype in ((1.0, torch.float64), (1e-24, torch.float32)):
        values = smooth.parts(torch.zeros(14, dtype=torch.long), rule.nodes, one.expand(14, 1))
        sums = torch.einsum("nc,ngi->cgi", rule.factors, values)[:, None] * unit
        coarse = rule.judged(sums.to(dtype), Asked(one * unit, one * 1e-40, one, rough=False))
        missed = abs(float(coarse.integral[0, 0, 0]) - exact * unit)
        # The gap sees nothing; the estimate is of the right size.
        assert float(coarse.gap) < 1e-4 * unit < missed <= 3 * float(coarse.error)
    fine = run(smooth, tol=1e-4, first_nodes=14)
    assert bool(fine.converged) and abs(float(fine.parts[0, 0, 0]) - exact) <= 1e-4 * exact


def test_several_panels_and_small_budgets_start_as_without_a_guess() -> None:
    function, slope = boundary_layer(1e-6)
    spent = [int(run(Analytic([function], [slope]), s0=1e-6, first_nodes=guess).nodes) for guess in (None, 40)]
    assert spent[0] == spent[1]
    function, slope = step(0.5, 0.004)
    guessed = run(Analytic([function], [slope]), tol=1e-3, max_nodes=200, first_nodes=64)
    assert bool(guessed.converged.all()) and int(guessed.nodes) <= 200


def test_errors_of_long_rules_are_seldom_taken_for_smaller_than_they_are() -> None:
    # Sums of steps, bells and Lorentz's curves, of any width and anywhere, that parts have different shares of.
    rng = np.random.default_rng(0)
    x, w = np.polynomial.legendre.leggauss(600)
    shapes = (lambda u: np.cosh(np.clip(u, -300, 300)) ** -2, lambda u: np.exp(-(u**2)), lambda u: 1 / (1 + u**2))
    found = []
    for _ in range(200):
        n_parts, n_terms = rng.integers(2, 12), rng.integers(1, 4)
        middle, width = rng.uniform(-0.1, 1.1, n_terms), 10 ** rng.uniform(-1.3, 0.3, n_terms)
        kind, share = rng.integers(0, 3, n_terms), rng.normal(size=(n_parts, n_terms))

        def values(a, middle=middle, width=width, kind=kind, share=share):
            terms = [shapes[k]((a - m) / s) for k, m, s in zip(kind, middle, width, strict=True)]
            return np.stack(terms, -1) @ share.T

        exact = (w / 2) @ values((x + 1) / 2)
        for n in range(8, 50, 3):
            rule = long_rule(n)
            sums = torch.as_tensor(rule.factors.numpy().T @ values(rule.nodes.numpy()))[:, None, None]
            change, open_ = torch.tensor([[exact.sum()]]), torch.ones(1, 1, dtype=torch.bool)
            said = rule.judged(sums, Asked(change, torch.full((1, 1), 1e-9), open_, rough=False))
            true = np.abs(said.integral[0, 0].numpy() - exact).max()
            if 2e-5 < true / np.abs(exact).max() < 2e-2:
                found.append(max(float(said.error), float(said.gap)) / true)
    assert len(found) > 100
    assert np.quantile(found, 0.05) > 0.7 and 1 < np.median(found) < 10


def test_where_the_model_switches_short_rules_are_used() -> None:
    class Kinked(Analytic):
        def switches(self) -> bool:
            return True

        def margins(self, dst: Tensor, a: Tensor) -> Tensor:
            return (a - 0.3)[:, None]

    kinked = Kinked([lambda a: (a - 0.3).clamp(min=0)], [lambda a: (a > 0.3).double()])
    assert bool(run(kinked, first_nodes=30).converged.all())
    assert float(kinked.evaluated) % NODES_PER_PANEL in (0, len(ADDED) % NODES_PER_PANEL) and len(SHORT) == 7


def test_boundaries_of_a_model_tell_each_other_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = lig_lens.load_model("sentiment"), "A dull film that wastes a good cast."
    asked = Explained.token_relevance
    nodes: list[int] = []

    def seen(self, boundary):
        integral = asked(self, boundary)
        nodes.append(int(integral.nodes))
        return integral

    def alone(self, boundary):
        self.down.needed.clear()
        return seen(self, boundary)

    found = []
    for way in (seen, alone):
        monkeypatch.setattr(Explained, "token_relevance", way)
        found.append((lig_lens.explain_class(model, text, method="ig_layers", progress=False), sum(nodes)))
        nodes.clear()
    (told, fewer), (untold, more) = found
    assert told.worst_gap() <= 1e-3 and fewer < 0.75 * more
    torch.testing.assert_close(told.token, untold.token, rtol=0, atol=2e-3 * float(untold.token.abs().max()))
