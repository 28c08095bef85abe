"""Classifiers: the adapter of the language model of their family, with the head that classifies in place of its own."""

from typing import Any

from torch import nn

# Where transformers' classifiers have the linear map that gives the logits.
_HEADS = ("score", "classifier.out_proj", "classifier.dense2", "classifier")


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
            for key, component in list(self.components.items()):
                if component.name is not None and component.name not in modules:
                    del self.components[key]
            head = next((name for name in _HEADS if isinstance(modules.get(name), nn.Linear)), None)
            if head is not None:
                self.components["unembed"] = UnembeddingBridge(name=head, config=self.cfg)

    return ClassifierAdapter
