"""Attention and MLP side by side: GPT-J, NeoX and others."""

from lig_lens.blocks.layouts.layout import Layout, Trial


class Parallel(Layout):
    """resid_post = resid_pre + attn(norm(resid_pre)) + mlp(norm(resid_pre)); there is no resid_mid."""

    name = "parallel"
    norms_in_series = False

    def fits(self, trial: Trial) -> bool:
        """See the base class."""
        # Without head outputs exactly the attention output is missing, but for its bias.
        return trial.same(trial.without_z - trial.b_O + trial.inside.attn_out)
