"""Arrays as pages hold them: base64 of floats or halves."""

import base64
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray


class Packed(TypedDict):
    """An array of the page: its element's id, the type of its numbers, and what each layer's are multiplied by."""

    id: str
    dtype: str
    scales: list[float]


def encoded(key: str, values: NDArray[np.float32], half: bool = False) -> tuple[str, Packed]:
    """Base64 of an array, and what the page has to know of it.

    Of halves each layer is divided by its largest value, so that none overflows or fades.

    Args:
        key: id of its element.
        values: layers first.
        half: write halves.
    """
    by_layer = values.reshape(len(values), -1).astype("<f4")
    scales = np.abs(by_layer).max(axis=1, initial=0.0) if half else np.ones(len(by_layer), dtype=np.float32)
    scales = np.where(scales > 0, scales, 1.0)
    raw = (by_layer / scales[:, None]).astype("<f2" if half else "<f4")
    packed: Packed = {"id": key, "dtype": "f2" if half else "f4", "scales": scales.tolist()}
    return base64.b64encode(raw.tobytes()).decode(), packed
