"""What is known of the weights that give a model's logits: whether they are its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.errors import InputError
from lig_lens.inputs.padding import end_of_text, reads_last_token

# Endings of classes whose head a language model's class takes over.
_LANGUAGE = ("LM", "LMHeadModel", "Model", "ForPreTraining", "ForConditionalGeneration")
SERVED_HEADS = "served are those of language models, masked ones too, and of classifiers of sequences and of images"
_NOTE = "_lig_lens_head"  # on the bridge itself, so that copies have it
_SAMPLE = 64


@dataclass(frozen=True)
class Head:
    """Where the weights of a model's logits come from.

    Attributes:
        saved: the class of transformers that the model was saved as, empty where its config does not say.
        loaded: the class that it was loaded as.
        missing: weights that were in no file, by name, with some of their numbers as they were made.
        bare: whether there is no head at all, and the model gives vectors.
    """

    saved: str
    loaded: str
    missing: tuple[tuple[str, Tensor, Tensor], ...]
    bare: bool = False

    @property
    def left_out(self) -> bool:
        """Whether the model was saved with a head that was not loaded."""
        return left_out(self.saved, self.loaded)


def left_out(saved: str, loaded: str) -> bool:
    """Whether a model that was saved as one class has a head that is not that of the class it was loaded as."""
    return bool(saved) and saved != loaded and not saved.endswith(_LANGUAGE)


def note_head(bridge: Any, saved: str, loaded: str, missing: Sequence[tuple[str, Tensor]], bare: bool = False) -> None:
    """Note where the weights of a bridge's logits come from."""
    noted = tuple((name, weight, _sample(weight)) for name, weight in missing)
    vars(bridge)[_NOTE] = Head(saved, loaded, noted, bare)


def check_head(model: object, of_logits: bool) -> None:
    """Refuse logits that are not the model's: weights made at random are others at every load.

    Weights that were put in later count as the model's.

    Args:
        model: a hooked model.
        of_logits: whether a metric needs logits, or may take the vectors of a model without a head.

    Raises:
        InputError: names the weights, or the head that was not loaded, or that takes one prompt at a time.
    """
    if not isinstance(model, torch.nn.Module):
        return
    if reads_last_token(model) and end_of_text(model) is None:
        raise InputError(
            "The model's head reads the last token that is not padding, and its config has no pad_token_id: so it "
            "takes no more than one prompt at a time. Name a token that your prompts do not have: "
            "model.original_model.config.pad_token_id = …"
        )
    head = vars(model).get(_NOTE)
    if not isinstance(head, Head):
        return
    if head.bare and of_logits:
        raise InputError(
            f"The model was saved as {head.saved or head.loaded}, which has no head: it gives vectors, and this "
            "metric takes logits. Load a model with a head, explain vectors (target='l2'), or give metric() a function "
            "of the vectors."
        )
    if head.left_out:
        raise InputError(
            f"The model was saved as {head.saved}, whose head lig_lens does not serve ({SERVED_HEADS}), and is loaded "
            f"as {head.loaded}: its logits are not that model's. Explain vectors instead (target='l2')."
        )
    held = {id(weight) for weight in model.parameters()}
    # A bias of zeros says nothing of where it comes from.
    telling = [one for one in head.missing if bool((one[2] != one[2][0]).any())] or head.missing
    random = [name for name, weight, made in telling if id(weight) in held and _same(_sample(weight), made)]
    if random:
        raise InputError(
            f"The model's logits come from random weights: {listed(random)} "
            f"{'stands' if len(random) == 1 else 'stand'} in no file of it (saved as "
            f"{head.saved or 'an unknown class'}, loaded as {head.loaded}). Take a model with a head, or put trained "
            "weights in."
        )


def listed(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _sample(weight: Tensor) -> Float[Tensor, "number"]:
    numbers = weight.detach().flatten()
    return numbers[:: max(1, len(numbers) // _SAMPLE)].float().cpu().clone()


def _same(now: Float[Tensor, "number"], made: Float[Tensor, "number"]) -> bool:
    """But for what a cast to half precision rounds."""
    return now.shape == made.shape and bool(((now - made).abs() <= 1e-2 * made.abs().max()).all())


def class_names(model: object) -> dict[int, str]:
    """What a classifier calls its classes; transformers says LABEL_0, LABEL_1, … where nobody gave them names."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    names = getattr(config, "id2label", None)
    if not isinstance(names, dict):
        return {}
    return {int(number): str(name) for number, name in names.items()}


def fills_in_masks(model: object) -> bool:
    """Whether a model's logits are of the tokens at their own positions, not of the next ones."""
    kind = type(getattr(model, "original_model", model)).__name__
    return kind == "HookedEncoder" or kind.endswith(("ForMaskedLM", "ForPreTraining"))
