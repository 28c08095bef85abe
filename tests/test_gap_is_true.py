"""The gap is what the returned numbers miss, whatever was asked for."""

import math
import warnings

import pytest
import torch
from tiny_models import tiny_bridge

import lig_lens
from lig_lens.integrate.quadrature import integrate

IDS, OTHER = [5, 12, 30, 7, 22, 9], [8, 12, 11, 7, 22, 9]


def missed(flow, name):
    """How far the returned numbers are from their total, relative to it, and where it is large enough to tell."""
    terms, total = flow.columns(name).double(), flow.total[name].double()
    summed = terms.sum(-2) if flow.metric is None else terms.flatten(1).sum(1) + flow.skip.double().sum(1)
    large = total.abs() > 0.05 * total.abs().max()
    return ((summed - total).abs() / total.abs())[large], flow.gap[name].double()[large]


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-5, 1e-8, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore::lig_lens.ConvergenceWarning")
def test_it_is_what_is_missed(tol: float, dtype: torch.dtype) -> None:
    model = tiny_bridge("llama", dtype)
    for asked in (
        {},
        {"maps": ("attn", "block"), "attn_baseline": "itb_zero_ratio", "block_baseline": "itb_zero_ratio"},
        {"corrupted": OTHER, "target": lig_lens.logit_difference(3, 4)},
    ):
        flow = lig_lens.attribute(model, IDS, tol=tol, max_nodes=128, progress=False, **asked)
        for name in flow.maps:
            found, said = missed(flow, name)
            assert len(found) and bool((said >= found * (1 - 1e-5)).all()), (asked, name, tol)
            assert not bool((flow.converged[name] & (flow.gap[name] > tol * (1 + 1e-6))).any())


def test_what_cannot_be_reached_is_said() -> None:
    model = lig_lens.load_model("induction")
    gaps = []
    for tol in (1e-8, 1e-30):
        with pytest.warns(lig_lens.ConvergenceWarning, match="limited by rounding, which no max_nodes cures"):
            flow = lig_lens.attribute(model, "lamp lake mouse lamp", maps="attn", tol=tol, progress=False)
        assert not bool(flow.converged["attn"].all())
        gaps.append(float(flow.gap["attn"].max()))
    # Float32: it does not depend on what was asked for.
    assert all(1e-9 < gap < 1e-4 for gap in gaps)


def test_the_default_tolerance_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", lig_lens.ConvergenceWarning)
        lig_lens.attribute(lig_lens.load_model("induction"), "lamp lake mouse lamp", progress=False)


class _HiddenLayer:
    """Two parts that add up to 1 all along: one moves by AREA within WIDTH of the start, the other the other way."""

    AREA, WIDTH = 0.05, 1e-6
    n_dst, n_groups, n_parts = 1, 1, 2
    chunk = 64
    dtype, device = torch.float64, torch.device("cpu")

    def scalars(self, dst: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return a[:, None].clone()

    def switches(self) -> bool:
        return False

    def margins(self, dst: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nothing switches")

    def sums(self, dst: torch.Tensor, a: torch.Tensor, factors: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        bump = self.AREA * self.WIDTH * 2 / torch.pi / (a**2 + self.WIDTH**2)
        parts = torch.stack([0.5 + bump, 0.5 - bump], -1)
        return torch.einsum("pnk,pnc->cpk", parts, factors)[:, :, None]


@pytest.mark.parametrize("tol", [1e-3, 1e-5])
def test_a_layer_that_sums_hide_is_found(tol: float) -> None:
    """A norm that no hook shows, behind one whose layer is 1e-3 wide; the sum of both parts never tells of it."""
    width = torch.tensor([1e-3])
    result = integrate(_HiddenLayer(), width, torch.ones(1), torch.full((1, 1), 1e-12), tol=tol, max_nodes=2048)
    exact = _HiddenLayer.AREA * 2 / math.pi * math.atan(1 / _HiddenLayer.WIDTH)
    assert result.converged.all() and float(result.gap) <= tol
    torch.testing.assert_close(
        result.parts[0, 0], torch.tensor([0.5 + exact, 0.5 - exact], dtype=torch.float64), rtol=tol, atol=0
    )
