"""A checkpoint in, a bridge out: as the class that it was saved as, and with what its loading found missing."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lig_lens.errors import BridgeWarning, InputError, LigLensError
from lig_lens.models.adapters import ENCODERS, KIN, MENDED, MODEL_TYPES
from lig_lens.models.adapters.classifiers import classifier_adapter
from lig_lens.models.adapters.encoders import encoder_adapter
from lig_lens.models.heads import listed, note_head
from lig_lens.models.packaged import quiet_transformers
from lig_lens.models.running import HALF, first_tensor, module_hooks, submodules

_CLASSIFIER = "ForSequenceClassification"
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM")
# A prompt that every vocabulary has, and how far logits on it may be apart, relative to their spread: rounding in
# single and in half precision.
_PROBE = (5, 9, 7, 11)
_APART, _HALF_APART = 1e-3, 5e-2


class _Loading:
    """A class of transformers as the bridge asks for it, which notes what its loading did not find."""

    def __init__(self, kind: Any, dtype: torch.dtype) -> None:
        self.kind, self.__name__, self.dtype = kind, kind.__name__, dtype
        self.of_head: list[tuple[str, Tensor]] = []
        self.of_body: list[str] = []
        self.logits: Tensor | None = None
        self.why_none = ""

    def from_pretrained(self, source: str, **options: Any) -> Any:
        """Load the model, and note weights that are in no file: those of its body, and those of its head."""
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
        self._settle(model)
        try:
            self.logits = _plain_logits(model, lambda: self._again(source, **options))
        except Exception as error:  # whatever comes up in a model
            self.why_none = _reason(error)
        return model

    def _again(self, source: str, **options: Any) -> Any:
        """The model as its user loads it, where the class settles its attention when it is made."""
        config = copy.deepcopy(options.pop("config"))
        options.pop("attn_implementation", None)
        # The bridge asks for attentions, which transformers gives with eager attention alone.
        config._attn_implementation, config.output_attentions = None, False
        model = self.kind.from_pretrained(source, config=config, **options).eval()
        self._settle(model)
        return model

    def from_config(self, config: Any, **options: Any) -> Any:
        """Make the model with random weights."""
        make = getattr(self.kind, "from_config", None) or self.kind._from_config  # automatic classes, and others
        model = make(config, **options)
        self._settle(model)
        return model

    def _settle(self, model: Any) -> None:
        """Let experts run one by one where transformers' joint product of matrices has no kernel for the dtype."""
        if self.dtype is torch.float64 and hasattr(model, "set_experts_implementation"):
            with contextlib.suppress(ValueError):  # a model without experts
                model.set_experts_implementation("eager")


def boot(source: str, name: str, device: "str | torch.device | None", dtype: torch.dtype, load_weights: bool) -> Any:
    """Load a model as a bridge with TransformerLens' familiar hook names.

    Args:
        source: a folder or a hub id.
        name: how the user called it.
        device: where to put the weights.
        dtype: of the weights.
        load_weights: False makes them at random.

    Raises:
        InputError: no model there, one that lacks weights below its head, an architecture that is not served, or a
            bridge that cannot run.
    """
    from transformer_lens.model_bridge import TransformerBridge

    with _named(source, name), quiet_transformers():
        architecture, saved, loading = _served(source, dtype)
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
    if not hasattr(bridge, "blocks"):
        raise _not_in_a_row(loaded)
    if load_weights:
        note_head(bridge, saved, loaded, loading.of_head)
    else:
        with contextlib.redirect_stdout(None):  # TransformerLens prints the dtype
            bridge.to(dtype)
        bridge.eval()
    if getattr(bridge.adapter, "supports_compatibility_mode", True):
        bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    _try_out(bridge, loading, name)
    return bridge


@torch.no_grad()
def _plain_logits(model: Any, load_again: Callable[[], Any]) -> Tensor | None:
    """Logits of a plain model as its user runs it, with the attention that transformers takes by default.

    None where it gives none.
    """
    taken = getattr(model.config, "_attn_implementation", None)
    model.eval()
    try:
        with contextlib.suppress(ValueError, ImportError, AttributeError):
            model.set_attn_implementation("sdpa")
        switched = getattr(model.config, "_attn_implementation", None) == "sdpa"
        plain = model if switched or not getattr(model, "_supports_sdpa", False) else load_again()
        logits = plain(input_ids=torch.tensor([_PROBE])).logits
        return logits.float() if isinstance(logits, Tensor) else None
    finally:
        if taken is not None:
            model.set_attn_implementation(taken)


def _nothing(*_: Any) -> None:
    """A hook that does nothing."""


@torch.no_grad()
def _try_out(bridge: Any, loading: _Loading, name: str) -> None:
    """Run a bridge under hooks on a short prompt, and warn if it gives other logits than the plain model did.

    Raises:
        InputError: it cannot run, and takes token ids.
    """
    plain, model = loading.logits, bridge.original_model
    # Some components compute otherwise where they have hooks.
    hooks = [(one, _nothing, False) for path, one in submodules(bridge) if path.split(".")[-1].startswith("hook_")]
    try:
        with module_hooks(hooks):
            found = first_tensor(bridge(torch.tensor([_PROBE], device=bridge.cfg.device))).cpu().float()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever comes up in a component
        if plain is None and getattr(model, "main_input_name", "input_ids") != "input_ids":
            return
        plain_name = f"the plain {type(model).__name__}"
        whose = f"and neither can {plain_name}" if loading.why_none else f"which {plain_name} can"
        raise InputError(
            f"TransformerLens' bridge of {name!r} cannot run in {str(bridge.cfg.dtype).removeprefix('torch.')} "
            f"({_reason(error)}), {whose}: try another dtype, or another version of TransformerLens or transformers."
        ) from error
    if plain is None:
        return
    spread = float((plain - plain.mean(-1, keepdim=True)).abs().max())
    apart = float((found - plain).abs().max()) / max(spread, 1e-30) if found.shape == plain.shape else float("inf")
    if not apart <= (_HALF_APART if bridge.cfg.dtype in HALF else _APART):
        warnings.warn(
            f"TransformerLens' bridge of {name!r} gives other logits than the plain {type(model).__name__} as "
            f"transformers runs it (apart by {apart:.1e} of their spread): contributions are to what the bridge "
            "computes. Try another version of TransformerLens or transformers.",
            BridgeWarning,
            stacklevel=4,  # the caller of load_model
        )


def _served(source: str, dtype: torch.dtype) -> tuple[str, str, _Loading]:
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
    if getattr(config, "is_encoder_decoder", False) and not saved.endswith(_CLASSIFIER):
        raise _not_in_a_row(saved or config.model_type)
    language = saved if saved in SUPPORTED_ARCHITECTURES else MODEL_TYPES.get(config.model_type)
    if language is None and saved.endswith(_CLASSIFIER):
        kin = (saved.removesuffix(_CLASSIFIER) + ending for ending in _LANGUAGE_MODELS)
        language = next((one for one in kin if one in SUPPORTED_ARCHITECTURES), None)
    if language is None:
        try:
            language = determine_architecture_from_hf_config(config)
        except ValueError as error:
            raise InputError(
                f"{saved or 'A model'} (model_type {config.model_type!r}) is served neither by TransformerLens' bridge "
                f"nor by an adapter of lig_lens ({len(SUPPORTED_ARCHITECTURES)} architectures are): load a model of "
                "another family."
            ) from error
    adapter = _mended(language)
    if saved.endswith(_CLASSIFIER) and hasattr(transformers, saved):
        if saved not in SUPPORTED_ARCHITECTURES:
            _register(saved, classifier_adapter(SUPPORTED_ARCHITECTURES[adapter]))
        return saved, saved, _Loading(getattr(transformers, saved), dtype)
    kind = transformers.AutoModelForMaskedLM if language in ENCODERS else get_hf_model_class_for_architecture(language)
    return adapter, saved, _Loading(kind, dtype)


def _mended(architecture: str) -> str:
    """The name of this package's own adapter, where TransformerLens' has a fault; else that of TransformerLens."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    if architecture not in MENDED:
        return architecture
    ours = f"LigLens{architecture}"
    if ours not in SUPPORTED_ARCHITECTURES:
        _register(ours, MENDED[architecture](SUPPORTED_ARCHITECTURES[architecture]))
    return ours


def _not_in_a_row(kind: str) -> InputError:
    return InputError(
        f"The layers of a {kind} are not in one row (they are an encoder's and a decoder's, say), and lig_lens has no "
        "maps for that: take a model that is an encoder or a decoder alone."
    )


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
    except (LigLensError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # adapters raise whatever comes up in them
        if Path(source).is_dir():
            raise InputError(f"The folder {name!r} holds no model that can be loaded: {_reason(error)}") from error
        raise InputError(
            f"{name!r} is neither a local folder nor a model that can be fetched now ({_reason(error)}): give a folder "
            "saved with save_pretrained, 'minilm', 'smollm2', or a hub id while online (HF_HUB_OFFLINE unset)."
        ) from error


def _reason(error: Exception) -> str:
    """The first line of what an error says, with its kind where that says little by itself."""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    plain = isinstance(error, (OSError, ValueError, RuntimeError)) and text
    return text if plain else f"{type(error).__name__}: {text}"
