"""What removed patches of an image are filled with; the others keep their pixels."""

import math
from abc import abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lig_lens.hooked import HookedModel
from lig_lens.inputs.inputs import Inputs
from lig_lens.inputs.pixels import Pixels
from lig_lens.relevance.faithfulness.replacers import Replacer

_WIDTH = 0.25  # of the Gaussian, its standard deviation as a share of the longer side


class _Filled(Replacer):
    """Pixels of another image, which is made of this one."""

    def __init__(self, model: HookedModel) -> None:
        """See the base class."""
        super().__init__(model)
        self._kept: dict[int, tuple[Pixels, Tensor]] = {}

    def row(self, inputs: Inputs, removed: Bool[Tensor, "pos"]) -> Tensor:
        """See the base class."""
        if not isinstance(inputs, Pixels):
            raise TypeError(f"{type(inputs).__name__} is no image")
        own = inputs.values
        return torch.where(covered(inputs, removed).to(own.device), self._filling(inputs).to(own), own)

    def _filling(self, image: Pixels) -> Float[Tensor, "1 #channel #height #width"]:
        if id(image) not in self._kept:
            self._kept[id(image)] = (image, self.filling(image))  # with the image, whose id is its own so long
        return self._kept[id(image)][1]

    @abstractmethod
    def filling(self, image: Pixels) -> Float[Tensor, "1 #channel #height #width"]:
        """The other image."""


class MeanColour(_Filled):
    """The image's own mean colour."""

    name = "mean"

    def filling(self, image: Pixels) -> Float[Tensor, "1 #channel #height #width"]:
        """See the base class."""
        return image.values.mean((2, 3), keepdim=True)


class Zero(_Filled):
    """Pixel values of 0 as the model takes them: the colour that its image processor takes off."""

    name = "zero"

    def filling(self, image: Pixels) -> Float[Tensor, "1 #channel #height #width"]:
        """See the base class."""
        return image.values.new_zeros(1, 1, 1, 1)


class Blurred(_Filled):
    """The image through a Gaussian with a quarter of its longer side as standard deviation, mirrored at its edges."""

    name = "blurred"

    def filling(self, image: Pixels) -> Float[Tensor, "1 #channel #height #width"]:
        """See the base class."""
        sigma = _WIDTH * max(image.values.shape[2:])
        down, across = (_gaussian(side, sigma).to(image.values.device) for side in image.values.shape[2:])
        return down @ image.values.double() @ across.T


def covered(image: Pixels, removed: Bool[Tensor, "pos"]) -> Bool[Tensor, "height width"]:
    """Pixels of the patches that are removed; those beyond the last whole patch belong to none."""
    (rows, columns), (high, wide) = image.grid, image.kind.patch
    patches = removed[len(removed) - rows * columns :].reshape(rows, columns)
    pixels = patches.repeat_interleave(high, 0).repeat_interleave(wide, 1)
    whole = pixels.new_zeros(image.values.shape[2:])
    whole[: pixels.shape[0], : pixels.shape[1]] = pixels
    return whole


def _gaussian(side: int, sigma: float) -> Float[Tensor, "side side"]:
    """What pixels along a side become, of what they were: row i holds the weights of pixel i's neighbours."""
    reach = math.floor(4 * sigma + 0.5)
    at = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (at.double() / sigma) ** 2)
    seen = (torch.arange(side)[:, None] + at) % (2 * side)
    seen = torch.minimum(seen, 2 * side - 1 - seen)  # mirrored: pixel -1 is pixel 0
    return torch.zeros(side, side, dtype=torch.float64).scatter_add_(
        1, seen, (weights / weights.sum()).expand(side, -1)
    )
