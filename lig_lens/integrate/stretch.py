"""The variable in which paths are laid out, see `quadrature.py`."""

import numpy as np
import torch
from torch import Tensor

_NEWTON_STEPS = 5


def stretch(a: Tensor, s0: Tensor, s1: Tensor) -> Tensor:
    """`t(a) = asinh(a / s0) - asinh((1 - a) / s1)`."""
    return torch.asinh(a / s0) - torch.asinh((1 - a) / s1)


def unstretch(t: Tensor, s0: Tensor, s1: Tensor) -> Tensor:
    """Inverse of `stretch`, by Newton's method from the nearer end, where `asinh` of one side is all but t."""
    # NumPy's small operations cost a fraction of torch's, and there are many.
    end, width0, width1 = (x.numpy() for x in (t, s0, s1))
    half0, half1 = np.arcsinh(0.5 / width0), np.arcsinh(0.5 / width1)
    mirrored = end > half0 - half1
    end, near, far = (
        np.where(mirrored, -end, end),
        np.where(mirrored, width1, width0),
        np.where(mirrored, width0, width1),
    )
    top = np.where(mirrored, half1, half0)
    x = np.zeros_like(end)  # asinh of the distance from the near end, in units of its layer
    for _ in range(_NEWTON_STEPS):
        distance = near * np.sinh(x)
        other = 1 - distance
        value = x - np.arcsinh(other / far) - end
        slope = 1 + near * np.cosh(x) / np.sqrt(other**2 + far**2)
        x = np.clip(x - value / slope, 0.0, top)
    distance = near * np.sinh(x)
    return torch.from_numpy(np.where(mirrored, 1 - distance, distance))


def density(a: Tensor, s0: Tensor, s1: Tensor) -> Tensor:
    """`da / dt` at `a`."""
    return 1 / (1 / torch.sqrt(a**2 + s0**2) + 1 / torch.sqrt((1 - a) ** 2 + s1**2))
