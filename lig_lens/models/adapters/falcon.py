"""Falcon as its user runs it: the bias of ALiBi once, and the joint queries, keys and values of grouped heads.

transformers 5.23 puts ALiBi's bias into the mask, and its eager attention, which the bridge follows, adds it again; the
attention that it takes by default does not. Models of the newer kind (40B, 180B) keep queries, keys and values group by
group, and the smallest of them have one norm in front of attention and MLP; the bridge knows neither.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def falcon_adapter(of_transformer_lens: type) -> type:
    """TransformerLens' adapter of Falcon, with these three mended."""
    from transformer_lens.model_bridge.generalized_components import LinearBridge, NormalizationBridge

    class FalconAdapter(of_transformer_lens):  # type: ignore[misc]
        def __init__(self, cfg: Any) -> None:
            if getattr(cfg, "new_decoder_architecture", False):
                cfg.multi_query = False  # which the published configs say, and which means nothing there
            super().__init__(cfg)
            if self._is_alibi:
                parts = {"qkv": LinearBridge(name="query_key_value"), "o": LinearBridge(name="dense")}
                self._parts["attn"] = _once_biased()(
                    name="self_attention", config=cfg, split_qkv_matrix=self._split_falcon_qkv, submodules=parts
                )

        @property
        def _parts(self) -> dict[str, Any]:
            parts: dict[str, Any] = self.component_mapping["blocks"].submodules
            return parts

        def prepare_model(self, hf_model: Any) -> None:
            super().prepare_model(hf_model)
            layer = hf_model.transformer.h[0]
            if self._is_new_arch:
                two = hasattr(layer, "ln_attn")
                self._parts["ln1"].name = "ln_attn" if two else "input_layernorm"
                if two:
                    self._parts["ln2"] = NormalizationBridge(name="ln_mlp", config=self.cfg)

        def _split_falcon_qkv(self, original_attention_component: Any) -> Sequence[nn.Linear]:
            if not self._is_new_arch:
                split: Sequence[nn.Linear] = super()._split_falcon_qkv(original_attention_component)
                return split
            qkv = original_attention_component.query_key_value
            groups = int(original_attention_component.num_kv_heads)
            weights = _by_group(qkv.weight.detach(), self.cfg.n_heads, groups)
            biases = [None] * 3 if qkv.bias is None else _by_group(qkv.bias.detach(), self.cfg.n_heads, groups)
            return [_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]

    return FalconAdapter


def _by_group(joint: Tensor, n_heads: int, groups: int) -> list[Tensor]:
    """Queries, keys and values of weights or biases in which each group has its queries, one key and one value."""
    queries = n_heads // groups
    rows = joint.reshape(groups, queries + 2, -1, *joint.shape[1:])
    parts = (rows[:, :queries], rows[:, queries : queries + 1], rows[:, queries + 1 :])
    return [part.reshape(-1, *joint.shape[1:]) for part in parts]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(
        weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    linear.weight = nn.Parameter(weight.clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone())
    return linear


def _once_biased() -> type:
    """Attention that adds ALiBi's bias unless the mask, which then has one plane for each head, holds it."""
    from transformer_lens.model_bridge.generalized_components import ALiBiJointQKVAttentionBridge

    class OnceBiasedAttention(ALiBiJointQKVAttentionBridge):  # type: ignore[misc]
        def _reconstruct_attention(self, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
            mask = kwargs.get("attention_mask")
            if isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[1] == self.config.n_heads:
                kwargs["alibi"] = None
            return super()._reconstruct_attention(q, k, v, **kwargs)

    return OnceBiasedAttention
