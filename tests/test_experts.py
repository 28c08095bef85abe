"""Routers that choose some of their experts: the choice is kept along paths, where it would jump."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import VOCAB, tiny_tokenizer
from torch import Tensor, nn

import lig_lens as ll
from lig_lens.errors import BoundaryError, ConvergenceWarning, InputError

IDS = [5, 12, 30, 7, 22]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "num_key_value_heads": 2, "pad_token_id": 0, "num_local_experts": 6,
    "num_experts": 6, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "norm_topk_prob": True,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {},
    "Qwen2MoeForCausalLM": {},
    "Qwen3MoeForCausalLM": {"head_dim": 8},
    "OlmoeForCausalLM": {},
    "GptOssForCausalLM": {"head_dim": 8, "sliding_window": 3},
    "GraniteMoeForCausalLM": {"residual_multiplier": 0.3},
    "DeepseekV3ForCausalLM": LATENT,
    "PhimoeForCausalLM": {},
    "JetMoeForCausalLM": {"kv_channels": 8, "activation_function": "silu"},
}
ASKED = {"attn_baseline": "zero", "mlp_baseline": "zero", "block_baseline": "zero", "progress": False}


def pair(kind: str, folder: Path) -> tuple[Any, Any]:
    """A plain model in float64, and the bridge of it."""
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    plain = model_class(model_class.config_class(**SIZES | KINDS.get(kind, {}))).eval()
    for weight in plain.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    plain.save_pretrained(folder)
    tiny_tokenizer("gpt2").save_pretrained(folder)
    plain.set_experts_implementation("eager")
    return plain.double(), ll.load_model(str(folder), device="cpu", dtype="float64")


def nodes() -> tuple[Tensor, Tensor]:
    edges = np.concatenate([[0.0], np.logspace(-18, 0, 49)])
    x, w = np.polynomial.legendre.leggauss(10)
    both = list(itertools.pairwise(edges))
    points = np.concatenate([(b - a) / 2 * x + (a + b) / 2 for a, b in both])
    return torch.tensor(points), torch.tensor(np.concatenate([(b - a) / 2 * w for a, b in both]))


def close(found: Tensor, wanted: Tensor) -> None:
    assert float((found.double() - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_held_experts_converge_and_add_up(kind: str, tmp_path: Path) -> None:
    """Without the choice held the same nodes do not suffice."""
    _, model = pair(kind, tmp_path)
    maps = ("block",) if kind == "JetMoeForCausalLM" else ("mlp", "block")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        held = ll.attribute(model, IDS, layers=[1], maps=maps, experts="held", tol=1e-4, **ASKED)
    assert held.settings["experts"] == "held"
    with pytest.warns(ConvergenceWarning, match="experts='held' keeps the prompt's"):
        free = ll.attribute(model, IDS, layers=[1], maps=maps, tol=1e-4, max_nodes=400, **ASKED)
    assert "experts" not in free.settings and not all(bool(free.converged[name].all()) for name in free.maps)


def test_held_experts_are_those_of_plain_torch(tmp_path: Path) -> None:
    """The block map of Mixtral's block, written by hand with the experts that the prompt chose."""
    plain, model = pair("MixtralForCausalLM", tmp_path)
    layer = plain.model.layers[1]
    flow = ll.attribute(model, IDS, layers=[1], maps=("mlp", "block"), experts="held", tol=1e-6, **ASKED)

    kept: dict[str, Any] = {}
    with torch.no_grad():
        handles = [
            layer.register_forward_pre_hook(lambda _m, a, k: kept.update(resid=a[0], rest=k), with_kwargs=True),
            layer.mlp.gate.register_forward_hook(lambda _m, _a, output: kept.update(chosen=output[-1])),
            layer.self_attn.o_proj.register_forward_hook(lambda _m, a, output: kept.update(z=a[0], attn_out=output)),
        ]
        plain(torch.tensor([IDS]))
    for handle in handles:
        handle.remove()
    resid, chosen = kept["resid"][0], kept["chosen"]

    def tail(mid: Tensor) -> Tensor:
        """[..., pos, d_model] of the sum of skip connection and attention output."""
        x = layer.post_attention_layernorm(mid)
        scores = torch.softmax(x @ layer.mlp.gate.weight.T, -1)
        weights = scores.gather(-1, chosen.expand(*x.shape[:-1], -1))
        weights = weights / weights.sum(-1, keepdim=True)
        experts, out = layer.mlp.experts, torch.zeros_like(x)
        for pos, which in itertools.product(range(len(IDS)), range(2)):
            number = chosen[pos, which]
            gate, up = (x[..., pos, :] @ experts.gate_up_proj[number].T).chunk(2, -1)
            made = (nn.functional.silu(gate) * up) @ experts.down_proj[number].T
            out = out.index_add(-2, torch.tensor([pos]), (weights[..., pos, which, None] * made)[..., None, :])
        return mid + out

    def block(x: Tensor) -> Tensor:
        rest = {
            name: value.expand(len(x), *value.shape[1:]) if isinstance(value, Tensor) and value.ndim == 4 else value
            for name, value in kept["rest"].items()
        }
        rest["past_key_values"] = None
        attended, _ = layer.self_attn(layer.input_layernorm(x), **rest)
        return tail(x + attended)

    with torch.no_grad():
        torch.testing.assert_close(
            block(resid[None])[0],
            layer(resid[None], **kept["rest"] | {"past_key_values": None})[0].reshape(resid.shape),
        )
    a, weights = nodes()
    x = (a[:, None, None] * resid).requires_grad_()
    y = block(x) - block(torch.zeros_like(resid)[None])
    s, o = ((a[:, None, None] * end).requires_grad_() for end in (resid, kept["attn_out"][0]))
    moved = tail(s + o) - tail(torch.zeros_like(resid)[None])
    W_O = layer.self_attn.o_proj.weight.T.reshape(4, 8, 32)
    z = kept["z"].reshape(len(IDS), 4, 8)
    for j in range(len(IDS)):
        (by_x,) = torch.autograd.grad(y[:, j].norm(dim=-1).sum(), x, retain_graph=True)
        wanted = torch.einsum("n,npm,pm->p", weights, by_x, resid)
        close(flow.block[0, :, j], wanted)
        by_s, by_o = torch.autograd.grad(moved[:, j].norm(dim=-1).sum(), (s, o), retain_graph=True)
        skip, by_o = (torch.einsum("n,npm->pm", weights, one)[j] for one in (by_s, by_o))
        heads = torch.einsum("m,hem,he->h", by_o, W_O, z[j])
        close(flow.skip[0, j], skip @ resid[j])
        close(flow.mlp[0, :, j], heads)


def test_routers_within_attention_are_held_too(tmp_path: Path) -> None:
    """JetMoE's heads are experts; from `zero` and `itb` those of the destination rest, so from another prompt."""
    _, model = pair("JetMoeForCausalLM", tmp_path)
    asked = {**ASKED, "block_baseline": "corrupted", "corrupted": [9, 3, 17, 28, 2], "maps": "block", "layers": [1]}
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        ll.attribute(model, IDS, experts="held", tol=1e-4, **asked)


def test_free_experts_leave_what_the_target_jumps_by(tmp_path: Path) -> None:
    """The gap is the sum of these jumps, seen on a fine grid in plain torch; few nodes are spent on them."""
    plain, model = pair("MixtralForCausalLM", tmp_path)
    with pytest.warns(ConvergenceWarning, match="miss what the target itself jumps by"):
        flow = ll.attribute(model, IDS, layers=[1], maps="block", tol=1e-4, max_nodes=600, **ASKED)
    layer, kept = plain.model.layers[1], {}
    with torch.no_grad():
        handle = layer.register_forward_pre_hook(lambda _m, a, k: kept.update(resid=a[0], rest=k), with_kwargs=True)
        plain(torch.tensor([IDS]))
        handle.remove()
        a = torch.cat([torch.logspace(-12, 0, 30_001, dtype=torch.float64), torch.linspace(0.001, 1, 30_001).double()])
        a = a.sort().values
        y = torch.cat([_block(layer, kept, part[:, None, None] * kept["resid"][0]) for part in a.split(4096)])
        moved = (y - _block(layer, kept, torch.zeros_like(kept["resid"]))).norm(dim=-1)
    steps = moved.diff(dim=0).abs()
    around = torch.maximum(steps.roll(2, 0), steps.roll(-2, 0))
    jumps = torch.where(steps > 20 * around + 1e-4 * moved[-1], steps, 0.0).sum(0)
    assert int((jumps > 0).sum()) >= 2
    torch.testing.assert_close(flow.gap["block"][0].double(), jumps / moved[-1], atol=2e-3, rtol=0)


def _block(layer: nn.Module, kept: dict[str, Any], x: Tensor) -> Tensor:
    rest = {
        name: value.expand(len(x), *value.shape[1:]) if isinstance(value, Tensor) and value.ndim == 4 else value
        for name, value in kept["rest"].items()
    }
    out = layer(x, **rest | {"past_key_values": None})
    return (out[0] if isinstance(out, tuple) else out).reshape(x.shape)


def test_a_block_without_experts_is_the_same(tmp_path: Path) -> None:
    model = ll.load_model("induction")
    free, held = (ll.attribute(model, IDS, layers=[1], experts=how, progress=False) for how in ("free", "held"))
    assert all(torch.equal(getattr(free, name), getattr(held, name)) for name in free.maps)


def test_a_choice_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Switch Transformers' routers take the number of the largest alone."""
    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2}
    config = transformers.SwitchTransformersConfig(**sizes, num_experts=4, num_sparse_encoder_layers=2)
    transformers.SwitchTransformersForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_tokenizer("gpt2").save_pretrained(tmp_path)
    model = ll.load_model(str(tmp_path), device="cpu")
    with pytest.raises(BoundaryError, match="does not choose its experts by the k largest scores"):
        ll.attribute(model, (IDS, IDS), stream="encoder", experts="held", **ASKED)


def test_a_metric_takes_none() -> None:
    with pytest.raises(InputError, match="experts='held' goes with targets at one block"):
        ll.attribute(
            ll.load_model("induction"), IDS, corrupted=IDS[::-1], target=ll.logit_difference(9, 17), experts="held"
        )
