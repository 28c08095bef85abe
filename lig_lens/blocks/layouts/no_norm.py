"""No norms at all, as in toy models of attention and MLP."""

from lig_lens.blocks.inside import Inside, any_norm
from lig_lens.blocks.layouts.layout import SumLayout


class NoNorm(SumLayout):
    """resid_mid = resid_pre + attn(resid_pre), resid_post = resid_mid + mlp(resid_mid)."""

    name = "no_norm"

    def places_norm(self, inside: Inside) -> bool:
        """See the base class."""
        return not any_norm(inside.seen.order)
