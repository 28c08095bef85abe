"""Real images for the packaged model of digits: handwriting that scikit-learn ships, 8 by 8 pixels.

1797 digits by 13 people (Alpaydin and Kaynak 1998, CC BY 4.0). The last ones are held out, and not some at random:
images that stand together are more alike, perhaps of one writer. A support vector machine names 96.7 % of the last ones
rightly, and 99.2 % of as many drawn at random.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.arguments import checked
from lig_lens.errors import check_choice, optional

N_TRAINED = 1400  # images that the packaged model was trained on, the first ones
SIZE, BRIGHTEST = 8, 16  # of an image, and of its pixels
MEAN, STD = 0.3, 0.4  # taken off brightness 0 to 1, about those of the images


class DigitImage(NamedTuple):
    """An image of a digit.

    Attributes:
        pixels: as the packaged model takes them; black is the lowest value, ink the highest.
        label: which digit it is, the number of its class.
    """

    pixels: Float[Tensor, "1 height width"]
    label: int


@checked
def digit_images(split: str = "held_out") -> list[DigitImage]:
    """Images for the packaged model of digits, with their classes, always in the same order.

    Args:
        split: `"held_out"`, the 397 images that it has never seen, or `"train"`, the 1400 that it was trained on.

    Raises:
        InputError: another split.
        MissingPackageError: scikit-learn is not installed.
    """
    held_out = check_choice("split", split, ("train", "held_out")) == "held_out"
    datasets = optional("sklearn.datasets", "Reading images of digits", "scikit-learn")
    read = datasets.load_digits()
    chosen = slice(N_TRAINED, None) if held_out else slice(N_TRAINED)
    images = (torch.tensor(read.images[chosen]).float() / BRIGHTEST - MEAN) / STD
    return [DigitImage(one[None], int(label)) for one, label in zip(images, read.target[chosen], strict=True)]
