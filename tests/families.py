"""Families of models that are held against the plain transformers model: how they are made, and what is to be found."""

from dataclasses import dataclass, replace
from typing import Any

from checkpoints import GPT2, GQA, SMALL
from tiny_models import VOCAB

_HEADS = {**GQA, "head_dim": 8}
# All experts are chosen for every token, so that nothing jumps along a path; each family has names of its own for it.
_EXPERTS = {
    "num_local_experts": 2, "num_experts": 2, "n_routed_experts": 2, "moe_num_experts": 2, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "n_group": 1, "topk_group": 1,
}  # fmt: skip
# Latent attention.
_LATENT: dict[str, Any] = {
    **SMALL, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "pad_token_id": 0, **_EXPERTS,
}  # fmt: skip
_DELTA = {
    **_HEADS, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
# Chunks of Mamba 2 that are shorter than the prompt.
_MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 3,
}  # fmt: skip
_JAMBA = {
    **GQA, **_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}  # fmt: skip
_BAMBA = {**GQA, **_MAMBA, "attn_layer_indices": [1]}
_GRANITE_HYBRID = {**GQA, **_EXPERTS, **_MAMBA, "shared_intermediate_size": 24}
_LFM2 = {**GQA, "layer_types": ["conv", "full_attention"], "block_ff_dim": 48}
_NEMOTRON_H = {
    **_HEADS, **_EXPERTS, "layers_block_type": ["mamba", "attention", "mlp", "moe"], "num_hidden_layers": 4,
    "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 3,
    "moe_shared_expert_intermediate_size": 24, "mlp_hidden_act": "gelu",
}  # fmt: skip
_RECURRENT_GEMMA = {
    **_HEADS, "lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 16,
}  # fmt: skip
_RWKV = {**SMALL, "context_length": 64}
_ZAMBA2 = {
    **SMALL, "num_key_value_heads": 4, "layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8,
    "n_mamba_heads": 4, "mamba_ngroups": 2, "mamba_headdim": 16, "mamba_expand": 2, "chunk_size": 3,
    "use_mem_rope": True, "adapter_rank": 4, "num_mem_blocks": 1, "attention_head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
_FALCON = {**SMALL, "multi_query": False, "parallel_attn": False, "new_decoder_architecture": False}
_GROUPED = {"new_decoder_architecture": True, "parallel_attn": True, "num_kv_heads": 2}
_CAPPED = {**_HEADS, "sliding_window": 3, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        config: of a tiny model.
        layers: where the plain model has its layers.
        out: in each of them, the linear map after the heads.
        layout: of the block that is held, by default the second.
        engine: that `engine="auto"` takes there.
        knock_outs: whether edges can be taken out of its pattern.
        layer: that block.
        experts: whether its routers choose anew along paths.
        wrong_on: beginning of versions of TransformerLens whose bridge computes something else, or cannot run.
    """

    config: dict[str, Any]
    layers: str = "model.layers"
    out: str = "self_attn.o_proj"
    layout: str = "pre_ln"
    engine: str = "closed_form"
    knock_outs: bool = True
    layer: int = 1
    experts: str = "free"
    wrong_on: str = "none"


def _bert(config: dict[str, Any], body: str) -> Family:
    return Family(config, f"{body}.encoder.layer", "attention.output.dense", "post_ln")


def _layout(config: dict[str, Any], layout: str = "pre_ln", **more: Any) -> Family:
    """Llama's names."""
    return Family(config, layout=layout, **more)


def _hooks(config: dict[str, Any], layout: str = "pre_ln", **more: Any) -> Family:
    """What the formula does not have."""
    return Family(config, layout=layout, engine="hooks", **more)


def _no_messages(config: dict[str, Any], layout: str = "pre_ln", **more: Any) -> Family:
    """The same, where head outputs are not pattern times values that a hook shows: gates."""
    return replace(_hooks(config, layout, **more), knock_outs=False)


def _mixer(config: dict[str, Any], layers: str = "model.layers", layer: int = 0, **more: Any) -> Family:
    """A block that mixes positions by something else than attention with separable heads."""
    return Family(config, layers, "", "block_only", "hooks", knock_outs=False, layer=layer, **more)


def _latent(**config: Any) -> Family:
    """No hook shows values from latent vectors by position."""
    return Family({**_LATENT, **config}, knock_outs=False)


def _falcon(layout: str = "parallel", **config: Any) -> Family:
    return Family({**_FALCON, **config}, "transformer.h", "self_attention.dense", layout)


# The class that a model is saved as, and a note -> what to find.
FAMILIES: dict[str, Family] = {
    # Encoders.
    "BertForMaskedLM": _bert(SMALL, "bert"),
    "RobertaForMaskedLM": _bert(SMALL, "roberta"),
    "XLMRobertaForMaskedLM": _bert(SMALL, "roberta"),
    "CamembertForMaskedLM": _bert(SMALL, "roberta"),
    "ElectraForMaskedLM": _bert({**SMALL, "embedding_size": 16}, "electra"),
    # Decoders with one kind of norm before attention and MLP.
    "BertLMHeadModel": _bert({**SMALL, "is_decoder": True}, "bert"),
    "GPT2LMHeadModel": Family(GPT2, "transformer.h", "attn.c_proj"),
    "GPTBigCodeForCausalLM": Family(GPT2, "transformer.h", "attn.c_proj"),
    "OpenAIGPTLMHeadModel": Family({**GPT2, "afn": "gelu"}, "transformer.h", "attn.c_proj", "post_ln"),
    "GPTNeoForCausalLM": Family(
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "window_size": 3,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
        "transformer.h",
        "attn.attention.out_proj",
    ),
    "BloomForCausalLM": Family(
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "transformer.h", "self_attention.dense"
    ),
    "MptForCausalLM": Family(
        {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        "transformer.blocks",
        "attn.out_proj",
    ),
    # Kinks need finer rules, hence gelu.
    "OPTForCausalLM": Family(
        {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "activation_function": "gelu"},
        "model.decoder.layers",
        "self_attn.out_proj",
    ),
    "XGLMForCausalLM": Family(
        {"vocab_size": VOCAB, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
        out="self_attn.out_proj",
    ),
    "OPTForCausalLM, norms after": Family(
        {
            **SMALL,
            "ffn_dim": 48,
            "word_embed_proj_dim": 16,
            "activation_function": "gelu",
            "do_layer_norm_before": False,
        },
        "model.decoder.layers",
        "self_attn.out_proj",
        "post_ln",
    ),
    "LlamaForSequenceClassification": Family(GQA),
    "LlamaForCausalLM": Family(GQA),
    "MistralForCausalLM": Family({**GQA, "sliding_window": 3}),
    "MinistralForCausalLM": Family({**_HEADS, "sliding_window": 3}),
    "Ministral3ForCausalLM": Family(_HEADS),
    "CwmForCausalLM": Family({**_HEADS, "sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]}),
    "HeliumForCausalLM": Family(_HEADS),
    "ArceeForCausalLM": Family({**GQA, "hidden_act": "gelu"}),
    "Jais2ForCausalLM": Family({**GQA, "hidden_act": "gelu"}),
    "SeedOssForCausalLM": Family(_HEADS),
    "Qwen2ForCausalLM": Family(GQA),
    "StableLmForCausalLM": Family(GQA),
    "Starcoder2ForCausalLM": Family(GQA),
    "GemmaForCausalLM": Family(_HEADS),
    "GlmForCausalLM": Family(_HEADS),
    "OlmoForCausalLM": Family(GQA),
    "NemotronForCausalLM": Family({**GQA, "hidden_act": "gelu"}),
    "Phi3ForCausalLM": Family(GQA),
    "SmolLM3ForCausalLM": Family(GQA),
    "Ernie4_5ForCausalLM": Family(GQA),
    "ModernBertDecoderForCausalLM": Family(
        {
            **SMALL,
            "local_attention": 4,
            "global_attn_every_n_layers": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 1,
            "cls_token_id": 1,
            "sep_token_id": 1,
        },
        out="attn.Wo",
    ),
    "GraniteForCausalLM": Family(
        {**GQA, "residual_multiplier": 0.22, "attention_multiplier": 0.3, "embedding_multiplier": 2.0},
        layout="scaled_pre_ln",
    ),
    # Attention and MLP side by side.
    "GPTJForCausalLM": Family({**GPT2, "rotary_dim": 4}, "transformer.h", "attn.out_proj", "parallel"),
    "CodeGenForCausalLM": Family({**GPT2, "rotary_dim": 4}, "transformer.h", "attn.out_proj", "parallel"),
    "GPTNeoXForCausalLM": Family(SMALL, "gpt_neox.layers", "attention.dense", "parallel"),
    "GPTNeoXForCausalLM, one after the other": Family(
        {**SMALL, "use_parallel_residual": False}, "gpt_neox.layers", "attention.dense"
    ),
    "PhiForCausalLM": Family({**SMALL, "pad_token_id": 0}, out="self_attn.dense", layout="parallel"),
    "CohereForCausalLM": Family(GQA, layout="parallel"),
    "Cohere2ForCausalLM": Family({**GQA, "sliding_window": 3}, layout="parallel"),
    "FalconForCausalLM": _falcon(multi_query=True, parallel_attn=True),
    "FalconForCausalLM, one after the other": _falcon("pre_ln", bias=True),
    "FalconForCausalLM, ALiBi": _falcon("pre_ln", alibi=True),
    "FalconForCausalLM, 40B": _falcon(**_GROUPED, multi_query=True, bias=True),
    "FalconForCausalLM, 11B": _falcon(**_GROUPED, num_ln_in_parallel_attn=1),
    # More norms, caps, sinks, latent attention.
    "Qwen3ForCausalLM": _layout(_HEADS),
    "ApertusForCausalLM": _layout(GQA),
    "NanoChatForCausalLM": _layout(_HEADS),
    "HunYuanDenseV1ForCausalLM": _layout(_HEADS, wrong_on="3."),  # rotates before it norms queries and keys
    "BitNetForCausalLM": _no_messages(GQA),
    "StableLmForCausalLM, parallel": _layout({**GQA, "use_parallel_residual": True, "qk_layernorm": True}, "parallel"),
    "Glm4ForCausalLM": Family(_HEADS, layout="pre_post_ln"),
    "Olmo2ForCausalLM": _layout(GQA, "pre_post_ln"),
    "Olmo3ForCausalLM": _layout(
        {**GQA, "sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]}, "pre_post_ln"
    ),
    "Exaone4ForCausalLM": _layout({**GQA, "sliding_window": 3}, "pre_post_ln"),
    "Gemma2ForCausalLM": _layout(_CAPPED, "pre_post_ln"),
    "Gemma3ForCausalLM": _layout({**_HEADS, "sliding_window": 3, "query_pre_attn_scalar": 8}, "pre_post_ln"),
    "VaultGemmaForCausalLM": _layout(_CAPPED),
    "Llama4ForCausalLM": _layout(
        {
            **_HEADS,
            **_EXPERTS,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 4,
            "interleave_moe_layer_step": 3,
        }
    ),
    "DeepseekV2ForCausalLM": _latent(first_k_dense_replace=2),
    "DeepseekV2ForCausalLM, latent queries": _latent(first_k_dense_replace=2, q_lora_rank=8),
    "DeepseekV2ForCausalLM, experts": _latent(first_k_dense_replace=1),
    "DeepseekV3ForCausalLM": _latent(first_k_dense_replace=2),
    "DeepseekV3ForCausalLM, latent queries": _latent(first_k_dense_replace=2, q_lora_rank=8),
    "DeepseekV3ForCausalLM, experts": _latent(first_k_dense_replace=1),
    "YoutuForCausalLM": _latent(tie_word_embeddings=False),
    "Glm4MoeLiteForCausalLM": _latent(mlp_layer_types=["dense", "dense"], q_lora_rank=8),
    "GlmMoeDsaForCausalLM": _latent(
        mlp_layer_types=["dense", "dense"], q_lora_rank=8, index_head_dim=8, index_n_heads=2, index_topk=64
    ),
    # Experts.
    "MixtralForCausalLM": Family({**GQA, **_EXPERTS}),
    "Qwen2MoeForCausalLM": Family({**GQA, **_EXPERTS}),
    "Qwen3MoeForCausalLM": _layout({**_HEADS, **_EXPERTS}),
    "OlmoeForCausalLM": _layout({**GQA, **_EXPERTS}),
    "FlexOlmoForCausalLM": _layout({**GQA, **_EXPERTS}, "pre_post_ln"),
    "GptOssForCausalLM": Family({**_HEADS, **_EXPERTS, "sliding_window": 3}),  # sinks
    "Glm4MoeForCausalLM": Family({**_HEADS, **_EXPERTS, "first_k_dense_replace": 1, "n_shared_experts": 1}),
    "Ernie4_5_MoeForCausalLM": Family({**GQA, **_EXPERTS}),
    "GraniteMoeForCausalLM": Family(
        {**GQA, **_EXPERTS, "residual_multiplier": 0.22, "attention_multiplier": 0.3}, layout="scaled_pre_ln"
    ),
    # An expert is weighed against those alone that come near it, which jumps; the noise says how near.
    "PhimoeForCausalLM, experts held": Family(
        {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.3}, experts="held"
    ),
    "MiniMaxM2ForCausalLM": _layout({**_HEADS, **_EXPERTS, "rotary_dim": 4}),
    "AfmoeForCausalLM": _no_messages({**_HEADS, **_EXPERTS}, "pre_post_ln"),
    "LagunaForCausalLM": _no_messages({**_HEADS, **_EXPERTS}),
    # Attention in some blocks only, which are held like any others, and what stands in its place in the others.
    "JambaForCausalLM": Family(_JAMBA),
    "JambaForCausalLM, Mamba": _mixer(_JAMBA),
    "BambaForCausalLM": Family(_BAMBA),
    "BambaForCausalLM, Mamba 2": _mixer(_BAMBA),
    "GraniteMoeHybridForCausalLM": Family({**_GRANITE_HYBRID, "layer_types": ["attention"] * 2}),
    "GraniteMoeHybridForCausalLM, Mamba 2": _mixer({**_GRANITE_HYBRID, "layer_types": ["mamba", "attention"]}),
    "GraniteMoeHybridForCausalLM, rotary": Family(
        {
            **GQA,
            **_MAMBA,
            "num_local_experts": 0,
            "layer_types": ["attention"] * 2,
            "shared_intermediate_size": 24,
            "position_embedding_type": "rope",
            "residual_multiplier": 0.3,
        },
        layout="scaled_pre_ln",
    ),
    "Lfm2ForCausalLM": _layout(_LFM2, out="self_attn.out_proj"),
    "Lfm2ForCausalLM, convolution": _mixer(_LFM2),
    "Lfm2MoeForCausalLM": _layout({**_LFM2, **_EXPERTS, "num_dense_layers": 1}, out="self_attn.out_proj"),
    "NemotronHForCausalLM": Family(_NEMOTRON_H, out="mixer.o_proj"),
    "NemotronHForCausalLM, Mamba 2": _mixer(_NEMOTRON_H),
    "NemotronHForCausalLM, MLP": _mixer(_NEMOTRON_H, layer=2),
    "NemotronHForCausalLM, experts": _mixer(_NEMOTRON_H, layer=3),
    "OlmoHybridForCausalLM": _layout({**_DELTA, "linear_num_key_heads": 4}, "pre_post_ln"),
    "OlmoHybridForCausalLM, delta rule": _mixer({**_DELTA, "linear_num_key_heads": 4}),
    # Of these TransformerLens 3.9 cannot run the other blocks.
    "Qwen3_5ForCausalLM": _no_messages(_DELTA, wrong_on="3."),
    "Qwen3_5ForCausalLM, delta rule": _mixer(_DELTA, wrong_on="3."),
    "Qwen3_5MoeForCausalLM": _no_messages({**_DELTA, **_EXPERTS}, wrong_on="3."),
    "Qwen3NextForCausalLM": _no_messages({**_DELTA, **_EXPERTS}, wrong_on="3."),
    "Qwen3NextForCausalLM, delta rule": _mixer({**_DELTA, **_EXPERTS}, wrong_on="3."),
    "RecurrentGemmaForCausalLM": Family(_RECURRENT_GEMMA, out="temporal_block.o_proj"),
    "RecurrentGemmaForCausalLM, RG-LRU": _mixer(_RECURRENT_GEMMA),
    # No block with separable heads: none at all, experts with heads of their own (JetMoE), a recurrence beside them
    # (Falcon-H1) or behind them (Zamba 2).
    "MambaForCausalLM": _mixer({**SMALL, "state_size": 4}, "backbone.layers", layer=1),
    "FalconMambaForCausalLM": _mixer({**SMALL, "state_size": 4}, "backbone.layers", layer=1),
    "Mamba2ForCausalLM": _mixer(
        {**SMALL, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 3},
        "backbone.layers",
        layer=1,
    ),
    "RwkvForCausalLM": _mixer({**_RWKV, "rescale_every": 1}, "rwkv.blocks", layer=1),
    "RwkvForCausalLM, first block": _mixer(_RWKV, "rwkv.blocks"),
    "JetMoeForCausalLM": _mixer(
        {**SMALL, **_EXPERTS, "num_key_value_heads": 2, "kv_channels": 8, "activation_function": "silu"}, layer=1
    ),
    "FalconH1ForCausalLM": _mixer({**_HEADS, **_MAMBA, "mamba_d_ssm": 64}, layer=1),
    "Zamba2ForCausalLM": _mixer(_ZAMBA2, layer=1),
    "Zamba2ForCausalLM, Mamba 2": _mixer(_ZAMBA2),
}
