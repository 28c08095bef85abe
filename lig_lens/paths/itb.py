"""The destination's own vector everywhere (ITB, arXiv 2606.21564)."""

from lig_lens.paths.baseline import Baseline, Place


class Itb(Baseline):
    """Every position starts at the destination's own vector, so that other tokens are what changes."""

    def resid_start(self, place: Place) -> None:
        """See the base class."""
        return None
