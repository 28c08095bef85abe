"""What is known of the weights that give a model's logits: whether they are its own."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lig_lens.errors import InputError

# Endings of classes whose head a language model's class takes over.
_LANGUAGE = ("LM", "LMHeadModel", "Model", "ForPreTraining", "ForConditionalGeneration")


@dataclass(frozen=True)
class Head:
    """Where the weights of a model's logits come from.

    Attributes:
        saved: the class of transformers that the model was saved as, empty where its config does not say.
        loaded: the class that it was loaded as.
        missing: weights that were in no file, by name, with their sums as they were made.
    """

    saved: str
    loaded: str
    missing: tuple[tuple[str, Tensor, float], ...]

    @property
    def other(self) -> bool:
        """Whether the model was saved with a head that was not loaded."""
        return bool(self.saved) and self.saved != self.loaded and not self.saved.endswith(_LANGUAGE)


_HEADS: "weakref.WeakKeyDictionary[Any, Head]" = weakref.WeakKeyDictionary()


def note_head(bridge: Any, saved: str, loaded: str, missing: Sequence[tuple[str, Tensor]]) -> None:
    """Note where the weights of a bridge's logits come from."""
    _HEADS[bridge] = Head(saved, loaded, tuple((name, weight, _sum(weight)) for name, weight in missing))


def check_head(model: object) -> None:
    """Refuse logits that are not the model's: weights made at random are others at every load.

    Weights that were put in later count as the model's.

    Raises:
        InputError: names the weights, or the head that was not loaded.
    """
    head = _HEADS.get(model) if isinstance(model, torch.nn.Module) else None
    if head is None or not isinstance(model, torch.nn.Module):
        return
    held = {id(weight) for weight in model.parameters()}
    random = [name for name, weight, total in head.missing if id(weight) in held and _sum(weight) == total]
    if random:
        raise InputError(
            f"The model's logits come from random weights: {listed(random)} stand in no file of it (saved as "
            f"{head.saved or 'an unknown class'}, loaded as {head.loaded}). Take a model with a head, or put trained "
            "weights in."
        )
    if head.other:
        raise InputError(
            f"The model was saved as {head.saved}, whose head cannot be loaded here, and is loaded as {head.loaded}: "
            "its logits are not that model's. Explain vectors instead (target='l2')."
        )


def listed(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _sum(weight: Tensor) -> float:
    return float(weight.detach().double().sum())
