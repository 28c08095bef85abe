"""A checkpoint in, a bridge out: as the class that it was saved as, and with what its loading found missing."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lig_lens.errors import BridgeWarning, InputError, LigLensError, warn_caller
from lig_lens.hooked import missing_parts
from lig_lens.inputs.pixels import note_no_processor, takes_pixels
from lig_lens.models.checkpoint import broken_json, cannot_load, reason
from lig_lens.models.heads import listed, note_head
from lig_lens.models.own_tokenizer import keep_own_tokenizer, placeholder
from lig_lens.models.packaged import packaged_names, quiet_transformers
from lig_lens.models.plain import Loading, try_out
from lig_lens.models.served import served

# Files in which image processors are saved.
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def boot(source: str, name: str, device: "str | torch.device | None", dtype: torch.dtype, load_weights: bool) -> Any:
    """Load a model as a bridge with TransformerLens' familiar hook names.

    Args:
        source: a folder or a hub id.
        name: how the user called it.
        device: where to put the weights.
        dtype: of the weights.
        load_weights: False makes them at random.

    Raises:
        InputError: no model there, files that do not hold it whole, an architecture that is not served, or a
            bridge that cannot run.
    """
    from transformer_lens.model_bridge import TransformerBridge

    with _named(source, name), quiet_transformers():
        how = served(source)
        loading, made_up = Loading(name, how, dtype), placeholder(source)
        bridge = TransformerBridge.boot_transformers(
            source,
            device=device,
            dtype=dtype,
            load_weights=load_weights,
            model_class=loading,
            hf_config_overrides={"original_architecture": how.architecture},
            tokenizer=made_up,
        )
        if made_up is None:
            keep_own_tokenizer(bridge, source)
        else:
            bridge._tokenizer = None  # ids still do
        if takes_pixels(bridge) and bridge.processor is None:
            note_no_processor(bridge, _why_no_processor(source))
    vars(bridge.original_model.config).pop("original_architecture", None)
    loaded = type(bridge.original_model).__name__
    if missing_parts(bridge):
        raise InputError(
            f"The layers of a {loaded} are neither in one row nor in an encoder's and a decoder's, and lig_lens has no "
            "maps for that: load a model of another family."
        )
    if loading.odd is not None:
        bare = loading.run is not None and not loading.run.has_head
        note_head(bridge, how.saved, loaded, loading.odd.of_head, bare)
    else:
        with contextlib.redirect_stdout(None):  # TransformerLens prints the dtype
            bridge.to(dtype)
        bridge.eval()
    if getattr(bridge.adapter, "supports_compatibility_mode", True):
        bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    if loading.odd is not None and loading.odd.beyond:
        warn_caller(
            f"The files of {name!r} hold more layers than its config says ({listed(loading.odd.beyond)}): they are "
            "left out, and contributions are to a model without them. Take the config.json that was saved with the "
            "weights.",
            BridgeWarning,
        )
    try_out(bridge, loading, name)
    return bridge


def _why_no_processor(source: str) -> str:
    """Why the image processor of a model, which TransformerLens passes over, is not there; empty if none was saved."""
    folder = Path(source)
    if folder.is_dir() and not any(any(folder.glob(name)) for name in _PROCESSORS):
        return ""
    broken = broken_json(folder, _PROCESSORS)
    if broken:
        return broken
    from transformers import AutoImageProcessor

    try:
        AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever comes up in it
        return reason(error)
    return "TransformerLens did not load it"


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
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{name!r} is made of code that comes with it, which is not run unasked: if you trust it, load it with "
                "TransformerBridge.boot_transformers(..., trust_remote_code=True) and pass that."
            ) from error
        if Path(source).is_dir():
            raise InputError(cannot_load(Path(source), name, error)) from error
        raise InputError(
            f"{name!r} is neither a local folder nor a model that can be fetched now ({reason(error)}): give a folder "
            f"saved with save_pretrained, {packaged_names()}, or a hub id while online (HF_HUB_OFFLINE unset)."
        ) from error
