"""All vectors 0."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.paths.baseline import Baseline, Place
from lig_lens.paths.path import TailStart


class Zero(Baseline):
    """Residual vectors, or head outputs, skip connection and bias, are 0."""

    def resid_start(self, place: Place) -> Float[Tensor, "pos d_model"]:
        """See the base class."""
        return torch.zeros_like(place.values.resid_pre)

    def tail_start(self, place: Place, dst: Int[Tensor, "dst"]) -> TailStart:
        """See the base class."""
        return TailStart(torch.zeros_like(place.values.heads.z), torch.zeros_like(place.values.resid_pre), bias=0.0)
