"""Causality, baselines, symmetry: what must hold whatever the weights are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import KINDS, tiny_bridge, tiny_hf, tiny_tokenizer
from transformer_lens.model_bridge import TransformerBridge

import lig_lens

CAUSAL = [kind for kind in KINDS if kind != "bert"]
prompts = st.lists(st.integers(5, 39), min_size=2, max_size=6)
baselines = st.sampled_from(["itb", "zero", "itb_zero_ratio", "itb_map_ratio"])


def attend(kind: str, ids: object, **options: object) -> lig_lens.Flow:
    return lig_lens.attribute(tiny_bridge(kind), ids, progress=False, **options)


@pytest.mark.parametrize("kind", CAUSAL)
@given(prompts, baselines)
def test_nothing_flows_back_in_time(kind: str, ids: list[int], baseline: str) -> None:
    block = "itb" if baseline == "itb_map_ratio" else baseline
    flow = attend(kind, ids, maps=("attn", "block"), attn_baseline=baseline, block_baseline=block)
    later = torch.ones(len(ids), len(ids)).tril(-1).bool()  # [src, dst] with src > dst
    assert (flow.attn[..., later] == 0).all() and (flow.block[..., later] == 0).all()


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_nothing_flows_from_outside_a_sliding_window(kind: str) -> None:
    flow = attend(kind, list(range(5, 15)), maps="attn")
    n_pos = flow.attn.shape[-1]
    far = torch.ones(n_pos, n_pos).triu(4).bool()  # window 4: src <= dst - 4
    per_layer = [(layer[:, far] == 0).all().item() for layer in flow.attn]
    assert per_layer.count(True) >= 1 and (flow.attn[..., far.logical_not()] != 0).any()


@pytest.mark.parametrize("kind", KINDS)
@given(prompts)
def test_itb_self_terms_are_exactly_zero(kind: str, ids: list[int]) -> None:
    flow = attend(kind, ids, maps=("attn", "block"))
    assert (torch.diagonal(flow.attn, dim1=-2, dim2=-1) == 0).all()
    assert (torch.diagonal(flow.block, dim1=-2, dim2=-1) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=2)
@given(prompts, st.sampled_from(["itb_zero_ratio", "itb_map_ratio"]))
def test_ratio_baselines_keep_column_sums_and_proportions(kind: str, ids: list[int], ratio: str) -> None:
    plain, refilled = (attend(kind, ids, maps="attn", layers=1, attn_baseline=b) for b in ("itb", ratio))
    scale = refilled.attn.abs().amax((-2, -1), keepdim=True).clamp(min=1e-6)
    assert ((plain.attn.sum(-2) - refilled.attn.sum(-2)).abs() <= 1e-4 * scale[..., 0]).all()
    # Others keep their proportions: the columns are parallel away from the diagonal.
    off = 1 - torch.eye(len(ids))
    one, other = plain.attn * off, refilled.attn * off
    cross = (one * other).sum(-2) ** 2
    both = one.pow(2).sum(-2) * other.pow(2).sum(-2)
    torch.testing.assert_close(cross, both, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_ratio_self_terms_follow_their_formulas(kind: str, ids: torch.Tensor) -> None:
    options = {"maps": "attn", "layers": 1, "tol": 1e-5}
    itb, zero = (attend(kind, ids, attn_baseline=b, **options).attn[0] for b in ("itb", "zero"))
    by_zero, by_map = (
        attend(kind, ids, attn_baseline=b, **options).attn[0] for b in ("itb_zero_ratio", "itb_map_ratio")
    )
    model = tiny_bridge(kind)
    _, cache = model.run_with_cache(ids[None])
    pattern = cache["blocks.1.attn.hook_pattern"][0]  # head dst src
    for head in range(itb.shape[0]):
        for j in range(1, len(ids)):
            s = itb[head, :, j].sum()
            z, z_own = zero[head, :, j].sum(), zero[head, j, j]
            p = pattern[head, j, j]
            for refilled, own in ((by_zero, s * z_own / (z - z_own)), (by_map, s * p / (1 - p))):
                expected = own * s / (s + own)
                torch.testing.assert_close(refilled[head, j, j], expected, rtol=2e-3, atol=1e-4)


def test_att_itb_leaves_nothing_to_skip_and_bias(ids: torch.Tensor) -> None:
    for kind in KINDS:
        flow = attend(kind, ids, maps="mlp")
        assert (flow.skip == 0).all() and (flow.bias == 0).all(), kind


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_permuting_heads_permutes_the_result(
    kind: str, ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> None:
    order = [2, 0, 1]
    folder = tmp_path_factory.mktemp(kind)
    hf = tiny_hf(kind)
    d_head = 8
    rows = torch.cat([torch.arange(h * d_head, (h + 1) * d_head) for h in order])
    for name, p in hf.named_parameters():
        if kind == "bert" and any(f"self.{n}." in name for n in ("query", "key", "value")):
            p.data = p.data[rows]
        elif kind == "bert" and name.endswith("attention.output.dense.weight"):
            p.data = p.data[:, rows]
        elif kind == "gpt2" and "attn.c_attn" in name:  # [in, 3 * out], or the bias [3 * out]
            p.data = torch.cat([part[..., rows] for part in p.data.chunk(3, -1)], -1)
        elif kind == "gpt2" and name.endswith("attn.c_proj.weight"):
            p.data = p.data[rows]
    hf.save_pretrained(folder)
    tiny_tokenizer(kind).save_pretrained(folder)
    permuted = TransformerBridge.boot_transformers(str(folder), device="cpu")
    one = attend(kind, ids, attn_baseline="zero", mlp_baseline="zero", tol=1e-4)
    other = lig_lens.attribute(permuted, ids, attn_baseline="zero", mlp_baseline="zero", tol=1e-4, progress=False)
    torch.testing.assert_close(other.attn, one.attn[:, order], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.mlp, one.mlp[:, order], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.skip, one.skip, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.block, one.block, rtol=1e-3, atol=1e-4)
    assert (one.attn - one.attn[:, order]).abs().max() > 1e-2  # the heads do differ
