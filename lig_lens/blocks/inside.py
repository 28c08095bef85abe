"""A block's attention nodes and norms, as its hooks show them on one prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.call import BlockCall, Seen

# How far a layout may be from what the block does, relative to the largest value of its output.
ALLOWED = 1e-3


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


def norm_paths(call: BlockCall) -> list[str]:
    """Norms of the block outside attention: TransformerLens gives each a `hook_normalized`."""
    suffix = ".hook_normalized"
    paths = [p.removesuffix(suffix) for p in call.modules if p.endswith(suffix)]
    return [p for p in paths if not p.startswith("attn.")]


def any_norm(order: Sequence[str]) -> bool:
    """Whether the block normalises anything outside attention."""
    return any(p.endswith(".hook_normalized") and not p.startswith("attn.") for p in order)


def norm_before(order: Sequence[str], z_path: str) -> bool:
    """Whether the block normalises what enters attention."""
    return any_norm(order[: order.index(z_path)])


def qk_normed(inside: Inside) -> bool:
    """Whether attention normalises its queries or keys: a hook shows it, or a module's class says so (Llama 4)."""
    order = inside.seen.order
    before = order[: order.index(inside.z_path)]
    shown = any(p.startswith("attn.") and p.endswith(".hook_normalized") for p in before)
    return shown or any(type(one).__name__.endswith("Norm") for one in inside.call.modules["attn"].modules())


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


def post_norm(inside: Inside) -> str | None:
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
        if min(relative(rebuilt - attn_out, attn_out), relative(rebuilt - centred, attn_out)) <= ALLOWED:
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
