"""Encoders with BERT's layers under other names, or with their norms before attention and MLP."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

# Components that some models of a family lack, or have under names of their own: DeBERTa has two heads, of which one
# unembeds without a module.
_OPTIONAL = ("token_type_embed", "pos_embed", "embed_ln", "mlm_head", "ln_final", "unembed")
# Hooks of a block with its norms after each sum, where TransformerLens' names for BERT show something else.
_HOOKS = {"hook_attn_out": "attn.o.hook_out"}
_POST_LN_HOOKS = {"hook_resid_mid": "ln1.hook_in"}


def _as_it_is(_body: nn.Module) -> None:
    """No module of the model has to change."""


@dataclass(frozen=True)
class Encoder:
    """A masked language model, and where it has what BERT has.

    Attributes:
        body: the encoder's name in the model, `bert` in BERT.
        names: component of TransformerLens' adapter of BERT -> module, where it goes by another name: relative to what
            is around it in a block, else whole, with `{body}` for the encoder's.
        pre_ln: norms stand before attention and MLP.
        gated: the MLP has a gate.
        prepare: gives the encoder's modules a shape that hooks can be put on; what is computed stays.
    """

    body: str
    names: Mapping[str, str]
    pre_ln: bool = False
    gated: bool = False
    prepare: Callable[[Any], None] = _as_it_is


def encoder_adapter(encoder: Encoder) -> type:
    """TransformerLens' adapter of BERT, for another encoder's modules."""
    from transformer_lens.model_bridge.generalized_components import GatedMLPBridge, LinearBridge
    from transformer_lens.model_bridge.supported_architectures.bert import BertArchitectureAdapter

    class EncoderAdapter(BertArchitectureAdapter):  # type: ignore[misc]
        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            blocks = self.component_mapping["blocks"]
            if encoder.gated:
                self.cfg.gated_mlp = True
                parts = {part: LinearBridge(name=None) for part in ("gate", "in", "out")}
                blocks.submodules["mlp"] = GatedMLPBridge(name=None, config=self.cfg, submodules=parts)
            own = _HOOKS if encoder.pre_ln else {**_HOOKS, **_POST_LN_HOOKS}
            blocks.hook_aliases = {**blocks.hook_aliases, **own}
            for component in self.component_mapping.values():
                component.name = component.name.replace("bert.", f"{encoder.body}.", 1)
            for path, name in encoder.names.items():
                key, *inner = path.split(".")
                component = self.component_mapping[key]
                for part in inner:
                    component = component.submodules[part]
                component.name = name.format(body=encoder.body)

        def prepare_model(self, hf_model: Any) -> None:
            super().prepare_model(hf_model)
            encoder.prepare(getattr(hf_model, encoder.body))
            modules = dict(hf_model.named_modules())
            for key in _OPTIONAL:
                if self.components[key].name not in modules:
                    del self.components[key]
            layers = modules[self.components["blocks"].name]
            self.cfg.n_layers = len(layers)
            norm = layers[-1].get_submodule(self.components["blocks"].submodules["ln2"].name)
            self.cfg.eps = getattr(norm, "eps", None) or norm.variance_epsilon
            if "pos_embed" not in self.components:
                self.cfg.positional_embedding_type = "rotary"  # no weights of positions that TransformerLens could fold
                return
            table = modules[self.components["pos_embed"].name]
            if table.padding_idx is not None:  # RoBERTa's positions begin after padding's
                self.cfg.n_ctx = table.num_embeddings - table.padding_idx - 1

    return EncoderAdapter
