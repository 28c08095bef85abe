"""Pixels as a picture that a page can show, small enough to be kept in a file's head."""

import base64
import struct
import zlib

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

_HEAD, _SIGNATURE = "data:image/png;base64,", b"\x89PNG\r\n\x1a\n"
LONGEST = 224  # pixels that a kept picture has along its longer side, at most


def picture_of(
    values: Float[Tensor, "channel height width"],
    mean: Float[Tensor, "#channel"] | None = None,
    std: Float[Tensor, "#channel"] | None = None,
) -> str | None:
    """Pixel values as a PNG in a data URI.

    Args:
        values: as a model takes them.
        mean: what was subtracted from each channel of brightness 0 to 1; without it the darkest value becomes black,
            and the brightest white.
        std: what it was divided by then.

    Returns:
        None where there are neither one channel nor three.
    """
    if len(values) not in (1, 3):
        return None
    values = values.detach().cpu().float()
    if mean is None or std is None:
        low, high = values.min(), values.max()
        shown = (values - low) / (high - low) if high > low else torch.full_like(values, 0.5)
    else:
        shown = values * std.reshape(-1, 1, 1) + mean.reshape(-1, 1, 1)
    factor = -(-max(values.shape[1:]) // LONGEST)
    if factor > 1:
        shown = torch.nn.functional.avg_pool2d(shown[None], factor, ceil_mode=True)[0]
    return picture_uri((shown.clamp(0, 1) * 255).round().to(torch.uint8))


def picture_uri(image: UInt8[Tensor, "channel height width"]) -> str:
    """An image, grey or coloured, as a PNG in a data URI."""
    return _HEAD + base64.b64encode(png_of(image)).decode()


def png_of(image: UInt8[Tensor, "channel height width"]) -> bytes:
    """A PNG file of a grey image, with one channel, or a coloured one, with three."""
    channels, height, width = image.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = image.permute(1, 2, 0).reshape(height, -1)
    unfiltered = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), rows], 1)  # a byte before each row says so
    head = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    data = zlib.compress(unfiltered.numpy().tobytes(), 9)
    return _SIGNATURE + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def pixels_of(picture: str) -> UInt8[Tensor, "channel height width"]:
    """The image in a data URI that `picture_of` made.

    Raises:
        ValueError: anything else.
    """
    if not picture.startswith(_HEAD):
        raise ValueError("it is no PNG in a data URI")
    data, chunks = base64.b64decode(picture.removeprefix(_HEAD), validate=True), dict[bytes, bytes]()
    at = len(_SIGNATURE)
    while at + 8 <= len(data):
        (length,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        chunks[kind], at = data[at + 8 : at + 8 + length], at + 12 + length
    if not {b"IHDR", b"IDAT"} <= set(chunks):
        raise ValueError("its PNG is cut short")
    try:
        width, height, depth, colours, *_ = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
        rows = torch.frombuffer(bytearray(zlib.decompress(chunks[b"IDAT"])), dtype=torch.uint8).reshape(height, -1)
        channels = {0: 1, 2: 3}[colours]
        if depth != 8 or bool(rows[:, 0].any()):
            raise ValueError("its PNG is of another kind")
        return rows[:, 1:].reshape(height, width, channels).permute(2, 0, 1)
    except (struct.error, zlib.error, KeyError, RuntimeError) as error:
        raise ValueError(f"its PNG cannot be read ({error})") from error
