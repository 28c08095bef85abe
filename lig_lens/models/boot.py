"""A checkpoint in, a bridge out: as the class that it was saved as, and with what its loading found missing."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lig_lens.errors import BridgeWarning, InputError
from lig_lens.models.adapters import ENCODERS, KIN, MODEL_TYPES, T5_ENCODERS
from lig_lens.models.adapters.classifiers import classifier_adapter
from lig_lens.models.adapters.encoders import encoder_adapter
from lig_lens.models.adapters.t5_encoder import t5_encoder_adapter
from lig_lens.models.heads import listed, note_head
from lig_lens.models.packaged import quiet_transformers
from lig_lens.models.running import HALF, first_tensor

_CLASSIFIER = "ForSequenceClassification"
# A prompt that every vocabulary has, and how far logits on it may be apart, relative to their spread: rounding in
# single and in half precision.
_PROBE = (5, 9, 7, 11)
_APART, _HALF_APART = 1e-3, 5e-2


class _Loading:
    """A class of transformers as the bridge asks for it, which notes what its loading did not find."""

    def __init__(self, kind: Any) -> None:
        self.kind, self.__name__ = kind, kind.__name__
        self.of_head: list[tuple[str, Tensor]] = []
        self.of_body: list[str] = []
        self.logits: Tensor | None = None

    def from_pretrained(self, source: str, **options: Any) -> Any:
        """Load the model, and note weights that are in no file: those of its body, and those of its head."""
        if Path(source).is_dir():
            options.pop("use_safetensors", None)  # some adapters know in which format a hub has their models
        model, info = self.kind.from_pretrained(source, output_loading_info=True, **options)
        weights = dict(model.named_parameters())
        prefix = f"{model.base_model_prefix}."
        has_body = prefix != "." and hasattr(model, model.base_model_prefix)
        unembed = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        of_unembed = {id(weight) for weight in unembed.parameters()} if isinstance(unembed, torch.nn.Module) else set()
        for name in sorted(info["missing_keys"] & weights.keys()):
            if id(weights[name]) in of_unembed or (has_body and not name.startswith(prefix)):
                self.of_head.append((name, weights[name]))
            else:
                self.of_body.append(name)
        self.logits = _plain_logits(model, lambda: self._again(source, **options))
        return model

    def _again(self, source: str, **options: Any) -> Any:
        """The model as its user loads it, where the class settles its attention when it is made."""
        config = copy.deepcopy(options.pop("config"))
        options.pop("attn_implementation", None)
        # The bridge asks for attentions, which transformers gives with eager attention alone.
        config._attn_implementation, config.output_attentions = None, False
        return self.kind.from_pretrained(source, config=config, **options).eval()

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
    vars(bridge.original_model.config).pop("original_architecture", None)
    loaded = type(bridge.original_model).__name__
    if loading.of_body:
        raise InputError(
            f"{name!r} lacks weights of its blocks: {listed(loading.of_body)} stand in no file of it, and random ones "
            f"would be explained. It was saved as {saved or 'an unknown class'} and loaded as {loaded}: take a model "
            "that was saved whole."
        )
    if architecture in T5_ENCODERS:  # else what ends a text would be put in front of it
        bridge.cfg.default_prepend_bos, bridge.cfg.tokenizer_appends_eos = bridge.cfg.tokenizer_prepends_bos, False
    if load_weights:
        note_head(bridge, saved, loaded, loading.of_head)
        _compare(bridge, loading.logits, name)
    else:
        with contextlib.redirect_stdout(None):  # TransformerLens prints the dtype
            bridge.to(dtype)
        bridge.eval()
    bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    return bridge


@torch.no_grad()
def _plain_logits(model: Any, load_again: Callable[[], Any]) -> Tensor | None:
    """Logits of a plain model as its user runs it, with the attention that transformers takes by default.

    Of a model without a head its vectors; None where it takes no token ids alone.
    """
    taken = getattr(model.config, "_attn_implementation", None)
    model.eval()
    try:
        with contextlib.suppress(ValueError, ImportError, AttributeError):
            model.set_attn_implementation("sdpa")
        switched = getattr(model.config, "_attn_implementation", None) == "sdpa"
        plain = model if switched or not getattr(model, "_supports_sdpa", False) else load_again()
        output = plain(input_ids=torch.tensor([_PROBE]), **_decoder_probe(plain))
        logits = output.logits if hasattr(output, "logits") else output.last_hidden_state
        return logits.float() if isinstance(logits, Tensor) else None
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError):
        return None
    finally:
        if taken is not None:
            model.set_attn_implementation(taken)


def _decoder_probe(model: Any) -> dict[str, Tensor]:
    """What a plain model takes beside the probe; left out, a decoder gets one thing here and another in a bridge."""
    two_sided = bool(getattr(model.config, "is_encoder_decoder", False))
    return {"decoder_input_ids": torch.tensor([_PROBE[::-1]])} if two_sided else {}


@torch.no_grad()
def _compare(bridge: Any, plain: Tensor | None, name: str) -> None:
    """Warn if a bridge gives other logits than the plain model did."""
    if plain is None:
        return
    given = {name: ids.to(bridge.cfg.device) for name, ids in _decoder_probe(bridge.original_model).items()}
    try:
        found = first_tensor(bridge(torch.tensor([_PROBE], device=bridge.cfg.device), **given)).cpu().float()
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        versions = ", ".join(f"{package} {version(package)}" for package in ("transformer_lens", "transformers"))
        raise InputError(
            f"TransformerLens' bridge of {name!r} does not run ({reason}), although the plain "
            f"{type(bridge.original_model).__name__} does ({versions}): take another version of TransformerLens."
        ) from error
    spread = float((plain - plain.mean(-1, keepdim=True)).abs().max())
    apart = float((found - plain).abs().max()) / max(spread, 1e-30) if found.shape == plain.shape else float("inf")
    if not apart <= (_HALF_APART if bridge.cfg.dtype in HALF else _APART):
        warnings.warn(
            f"TransformerLens' bridge of {name!r} gives other logits than the plain "
            f"{type(bridge.original_model).__name__} as transformers runs it (apart by {apart:.1e} of their spread): "
            "contributions are to what the bridge computes. Try another version of TransformerLens or transformers.",
            BridgeWarning,
            stacklevel=4,  # the caller of load_model
        )


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

    config = transformers.AutoConfig.from_pretrained(_without_alias(source))
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
                "another family."
            ) from error
    if saved.endswith(_CLASSIFIER) and hasattr(transformers, saved):
        if saved not in SUPPORTED_ARCHITECTURES:
            _register(saved, classifier_adapter(SUPPORTED_ARCHITECTURES[language]))
        return saved, saved, _Loading(getattr(transformers, saved))
    if language in T5_ENCODERS:
        return language, saved, _Loading(getattr(transformers, language))
    if language in ENCODERS:
        return language, saved, _Loading(transformers.AutoModelForMaskedLM)
    return language, saved, _Loading(get_hf_model_class_for_architecture(language))


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

    for name, names in ENCODERS.items():
        if name not in SUPPORTED_ARCHITECTURES:
            _register(name, encoder_adapter(names))
    for name in T5_ENCODERS:
        if name not in SUPPORTED_ARCHITECTURES:
            _register(name, t5_encoder_adapter())
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
    except (InputError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if Path(source).is_dir():
            raise InputError(f"The folder {name!r} holds no model that can be loaded: {reason}") from error
        raise InputError(
            f"{name!r} is neither a local folder nor a model that can be fetched now ({reason}): give a folder saved "
            "with save_pretrained, 'minilm', 'smollm2', or a hub id while online (HF_HUB_OFFLINE unset)."
        ) from error
