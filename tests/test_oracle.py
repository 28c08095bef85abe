"""`attribute` against a naive float64 oracle on every layout; before it, the oracle against what is known."""

import functools
import os
from collections.abc import Iterator

import oracle
import pytest
import torch
from tiny_models import KINDS, LAYOUTS, exact_hf, hf_residuals, tiny_bridge
from torch import Tensor

import lig_lens

IDS = torch.tensor([5, 12, 30, 7, 22, 39])
CORRUPTED_IDS = torch.tensor([8, 31, 12, 25, 6, 17])
BASELINES = {
    "attn": ("zero", "itb", "itb_zero_ratio", "itb_map_ratio", "corrupted", "tensor"),
    "mlp": ("zero", "att_itb_a0", "corrupted", "tensor"),
    "block": ("zero", "itb", "itb_zero_ratio", "corrupted", "tensor"),
}
TARGETS = ("l2", "direction")
MAX_ERROR = 1e-4
ERRORS: dict[tuple[str, str], float] = {}


@functools.cache
def block_of(kind: str, layer: int) -> oracle.Block:
    return oracle.block_of(exact_hf(kind), layer)


@functools.cache
def residuals(kind: str, corrupted: bool = False) -> Tensor:
    return hf_residuals(kind, CORRUPTED_IDS if corrupted else IDS)


def random_like(shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def direction_of(kind: str) -> Tensor:
    return random_like(residuals(kind)[0].shape, seed=1)


def tensor_baseline(kind: str, name: str) -> Tensor:
    """Start point of the shape of the node: resid_pre for attn and block, head outputs for mlp."""
    x = residuals(kind)[1]
    return random_like(block_of(kind, 1).z_of(x).shape if name == "mlp" else x.shape, seed=2)


@functools.cache
def expected(kind: str, layer: int, name: str, baseline: str, target: str) -> tuple[Tensor, ...]:
    compute = {"attn": oracle.attn_map, "mlp": oracle.mlp_map, "block": oracle.block_map}[name]
    result = compute(
        block_of(kind, layer),
        residuals(kind)[layer],
        baseline,
        "l2" if target == "l2" else direction_of(kind),
        residuals(kind, corrupted=True)[layer],
        tensor_baseline(kind, name),
    )
    return result if isinstance(result, tuple) else (result,)


def relative_error(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """Largest deviation, relative to the largest entry of the whole map."""
    largest = max(part.abs().max().item() for part in theirs)
    return max((a.double() - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) / largest


@pytest.fixture(scope="session", autouse=True)
def error_table() -> Iterator[None]:
    """Write the measured errors as a table to the file named by LIG_LENS_ORACLE_TABLE, if it is set."""
    path = os.environ.get("LIG_LENS_ORACLE_TABLE")
    if path and "PYTEST_XDIST_WORKER" in os.environ:
        pytest.fail("LIG_LENS_ORACLE_TABLE is made by one process, which sees all tests: leave out -n.")
    yield
    if not path:
        return
    rows, columns = (list(dict.fromkeys(key[i] for key in ERRORS)) for i in (0, 1))
    lines = ["| layout/kind | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = (f"{ERRORS[row, c]:.1e}" if (row, c) in ERRORS else "" for c in columns)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


# The oracle on trial.


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_reproduce_hugging_face(kind: str):
    states = residuals(kind)
    for layer in range(len(states) - 1):
        assert (block_of(kind, layer).run(states[layer]) - states[layer + 1]).abs().max() < 1e-9


@pytest.mark.parametrize("n_per_panel", [8, 16])
def test_rule_integrates_polynomials_and_a_boundary_layer(n_per_panel: int):
    nodes, weights = oracle.graded_rule(n_per_panel)
    assert (weights @ nodes**5 - 1 / 6).abs() < 1e-14
    # ∫ s²/(a² + s²)^1.5 da = 1/sqrt(1 + s²): what LayerNorm does on a path from 0.
    for s in (1e-3, 1e-6, 1e-10):
        assert (weights @ (s**2 / (nodes**2 + s**2) ** 1.5) - (1 + s**2) ** -0.5).abs() < 1e-4


def test_naive_ig_of_a_quadratic_is_known():
    matrix, x, x0 = random_like(torch.Size([4, 4]), 3), *random_like(torch.Size([2, 1, 4]), 4)
    matrix = matrix + matrix.T
    ((contributions,), gap) = oracle.naive_ig(
        lambda x: torch.einsum("npi,ij,npj->np", x, matrix, x), [x0], [x], lambda d: d[..., None]
    )
    # The gradient is linear in a, so its mean over the path is its value half way.
    assert (contributions[0] - (x - x0) * ((x + x0) @ matrix)).abs().max() < 1e-12
    assert gap < 1e-12


def test_naive_ig_refuses_an_integral_that_does_not_add_up():
    with pytest.raises(AssertionError, match="own completeness gap"):
        oracle.naive_ig(
            lambda x: (x > 0.345).double() + 0 * x,
            [torch.zeros(1, 1, dtype=torch.float64)],
            [torch.ones(1, 1, dtype=torch.float64)],
            lambda d: d,
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "baseline"), [("attn", "zero"), ("mlp", "zero"), ("block", "tensor")])
def test_finer_rule_changes_nothing(kind: str, name: str, baseline: str, monkeypatch):
    coarse = expected(kind, 1, name, baseline, "l2")
    monkeypatch.setattr(oracle, "MAX_GAP", 1e-10)
    fine = expected.__wrapped__(kind, 1, name, baseline, "l2")
    assert relative_error(coarse, fine) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_what_moves_alone_gets_all_of_the_change(kind: str):
    block, x = block_of(kind, 1), residuals(kind)[1]
    w, step = direction_of(kind), 1e-5
    for source in (1, 4):
        moved = x.clone()
        moved[source] += step * random_like(x[0].shape, seed=5)
        attn = oracle.attn_map(block, moved, "tensor", w, tensor=x)
        change = torch.einsum("jhk,hkd,jd->hj", block.z_of(moved) - block.z_of(x), block.w_o, w)
        assert (attn[:, source] - change).abs().max() < 1e-9
        rest = [i for i in range(len(x)) if i != source]
        assert attn[:, rest].abs().max() == 0
    z = block.z_of(x)
    other = z.clone()
    other[:, 2] += step * random_like(z[:, 2].shape, seed=5)
    heads, skip, bias = oracle.mlp_map(block, x, "tensor", w, tensor=other)
    change = ((block.tail(z, x) - block.tail(other, x)) * w).sum(-1)
    assert (heads[2] - change).abs().max() < 1e-9
    assert heads[[0, 1]].abs().max() == skip.abs().max() == bias.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["attn", "block"])
def test_autograd_agrees_with_central_differences(kind: str, name: str):
    block, x = block_of(kind, 1), residuals(kind)[1]
    outputs = block.z_of if name == "attn" else block.run
    start, weight = outputs(random_like(x.shape, 6)), random_like(outputs(x).shape, 7)

    def scalar(point: Tensor) -> Tensor:
        return (outputs(point) - start).square().sum(-1).sqrt().flatten() @ weight[..., 0].flatten()

    point = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(scalar(point), point)
    for seed in (8, 9):
        step = 1e-5 * random_like(x.shape, seed)
        slope = (scalar(x + step) - scalar(x - step)) / 2
        assert abs(slope - (grad * step).sum()) < 1e-6 * abs(slope)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_add_up_to_the_change_of_the_output(kind: str):
    block, x = block_of(kind, 1), residuals(kind)[1]
    n_pos = len(x)
    for j in range(n_pos):
        everywhere = x[j].expand(n_pos, -1)
        z_gain = (block.z_of(x) - block.z_of(everywhere))[j].norm(dim=-1)
        for baseline in ("itb", "itb_zero_ratio", "itb_map_ratio"):
            (attn,) = expected(kind, 1, "attn", baseline, "l2")
            assert (attn[:, :, j].sum(1) - z_gain).abs().max() < 1e-6
        (flow,) = expected(kind, 1, "block", "itb", "l2")
        assert abs(flow[:, j].sum() - (block.run(x) - block.run(everywhere))[j].norm()) < 1e-6
    # The start of the mlp map is a tail with nothing in it: no heads, no skip, no bias.
    empty = block.tail(torch.zeros_like(block.z_of(x)), torch.zeros_like(x), bias_scale=0.0)
    heads, skip, bias = expected(kind, 1, "mlp", "zero", "l2")
    assert (heads.sum(0) + skip + bias - (block.run(x) - empty).norm(dim=-1)).abs().max() < 1e-5
    assert (bias.abs().max() > 0) == bool(block.b_o.abs().max() > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_itb_leaves_out_the_destination_and_what_it_cannot_see(kind: str):
    for layer in (0, 1):
        blind = ~block_of(kind, layer).visible(len(IDS)).T
        for name in ("attn", "block"):
            (itb,) = expected(kind, layer, name, "itb", "l2")
            assert itb.diagonal(dim1=-2, dim2=-1).abs().max() == 0
            for baseline in ("itb", "zero"):
                (flow,) = expected(kind, layer, name, baseline, "l2")
                assert (flow[..., blind] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_att_itb_a0_starts_at_the_own_value(kind: str):
    block, x = block_of(kind, 1), residuals(kind)[1]
    # Where every position holds the same vector all values are alike, and a pattern sums to 1.
    as_tensor = oracle.mlp_map(block, x, "tensor", "l2", tensor=block.values_of(x))
    a0 = expected(kind, 1, "mlp", "att_itb_a0", "l2")
    assert relative_error(a0, as_tensor) < 1e-6
    assert a0[1].abs().max() == a0[2].abs().max() == 0


@pytest.mark.parametrize("name", ["attn", "block"])
def test_zero_ratio_gives_the_self_term_its_share(name: str):
    (zero,), (filled,) = (expected("bert", 1, name, b, "l2") for b in ("zero", "itb_zero_ratio"))
    shares = [flow.diagonal(dim1=-2, dim2=-1) / flow.sum(-2) for flow in (zero, filled)]
    assert (shares[0] - shares[1]).abs().max() < 1e-6


def test_map_ratio_gives_the_self_term_its_share():
    (filled,) = expected("bert", 1, "attn", "itb_map_ratio", "l2")
    pattern = block_of("bert", 1).pattern_of(residuals("bert")[1])
    share = filled.diagonal(dim1=-2, dim2=-1) / filled.sum(-2)
    assert (share - pattern.diagonal(dim1=-2, dim2=-1)).abs().max() < 1e-6


# The package on trial.


CASES = [
    (kind, layer, name, baseline)
    for layer, kinds in ((1, KINDS), (0, ("bert", "neox", "gemma2")))
    for kind in kinds
    for name, baselines in BASELINES.items()
    for baseline in baselines
    # On layer 0 one shared and one own path are enough, and what sees the sliding window of gemma2.
    if layer == 1 or baseline in ("zero", "itb", "att_itb_a0")
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("kind", "layer", "name", "baseline"), CASES)
def test_attribute_matches_the_oracle(kind: str, layer: int, name: str, baseline: str, target: str):
    start = tensor_baseline(kind, name) if baseline == "tensor" else baseline
    flow = lig_lens.attribute(
        tiny_bridge(kind, torch.float64),
        IDS,
        maps=(name,),
        layers=[layer],
        target="l2" if target == "l2" else lig_lens.direction(direction_of(kind)),
        corrupted=CORRUPTED_IDS if baseline == "corrupted" else None,
        tol=1e-4,
        progress=False,
        **{f"{name}_baseline": start},
    )
    ours = (flow.mlp[0], flow.skip[0], flow.bias[0]) if name == "mlp" else (getattr(flow, name)[0],)
    error = relative_error(ours, expected(kind, layer, name, baseline, target))
    row = f"{LAYOUTS[kind]}/{kind}" + (" layer 0" if layer == 0 else "")
    column = f"{name}:{baseline}"
    ERRORS[row, column] = max(error, ERRORS.get((row, column), 0.0))
    # A column that the Flow itself marks as having missed its tolerance is held to ten times as much.
    allowed = MAX_ERROR if bool(flow.converged[name].all()) else 10 * MAX_ERROR
    assert error <= allowed
