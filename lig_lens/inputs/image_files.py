"""Image files, for those who have Pillow."""

import os
from typing import Any

from lig_lens.errors import InputError, missing_package


def open_image(path: "str | os.PathLike[str]", what: str = "image") -> Any:
    """Read an image, turned as its camera says.

    Args:
        path: of a file in any format that Pillow reads.
        what: name of the argument in messages.

    Raises:
        InputError: no such file, or one that holds no image that can be read whole.
        MissingPackageError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise missing_package("pillow", "Reading an image file", "pip install 'lig-lens[pictures]'") from error
    shown = os.fspath(path)
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)
    except FileNotFoundError as error:
        raise InputError(f"{what}: there is no file {shown!r}: give the path of an image.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's formats raise these
        raise InputError(
            f"{what}: {shown!r} cannot be read as an image ({getattr(error, 'strerror', None) or error}): give a whole "
            "PNG, JPEG or another file that Pillow reads."
        ) from error
