"""An image in, what a model of images takes out: pixel values, and its patches as positions."""

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.errors import InputError
from lig_lens.hooked import HookedModel
from lig_lens.inputs.inputs import Inputs
from lig_lens.inputs.pictures import picture_of
from lig_lens.names import patch_name

_NO_PROCESSOR = "_lig_lens_no_processor"  # on the bridge itself, so that copies have it
_FEW = 3  # patches each way that are enough to see what a model does, where it takes images of any size


@dataclass(frozen=True)
class _Family:
    """What a family of models makes of an image.

    Attributes:
        special: from a config, labels of the positions before the patches.
        any_size: whether its position embeddings are fitted to the size of the image.
    """

    special: Callable[[Any], tuple[str, ...]] = lambda _config: ("[CLS]",)
    any_size: bool = False


def _registers(config: Any) -> tuple[str, ...]:
    return ("[CLS]", *(f"[REG{number + 1}]" for number in range(int(config.num_register_tokens))))


# By what a config calls its type; a family with patches in rows after some special positions is a line here.
_FAMILIES: Mapping[str, _Family] = MappingProxyType(
    {
        "vit": _Family(),
        "deit": _Family(lambda _config: ("[CLS]", "[DIST]")),
        "vit_mae": _Family(),
        "dinov2": _Family(any_size=True),
        "dinov2_with_registers": _Family(_registers, any_size=True),
    }
)


@dataclass(frozen=True)
class ImageKind:
    """Which images a model takes, as its config says.

    Attributes:
        channels: of an image.
        size: height and width, of those that it was made for.
        patch: height and width of a patch.
        special: labels of the positions before the patches.
        any_size: whether images of other sizes are taken as well.
    """

    channels: int
    size: tuple[int, int]
    patch: tuple[int, int]
    special: tuple[str, ...]
    any_size: bool

    @classmethod
    def of(cls, config: Any) -> "ImageKind":
        """Read it off a config of transformers.

        Raises:
            InputError: a family whose positions are not known.
        """
        kind = str(getattr(config, "model_type", ""))
        if kind not in _FAMILIES:
            raise InputError(
                f"Models of type {kind!r} take images in a way that is not known here: take one of the types "
                f"{', '.join(_FAMILIES)}."
            )
        family = _FAMILIES[kind]
        return cls(
            int(config.num_channels),
            _both(config.image_size),
            _both(config.patch_size),
            family.special(config),
            family.any_size,
        )

    @property
    def wanted(self) -> str:
        """The shape of pixel values, in words."""
        sizes = ("height", "width") if self.any_size else map(str, self.size)
        return f"[{self.channels}, {', '.join(sizes)}]"

    def takes(self, height: int, width: int) -> bool:
        """Whether an image of this size is taken."""
        if self.any_size:
            return height >= self.patch[0] and width >= self.patch[1]
        return (height, width) == self.size

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches."""
        return height // self.patch[0], width // self.patch[1]

    def arbitrary(self) -> Float[Tensor, "1 channel height width"]:
        """Some image, always the same."""
        few = [min(side, _FEW * patch) for side, patch in zip(self.size, self.patch, strict=True)]
        size = few if self.any_size else self.size
        return torch.randn(1, self.channels, *size, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Pixels(Inputs):
    """Pixel values as the model takes them.

    Attributes:
        values: the image.
        kind: which images the model takes.
        look: mean and standard deviation of each channel that were taken off, where an image processor says so.
    """

    values: Float[Tensor, "1 channel height width"] = field(repr=False)
    kind: ImageKind
    look: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    kept_as = "pixels"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.kind.grid(*self.values.shape[2:])

    @property
    def tokens(self) -> tuple[str, ...]:  # type: ignore[override]  # read-only, since it follows from the others
        """Special positions, then patches by row and column."""
        rows, columns = self.grid
        return (*self.kind.special, *(patch_name(row, column) for row in range(rows) for column in range(columns)))

    @property
    def special(self) -> tuple[bool, ...]:  # type: ignore[override]
        """See the base class."""
        before = len(self.kind.special)
        return tuple(number < before for number in range(len(self.tokens)))

    def arguments(self, batch: int = 1) -> tuple[Tensor, ...]:
        """See the base class."""
        return (self.values.expand(batch, -1, -1, -1),)

    def shortened(self) -> "Pixels":
        """See the base class; an image has the size that the model takes."""
        return self

    def record(self) -> dict[str, Any]:
        """Shape, rows and columns of patches, SHA-256 of the pixel values as float64, and the image that they show.

        The image (a PNG in a data URI, None if there are neither one channel nor three) shows what patches cover.
        """
        covered = [count * size for count, size in zip(self.grid, self.kind.patch, strict=True)]
        shown = self.values[0, :, : covered[0], : covered[1]]
        return {
            "shape": list(self.values.shape[1:]),
            "grid": list(self.grid),
            "sha256": hashlib.sha256(self.values.double().cpu().contiguous().numpy().tobytes()).hexdigest(),
            "image": picture_of(shown, *(self.look or ())),
        }

    @property
    def shown(self) -> str:
        """See the base class."""
        return f"an image {list(self.values.shape[1:])}"

    def check_joins(self, corrupted: Inputs) -> None:
        """See the base class; both have to be of one shape."""
        if not isinstance(corrupted, Pixels) or corrupted.values.shape != self.values.shape:
            raise InputError(
                f"corrupted is {corrupted.shown}, the prompt {self.shown}: a path joins them patch by patch, so give "
                "images of one shape."
            )


def takes_pixels(model: HookedModel) -> bool:
    """Whether a model takes images, as its config says."""
    return bool(getattr(model.cfg, "is_visual_model", False))


def note_no_processor(model: torch.nn.Module, why: str) -> None:
    """Note why a model of images has no image processor; nothing if none was saved with it."""
    vars(model)[_NO_PROCESSOR] = why


def image_kind(model: HookedModel) -> ImageKind:
    """Which images a model takes.

    Raises:
        InputError: a family whose positions are not known.
    """
    return ImageKind.of(getattr(getattr(model, "original_model", None), "config", None))


def is_image(prompt: Any) -> bool:
    """Whether a prompt can only be meant as an image: one of Pillow's, or floats or bytes with three axes or four."""
    pixels = str(getattr(prompt, "dtype", "")).removeprefix("torch.").startswith(("float", "bfloat", "uint8"))
    return _is_pil(prompt) or (pixels and getattr(prompt, "ndim", 0) in (3, 4))


def read_image(
    model: HookedModel, prompt: Any, *, prepend_bos: Any = None, attention_mask: Any = None, what: str = "prompt"
) -> Pixels:
    """Process an image, or check pixel values.

    Args:
        model: a hooked model of images.
        prompt: an image of Pillow or bytes [channel, height, width], for the image processor that was saved with the
            model; or pixel values [channel, height, width] or [1, channel, height, width] as the model takes them, as
            an array or a tensor of floats.
        prepend_bos: goes with texts.
        attention_mask: goes with token ids.
        what: name of the argument in messages.

    Raises:
        InputError: no image, one of another shape than the model takes, pixel values that were not processed, or NaN.
    """
    kind = image_kind(model)
    for name, given in (("prepend_bos", prepend_bos), ("attention_mask", attention_mask)):
        if given is not None:
            raise InputError(f"{name} goes with text: this model takes images, leave it out.")
    processor = getattr(model, "processor", None)
    values = _tensor(prompt, kind, what) if not _is_pil(prompt) else None
    if 0 in (values.shape if values is not None else prompt.size):
        shape = list(values.shape) if values is not None else f"{prompt.width} by {prompt.height}"
        raise InputError(f"The {what} has no pixels ({shape}): {_remedy(kind)}.")
    if values is None or (values.dtype == torch.uint8 and processor is not None):
        if processor is None:
            raise InputError(_no_processor(vars(model).get(_NO_PROCESSOR), kind, what))
        values = _processed(processor, prompt if values is None else values, kind, what)
    values = _checked(values, kind, what)
    return Pixels(values.detach().to(model.cfg.device), kind, _look(processor, kind))


def arbitrary_image(model: HookedModel) -> Float[Tensor, "1 channel height width"]:
    """Some image that a model takes."""
    return image_kind(model).arbitrary()


# Of Pillow's modes, those of colours in 256 levels.
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


def _is_pil(prompt: Any) -> bool:
    """Whether a prompt is an image of Pillow, which need not be installed."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(prompt, pillow.Image)


def _remedy(kind: ImageKind) -> str:
    return f"give an image of Pillow, or pixel values {kind.wanted} as the model takes them"


def _tensor(prompt: Any, kind: ImageKind, what: str) -> Tensor:
    """Numbers without a batch axis."""
    if isinstance(prompt, str):
        shown = prompt if len(prompt) <= 40 else prompt[:39] + "…"
        raise InputError(
            f"The {what} is the text {shown!r}, and this model takes images: {_remedy(kind)} (PIL.Image.open reads a "
            "file, and lig-lens explain --image takes one)."
        )
    if not hasattr(prompt, "ndim"):
        raise InputError(f"The {what} is of type {type(prompt).__name__}: {_remedy(kind)}.")
    try:
        values = prompt if isinstance(prompt, Tensor) else torch.as_tensor(np.array(prompt))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"The {what} holds no numbers ({error}): {_remedy(kind)}.") from error
    if values.ndim == 4 and len(values) != 1:
        raise InputError(
            f"The {what} has shape {list(values.shape)}, a batch of {len(values)}: pass a list of images to get a list "
            "of Flows."
        )
    values = values.detach()
    return values[0] if values.ndim == 4 else values


def _processed(processor: Any, image: Any, kind: ImageKind, what: str) -> Tensor:
    """Pixel values that the model's own image processor makes."""
    if _is_pil(image):
        if image.mode not in _MODES:
            raise InputError(
                f"The {what} has pixels of mode {image.mode!r}, not of 256 levels, which Pillow would cut off: bring "
                "it to mode 'L' or 'RGB' first."
            )
        image = image.convert({1: "L", 4: "RGBA"}.get(kind.channels, "RGB"))
    try:
        values: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            f"The model's {type(processor).__name__} cannot process the {what} ({str(error).splitlines()[0][:160]}): "
            f"{_remedy(kind)}."
        ) from error
    if values.ndim == 3 and not kind.takes(*values.shape[1:]):
        made, size = f"{values.shape[1]} by {values.shape[2]}", dict(zip(("height", "width"), kind.size, strict=True))
        name = "crop_size" if getattr(processor, "do_center_crop", False) else "size"
        raise InputError(
            f"The model's {type(processor).__name__} makes images of {made}, and the model takes {kind.size[0]} by "
            f"{kind.size[1]}: set model.processor.{name} = {size} if that is how it was trained, and save the "
            f"processor so, or give pixel values {kind.wanted} as the model takes them."
        )
    return values


def _no_processor(why: str | None, kind: ImageKind, what: str) -> str:
    """What is to be said of an image that nothing can process."""
    saved, remedy = "was saved with the model", "save one beside it (AutoImageProcessor)"
    if why:
        saved, remedy = f"could be loaded with the model: {why}", "mend that"
    return (
        f"The {what} is an image, and no image processor {saved}: {remedy}, or give pixel values {kind.wanted} as the "
        "model takes them."
    )


def _checked(values: Tensor, kind: ImageKind, what: str) -> Float[Tensor, "1 channel height width"]:
    """Pixel values as floats with a batch axis, if they are what the model takes."""
    shape = list(values.shape)
    if values.ndim != 3 or shape[0] != kind.channels:
        turned = values.ndim == 3 and shape[-1] == kind.channels
        hint = " Its channels are last: put them first, permute(2, 0, 1)." if turned else ""
        raise InputError(f"The {what} has shape {shape}, and the model takes {kind.wanted}.{hint}")
    if not kind.takes(*shape[1:]):
        least = f" of at least a patch, {kind.patch[0]} by {kind.patch[1]}" if kind.any_size else ""
        raise InputError(f"The {what} has shape {shape}, and the model takes {kind.wanted}{least}: resize the image.")
    if values.is_complex() or not bool(torch.isfinite(values).all()):
        held = "complex numbers" if values.is_complex() else "NaN or infinite pixel values"
        raise InputError(f"The {what} holds {held}: check how they were made.")
    low, high = (float(end) for end in (values.min(), values.max()))
    whole = not values.is_floating_point() or (bool((values == values.round()).all()) and high > 1)
    if whole:
        raise InputError(
            f"The {what} holds whole numbers from {low:g} to {high:g} ({values.dtype}), as images are stored: divide "
            "by 255 and normalise as in the model's training (its image processor does, for an image of Pillow)."
        )
    return values[None] if values.dtype == torch.float64 else values[None].float()


def _look(processor: Any, kind: ImageKind) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of each channel that an image processor takes off, if there is one that does."""
    if processor is None or not getattr(processor, "do_normalize", False):
        return None
    try:
        mean, std = (torch.tensor(getattr(processor, f"image_{name}")).float().reshape(-1) for name in ("mean", "std"))
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None
    fits = len(mean) == len(std) and len(mean) in (1, kind.channels)
    return (mean, std) if fits else None


def _both(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
