"""Baselines of images: from a read image another of its shape that says less, as `blurred` or its mean colour.

A baseline is a function here, and a line in the table at the end. An image of one's own is read as any other is.
"""

import dataclasses
import inspect
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.arguments import checked
from lig_lens.errors import InputError
from lig_lens.inputs.pixels import Pixels
from lig_lens.registry import Entry, Registry

_TRUNCATE = 4.0  # standard deviations after which the Gaussian is cut off
_STRONGEST = 4.0


def image_reference(image: Pixels, name: str, **options: Any) -> Pixels:
    """The image that a baseline makes of another.

    Args:
        image: as `read_image` gives it; it is left as it is.
        name: of the baseline, one of `IMAGE_REFERENCES`.
        options: what the baseline can be asked for, such as `strength` of `blurred`.

    Raises:
        InputError: unknown name, an option that the baseline has not or cannot use, or no known black.
    """
    make = IMAGE_REFERENCES[name]
    known = [option for option in inspect.signature(make).parameters if option != "image"]
    for option in options:
        if option not in known:
            takes = f"give {', '.join(known)}" if known else "leave it out, it has no options"
            raise InputError(f"The baseline {name!r} has no option {option!r}: {takes}.")
    made: Pixels = make(image, **options)
    return made


@checked
def blurred(image: Pixels, strength: float = 0.25) -> Pixels:
    """The image through a Gaussian, as if mirrored at its edges: its mean colour stays, and more strength nears it.

    Args:
        image: a read image.
        strength: standard deviation of the Gaussian, as a share of the longer side. At the largest, 4, nothing but the
            mean colour is left.

    Raises:
        InputError: strength is not above 0, or it is above 4.
    """
    if not 0 < strength <= _STRONGEST:
        raise InputError(f"blurred: strength={strength!r}: give a number above 0, such as 0.25, up to {_STRONGEST:g}.")
    height, width = image.values.shape[2:]
    sigma = strength * max(height, width)
    # In float64 and rounded once, so that no order of sums shows.
    down, across = (_gaussian(side, sigma).to(image.values.device) for side in (height, width))
    return _with(image, down @ image.values.double() @ across.T)


def mean(image: Pixels) -> Pixels:
    """The image's own mean colour everywhere."""
    return _with(image, image.values.double().mean((2, 3), keepdim=True))


def zero_pixels(image: Pixels) -> Pixels:
    """Pixel values of 0 as the model takes them: the colour that its image processor takes off, often a grey."""
    return _with(image, torch.zeros_like(image.values))


def black(image: Pixels) -> Pixels:
    """Black everywhere.

    Raises:
        InputError: no image processor says which pixel values are black.
    """
    if image.look is None:
        raise InputError(
            "The baseline 'black' needs to know which pixel values are black, and no image processor of this model "
            "says so: take 'mean', 'blurred' or 'zero_pixels', or give an image of your own."
        )
    taken_off, divided_by = (one.double().reshape(1, -1, 1, 1).to(image.values.device) for one in image.look)
    return _with(image, -taken_off / divided_by)


def _with(image: Pixels, values: Float[Tensor, "1 #channel #height #width"]) -> Pixels:
    """The image with other pixel values, in its precision."""
    return dataclasses.replace(image, values=values.to(image.values).expand_as(image.values).clone())


def _gaussian(side: int, sigma: float) -> Float[Tensor, "side side"]:
    """What pixels along a side become, of what they were, under a Gaussian.

    Beyond an edge the image goes on as its mirror image, edge pixels twice: pixel -1 is pixel 0, -2 is 1, and so on,
    with period 2 `side`. So rows and columns both add up to 1.
    """
    radius = math.floor(_TRUNCATE * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    weights /= weights.sum()
    met = (torch.arange(side)[:, None] + offsets) % (2 * side)
    met = torch.minimum(met, 2 * side - 1 - met)
    return torch.zeros(side, side, dtype=torch.float64).scatter_add_(1, met, weights.expand(side, -1))


IMAGE_REFERENCES: Registry[Entry] = Registry(
    "baseline of images", blurred=Entry(blurred), mean=Entry(mean), zero_pixels=Entry(zero_pixels), black=Entry(black)
)
