"""Which kind of inputs a model takes: found here, once, and asked nowhere else."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lig_lens.hooked import HookedModel
from lig_lens.inputs.inputs import Inputs
from lig_lens.inputs.pixels import arbitrary_image, read_image, takes_pixels
from lig_lens.inputs.token_ids import arbitrary_ids, read_ids


@dataclass(frozen=True)
class Kind:
    """A kind of inputs.

    Attributes:
        read: a prompt as users give it, with the options of `read_prompt`.
        arbitrary: some prompt that a model takes.
    """

    read: Callable[..., Inputs]
    arbitrary: Callable[[HookedModel], Any]


IDS, PIXELS = Kind(read_ids, arbitrary_ids), Kind(read_image, arbitrary_image)


def kind_of(model: HookedModel) -> Kind:
    """The kind of inputs that a model takes."""
    return PIXELS if takes_pixels(model) else IDS


def read_prompt(
    model: HookedModel, prompt: Any, *, prepend_bos: Any = None, attention_mask: Any = None, what: str = "prompt"
) -> Inputs:
    """Read a prompt as what a model takes; arguments and errors as in `read_ids` and `read_image`."""
    return kind_of(model).read(model, prompt, prepend_bos=prepend_bos, attention_mask=attention_mask, what=what)


def arbitrary_prompt(model: HookedModel) -> Any:
    """Some prompt that a model takes, always the same."""
    return kind_of(model).arbitrary(model)
