"""The same vectors in a run on a second prompt."""

from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.paths.baseline import Baseline, Place
from lig_lens.paths.path import TailStart


class Corrupted(Baseline):
    """The second prompt's vectors at the node where the path starts."""

    def resid_start(self, place: Place) -> Float[Tensor, "pos d_model"]:
        """See the base class."""
        return place.second.resid_pre

    def tail_start(self, place: Place, dst: Int[Tensor, "dst"]) -> TailStart:
        """See the base class."""
        return TailStart(place.second.heads.z, place.second.resid_pre)
