"""Models without norms, as toy models are: the layout is named, and the maps are those of plain torch."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from tiny_hooked import has_hooked_transformer
from torch import Tensor

import lig_lens as ll

IDS = [5, 12, 30, 7]
SIZES: dict[str, Any] = {
    "d_model": 32, "d_head": 8, "n_layers": 2, "n_ctx": 32, "n_heads": 4, "d_vocab": 40, "d_mlp": 48, "act_fn": "gelu",
    "normalization_type": None, "device": "cpu",
}  # fmt: skip


def made(dtype: torch.dtype = torch.float64) -> Any:
    """A HookedTransformer, or what took its place."""
    torch.manual_seed(0)
    if has_hooked_transformer():
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        model = HookedTransformer(HookedTransformerConfig(**SIZES, dtype=dtype))
    else:
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.model_bridge.sources.native import boot

        model = boot(TransformerBridgeConfig(**SIZES, architecture="TransformerLensNative"), dtype=dtype)
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    return model.eval()


def z_of(block: Any, resid: Tensor) -> Tensor:
    """Head outputs [..., pos, head, d_head] by hand."""
    attn = block.attn
    q, k, v = (
        torch.einsum("...pm,hmd->...phd", resid, W) + b.reshape(W.shape[0], -1)
        for W, b in ((attn.W_Q, attn.b_Q), (attn.W_K, attn.b_K), (attn.W_V, attn.b_V))
    )
    scores = torch.einsum("...jhd,...ihd->...hji", q, k) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:]).triu(1).bool()
    return torch.einsum("...hji,...ihd->...jhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


def tail(block: Any, z: Tensor, skip: Tensor, bias: Tensor | float = 1.0) -> Tensor:
    """What leaves the block, of head outputs and what enters it."""
    mid = skip + torch.einsum("...phd,hdm->...pm", z, block.attn.W_O) + bias * block.attn.b_O
    hidden = torch.nn.functional.gelu(mid @ W(block, "in") + block.mlp.b_in)
    return mid + hidden @ W(block, "out") + block.mlp.b_out


def W(block: Any, name: str) -> Tensor:  # noqa: N802
    weight = getattr(block.mlp, f"W_{name}")
    shape = (SIZES["d_model"], SIZES["d_mlp"]) if name == "in" else (SIZES["d_mlp"], SIZES["d_model"])
    return weight if weight.shape == shape else weight.T


def nodes() -> tuple[Tensor, Tensor]:
    x, w = np.polynomial.legendre.leggauss(12)
    panels = list(itertools.pairwise(np.linspace(0, 1, 9)))
    points = np.concatenate([(b - a) / 2 * x + (a + b) / 2 for a, b in panels])
    return torch.tensor(points), torch.tensor(np.concatenate([(b - a) / 2 * w for a, b in panels]))


@pytest.mark.parametrize("engine", ["closed_form", "hooks"])
def test_maps_are_those_of_plain_torch(engine: str) -> None:
    model = made()
    blocks = ll.describe_boundaries(model)
    assert [(one.layout, one.norms, one.engine) for one in blocks] == [("no_norm", (), "closed_form")] * 2
    asked = {"attn_baseline": "zero", "mlp_baseline": "zero", "block_baseline": "zero", "engine": engine}
    flow = ll.attribute(model, IDS, layers=[1], tol=1e-6, max_nodes=8192, progress=False, **asked)
    assert flow.layouts == ("no_norm",)

    _, cache = model.run_with_cache(torch.tensor([IDS]))
    resid, block = cache[blocks[1].resid_pre][0].detach(), model.blocks[1]
    a, weights = nodes()
    x = (a[:, None, None] * resid).requires_grad_()
    z, z_0 = z_of(block, x), z_of(block, torch.zeros_like(resid))
    y, y_0 = tail(block, z, x), tail(block, z_0, torch.zeros_like(resid))

    def shares(scalar: Tensor, moved: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(scalar.sum(), x, retain_graph=True)
        return torch.einsum("n,npm,pm->p", weights, gradient, moved)

    for j in range(len(IDS)):
        wanted = shares((y - y_0)[:, j].norm(dim=-1), resid)
        torch.testing.assert_close(flow.block[0, :, j].double(), wanted, rtol=1e-4, atol=1e-4)
        for h in range(4):
            wanted = shares((z - z_0)[:, j, h].norm(dim=-1), resid)
            torch.testing.assert_close(flow.attn[0, h, :, j].double(), wanted, rtol=1e-4, atol=1e-4)

    # From the sum of skip connection and heads at 0: what is left of it is the bias, which moves too.
    z_1 = z_of(block, resid).detach()
    s, u, c = (one.requires_grad_() for one in (a[:, None, None] * resid, a[:, None, None, None] * z_1, a.clone()))
    moved = tail(block, u, s, c[:, None, None]) - tail(block, 0 * z_1, 0 * resid, 0.0)
    for j in range(len(IDS)):
        by_s, by_u = torch.autograd.grad(moved[:, j].norm(dim=-1).sum(), (s, u), retain_graph=True)
        skip = torch.einsum("n,npm,pm->p", weights, by_s, resid)[j]
        heads = torch.einsum("n,nphd,phd->ph", weights, by_u, z_1)[j]
        torch.testing.assert_close(flow.skip[0, j].double(), skip, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(flow.mlp[0, :, j].double(), heads, rtol=1e-4, atol=1e-4)


def test_edges_and_heads_can_be_patched() -> None:
    model = made(torch.float32)
    effects = ll.patching.knock_out(model, IDS, ll.logit_difference(9, 17), layers=[1], progress=False)
    assert bool((effects.values.nan_to_num() != 0).any())


def test_contributions_to_a_metric_add_up() -> None:
    flow = ll.attribute(made(), IDS, corrupted=[5, 12, 11, 7], target=ll.logit_difference(9, 17), progress=False)
    torch.testing.assert_close(
        (flow.attn.sum((1, 2, 3)) + flow.skip.sum(1)).double(),
        torch.full((2,), float(flow.total["attn"].flatten()[0])).double(),
        rtol=2e-3,
        atol=1e-5,
    )
