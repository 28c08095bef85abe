"""Baselines of images: by hand, against SciPy's Gaussian, and what they refuse."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image

import lig_lens as ll
from lig_lens.errors import InputError
from lig_lens.inputs.image_references import IMAGE_REFERENCES, image_reference
from lig_lens.inputs.pixels import ImageKind, Pixels, read_image
from lig_lens.registry import Entry


def read(values: Any, look: Any = None) -> Pixels:
    """A read image [channel height width] of a model with patches of a pixel."""
    tensor = torch.as_tensor(values)
    kind = ImageKind(len(tensor), tuple(tensor.shape[1:]), (1, 1), ("[CLS]",), False)
    return Pixels(tensor[None], kind, look)


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("height, width", [(8, 8), (5, 12), (1, 7), (31, 4)])
@pytest.mark.parametrize("strength", [0.05, 0.25, 1.0, 4.0])
def test_blurred_is_scipys_gaussian(height: int, width: int, strength: float) -> None:
    values = noise(3, height, width)
    sigma = strength * max(height, width)
    expected = scipy.ndimage.gaussian_filter(values.numpy(), (0, sigma, sigma), mode="reflect", truncate=4.0)
    found = image_reference(read(values), "blurred", strength=strength)
    np.testing.assert_allclose(found.values[0].numpy(), expected, rtol=0, atol=1e-12)


def test_two_pixels_are_blurred_by_hand() -> None:
    """A white and a black pixel, mirrored without end: white at 0, black at 1 and 2, white at 3 and 4, and so on."""
    sigma = 2 * 0.25
    gauss = {offset: math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-2, 3)}  # cut off at 4 sigma
    white = (gauss[0] + gauss[-1]) / sum(gauss.values())  # from pixel 0: itself, and its mirror image at -1
    found = image_reference(read([[[1.0, 0.0]]]), "blurred", strength=0.25)
    torch.testing.assert_close(found.values, torch.tensor([[[[white, 1 - white]]]]))


def test_blurring_keeps_the_mean_and_ends_at_it() -> None:
    image = read(noise(3, 6, 9))
    mean = image_reference(image, "mean").values
    for strength in (0.1, 0.25, 1.0):
        found = image_reference(image, "blurred", strength=strength).values
        torch.testing.assert_close(found.mean((2, 3), keepdim=True).expand_as(mean), mean)
    torch.testing.assert_close(image_reference(image, "blurred", strength=4.0).values, mean, rtol=0, atol=1e-4)


def test_mean_zero_and_black_by_hand() -> None:
    look = (torch.tensor([0.5, 0.25]), torch.tensor([0.5, 0.125]))
    image = read([[[1.0, 3.0], [5.0, 7.0]], [[0.0, 0.0], [0.0, -2.0]]], look)
    for name, colour in {"mean": (4.0, -0.5), "zero_pixels": (0.0, 0.0), "black": (-1.0, -2.0)}.items():
        found = image_reference(image, name)
        expected = torch.tensor(colour).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
        torch.testing.assert_close(found.values, expected, rtol=0, atol=0)


def test_black_is_what_the_processor_makes_of_black(classifier: Any) -> None:
    shown, black = (read_image(classifier, Image.new("RGB", (12, 12), colour)) for colour in ("orange", "black"))
    torch.testing.assert_close(image_reference(shown, "black").values, black.values)


@pytest.mark.parametrize("name", IMAGE_REFERENCES.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_image_of_the_same_kind_comes_out(name: str, dtype: torch.dtype) -> None:
    image = read(noise(1, 4, 6, dtype=dtype), (torch.tensor([0.3]), torch.tensor([0.4])))
    before = image.values.clone()
    found = image_reference(image, name)
    assert (found.kind, found.look, found.tokens) == (image.kind, image.look, image.tokens)
    assert (found.values.shape, found.values.dtype) == (before.shape, dtype)
    found.values.zero_()  # shares no memory with what it was made of
    torch.testing.assert_close(image.values, before, rtol=0, atol=0)


def test_a_path_starts_at_a_reference(classifier: Any) -> None:
    """Contributions to a class add up to what the plain model says of the image and of the blurred one."""
    image = read_image(classifier, noise(3, 12, 12, dtype=torch.float32))
    start = image_reference(image, "blurred")
    image.check_joins(start)
    with torch.no_grad():
        change = (classifier(image.values) - classifier(start.values))[0, 1]
    asked = {"corrupted": start.values, "target": ll.class_logit(1), "layers": [0], "progress": False}
    flow = ll.attribute(classifier, image.values, **asked)
    torch.testing.assert_close(flow.attn[0].sum() + flow.skip[0].sum(), change, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("blured", {}, "Unknown baseline of images 'blured': use one of 'blurred', 'mean', 'zero_pixels', 'black'."),
        ("mean", {"strength": 0.1}, "The baseline 'mean' has no option 'strength': leave it out, it has no options."),
        ("blurred", {"sigma": 2}, "The baseline 'blurred' has no option 'sigma': give strength."),
        ("blurred", {"strength": 0}, r"blurred: strength=0.0: give a number above 0, such as 0.25, up to 4."),
        ("blurred", {"strength": 4.5}, r"blurred: strength=4.5: give a number above 0, such as 0.25, up to 4."),
        ("blurred", {"strength": "much"}, r"blurred: strength='much': give a finite number."),
        ("black", {}, "no image processor of this model says so: take 'mean', 'blurred' or 'zero_pixels', or give"),
    ],
)
def test_what_cannot_be_used_is_said(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        image_reference(read(noise(1, 4, 4)), name, **options)
    assert message in str(caught.value)


def test_one_of_your_own_is_a_line() -> None:
    IMAGE_REFERENCES.add("turned", Entry(lambda image: read(image.values[0].flip(1, 2))))
    try:
        found = image_reference(read([[[1.0, 2.0]]]), "turned")
    finally:
        IMAGE_REFERENCES.remove("turned")
    torch.testing.assert_close(found.values, torch.tensor([[[[2.0, 1.0]]]]))
