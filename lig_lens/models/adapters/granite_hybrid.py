"""Granite's hybrids that know no positions (Granite 4): they lack the module of rotary angles that the bridge wraps."""

from typing import Any


def granite_hybrid_adapter(of_transformer_lens: type) -> type:
    """TransformerLens' adapter of GraniteMoeHybrid, for models with and without rotary positions."""

    class GraniteHybridAdapter(of_transformer_lens):  # type: ignore[misc]
        def prepare_model(self, hf_model: Any) -> None:
            super().prepare_model(hf_model)
            if getattr(hf_model.model, "rotary_emb", None) is None:
                self.component_mapping.pop("rotary_emb", None)
                self.cfg.positional_embedding_type = "none"

    return GraniteHybridAdapter
