"""Which architecture serves a checkpoint, and the class of transformers that it is loaded as."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lig_lens.errors import InputError
from lig_lens.models.adapters import ENCODERS, IMAGES, KIN, MENDED, T5_ENCODERS
from lig_lens.models.adapters.classifiers import classifier_adapter
from lig_lens.models.adapters.encoders import encoder_adapter
from lig_lens.models.adapters.images import image_adapter
from lig_lens.models.adapters.t5_encoder import t5_encoder_adapter
from lig_lens.models.heads import left_out

_CLASSIFIER = "ForSequenceClassification"
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM")


@dataclass(frozen=True)
class Served:
    """How a checkpoint is loaded.

    Attributes:
        architecture: that the bridge is asked for.
        saved: the class that the model was saved as, empty where its config does not say.
        kind: the class of transformers, automatic or not, that it is loaded as.
    """

    architecture: str
    saved: str
    kind: Any

    def other_head(self, loaded: str) -> bool:
        """Whether the model was saved with a head that the class that it was loaded as has not."""
        return left_out(self.saved, loaded)


def served(source: str) -> Served:
    """How the checkpoint at `source` is loaded.

    Raises:
        InputError: no adapter for it.
    """
    import transformers
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformer_lens.model_bridge.sources.transformers import get_hf_model_class_for_architecture

    # Not asked on the terminal, as transformers would.
    config = transformers.AutoConfig.from_pretrained(_without_alias(source), trust_remote_code=False)
    saved = next(iter(getattr(config, "architectures", None) or [""]))
    _register_ours()
    if saved in IMAGES or saved in T5_ENCODERS:
        return Served(saved, saved, getattr(transformers, saved))
    language = _language_model(config, saved)
    adapter = _mended(language)
    if saved.endswith(_CLASSIFIER) and hasattr(transformers, saved):
        if saved not in SUPPORTED_ARCHITECTURES:
            _register(saved, classifier_adapter(SUPPORTED_ARCHITECTURES[adapter]))
        return Served(saved, saved, getattr(transformers, saved))
    masked = language in ENCODERS
    kind = transformers.AutoModelForMaskedLM if masked else get_hf_model_class_for_architecture(language)
    return Served(adapter, saved, kind)


def _language_model(config: Any, saved: str) -> str:
    """The architecture whose adapter serves a model without its head.

    Raises:
        InputError: none does.
    """
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

    if saved in SUPPORTED_ARCHITECTURES:
        return saved
    language = _of_ours(config.model_type)
    if language is None and saved.endswith(_CLASSIFIER):
        kin = (saved.removesuffix(_CLASSIFIER) + ending for ending in _LANGUAGE_MODELS)
        language = next((one for one in kin if one in SUPPORTED_ARCHITECTURES), None)
    if language is not None:
        return language
    try:
        return str(determine_architecture_from_hf_config(config))
    except ValueError as error:
        raise InputError(
            f"{saved or 'A model'} (model_type {config.model_type!r}) is served neither by TransformerLens' bridge "
            f"nor by an adapter of lig_lens ({len(SUPPORTED_ARCHITECTURES)} architectures are): load a model of "
            "another family."
        ) from error


def _mended(architecture: str) -> str:
    """The name of this package's own adapter, where TransformerLens' has a fault; else that of TransformerLens."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    if architecture not in MENDED:
        return architecture
    ours = f"LigLens{architecture}"
    if ours not in SUPPORTED_ARCHITECTURES:
        _register(ours, MENDED[architecture](SUPPORTED_ARCHITECTURES[architecture]))
    return ours


def _of_ours(model_type: str) -> str | None:
    """The language model among those of our tables that a model of this type can be loaded as."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    names = (MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type))
    return next((name for name in names if name in ENCODERS or name in KIN), None)


def _without_alias(name: str) -> str:
    """The hub id that TransformerLens loads for one of its own names, such as gpt2-small."""
    try:
        from transformer_lens.tools.model_registry.registry_io import resolve_model_alias
    except ImportError:  # 3.9
        from transformer_lens.supported_models import MODEL_ALIASES

        return next((official for official, aliases in MODEL_ALIASES.items() if name in aliases), name)
    return resolve_model_alias(name) or name


def _register_ours() -> None:
    """Let TransformerLens know the adapters of this package; its own are left in place."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    ours: dict[str, Callable[[], type]] = {
        **{name: functools.partial(encoder_adapter, encoder) for name, encoder in ENCODERS.items()},
        **{name: functools.partial(image_adapter, names) for name, names in IMAGES.items()},
        **dict.fromkeys(T5_ENCODERS, t5_encoder_adapter),
    }
    for name, make in ours.items():
        if name not in SUPPORTED_ARCHITECTURES:
            _register(name, make())
    for name, other in KIN.items():
        if name not in SUPPORTED_ARCHITECTURES and other in SUPPORTED_ARCHITECTURES:
            _register(name, SUPPORTED_ARCHITECTURES[other])


def _register(name: str, adapter: type) -> None:
    """Register an adapter: for the factory, and in the table in which loading looks a config's architecture up."""
    from transformer_lens.factories.architecture_adapter_factory import (
        SUPPORTED_ARCHITECTURES,
        ArchitectureAdapterFactory,
    )

    ArchitectureAdapterFactory.register_adapter(name, adapter)
    SUPPORTED_ARCHITECTURES[name] = adapter
