"""What removed patches of an image are filled with: patches of a baseline of images. The others keep their pixels."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lig_lens.errors import InputError
from lig_lens.hooked import HookedModel
from lig_lens.inputs.image_references import image_reference
from lig_lens.inputs.inputs import Inputs
from lig_lens.inputs.pixels import Pixels
from lig_lens.relevance.faithfulness.replacers import Replacer


class Filled(Replacer):
    """Pixels of the baseline of images that has this name."""

    def __init__(self, model: HookedModel, name: str) -> None:
        """See the base class."""
        super().__init__(model, name)
        self._kept: dict[int, tuple[Pixels, Tensor]] = {}

    def check(self, inputs: Inputs) -> None:
        """See the base class."""
        self._filling(_image(inputs))

    def row(self, inputs: Inputs, removed: Bool[Tensor, "pos"]) -> Tensor:
        """See the base class."""
        image = _image(inputs)
        return torch.where(covered(image, removed).to(image.values.device), self._filling(image), image.values)

    def _filling(self, image: Pixels) -> Float[Tensor, "1 channel height width"]:
        if id(image) not in self._kept:
            self._kept[id(image)] = (image, image_reference(image, self.name).values)  # whose id is its own so long
        return self._kept[id(image)][1]


def _image(inputs: Inputs) -> Pixels:
    if not isinstance(inputs, Pixels):
        raise InputError("This replacer fills patches of images, and the inputs are texts: name another.")
    return inputs


def covered(image: Pixels, removed: Bool[Tensor, "pos"]) -> Bool[Tensor, "height width"]:
    """Pixels of the patches that are removed; those beyond the last whole patch belong to none."""
    (rows, columns), (high, wide) = image.grid, image.kind.patch
    patches = removed[len(removed) - rows * columns :].reshape(rows, columns)
    pixels = patches.repeat_interleave(high, 0).repeat_interleave(wide, 1)
    whole = pixels.new_zeros(image.values.shape[2:])
    whole[: pixels.shape[0], : pixels.shape[1]] = pixels
    return whole
