"""The tiny models as HookedTransformer and HookedEncoder, where TransformerLens still has them (up to 3.9)."""

import functools
from typing import Any

import torch
import transformers
from tiny_models import tiny_hf


def has_hooked_transformer() -> bool:
    try:
        import transformer_lens

        return hasattr(transformer_lens, "HookedTransformer")
    except ImportError:
        return False


def _common(hf: Any) -> dict[str, Any]:
    c = hf.config
    return {
        "n_layers": c.num_hidden_layers,
        "d_model": c.hidden_size,
        "n_heads": c.num_attention_heads,
        "n_ctx": c.max_position_embeddings,
        "d_vocab": c.vocab_size,
        "init_weights": False,
        "device": "cpu",
    }


def _gpt2(hf: Any) -> tuple[dict[str, Any], Any]:
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    c = hf.config
    cfg = {"d_head": c.n_embd // c.n_head, "act_fn": "gelu_new", "normalization_type": "LN"}
    cfg |= {"eps": c.layer_norm_epsilon, "d_mlp": c.n_inner or 4 * c.n_embd}
    return cfg, convert_gpt2_weights


def _llama(hf: Any) -> tuple[dict[str, Any], Any]:
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    c = hf.config
    cfg = {"d_head": c.head_dim, "n_key_value_heads": c.num_key_value_heads, "d_mlp": c.intermediate_size}
    cfg |= {"act_fn": "silu", "normalization_type": "RMS", "positional_embedding_type": "rotary"}
    cfg |= {"rotary_dim": c.head_dim, "rotary_adjacent_pairs": False, "gated_mlp": True, "final_rms": True}
    cfg |= {"eps": c.rms_norm_eps, "original_architecture": "LlamaForCausalLM"}
    return cfg, convert_llama_weights


def _neox(hf: Any) -> tuple[dict[str, Any], Any]:
    from transformer_lens.pretrained.weight_conversions import convert_neox_weights

    c = hf.config
    d_head = c.hidden_size // c.num_attention_heads
    cfg = {"d_head": d_head, "d_mlp": c.intermediate_size, "act_fn": "gelu", "normalization_type": "LN"}
    cfg |= {"positional_embedding_type": "rotary", "rotary_adjacent_pairs": False}
    cfg |= {"rotary_dim": int(c.rope_parameters["partial_rotary_factor"] * d_head)}
    cfg |= {"parallel_attn_mlp": True, "eps": c.layer_norm_eps}
    return cfg, convert_neox_weights


def _gemma2(hf: Any) -> tuple[dict[str, Any], Any]:
    from transformer_lens.pretrained.weight_conversions import convert_gemma_weights

    c = hf.config
    cfg = {"d_head": c.head_dim, "n_key_value_heads": c.num_key_value_heads, "d_mlp": c.intermediate_size}
    cfg |= {"act_fn": "gelu_pytorch_tanh", "normalization_type": "RMS", "gated_mlp": True, "final_rms": True}
    cfg |= {"positional_embedding_type": "rotary", "rotary_dim": c.head_dim, "eps": c.rms_norm_eps}
    cfg |= {"use_normalization_before_and_after": True, "attn_scores_soft_cap": c.attn_logit_softcapping}
    cfg |= {"output_logits_soft_cap": c.final_logit_softcapping, "attn_scale": c.query_pre_attn_scalar**0.5}
    cfg |= {"use_local_attn": True, "window_size": c.sliding_window, "attn_types": ["local", "global"]}
    cfg |= {"original_architecture": "Gemma2ForCausalLM"}
    return cfg, convert_gemma_weights


_KINDS = {"gpt2": _gpt2, "llama": _llama, "neox": _neox, "gemma2": _gemma2}
HOOKED_KINDS = (*_KINDS, "bert")


@functools.lru_cache
def tiny_hooked(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny model of `kind` as HookedTransformer, or HookedEncoder for bert, unprocessed weights."""
    from transformer_lens import HookedEncoder, HookedTransformer, HookedTransformerConfig

    hf = tiny_hf(kind).float()
    if kind == "bert":
        from transformer_lens.pretrained.weight_conversions import convert_bert_weights

        c = hf.config
        # The converter wants the heads of pre-training; no block uses them.
        bare, hf = hf, transformers.BertForPreTraining(c)
        hf.load_state_dict(bare.state_dict(), strict=False)
        extra = {"d_head": c.hidden_size // c.num_attention_heads, "d_mlp": c.intermediate_size}
        extra |= {"act_fn": "gelu", "attention_dir": "bidirectional", "eps": c.layer_norm_eps}
        cfg = HookedTransformerConfig(**_common(hf), **extra, original_architecture="BertForMaskedLM")
        model = HookedEncoder(cfg, move_to_device=False)
        model.load_state_dict(convert_bert_weights(hf, cfg), strict=False)
    else:
        extra, convert = _KINDS[kind](hf)
        cfg = HookedTransformerConfig(**_common(hf), **extra)
        model = HookedTransformer(cfg, move_to_device=False)
        model.load_state_dict(convert(hf, cfg), strict=False)
    return model.to(dtype).eval()
