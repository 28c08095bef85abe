"""Norms before attention and MLP, and outputs that are scaled before they are added: Granite."""

from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.inside import Inside, norm_before
from lig_lens.blocks.layouts.layout import Layout, Trial


class ScaledPreLn(Layout):
    """resid_mid = resid_pre + scale attn(norm(resid_pre)), and the same with the MLP."""

    name = "scaled_pre_ln"

    def fits(self, trial: Trial) -> bool:
        """See the base class."""
        scale = _scale(trial.inside)
        if scale in (0.0, 1.0) or not norm_before(trial.inside.seen.order, trial.inside.z_path):
            return False
        return trial.same(trial.moved_scaled(scale))

    def middle(self, inside: Inside) -> Float[Tensor, "pos d_model"] | None:
        """The sum."""
        return inside.call.resid_pre + _scale(inside) * inside.attn_out


def _scale(inside: Inside) -> float:
    """What the model's settings say that outputs are multiplied with; `fits` checks it."""
    return float(getattr(inside.call.stack.model.cfg, "residual_multiplier", None) or 1.0)
