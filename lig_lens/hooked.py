"""What a hooked model has to offer."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn

from lig_lens.errors import InputError

if TYPE_CHECKING:
    from abc import ABCMeta as _ProtocolMeta
else:
    _ProtocolMeta = type(Protocol)


class _ByAttributes(_ProtocolMeta):
    """Looks for a module's parts the way `nn.Module` gives them.

    `runtime_checkable` does not from Python 3.12 on: it looks attributes up statically, and a module's submodules are
    found by its `__getattr__`.
    """

    def __instancecheck__(self, instance: object) -> bool:
        return not missing_parts(instance)


class HookedModel(Protocol, metaclass=_ByAttributes):
    """A `TransformerBridge`, a `HookedTransformer`, a `HookedEncoder`, or another module with their interface."""

    cfg: Any
    """TransformerLens' config: `n_layers`, `d_model`, `d_vocab`, `n_ctx`, `dtype`, `device`, and more by model."""
    blocks: nn.ModuleList
    hook_dict: Mapping[str, nn.Module]
    """Hooks of the whole model by all their names."""
    tokenizer: Any
    training: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights."""

    def buffers(self) -> Iterator[torch.Tensor]:
        """All buffers."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """All submodules by their path."""

    def to_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Token ids of a text."""


# Names of the lists of blocks, of models with one and of those with an encoder and a decoder.
ONE_STACK = ("blocks",)
TWO_STACKS = ("encoder_blocks", "decoder_blocks")


def missing_parts(model: object) -> list[str]:
    """Parts of a hooked model that `model` lacks."""
    parts = (*(() if has_two_stacks(model) else ONE_STACK), "cfg", "hook_dict")
    return [name for name in parts if not hasattr(model, name)]


def has_two_stacks(model: object) -> bool:
    """Whether a model has an encoder and a decoder."""
    return all(isinstance(getattr(model, name, None), nn.ModuleList) for name in TWO_STACKS)


def lists_of_blocks(model: "HookedModel") -> dict[str, nn.ModuleList]:
    """All blocks of a model, list by list, under the names that the lists go by among its hooks."""
    return {name: getattr(model, name) for name in (TWO_STACKS if has_two_stacks(model) else ONE_STACK)}


def check_one_stack(model: "HookedModel", what: str) -> None:
    """Raise InputError if a model has an encoder and a decoder, which `what` cannot work on."""
    if has_two_stacks(model):
        raise InputError(
            f"{what} works on models with one stack of blocks, and this {type(model).__name__} has an encoder and a "
            "decoder: attribute() explains those (stream=)."
        )


def check_hooked(model: object) -> HookedModel:
    """Return `model`, or what `torch.compile` made it of, if it has the parts of a hooked model that are used here.

    Raises:
        InputError: it has not.
    """
    # torch.compile wraps a model, whose hooks it would trace over and over; the numbers are the model's own.
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        model = compiled
    missing = missing_parts(model)
    if missing:
        raise InputError(
            f"{type(model).__name__} is not a hooked model (no {', '.join(missing)}): pass a TransformerBridge, "
            "a HookedTransformer or a HookedEncoder, or a name for load_model."
        )
    return cast(HookedModel, model)
