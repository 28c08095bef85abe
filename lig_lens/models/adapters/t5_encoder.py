"""T5's encoder alone, as it is saved for embeddings of texts: one stack of blocks, and no head."""

from typing import Any


def t5_encoder_adapter() -> type:
    """TransformerLens' adapter of T5, without what belongs to the decoder."""
    from transformer_lens.model_bridge.supported_architectures.t5 import T5ArchitectureAdapter

    class T5EncoderAdapter(T5ArchitectureAdapter):  # type: ignore[misc]
        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            parts: dict[str, Any] = self.components
            self.component_mapping = {
                "embed": parts["embed"],
                "pos_embed": parts["pos_embed"],
                "blocks": parts["encoder_blocks"],
                "ln_final": parts["encoder_ln_final"],
            }

    return T5EncoderAdapter
