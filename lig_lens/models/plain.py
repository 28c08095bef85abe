"""The plain model behind a bridge: what its loading did not find, and whether the bridge gives what it gives."""

import contextlib
import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lig_lens.errors import BridgeWarning, InputError, warn_caller
from lig_lens.models.adapters.images import image_arguments
from lig_lens.models.checkpoint import Odd, check_weights, reason
from lig_lens.models.precision import HALF
from lig_lens.models.running import first_tensor, module_hooks, submodules
from lig_lens.models.served import Served

# A prompt that every vocabulary has, and how far logits on it may be apart, relative to their spread: rounding in
# single and in half precision.
_PROBE = (5, 9, 7, 11)
_APART, _HALF_APART = 1e-3, 5e-2


@dataclass(frozen=True)
class PlainRun:
    """A plain model's run on an arbitrary prompt.

    Attributes:
        prompt: what it was given, by name.
        output: its logits, or the last vectors of a model without a head.
        has_head: which of both.
    """

    prompt: dict[str, Tensor]
    output: Tensor
    has_head: bool


class Loading:
    """A class of transformers as the bridge asks for it, which notes what its loading did not find.

    Attributes:
        odd: about the weights that its files hold; None where none are loaded.
        run: of the plain model, if it can run.
        why_none: why it cannot.
    """

    def __init__(self, name: str, how: Served, dtype: torch.dtype) -> None:
        self.name, self.how, self.dtype = name, how, dtype
        self.kind, self.__name__ = how.kind, how.kind.__name__
        self.odd: Odd | None = None
        self.run: PlainRun | None = None
        self.why_none = ""

    def from_pretrained(self, source: str, **options: Any) -> Any:
        """Load the model, and note what is odd about its files.

        Raises:
            InputError: the files do not hold the model, see `check_weights`.
        """
        if Path(source).is_dir():
            options.pop("use_safetensors", None)  # some adapters know in which format a hub has their models
        # Shapes that disagree are told by name here, and by the loading with a report that nobody sees.
        asked = {**options, "ignore_mismatched_sizes": True}
        model, info = self.kind.from_pretrained(source, output_loading_info=True, **asked)
        self.odd = check_weights(model, info, self.name, self.how)
        self._settle(model)
        try:
            self.run = _run(model, lambda: self._again(source, **options))
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # whatever comes up in a model
            self.why_none = reason(error)
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


def _prompt(model: Any) -> dict[str, Tensor]:
    """An arbitrary prompt for a plain model, what it takes alone first."""
    if model.main_input_name == "pixel_values":
        return image_arguments(model)
    prompt = {"input_ids": torch.tensor([_PROBE])}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        # Left out, a decoder gets one thing here and another in a bridge.
        prompt["decoder_input_ids"] = torch.tensor([_PROBE[::-1]])
    return prompt


@torch.no_grad()
def _run(model: Any, load_again: Callable[[], Any]) -> PlainRun | None:
    """Run a plain model as its user does, with the attention that transformers takes by default."""
    taken = getattr(model.config, "_attn_implementation", None)
    model.eval()
    try:
        with contextlib.suppress(ValueError, ImportError, AttributeError):
            model.set_attn_implementation("sdpa")
        switched = getattr(model.config, "_attn_implementation", None) == "sdpa"
        plain = model if switched or not getattr(model, "_supports_sdpa", False) else load_again()
        prompt = _prompt(model)
        output = plain(**prompt)
        logits = getattr(output, "logits", None)
        found = output.last_hidden_state if logits is None else logits
        return PlainRun(prompt, found.float(), logits is not None) if isinstance(found, Tensor) else None
    finally:
        if taken is not None:
            model.set_attn_implementation(taken)


def _nothing(*_: Any) -> None:
    """A hook that does nothing."""


@torch.no_grad()
def try_out(bridge: Any, loading: Loading, name: str) -> None:
    """Run a bridge under hooks on a short prompt, and warn if it gives something else than the plain model did.

    Raises:
        InputError: it cannot run.
    """
    run, model = loading.run, bridge.original_model
    prompt = _prompt(model) if run is None else run.prompt
    alone, *others = (value.to(bridge.cfg.device) for value in prompt.values())
    named = dict(zip(list(prompt)[1:], others, strict=True))
    # Some components compute otherwise where they have hooks.
    hooks = [(one, _nothing, False) for path, one in submodules(bridge) if path.split(".")[-1].startswith("hook_")]
    try:
        with module_hooks(hooks):
            found = first_tensor(bridge(alone, **named)).cpu().float()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever comes up in a component
        if run is None and getattr(model, "main_input_name", "input_ids") != "input_ids":
            return
        plain_name = f"the plain {type(model).__name__}"
        whose = f"and neither can {plain_name}" if loading.why_none else f"which {plain_name} can"
        raise InputError(
            f"TransformerLens' bridge of {name!r} cannot run in {str(bridge.cfg.dtype).removeprefix('torch.')} "
            f"({reason(error)}), {whose}: try another dtype, or another version of TransformerLens or transformers."
        ) from error
    if run is None:
        return
    plain = run.output
    spread = float((plain - plain.mean(-1, keepdim=True)).abs().max())
    apart = float((found - plain).abs().max()) / max(spread, 1e-30) if found.shape == plain.shape else float("inf")
    if not apart <= (_HALF_APART if bridge.cfg.dtype in HALF else _APART):
        warn_caller(
            f"TransformerLens' bridge of {name!r} gives other {'logits' if run.has_head else 'vectors'} than the plain "
            f"{type(model).__name__} as transformers runs it (apart by {apart:.1e} of their spread): contributions are "
            "to what the bridge computes. Try another version of TransformerLens or transformers.",
            BridgeWarning,
        )
