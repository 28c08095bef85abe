"""Hybrids that keep attention and recurrences under one name, so that the bridge shows the heads of neither.

Layers that have attention get it under a name of its own; what the layer does with it stays as it is.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

_ATTENTION = "self_attn"


def with_attention(layers: str, mixer: str, norms: dict[str, str]) -> Callable[[type], type]:
    """What mends TransformerLens' adapter of such a family.

    Args:
        layers: where the model has its layers.
        mixer: what a layer calls its attention or its recurrence.
        norms: names of norms that the bridge does not show yet, by what TransformerLens calls them.
    """

    def mend(of_transformer_lens: type) -> type:
        from transformer_lens.model_bridge.generalized_components import (
            AttentionBridge,
            LinearBridge,
            RMSNormalizationBridge,
        )

        class AttentionShown(of_transformer_lens):  # type: ignore[misc]
            def __init__(self, cfg: Any) -> None:
                super().__init__(cfg)
                parts = self.component_mapping["blocks"].submodules
                if "mixer" in parts:
                    parts["mixer"].optional = True
                parts |= {ours: RMSNormalizationBridge(name=name, config=self.cfg) for ours, name in norms.items()}
                parts["attn"] = AttentionBridge(
                    name=_ATTENTION,
                    config=self.cfg,
                    optional=True,
                    maintain_native_attention=True,
                    requires_attention_mask=True,
                    submodules={part: LinearBridge(name=f"{part}_proj") for part in ("q", "k", "v", "o")},
                )

            def prepare_model(self, hf_model: Any) -> None:
                super().prepare_model(hf_model)
                for layer in hf_model.get_submodule(layers):
                    if hasattr(getattr(layer, mixer), "q_proj"):
                        _rename(layer, mixer)

        return AttentionShown

    return mend


def _rename(layer: nn.Module, mixer: str) -> None:
    """Let a layer's mixer be its attention, which it goes on calling by both names."""
    layer.add_module(_ATTENTION, layer._modules.pop(mixer))
    kind = type(layer)
    both = {mixer: property(lambda self: getattr(self, _ATTENTION)), "__module__": kind.__module__}
    layer.__class__ = type(kind.__name__, (kind,), both)
