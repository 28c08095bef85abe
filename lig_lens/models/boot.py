"""A checkpoint in, a bridge out: as the class that it was saved as, and with what its loading found missing."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lig_lens.errors import InputError
from lig_lens.models.adapters import ENCODERS, KIN, MODEL_TYPES
from lig_lens.models.adapters.classifiers import classifier_adapter
from lig_lens.models.adapters.encoders import encoder_adapter
from lig_lens.models.heads import listed, note_head
from lig_lens.models.packaged import quiet_transformers

_CLASSIFIER = "ForSequenceClassification"


class _Loading:
    """A class of transformers as the bridge asks for it, which notes what its loading did not find."""

    def __init__(self, kind: Any) -> None:
        self.kind, self.__name__ = kind, kind.__name__
        self.missing: list[tuple[str, Tensor]] = []
        self.body: list[str] = []

    def from_pretrained(self, source: str, **options: Any) -> Any:
        """Load the model, and note weights that are in no file: those of its body, and those of its head."""
        model, info = self.kind.from_pretrained(source, output_loading_info=True, **options)
        weights = dict(model.named_parameters())
        prefix = f"{model.base_model_prefix}."
        has_head = prefix != "." and hasattr(model, model.base_model_prefix)
        for name in sorted(info["missing_keys"]):
            if name in weights and has_head and not name.startswith(prefix):
                self.missing.append((name, weights[name]))
            elif name in weights:
                self.body.append(name)
        return model

    def from_config(self, config: Any, **options: Any) -> Any:
        """Make the model with random weights."""
        make = getattr(self.kind, "from_config", None) or self.kind._from_config  # automatic classes, and others
        return make(config, **options)


def boot(source: str, name: str, device: "str | torch.device | None", dtype: torch.dtype, load_weights: bool) -> Any:
    """Load a model as a bridge with TransformerLens' familiar hook names.

    Args:
        source: a folder or a hub id.
        name: how the user called it.
        device: where to put the weights.
        dtype: of the weights.
        load_weights: False makes them at random.

    Raises:
        InputError: no model there, one that lacks weights below its head, or an architecture that is not served.
    """
    from transformer_lens.model_bridge import TransformerBridge

    with _named(source, name), quiet_transformers():
        architecture, saved, loading = _served(source)
        bridge = TransformerBridge.boot_transformers(
            source,
            device=device,
            dtype=dtype,
            load_weights=load_weights,
            model_class=loading,
            hf_config_overrides={"original_architecture": architecture},
        )
    if loading.body:
        raise InputError(
            f"{name!r} lacks weights of its blocks: {listed(loading.body)} stand in no file of it, and random ones "
            "would be explained. Save the whole model again."
        )
    if load_weights:
        note_head(bridge, saved, type(bridge.original_model).__name__, loading.missing)
    else:
        with contextlib.redirect_stdout(None):  # TransformerLens prints the dtype
            bridge.to(dtype)
        bridge.eval()
    bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    return bridge


def _served(source: str) -> tuple[str, str, _Loading]:
    """The architecture that the bridge is asked for, the class that a model was saved as, and the one to load.

    Raises:
        InputError: no adapter for it.
    """
    import transformers
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformer_lens.model_bridge.sources.transformers import (
        determine_architecture_from_hf_config,
        get_hf_model_class_for_architecture,
    )

    config = transformers.AutoConfig.from_pretrained(source)
    saved = next(iter(getattr(config, "architectures", None) or [""]))
    _register_ours()
    language = saved if saved in SUPPORTED_ARCHITECTURES else MODEL_TYPES.get(config.model_type)
    if language is None:
        try:
            language = determine_architecture_from_hf_config(config)
        except ValueError as error:
            raise InputError(
                f"{saved or 'A model'} (model_type {config.model_type!r}) is served neither by TransformerLens' bridge "
                f"nor by an adapter of lig_lens ({len(SUPPORTED_ARCHITECTURES)} architectures are): load a model of "
                "another family, or register an adapter with TransformerLens' ArchitectureAdapterFactory."
            ) from error
    if saved.endswith(_CLASSIFIER) and hasattr(transformers, saved):
        if saved not in SUPPORTED_ARCHITECTURES:
            _register(saved, classifier_adapter(SUPPORTED_ARCHITECTURES[language]))
        return saved, saved, _Loading(getattr(transformers, saved))
    if language in ENCODERS:
        return language, saved, _Loading(transformers.AutoModelForMaskedLM)
    return language, saved, _Loading(get_hf_model_class_for_architecture(language))


def _register_ours() -> None:
    """Let TransformerLens know the adapters of this package; its own are left in place."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    for name, names in ENCODERS.items():
        if name not in SUPPORTED_ARCHITECTURES:
            _register(name, encoder_adapter(names))
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


@contextlib.contextmanager
def _named(source: str, name: str) -> Iterator[None]:
    """Say of a model that cannot be loaded which it is.

    Raises:
        InputError: what libraries raise, with the name.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        if Path(source).is_dir():
            raise InputError(f"The folder {name!r} holds no model that can be loaded: {reason}") from error
        raise InputError(
            f"{name!r} is neither a local folder nor a model that can be fetched now ({reason}): give a folder saved "
            "with save_pretrained, 'minilm', 'smollm2', or a hub id while online (HF_HUB_OFFLINE unset)."
        ) from error
