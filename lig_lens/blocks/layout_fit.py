"""Finds how a block joins skip connection and attention output, by running it with its nodes changed.

One run settles the common layouts, in which the rest of the block acts on the sum of both, token by token. Only where
that fails does a second one, of four prompts, tell what else it is.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.formula_fit import Probe
from lig_lens.blocks.inside import ALLOWED, Inside, by_position, relative
from lig_lens.blocks.layouts import LAYOUTS
from lig_lens.blocks.layouts.layout import Layout, SumLayout, Trial
from lig_lens.errors import BoundaryError
from lig_lens.models.running import Hook

_MAY_LEAK = 1e-4


def find_common_layout(inside: Inside, probe: Probe) -> tuple[Layout, Float[Tensor, "d_model"]] | None:
    """Layout of a block with attention and its b_O, if it acts on the sum and one run can show it.

    Args:
        inside: the block's nodes.
        probe: what attention makes of it is read along the way.
    """
    b_O = _known_bias(inside)
    if b_O is None or not _acts_on_sum(inside, probe):
        return None
    found = (one for one in LAYOUTS if isinstance(one, SumLayout) and one.places_norm(inside))
    layout = next(found, None)
    return None if layout is None else (layout, b_O)


def _known_bias(inside: Inside) -> Tensor | None:
    """b_O as the block names it, if that gives the attention output to within rounding."""
    b_O = getattr(inside.call.modules["attn"], "b_O", None)
    b_O = torch.zeros_like(inside.attn_out[0]) if b_O is None else b_O.detach().to(inside.attn_out)
    if b_O.shape != inside.attn_out.shape[1:]:
        return None
    missed = inside.z.flatten(1) @ inside.W_O.flatten(0, 1) + b_O - inside.attn_out
    return b_O if relative(missed, inside.attn_out) <= 1e-5 else None


def _acts_on_sum(inside: Inside, probe: Probe) -> bool:
    """Whether the rest of the block sees only skip + attention output, and each position by itself.

    The block gets the probe, and heads and attention output get what makes the sum that of the prompt moved on by one
    position, but for the last, where something else is put in. All other positions must come out moved on.
    """
    call, n_pos = inside.call, len(inside.z)
    if n_pos == 1:
        return False
    runs = len(probe.resid)
    z = inside.z.roll(1, 0).clone()
    z[-1] = z[-1].flip(-1) + z.std()
    shift = call.resid_pre.roll(1, 0) - probe.resid
    hooks: dict[str, Hook] = {
        **probe.hooks(),
        inside.z_path: lambda now: z.repeat(runs, 1, 1, 1).reshape(now.shape),
        inside.attn_out_path: lambda now: now + shift,
    }
    output = call.run(probe.resid, hooks)
    expected = inside.seen.output.roll(1, 0)[:-1]
    return all(by_position(row[:-1] - expected, expected) <= _MAY_LEAK for row in output)


def find_bias(inside: Inside) -> Float[Tensor, "d_model"]:
    """b_O of attention whose heads are all that is asked about.

    Raises:
        BoundaryError: head outputs times W_O with it are not the attention output.
    """
    b_O = _known_bias(inside)
    if b_O is None:
        outs: list[Tensor] = []
        hooks: dict[str, Hook] = {inside.z_path: torch.zeros_like, inside.attn_out_path: outs.append}
        inside.call.run(inside.call.resid_pre[None], hooks)
        b_O = outs[0][0, 0]
        _check_heads(inside, b_O)
    return b_O


def _check_heads(inside: Inside, b_O: Float[Tensor, "d_model"]) -> None:
    attn_out = inside.attn_out
    error = relative(torch.einsum("phd,hdm->pm", inside.z, inside.W_O) + b_O - attn_out, attn_out)
    if not error <= ALLOWED:
        raise BoundaryError(
            f"Block {inside.call.layer}: hook_z times W_O plus b_O misses the attention output at "
            f"'{inside.attn_out_path}' by {error:.1e} of it. The hook is not the head output before W_O."
        )


def diagnose(inside: Inside) -> tuple[Layout, Float[Tensor, "d_model"]]:
    """Layout and b_O of a block, from four runs that differ in one node each.

    Run 0 moves a vector from the attention output to the skip connection: if nothing changes, the rest of the
    block sees only their sum (pre_ln, post_ln). Run 1 sets z to 0, which leaves b_O and, in parallel blocks,
    changes the output by exactly the attention output. Run 2 changes z at the last position only: no other
    position may follow, since the rest of the block is taken to act token by token. Run 3 moves all positions
    on by one, and the output must move with them.

    Raises:
        BoundaryError: the block fits no layout.
    """
    call, z, output = inside.call, inside.z, inside.seen.output
    scale = call.resid_pre.std().clamp(min=1e-6)
    generator = torch.Generator().manual_seed(0)
    moved = torch.randn(call.resid_pre.shape, generator=generator).to(call.resid_pre) * scale
    changed_z = torch.stack([z, torch.zeros_like(z), z.clone(), z.roll(1, 0)])
    changed_z[2, -1] = changed_z[2, -1].flip(-1) + z.std()
    shift = torch.stack([-moved, *torch.zeros_like(moved).expand(3, -1, -1)])
    skip = torch.stack([call.resid_pre + moved, call.resid_pre, call.resid_pre, call.resid_pre.roll(1, 0)])
    attn_outs: list[Tensor] = []

    def on_attn_out(now: Tensor) -> Tensor:
        attn_outs.append(now.detach().clone())
        return now + shift

    hooks: dict[str, Hook] = {
        inside.z_path: lambda now: changed_z.reshape(now.shape),
        inside.attn_out_path: on_attn_out,
    }
    outputs = call.run(skip, hooks)
    b_O = attn_outs[0][1, 0]
    _check_heads(inside, b_O)
    if z.shape[0] > 1:
        leak = max(
            by_position((outputs[2] - output)[:-1], output[:-1]), by_position(outputs[3].roll(-1, 0) - output, output)
        )
        if not leak <= _MAY_LEAK:
            raise BoundaryError(
                f"Block {call.layer}: after attention it mixes positions or treats them differently (by {leak:.1e} of "
                "its output), but only what acts on each token alike can be attributed to heads."
            )
    trial = Trial(inside, b_O, moved, outputs[0], outputs[1])
    for layout in LAYOUTS:
        if layout.fits(trial):
            return layout, b_O
    raise BoundaryError(
        f"Block {call.layer}: its output follows neither the sum of skip connection and attention output, nor a norm "
        "of the attention output, nor a parallel MLP."
    )
