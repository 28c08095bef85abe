"""Norms after each sum: BERT."""

from lig_lens.blocks.inside import Inside, any_norm, norm_before
from lig_lens.blocks.layouts.layout import SumLayout


class PostLn(SumLayout):
    """h = norm(resid_pre + attn(resid_pre)), resid_post = norm(h + mlp(h)); the first sum stands for resid_mid."""

    name = "post_ln"

    def places_norm(self, inside: Inside) -> bool:
        """See the base class."""
        return any_norm(inside.seen.order) and not norm_before(inside.seen.order, inside.z_path)
