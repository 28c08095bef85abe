"""Norms after each sum: BERT."""

from lig_lens.blocks.layouts.layout import SumLayout


class PostLn(SumLayout):
    """h = norm(resid_pre + attn(resid_pre)), resid_post = norm(h + mlp(h)); the first sum stands for resid_mid."""

    name = "post_ln"
    norm_first = False
