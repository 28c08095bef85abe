"""The integration rule by itself: nodes, the stretched variable, refinement, budget."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lig_lens.integrate import quadrature
from lig_lens.integrate.quadrature import density, integrate, stretch, unstretch
from lig_lens.integrate.rules import NODES_PER_PANEL

widths = st.floats(-12, 0).map(lambda exponent: 10.0**exponent)


class Analytic:
    """Scalars with known derivatives, one function per group: parts are two uneven halves of dL/da."""

    n_parts = 2
    chunk, switching = 64, False
    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, functions, derivatives, n_dst: int = 1) -> None:
        self.functions, self.derivatives = functions, derivatives
        self.n_dst, self.n_groups = n_dst, len(functions)
        self.evaluated = torch.zeros(n_dst, self.n_groups)

    def scalars(self, dst: Tensor, a: Tensor) -> Tensor:
        return torch.stack([f(a.double()) - f(torch.zeros_like(a.double())) for f in self.functions], -1)

    def parts(self, dst: Tensor, a: Tensor, groups: Tensor) -> Tensor:
        self.evaluated.index_put_((dst,), groups.float(), accumulate=True)
        slope = torch.stack([f(a.double()) for f in self.derivatives], -1) * groups
        return torch.stack([0.25 * slope, 0.75 * slope], -1)

    def switches(self) -> bool:
        return self.switching

    def margins(self, dst: Tensor, a: Tensor) -> Tensor:
        raise AssertionError("nothing switches")

    def sums(self, dst: Tensor, a: Tensor, factors: Tensor, groups: Tensor) -> Tensor:
        n = a.shape[1]
        values = self.parts(dst.repeat_interleave(n), a.flatten(), groups.repeat_interleave(n, 0))
        return torch.einsum("pnc,pngi->cpgi", factors, values.unflatten(0, a.shape))


def run(integrand: Analytic, s0: float = 1.0, s1: float = 1.0, **options):
    settings = {"tol": 1e-6, "max_nodes": 4096} | options
    n = integrand.n_dst
    wide = {"s0": torch.full((n,), s0), "s1": torch.full((n,), s1)}
    noise = torch.zeros(n, integrand.n_groups, dtype=torch.float64)
    return integrate(integrand, wide["s0"], wide["s1"], noise, **settings)


def boundary_layer(s: float):
    """`a / sqrt(a^2 + s^2)`: what a norm does along a straight path from 0."""
    return (lambda a: a / torch.sqrt(a**2 + s**2)), (lambda a: s**2 / (a**2 + s**2) ** 1.5)


@settings(max_examples=50)
@given(st.floats(0, 1), widths, widths)
def test_unstretch_inverts_stretch(a: float, s0: float, s1: float) -> None:
    point, low, high = (torch.tensor([v], dtype=torch.float64) for v in (a, s0, s1))
    t = stretch(point, low, high)
    # Compared in t: near a = 1 many t share one float64.
    torch.testing.assert_close(stretch(unstretch(t, low, high), low, high), t, atol=1e-3, rtol=1e-6)


@settings(max_examples=50)
@given(st.floats(0.001, 0.999), st.floats(-6, 0), st.floats(-6, 0))
def test_density_is_the_derivative(a: float, low: float, high: float) -> None:
    s0, s1 = (torch.tensor([10.0**v], dtype=torch.float64) for v in (low, high))
    point = torch.tensor([a], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(stretch(point, s0, s1), point)
    torch.testing.assert_close(density(point.detach(), s0, s1), 1 / slope)


def test_nodes_are_gauss_legendre_in_t() -> None:
    # With wide layers and one panel, the nodes must be the hand-made ones mapped through t.
    seen: list[Tensor] = []
    integrand = Analytic([lambda a: a], [torch.ones_like])
    original = integrand.parts
    integrand.parts = lambda dst, a, groups: (seen.append(a.clone()), original(dst, a, groups))[1]
    run(integrand, tol=0.5)
    end = math.asinh(1.0)
    t = np.polynomial.legendre.leggauss(NODES_PER_PANEL)[0] * end
    by_hand = [np.interp(v, np.arcsinh(g := np.linspace(0, 1, 200001)) - np.arcsinh(1 - g), g) for v in t]
    np.testing.assert_allclose(torch.cat(seen).sort().values.numpy(), by_hand, atol=1e-6)
    assert seen[0].min() > 0 and seen[0].max() < 1  # the end points, where norms have no gradient, are left out


@pytest.mark.parametrize("s", [1.0, 1e-2, 1e-5, 1e-9])
def test_boundary_layer_is_resolved_with_few_nodes(s: float) -> None:
    function, slope = boundary_layer(s)
    result = run(Analytic([function], [slope]), s0=s)
    assert bool(result.converged.all())
    assert abs(float(result.parts.sum()) - float(result.total)) <= 1e-6 * float(result.total)
    assert int(result.nodes) <= 160
    torch.testing.assert_close(result.parts[0, 0, 0] * 3, result.parts[0, 0, 1])


def test_layer_that_nobody_announced_is_found_by_halving() -> None:
    function, slope = boundary_layer(1e-7)
    result = run(Analytic([function], [slope]), s0=1.0, tol=1e-4)
    assert bool(result.converged.all())
    assert abs(float(result.parts.sum()) - float(result.total)) <= 1e-4 * float(result.total)


def test_layer_at_the_other_end() -> None:
    function, slope = boundary_layer(1e-6)
    result = run(Analytic([lambda a: -function(1 - a)], [lambda a: slope(1 - a)]), s1=1e-6, tol=1e-5)
    assert bool(result.converged.all()) and int(result.nodes) <= 160


def test_only_cells_that_miss_are_refined() -> None:
    function, slope = boundary_layer(1e-4)
    easy = (lambda a: a**2), (lambda a: 2 * a)
    integrand = Analytic([easy[0], function], [easy[1], slope], n_dst=3)
    result = run(integrand)
    assert bool(result.converged.all())
    assert (result.nodes[:, 0] == NODES_PER_PANEL).all() and (result.nodes[:, 1] > NODES_PER_PANEL).all()
    torch.testing.assert_close(integrand.evaluated, result.nodes.float())


def test_gap_bounds_the_plain_gap_and_is_reported_where_the_budget_ends() -> None:
    function, slope = boundary_layer(1e-6)
    result = run(Analytic([function], [slope]), s0=1.0, max_nodes=3 * NODES_PER_PANEL)
    plain = float((result.parts.sum(-1) - result.total).abs() / result.total.abs())
    assert not bool(result.converged.any()) and float(result.gap) > 1e-6
    assert float(result.gap) >= plain * (1 - 1e-9)
    assert int(result.nodes) <= 3 * NODES_PER_PANEL


def test_cell_without_change_needs_no_nodes_beyond_the_first_panel() -> None:
    flat = Analytic([torch.zeros_like], [torch.zeros_like])
    noise = torch.full((1, 1), 1e-7, dtype=torch.float64)
    one = torch.ones(1)
    result = integrate(flat, one, one, noise, tol=1e-3, max_nodes=1000)
    assert bool(result.converged.all()) and float(result.gap) == 0.0
    assert int(result.nodes) == NODES_PER_PANEL


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_flat_cells_are_free_and_spoil_no_others(noise: float) -> None:
    # A zero allowance must not become 0 / 0: cell 0 is flat, cell 1 has a layer.
    function, slope = boundary_layer(1e-3)
    both = Analytic([torch.zeros_like, function], [torch.zeros_like, slope], n_dst=2)
    one = torch.ones(2)
    result = integrate(both, one, one, torch.full((2, 2), noise), tol=1e-4, max_nodes=2000)
    assert (result.nodes[:, 0] == NODES_PER_PANEL).all() and bool(result.converged.all())
    assert not bool(result.gap.isnan().any()) and int(result.nodes[:, 1].max()) < 500


def test_parts_that_miss_while_their_sum_is_right_do_not_converge() -> None:
    class Cancelling(Analytic):
        def parts(self, dst: Tensor, a: Tensor, groups: Tensor) -> Tensor:
            values = super().parts(dst, a, groups)
            spike = 1e-4 / (a**2 + 1e-4)  # far too narrow for one panel
            return values + torch.stack([spike, -spike], -1)[:, None]

    smooth = Cancelling([lambda a: a], [torch.ones_like])
    coarse, fine = (run(smooth, tol=1e-4, max_nodes=n) for n in (NODES_PER_PANEL, 4096))
    assert float(coarse.gap) <= 1e-4 < float(coarse.error) and not bool(coarse.converged)
    exact = 0.25 + 1e-2 * math.atan(1e2)
    assert bool(fine.converged) and abs(float(fine.parts[0, 0, 0]) - exact) <= 1e-4 * exact


def test_budget_is_kept_beyond_the_first_panels() -> None:
    function, slope = boundary_layer(1e-9)
    for max_nodes in (8, 40, 100, 300):
        result = run(Analytic([function], [slope]), s0=1e-2, tol=1e-9, max_nodes=max_nodes)
        first = run(Analytic([function], [slope]), s0=1e-2, tol=0.9, max_nodes=1)
        assert int(result.nodes) <= max(max_nodes, int(first.nodes))


def test_panels_that_miss_are_the_ones_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    # A kink at 0.3 concerns one panel of each generation: nodes must grow with log(1 / tol), not with 1 / tol.
    kink = Analytic([lambda a: (a - 0.3).abs()], [lambda a: torch.sign(a - 0.3)])
    monkeypatch.setattr(quadrature, "PANEL_LENGTH", 0.5)
    coarse, fine = run(kink, tol=1e-3).nodes, run(kink, tol=1e-6).nodes
    assert int(fine) - int(coarse) <= 14 * 2 * NODES_PER_PANEL


class Switching(Analytic):
    """One cell that says where it switches."""

    switching = True

    def __init__(self, function, derivative, places: Tensor) -> None:
        super().__init__([function], [derivative])
        self.places = places

    def margins(self, dst: Tensor, a: Tensor) -> Tensor:
        assert len(a) <= self.chunk
        return torch.sinh(a.double()[:, None] - self.places)


@pytest.mark.parametrize(
    "places", [[0.5**0.5], [1 / math.pi, 1 / math.e, 0.9], list(0.5 + 0.49 * np.sin(np.arange(99)))]
)
def test_panels_are_cut_where_the_model_switches(places: list[float]) -> None:
    at = torch.tensor(places, dtype=torch.float64)
    size = 1 + torch.arange(len(at)) % 3
    kinks = Switching(
        lambda a: a**2 + (size * (a[:, None] - at).relu()).sum(-1),
        lambda a: 2 * a + (size * (a[:, None] > at)).sum(-1),
        at,
    )
    result = run(kinks, tol=1e-8)
    assert bool(result.converged.all()) and float(result.jumped) == 0
    assert int(result.nodes) <= 30 * (1 + len(at))  # bisection takes 14 nodes per place and bit
    exact = 1 + float((size * (1 - at)).sum())
    assert abs(float(result.parts.sum()) - exact) <= 1e-8 * exact


def test_jumps_of_the_scalar_are_its_gap() -> None:
    at = torch.tensor([0.5**0.5, 1 / math.pi], dtype=torch.float64)
    jumps = torch.tensor([0.3, -0.1], dtype=torch.float64)
    result = run(Switching(lambda a: a**3 + ((a[:, None] > at) * jumps).sum(-1), lambda a: 3 * a**2, at), tol=1e-5)
    assert not bool(result.converged.any()) and int(result.nodes) <= 50
    torch.testing.assert_close(float(result.parts.sum()), 1.0, atol=1e-5, rtol=0)
    for found in (result.gap, result.jumped):
        torch.testing.assert_close(float(found), 0.4 / 1.2, atol=2e-5, rtol=0)
    assert float(result.error) <= 1e-5
