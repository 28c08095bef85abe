"""Contributions add up, to the tolerance, on every layout; what misses it is said."""

import pytest
import torch
from at_blocks import values_at
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import KINDS, tiny_bridge

import lig_lens
from lig_lens.errors import ConvergenceWarning
from lig_lens.integrate.autograd import FromResid
from lig_lens.paths.path import ResidPath
from lig_lens.targets.l2 import L2

prompts = st.lists(st.integers(5, 39), min_size=1, max_size=7)


def column_sums(flow: lig_lens.Flow, name: str) -> torch.Tensor:
    if name == "mlp":
        return flow.mlp.sum(1) + flow.skip + flow.bias
    return getattr(flow, name).sum(-2)


def check_complete(flow: lig_lens.Flow, tol: float) -> None:
    for name in flow.maps:
        missing = (column_sums(flow, name) - flow.total[name]).abs()
        # 8 eps of vectors that are no longer than 10 here: what a total may miss by rounding alone.
        assert (missing <= tol * flow.total[name].abs() + 1e-5).all(), name
        assert bool(flow.converged[name].all()) and (flow.gap[name] <= tol).all()


@pytest.mark.parametrize("kind", KINDS)
@given(prompts, st.sampled_from(["itb", "zero"]), st.sampled_from([1e-2, 1e-3]))
def test_complete_within_tol(kind: str, ids: list[int], baseline: str, tol: float) -> None:
    tail = "zero" if baseline == "zero" else "att_itb_a0"
    flow = lig_lens.attribute(
        tiny_bridge(kind),
        ids,
        attn_baseline=baseline,
        block_baseline=baseline,
        mlp_baseline=tail,
        tol=tol,
        progress=False,
    )
    check_complete(flow, tol)


@settings(max_examples=1)
@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.integers(5, 39), min_size=4, max_size=4), st.integers(0, 2**16))
def test_complete_along_any_start(kind: str, ids: list[int], seed: int) -> None:
    model = tiny_bridge(kind)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(2, 4, model.cfg.d_model, generator=generator)
    heads = torch.randn(4, model.cfg.n_heads, model.cfg.d_head, generator=generator)
    flow = lig_lens.attribute(model, ids, attn_baseline=start, block_baseline=start, mlp_baseline=heads, progress=False)
    check_complete(flow, 1e-3)


@pytest.mark.parametrize("kind", ["bert", "gemma2"])
@given(st.integers(0, 2**16))
def test_totals_of_a_direction_are_signed_movements(kind: str, seed: int) -> None:
    model = tiny_bridge(kind)
    w = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(seed))
    ids = [5, 12, 30, 7]
    plus, minus = (
        lig_lens.attribute(model, ids, maps="block", layers=1, target=lig_lens.direction(v), progress=False)
        for v in (w, -w)
    )
    torch.testing.assert_close(plus.total["block"], -minus.total["block"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plus.block, -minus.block, atol=1e-4, rtol=1e-3)


def test_l2_total_is_the_distance_between_two_runs(ids: torch.Tensor, corrupted_ids: torch.Tensor) -> None:
    model = tiny_bridge("llama")
    flow = lig_lens.attribute(
        model, ids, maps="block", layers=1, block_baseline="corrupted", corrupted=corrupted_ids, progress=False
    )
    posts = []
    for prompt in (ids, corrupted_ids):
        _, cache = model.run_with_cache(prompt[None])
        posts.append(cache["blocks.1.hook_out"][0])
    torch.testing.assert_close(flow.total["block"][0], (posts[0] - posts[1]).norm(dim=-1), rtol=1e-4, atol=1e-5)


def test_what_misses_is_counted_in_one_warning(ids: torch.Tensor) -> None:
    model = tiny_bridge("llama")
    with pytest.warns(ConvergenceWarning) as caught:
        flow = lig_lens.attribute(model, ids, attn_baseline="zero", block_baseline="zero", max_nodes=8, progress=False)
    missed = sum(int((~flow.converged[name]).sum()) for name in flow.maps)
    cells = sum(flow.converged[name].numel() for name in flow.maps)
    assert missed > 0 and len([w for w in caught if w.category is ConvergenceWarning]) == 1
    text = str(caught[0].message)
    assert text.startswith(f"{missed} of {cells} cells missed tol=0.001 within max_nodes=8")
    assert "raise max_nodes or tol" in text


def test_rounding_allowance_is_a_millionth_of_the_vectors(ids: torch.Tensor) -> None:
    # What is not refined must stay out of sight: 8 eps of float32, relative to the longer end of the path.
    model = tiny_bridge("llama")
    values = values_at(model, ids, [1])[1]
    dst = torch.arange(len(ids))
    with torch.no_grad():
        integrand = FromResid(values, ResidPath(values.resid_pre, None), L2(), dst, False, 64)
    length = torch.maximum(integrand.start.norm(dim=-1), values.resid_post.norm(dim=-1)[:, None])
    torch.testing.assert_close(integrand.noise(values.resid_post[:, None]), 8 * torch.finfo(torch.float32).eps * length)


def test_zero_ratio_reports_the_gap_of_the_share_it_took(ids: torch.Tensor) -> None:
    model = tiny_bridge("gpt2")
    options = {"maps": "attn", "layers": 1, "max_nodes": 8, "progress": False}
    with pytest.warns(ConvergenceWarning):
        zero = lig_lens.attribute(model, ids, attn_baseline="zero", tol=1e-3 / 4, **options)
        ratio = lig_lens.attribute(model, ids, attn_baseline="itb_zero_ratio", tol=1e-3, **options)
    # Stored in float32, the numbers from zero round by themselves.
    assert (ratio.gap["attn"] >= zero.gap["attn"] * (1 - 1e-5) - 1e-7).all()
    assert not bool(ratio.converged["attn"][zero.gap["attn"] > 1e-3].any())


def test_the_warning_points_at_the_caller(ids: torch.Tensor) -> None:
    with pytest.warns(ConvergenceWarning) as caught:
        lig_lens.attribute(tiny_bridge("gpt2"), ids, block_baseline="zero", max_nodes=8, progress=False)
    assert caught[0].filename == __file__


def test_single_contributions_are_right_where_their_errors_cancel(ids: torch.Tensor) -> None:
    # With per-head norms of queries and keys, sums converge long before their parts do.
    model = tiny_bridge("gemma3")
    coarse, fine = (
        lig_lens.attribute(model, ids, maps="attn", layers=1, attn_baseline="zero", tol=tol, progress=False)
        for tol in (1e-3, 1e-5)
    )
    assert (coarse.attn - fine.attn).abs().max() <= 1e-3 * fine.attn.abs().max()
