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
        read: a prompt as users give it, with the options of `read_ids`.
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
