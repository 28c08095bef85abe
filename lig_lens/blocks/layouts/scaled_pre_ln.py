"""Norms before attention and MLP, and outputs that are scaled before they are added: Granite, DINOv2."""

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.inside import Inside, norm_before, relative
from lig_lens.blocks.layouts.layout import Layout, Trial


class ScaledPreLn(Layout):
    """resid_mid = resid_pre + scale attn(norm(resid_pre)), and the same with the MLP."""

    name = "scaled_pre_ln"

    def fits(self, trial: Trial) -> bool:
        """See the base class."""
        scale = _scale(trial.inside)
        if bool((scale == 0).any()) or bool((scale == 1).all()):
            return False
        return norm_before(trial.inside.seen.order, trial.inside.z_path) and trial.same(trial.moved_scaled(scale))

    def middle(self, inside: Inside) -> Float[Tensor, "pos d_model"] | None:
        """The sum."""
        return inside.call.resid_pre + _scale(inside) * inside.attn_out

    def reads(self, inside: Inside) -> tuple[str, ...]:
        """See the base class."""
        path = _scaled_by(inside)
        return () if path is None else (f"{path}.hook_in", f"{path}.hook_out")


def _scale(inside: Inside) -> Float[Tensor, "..."]:
    """What the attention output is multiplied with, one number or one for each dimension; `fits` checks it.

    A module that does it (DINOv2's layer scale) shows it, and else the model's settings say so.
    """
    path = _scaled_by(inside)
    if path is None:
        multiplier = getattr(inside.call.stack.model.cfg, "residual_multiplier", None)
        return torch.tensor(float(multiplier or 1.0)).to(inside.attn_out)
    before, after = (inside.seen.values[f"{path}.{hook}"] for hook in ("hook_in", "hook_out"))
    largest = before.abs().argmax(0, keepdim=True)  # of each dimension, since all positions are scaled alike
    return after.gather(0, largest)[0] / before.gather(0, largest)[0]


def _scaled_by(inside: Inside) -> str | None:
    """A module of the block, outside attention, that takes the attention output alone, and keeps its shape."""
    values, attn_out = inside.seen.values, inside.attn_out
    for path in (name.removesuffix(".hook_in") for name in values if name.endswith(".hook_in")):
        before, after = values[f"{path}.hook_in"], values.get(f"{path}.hook_out")
        if path.startswith("attn.") or after is None or not before.shape == after.shape == attn_out.shape:
            continue
        if relative(before - attn_out, attn_out) <= 1e-6:
            return path
    return None
