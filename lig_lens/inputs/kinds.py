"""Which kind of inputs a model takes, and what reads them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lig_lens.hooked import HookedModel
from lig_lens.inputs.inputs import Inputs
from lig_lens.inputs.pixels import arbitrary_image, read_image, takes_pixels
from lig_lens.inputs.source_and_target import arbitrary_source_and_target, read_source_and_target
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


def kind_of(model: HookedModel, stream: str | None = None) -> Kind:
    """The kind of inputs that a model takes; with a stream, of an encoder and a decoder, sources and targets."""
    if stream is not None:
        return Kind(functools.partial(read_source_and_target, stream=stream), arbitrary_source_and_target)
    return PIXELS if takes_pixels(model) else IDS


def read_prompt(
    model: HookedModel, prompt: Any, *, prepend_bos: Any = None, attention_mask: Any = None, what: str = "prompt"
) -> Inputs:
    """Read a prompt as what a model takes; arguments and errors as in `read_ids` and `read_image`."""
    return kind_of(model).read(model, prompt, prepend_bos=prepend_bos, attention_mask=attention_mask, what=what)
