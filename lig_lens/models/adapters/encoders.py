"""Encoders with BERT's layers under other names."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EncoderNames:
    """Module paths of a masked language model.

    Attributes:
        body: the encoder, `bert` in BERT.
        head: the head's first linear map.
        head_norm: its norm.
        unembed: its last linear map.
    """

    body: str
    head: str
    head_norm: str
    unembed: str


def encoder_adapter(names: EncoderNames) -> type:
    """TransformerLens' adapter of BERT, for modules of other names."""
    from transformer_lens.model_bridge.supported_architectures.bert import BertArchitectureAdapter

    class EncoderAdapter(BertArchitectureAdapter):  # type: ignore[misc]
        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            heads = {"mlm_head": names.head, "ln_final": names.head_norm, "unembed": names.unembed}
            for key, component in self.component_mapping.items():
                component.name = heads.get(key) or component.name.replace("bert.", f"{names.body}.", 1)

        def prepare_model(self, hf_model: Any) -> None:
            super().prepare_model(hf_model)
            table = getattr(hf_model, names.body).embeddings.position_embeddings
            if table.padding_idx is not None:  # RoBERTa's positions begin after the one of padding
                self.cfg.n_ctx = table.num_embeddings - table.padding_idx - 1

    return EncoderAdapter
