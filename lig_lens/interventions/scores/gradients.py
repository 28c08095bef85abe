"""Scores from gradients of the metric at head outputs, `g_j = df/dz_j`."""

from jaxtyping import Float
from torch import Tensor

from lig_lens.interventions.scores.score import Score, Side


class GradientPattern(Score):
    """`p_ji df/dp_ji = p_ji <g_j, v_i>`, on the clean run."""

    def edges(self, clean: Side, corrupted: Side) -> Float[Tensor, "head src dst"]:
        """See the base class."""
        return clean.weighted(clean.gradient)


class AttributionPatching(Score):
    """How far an edge's message is moved from corrupted to clean, along the corrupted run's gradient (Nanda 2023)."""

    def edges(self, clean: Side, corrupted: Side) -> Float[Tensor, "head src dst"]:
        """See the base class."""
        return clean.weighted(corrupted.gradient) - corrupted.weighted(corrupted.gradient)
