"""The closed-form engine gives what automatic differentiation gives, on attention of many makes.

The kinds of `tiny_models` stand for the layouts. Here are what attention itself may differ in: windows, ALiBi, shared
keys and values, biases, pairs that rotary turns, scales, and blocks of one model that are not alike.
"""

import functools
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers as tf
from at_blocks import values_at
from engine_pairs import both, difference
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_hooked import has_hooked_transformer
from tiny_models import VOCAB, config_bridge

import lig_lens
from lig_lens.blocks.head_norms import HeadNorms
from lig_lens.blocks.latent import LatentNorms
from lig_lens.blocks.rotary import RotaryKind
from lig_lens.blocks.values import Values

IDS = [5, 12, 30, 7, 22, 39]
# Rounding may decide whether a panel is halved, and the engines then differ by what `tol` allows.
TOL = 1e-5
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
MLP = {"intermediate_size": 48, "max_position_embeddings": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SMALL = {**SIZES, **MLP, **HEADS}
WIDE = {**SMALL, "hidden_size": 32}
GPT = {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_positions": 32, "pad_token_id": 0}
# Half of 8 dimensions: the default quarter is one pair, where all pairings are the same.
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8}
# Values have fewer dimensions than keys, of which no two parts are alike.
LATENT = {
    **SMALL, "num_key_value_heads": 4, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
    "v_head_dim": 5, "first_k_dense_replace": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Attention:
    """What a block's attention has to show; without it, its test would be about something else."""

    layout: str = "pre_ln"
    norm: str = "rms"
    rotary: str = "halves"
    """Which dimensions make a pair: `halves`, `neighbours`, or `none`."""
    n_kv: int = 2
    sees: int = len(IDS)
    """Number of sources that the last token sees."""
    alibi: bool = False
    scale: float | None = None
    """None for 1 / sqrt(d_head)."""
    normed: str = ""
    """Norms of queries and keys: each `head`, or all `together`, and whether rotary comes `first`; or of `latents`."""
    cap: float | None = None
    sink: bool = False


RMS = Attention()
LAYER = Attention(norm="layer")
PARALLEL = Attention("parallel", "layer")


def falcon(**options: Any) -> tf.PreTrainedConfig:
    return tf.FalconConfig(**SIZES, **{"num_attention_heads": 4, "new_decoder_architecture": False, **options})


# Configuration, and attention of both blocks, or of the first and the second.
KINDS: dict[str, tuple[Any, ...]] = {
    "gemma2": (
        tf.Gemma2Config(**SMALL, head_dim=8, query_pre_attn_scalar=8, sliding_window=4, attn_logit_softcapping=None),
        replace(RMS, layout="pre_post_ln", sees=4),
        replace(RMS, layout="pre_post_ln"),
    ),
    "mistral": (tf.MistralConfig(**SMALL, head_dim=6, sliding_window=3), replace(RMS, sees=3)),
    "gpt_neo": (
        tf.GPTNeoConfig(
            **SIZES, **MLP, num_heads=3, num_layers=2, attention_types=[[["global", "local"], 1]], window_size=3
        ),
        replace(LAYER, rotary="none", n_kv=3, scale=1.0),
        replace(LAYER, rotary="none", n_kv=3, scale=1.0, sees=3),
    ),
    # Its first block takes the embedding's norm as its own and has none.
    "modernbert_decoder": (
        tf.ModernBertDecoderConfig(**{**SIZES, **MLP}, num_attention_heads=4, local_attention=4),
        replace(LAYER, norm="none", n_kv=4),
        replace(LAYER, n_kv=4, sees=2),
    ),
    "mpt": (
        tf.MptConfig(vocab_size=VOCAB, d_model=24, n_layers=2, n_heads=3, expansion_ratio=2, max_seq_len=32),
        replace(LAYER, rotary="none", n_kv=3, alibi=True),
    ),
    "bloom": (
        tf.BloomConfig(vocab_size=VOCAB, hidden_size=24, n_layer=2, n_head=3, pad_token_id=0),
        replace(LAYER, rotary="none", n_kv=3, alibi=True),
    ),
    "falcon": (falcon(multi_query=True), replace(PARALLEL, n_kv=1)),
    "falcon_alibi": (falcon(alibi=True, multi_query=True), replace(PARALLEL, rotary="none", n_kv=1, alibi=True)),
    "phi": (tf.PhiConfig(**{**WIDE, "num_key_value_heads": 4}, rope_parameters=PARTIAL), replace(PARALLEL, n_kv=4)),
    "cohere": (tf.CohereConfig(**SMALL), replace(PARALLEL, rotary="neighbours")),
    "stablelm": (tf.StableLmConfig(**WIDE, use_qkv_bias=True, rope_parameters=PARTIAL), LAYER),
    "gpt_bigcode": (tf.GPTBigCodeConfig(**GPT, n_head=4, multi_query=True), replace(LAYER, rotary="none", n_kv=1)),
    "glm": (tf.GlmConfig(**WIDE, head_dim=8, attention_bias=True), replace(RMS, rotary="neighbours")),
    "qwen2": (tf.Qwen2Config(**SMALL), RMS),
    # YaRN's tables turn and stretch.
    "llama": (
        tf.LlamaConfig(**{**SMALL, "num_key_value_heads": 1}, head_dim=6, attention_bias=True, rope_parameters=YARN),
        replace(RMS, n_kv=1),
    ),
    "granite": (tf.GraniteConfig(**SMALL, attention_multiplier=0.3), replace(RMS, scale=0.3)),
    # Its second block gets the tables for rotary and does not turn anything.
    "smollm3": (tf.SmolLM3Config(**SMALL, no_rope_layers=[1, 0]), RMS, replace(RMS, rotary="none")),
    "gemma2_capped": (
        tf.Gemma2Config(**SMALL, head_dim=8, query_pre_attn_scalar=5, sliding_window=4, attn_logit_softcapping=0.7),
        replace(RMS, layout="pre_post_ln", sees=4, cap=0.7, scale=round(5**-0.5, 4)),
        replace(RMS, layout="pre_post_ln", cap=0.7, scale=round(5**-0.5, 4)),
    ),
    "qwen3": (tf.Qwen3Config(**SMALL, head_dim=6), replace(RMS, normed="head")),
    "gemma3": (
        tf.Gemma3TextConfig(**SMALL, head_dim=8, query_pre_attn_scalar=8, sliding_window=4),
        replace(RMS, layout="pre_post_ln", sees=4, normed="head"),
    ),
    "cohere_normed": (
        tf.CohereConfig(**SMALL, use_qk_norm=True),
        replace(PARALLEL, rotary="neighbours", normed="head"),
    ),
    "olmo2": (tf.Olmo2Config(**SMALL), replace(RMS, layout="pre_post_ln", norm="none", normed="together")),
    "hunyuan": (tf.HunYuanDenseV1Config(**SMALL, head_dim=6), replace(RMS, normed="head, rotary first")),
    # Turns the other way; its norms have no weights.
    "nanochat": (tf.NanoChatConfig(**SMALL, head_dim=6), replace(RMS, normed="head, rotary first")),
    # Norms that no hook shows; a table of complex numbers for rotary.
    "llama4": (
        tf.Llama4TextConfig(**SMALL, head_dim=6, num_local_experts=1, interleave_moe_layer_step=5),
        replace(RMS, rotary="neighbours", normed="head"),
    ),
    # Biases come before its norms.
    "stablelm_normed": (
        tf.StableLmConfig(**WIDE, use_qkv_bias=True, qk_layernorm=True, rope_parameters=PARTIAL),
        replace(LAYER, normed="head"),
    ),
    "deepseek_v2": (tf.DeepseekV2Config(**LATENT), replace(RMS, n_kv=4, rotary="neighbours", normed="latents")),
    "deepseek_v3": (
        tf.DeepseekV3Config(**LATENT, q_lora_rank=7, rope_interleave=False),
        replace(RMS, n_kv=4, normed="latents"),
    ),
    "gpt_oss": (
        tf.GptOssConfig(**SMALL, head_dim=6, num_local_experts=2, num_experts_per_tok=2, attention_bias=True),
        replace(RMS, sink=True),
    ),
}
# Gates, clipped queries, biases of latents, sources that are chosen: the formula does not cover them and has to notice.
REFUSED: dict[str, tuple[Any, str]] = {
    "afmoe": (tf.AfmoeConfig(**SMALL, head_dim=6), "not a softmax"),
    "olmo": (tf.OlmoConfig(**SMALL, clip_qkv=1.0), "not affine|not a softmax"),
    "deepseek_biased": (tf.DeepseekV3Config(**LATENT, q_lora_rank=7, attention_bias=True), "latent vectors are biased"),
    "glm_moe_dsa": (
        tf.GlmMoeDsaConfig(
            **LATENT, q_lora_rank=7, mlp_layer_types=["dense"] * 2, index_head_dim=8, index_n_heads=2, index_topk=2
        ),
        "not a softmax|may be masked",
    ),
}
COHERE = pytest.mark.skipif(has_hooked_transformer(), reason="TransformerLens 3.9 pairs Cohere's dimensions wrongly")
HUNYUAN = pytest.mark.skipif(has_hooked_transformer(), reason="TransformerLens 3.9 norms HunYuan's queries too early")


def kinds(**marks: pytest.MarkDecorator) -> list[Any]:
    return [pytest.param(kind, marks=marks.get(kind, ())) for kind in KINDS]


def bridge(kind: str) -> Any:
    return bridge_in(kind, torch.float32)


@functools.cache
def bridge_in(kind: str, dtype: torch.dtype) -> Any:
    return config_bridge(KINDS[kind][0], dtype)


@functools.cache
def windowed(n_kv: int, window: int, dtype: torch.dtype) -> Any:
    sizes = {**SMALL, "num_key_value_heads": n_kv}
    return config_bridge(tf.MistralConfig(**sizes, head_dim=6, sliding_window=window), dtype)


def shown(values: Values) -> Attention:
    boundaries, rotary = values.block.boundaries, "none"
    assert values.heads.formula is not None, boundaries.why_hooks
    formula, bias = values.heads.formula.formula, values.heads.formula.bias
    if isinstance(formula.positions, RotaryKind):
        rotary = "neighbours" if formula.positions.adjacent else "halves"
    score, norms = formula.score, formula.norms
    if isinstance(norms, LatentNorms):
        normed = "latents"
    else:
        assert isinstance(norms, HeadNorms)
        normed = "" if norms.q is None else "together" if norms.q.together else "head"
    is_usual = abs(score.scale * formula.b_q.shape[-1] ** 0.5 - 1) < 1e-4
    return Attention(
        layout=boundaries.layout,
        norm=formula.norm,
        rotary=rotary,
        n_kv=len(formula.b_k),
        sees=int(torch.isfinite(bias[0, -1]).sum()),
        alibi=len(bias) > 1,
        scale=None if is_usual else round(score.scale, 4),
        normed=f"{normed}, rotary first" if score.weight is not None else normed,
        cap=score.cap,
        sink=score.sink is not None,
    )


@pytest.mark.parametrize("kind", kinds(cohere=COHERE, cohere_normed=COHERE, hunyuan=HUNYUAN))
def test_the_formula_is_the_attention_that_is_meant(kind: str) -> None:
    model, expected = bridge(kind), KINDS[kind][1:]
    values = values_at(model, IDS, [0, 1])
    assert [shown(values[layer]) for layer in (0, 1)] == [expected[0], expected[-1]]


@pytest.mark.parametrize("baseline", ["itb", "zero", "corrupted"])
@pytest.mark.parametrize("kind", kinds(cohere=COHERE, cohere_normed=COHERE, hunyuan=HUNYUAN))
def test_engines_agree(kind: str, baseline: str) -> None:
    alike = len(KINDS[kind]) == 2
    flows = both(bridge(kind), IDS, ("attn", "block"), baseline, "l2", layers=1 if alike else None, tol=TOL)
    for name in ("attn", "block"):
        assert difference(flows, name) <= 2e-5
        torch.testing.assert_close(flows[0].total[name], flows[1].total[name], rtol=1e-4, atol=1e-5)


@settings(max_examples=12)
@given(
    st.lists(st.integers(5, 39), min_size=1, max_size=8),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 8),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from(["attn", "block"]),
    st.sampled_from(["itb", "zero", "corrupted"]),
)
def test_engines_agree_on_any_window(
    ids: list[int], n_kv: int, window: int, dtype: torch.dtype, name: str, baseline: str
) -> None:
    flows = both(windowed(n_kv, window, dtype), ids, name, baseline, "l2", layers=1, tol=TOL)
    fast, slow = (getattr(flow, name) for flow in flows)
    assert (fast - slow).abs().max() <= 2e-5 * slow.abs().max() + 1e-6


@pytest.mark.parametrize("kind", REFUSED)
def test_the_formula_refuses_other_attention(kind: str) -> None:
    config, reason = REFUSED[kind]
    boundaries = lig_lens.describe_boundaries(config_bridge(config))
    assert all(b.engine == "hooks" and re.search(reason, b.why_hooks) for b in boundaries)


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "stablelm_normed"])
def test_engines_agree_on_a_metric(kind: str) -> None:
    asked = {"corrupted": IDS[::-1], "target": lig_lens.logit_difference(9, 17), "layers": [1], "progress": False}
    fast, slow = (lig_lens.attribute(bridge(kind), IDS, engine=e, tol=TOL, **asked) for e in ("closed_form", "hooks"))
    assert difference([fast, slow], "attn") <= 2e-5 and difference([fast, slow], "skip") <= 2e-5


def test_other_norms_of_latents_go_through_hooks() -> None:
    model = config_bridge(KINDS["deepseek_v3"][0])
    model.blocks[1].attn.kv_a_layernorm.register_forward_hook(lambda _module, _args, output: torch.tanh(output))
    first, second = lig_lens.describe_boundaries(model)
    assert (first.engine, second.engine) == ("closed_form", "hooks") and "norms of latent vectors" in second.why_hooks
