"""How a block joins skip connection and attention output, found by running it with its nodes changed.

One run settles the common layouts, in which the rest of the block acts on the sum of both, token by token. Only where
that fails does a second one, of four prompts, tell what else it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.call import BlockCall, Hook, Seen
from lig_lens.blocks.formula import Probe
from lig_lens.errors import BoundaryError

# How far a layout may be from what the block does, relative to the largest value of its output.
_ALLOWED = 1e-3
_MAY_LEAK = 1e-4


@dataclass(frozen=True)
class Inside:
    """A block's attention nodes and what its hooks showed, in order, on the prompt (no batch axis)."""

    call: BlockCall
    z_path: str
    attn_out_path: str
    W_O: Float[Tensor, "head d_head d_model"]
    z: Float[Tensor, "pos head d_head"]
    seen: Seen = field(repr=False)

    @property
    def attn_out(self) -> Float[Tensor, "pos d_model"]:
        """Attention output on the prompt."""
        return self.seen.values[self.attn_out_path]


def find_common_layout(inside: Inside, probe: Probe | None) -> tuple[str, Float[Tensor, "d_model"]] | None:
    """Layout of a block with attention and its b_O, if it is `pre_ln` or `post_ln` and one run can show it.

    Args:
        inside: the block's nodes.
        probe: where given, what attention makes of it is read along the way.
    """
    b_O = _known_bias(inside)
    return None if b_O is None or not _acts_on_sum(inside, probe) else (_by_norm(inside), b_O)


def _by_norm(inside: Inside) -> str:
    return "pre_ln" if norm_before(inside.seen.order, inside.z_path) else "post_ln"


def _known_bias(inside: Inside) -> Tensor | None:
    """b_O as the block names it, if that gives the attention output to within rounding."""
    b_O = getattr(inside.call.block.attn, "b_O", None)
    b_O = torch.zeros_like(inside.attn_out[0]) if b_O is None else b_O.detach().to(inside.attn_out)
    if b_O.shape != inside.attn_out.shape[1:]:
        return None
    missed = inside.z.flatten(1) @ inside.W_O.flatten(0, 1) + b_O - inside.attn_out
    return b_O if relative(missed, inside.attn_out) <= 1e-5 else None


def _acts_on_sum(inside: Inside, probe: Probe | None) -> bool:
    """Whether the rest of the block sees only skip + attention output, and each position by itself.

    The block gets the probe, and heads and attention output get what makes the sum that of the prompt moved on by one
    position, but for the last, where something else is put in. All other positions must come out moved on.
    """
    call, n_pos = inside.call, len(inside.z)
    if n_pos == 1:
        return False
    if probe is None:
        probe = Probe(call, 1.0)
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
    assert output is not None
    expected = inside.seen.output.roll(1, 0)[:-1]
    return all(by_position(row[:-1] - expected, expected) <= _MAY_LEAK for row in output)


def diagnose(inside: Inside) -> tuple[str, Tensor]:
    """Layout (`pre_ln`, `post_ln`, `pre_post_ln` or `parallel`) and b_O from four runs that differ in one node each.

    Run 0 moves a vector from the attention output to the skip connection: if nothing changes, the rest of the
    block sees only their sum (pre_ln, post_ln). Run 1 sets z to 0, which leaves b_O and, in parallel blocks,
    changes the output by exactly the attention output. Run 2 changes z at the last position only: no other
    position may follow, since the rest of the block is taken to act token by token. Run 3 moves all positions
    on by one, and the output must move with them.

    Raises:
        BoundaryError: the block fits no layout.
    """
    call, z, output, attn_out = inside.call, inside.z, inside.seen.output, inside.attn_out
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
    assert outputs is not None
    b_O = attn_outs[0][1, 0]
    error = relative(torch.einsum("phd,hdm->pm", z, inside.W_O) + b_O - attn_out, attn_out)
    if error > _ALLOWED:
        raise BoundaryError(
            f"Block {call.layer}: hook_z times W_O plus b_O misses the attention output at "
            f"'{inside.attn_out_path}' by {error:.1e} of it. The hook is not the head output before W_O. "
            "Take off hooks that edit the model, or use maps=('block',)."
        )
    if z.shape[0] > 1:
        leak = max(
            by_position((outputs[2] - output)[:-1], output[:-1]), by_position(outputs[3].roll(-1, 0) - output, output)
        )
        if leak > _MAY_LEAK:
            raise BoundaryError(
                f"Block {call.layer}: after attention it mixes positions or treats them differently (by {leak:.1e} of "
                "its output), but only what acts on each token alike can be attributed to heads. Take off hooks that "
                "edit the model, or use maps=('block',)."
            )
    if by_position(outputs[0] - output, output) <= _ALLOWED:
        return _by_norm(inside), b_O
    if _post_norm(inside) is not None:
        return "pre_post_ln", b_O
    without_attention = outputs[1] - b_O
    if by_position(output - attn_out - without_attention, output) <= _ALLOWED:
        return "parallel", b_O
    raise BoundaryError(
        f"Block {call.layer}: its output follows neither the sum of skip connection and attention output, nor a norm "
        "of the attention output, nor a parallel MLP. Take off hooks that edit the model, or use maps=('block',)."
    )


def middle(layout: str, inside: Inside) -> Float[Tensor, "pos d_model"] | None:
    """The vector m that the rest of the block sees, where the layout has one."""
    if layout in ("pre_ln", "post_ln"):
        return inside.call.resid_pre + inside.attn_out
    post_norm = _post_norm(inside)
    if layout == "pre_post_ln" and post_norm is not None:
        normed = inside.seen.values.get(f"{post_norm}.hook_out", inside.seen.values.get("hook_attn_out"))
        return None if normed is None else inside.call.resid_pre + normed
    return None


def norm_paths(call: BlockCall) -> list[str]:
    """Norms of the block outside attention: TransformerLens gives each a `hook_normalized`."""
    suffix = ".hook_normalized"
    paths = [p.removesuffix(suffix) for p in call.modules if p.endswith(suffix)]
    return [p for p in paths if not p.startswith("attn.")]


def norm_before(order: Sequence[str], z_path: str) -> bool:
    """Whether the block normalises what enters attention."""
    before = order[: order.index(z_path)]
    return any(p.endswith(".hook_normalized") and not p.startswith("attn.") for p in before)


def qk_normed(order: Sequence[str], z_path: str) -> bool:
    """Whether attention normalises its queries or keys."""
    before = order[: order.index(z_path)]
    return any(p.startswith("attn.") and p.endswith(".hook_normalized") for p in before)


def tail_scales(call: BlockCall, seen: Seen, after: str | None) -> dict[str, Float[Tensor, "pos"]]:
    """What the norms outside attention divide by: path of the hook -> value on the prompt.

    Args:
        call: the block.
        seen: what its hooks show on the prompt.
        after: only norms that follow this hook, or the norm of this name; all with None.
    """
    hooks = {f"{path}.hook_scale": path for path in norm_paths(call)}
    passed, found = after is None, {}
    for path in seen.order:
        value = seen.values[path]
        if passed and path in hooks and value.shape[-1:] == (1,) and hooks[path] != after:
            found[path] = value[..., 0]
        passed = passed or path == after or hooks.get(path) == after
    return found


def _post_norm(inside: Inside) -> str | None:
    """Path of the norm that is applied to the attention output alone, if there is one."""
    attn_out = inside.attn_out
    for path in norm_paths(inside.call):
        scale = inside.seen.values.get(f"{path}.hook_scale")
        normalized = inside.seen.values.get(f"{path}.hook_normalized")
        if scale is None or normalized is None:
            continue
        # x = normalized * scale, up to the mean that LayerNorm takes off.
        rebuilt = normalized * scale
        centred = attn_out - attn_out.mean(-1, keepdim=True)
        if min(relative(rebuilt - attn_out, attn_out), relative(rebuilt - centred, attn_out)) <= _ALLOWED:
            return path
    return None


def relative(difference: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    if difference.numel() == 0:
        return 0.0
    return float(difference.abs().max() / reference.abs().max().clamp(min=1e-30))


def by_position(difference: Float[Tensor, "pos d_model"], reference: Float[Tensor, "pos d_model"]) -> float:
    """The same for each position, of which one may be a thousand times larger than all others; then the worst."""
    sizes = reference.abs().amax(-1)
    return float((difference.abs().amax(-1) / sizes.clamp(min=1e-6 * float(sizes.max()))).max())
