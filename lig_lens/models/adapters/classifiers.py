"""Classifiers: the adapter of the language model of their family, with the head that classifies in place of its own."""

from typing import Any

from torch import nn

from lig_lens.errors import InputError

# Where transformers' classifiers have the linear map that gives the logits.
_LOGITS = ("score", "classifier.out_proj", "classifier")
# Components of adapters that belong to a language model's head.
_LANGUAGE_HEAD = ("mlm_head", "ln_final", "unembed")


def classifier_adapter(of_language_model: type) -> type:
    """An adapter for models that were saved with a classification head.

    Args:
        of_language_model: the adapter of the same family's language model.
    """
    from transformer_lens.model_bridge.generalized_components import UnembeddingBridge

    class ClassifierAdapter(of_language_model):  # type: ignore[misc]
        def prepare_model(self, hf_model: Any) -> None:
            super().prepare_model(hf_model)
            modules = dict(hf_model.named_modules())
            for key in _LANGUAGE_HEAD:
                if key in self.components and self.components[key].name not in modules:
                    del self.components[key]
            head = next((name for name in _LOGITS if isinstance(modules.get(name), nn.Linear)), None)
            strange = [c.name for c in self.components.values() if c.name is not None and c.name not in modules]
            if head is None or strange:
                lacks = strange[0] if strange else f"linear map {' or '.join(_LOGITS)}"
                raise InputError(
                    f"{type(hf_model).__name__} is no classifier that lig_lens knows, it has no {lacks}: load the "
                    "model that it was made of."
                )
            self.components["unembed"] = UnembeddingBridge(name=head, config=self.cfg)

    return ClassifierAdapter
