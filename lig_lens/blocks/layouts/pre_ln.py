"""Norms before attention and MLP: GPT-2, Llama and most others."""

from lig_lens.blocks.inside import Inside, norm_before
from lig_lens.blocks.layouts.layout import SumLayout


class PreLn(SumLayout):
    """resid_mid = resid_pre + attn(norm(resid_pre)), resid_post = resid_mid + mlp(norm(resid_mid))."""

    name = "pre_ln"

    def places_norm(self, inside: Inside) -> bool:
        """See the base class."""
        return norm_before(inside.seen.order, inside.z_path)
