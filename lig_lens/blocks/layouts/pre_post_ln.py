"""Norms before and after attention and MLP: Gemma 2 and 3."""

from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.inside import Inside, post_norm
from lig_lens.blocks.layouts.layout import Layout, Trial


class PrePostLn(Layout):
    """resid_mid = resid_pre + norm(attn(norm(resid_pre))), and the same with the MLP."""

    name = "pre_post_ln"

    def fits(self, trial: Trial) -> bool:
        """See the base class."""
        return post_norm(trial.inside) is not None

    def middle(self, inside: Inside) -> Float[Tensor, "pos d_model"] | None:
        """Skip connection and normed attention output added up."""
        path, values = post_norm(inside), inside.seen.values
        normed = None if path is None else values.get(f"{path}.hook_out", values.get("hook_attn_out"))
        return None if normed is None else inside.call.resid_pre + normed

    def reads(self, inside: Inside) -> tuple[str, ...]:
        """See the base class."""
        path, values = post_norm(inside), inside.seen.values
        named = ("hook_attn_out", *(f"{path}.{hook}" for hook in ("hook_scale", "hook_normalized", "hook_out")))
        return tuple(name for name in named if name in values)
