"""Which hooks are the nodes of a block, found on the model at hand and checked numerically.

Hook names mean different things by architecture (`hook_resid_mid` of a BERT bridge is the sum that enters the
*second* LayerNorm, `hook_resid_post` of a HookedEncoder comes before the last one), so no name is trusted.
All hooks of a block are read in the model's own run, then it is run with its nodes changed (`layout_fit.py`), and the
layout follows from what the block's output did.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lig_lens.blocks.across import AcrossFormula, find_across
from lig_lens.blocks.block import AttentionNodes, Block, BlockBoundaries
from lig_lens.blocks.call import BlockCall, Seen
from lig_lens.blocks.formula import AttentionFormula
from lig_lens.blocks.formula_fit import UNTOLD, Probe, find_formula
from lig_lens.blocks.inside import Inside, norm_before, norm_paths, qk_normed, relative, tail_scales
from lig_lens.blocks.layout_fit import diagnose, find_bias, find_common_layout
from lig_lens.blocks.layouts import ACROSS, BLOCK_ONLY
from lig_lens.blocks.layouts.layout import Layout
from lig_lens.errors import BoundaryError, NonFiniteError

# Where the two generations keep the head outputs before W_O, and the output of W_O with its bias; a bridge that shows
# each head's result (`set_use_attn_result`) does not run its W_O module.
_Z_PATHS = (("attn.o.hook_in", "attn.o.hook_out"), ("attn.o.hook_in", "attn.hook_out"), ("attn.hook_z", "attn"))


def find_block(call: BlockCall, seen: Seen, replayed: bool) -> Block:
    """Find what a block is, from one prompt. Call it inside `prepared`.

    Args:
        call: the block on the prompt.
        seen: what all of its hooks show there.
        replayed: whether the block is known to do alone what it does in the model.

    Raises:
        BoundaryError: the block does alone something else than in the model.
        NonFiniteError: a head output is NaN or infinite.
    """
    block = _whole_block(call, seen)
    inside = inside_of(call, seen)
    if inside is not None:
        try:
            return (_with_heads_across if call.stack.crosses else _with_heads)(block, inside, replayed)
        except BoundaryError as error:
            # Another prompt may fit, if this one missed by little.
            boundaries = replace(block.boundaries, why_hooks=str(error))
            block = replace(block, boundaries=boundaries, problem=str(error), settled=False)
    if not replayed:
        replay(call)
    return block


def replay(call: BlockCall, reads: tuple[str, ...] | None = None) -> Seen:
    """What the block's hooks show when it runs alone, which must be what it does in the model.

    Args:
        call: the block on a prompt.
        reads: hooks that are read; all by default.

    Raises:
        BoundaryError: it does something else.
    """
    seen = Seen()
    seen.output = call.run(call.resid_pre[None], seen.hooks(call.modules, reads))[0]
    # A half-precision model was recorded in its own rounding and is replayed in float32.
    tolerance = max(1e-4, 8 * torch.finfo(call.recorded_dtype).eps)
    error = relative(seen.output - call.resid_post, call.resid_post)
    if not error <= tolerance:
        raise BoundaryError(
            f"Running block {call.layer} alone differs from the full model by {error:.1e} of its output "
            f"(allowed {tolerance:.0e}): the block takes input that its call does not show, or is random."
        )
    return seen


def _whole_block(call: BlockCall, seen: Seen) -> Block:
    """What every block has, resid_pre and resid_post."""
    norms = {path: call.modules[path] for path in norm_paths(call)}
    boundaries = BlockBoundaries(
        layer=call.layer,
        layout=BLOCK_ONLY,
        resid_pre=_hook_name(call, _hook_with_value(seen.values, call.resid_pre, first=True), "hook_resid_pre"),
        hook_z=None,
        resid_mid=None,
        resid_post=_hook_name(call, _hook_with_value(seen.values, seen.output, first=False), "hook_resid_post"),
        n_heads=0,
        n_key_value_heads=0,
        d_head=0,
        norms=tuple(f"{path} {_norm_kind(module)}" for path, module in norms.items()),
        engine="hooks",
        why_hooks="no attention with separable heads",
    )
    return Block(
        boundaries,
        eps=float(getattr(call.stack.model.cfg, "eps", 1e-5) or 1e-5),
        rounding=_rounding(call, seen.output),
        norms_to_z=1,
        tail_norms=tuple(tail_scales(call, seen, next(iter(norms), None))),
        attention=None,
        problem="",
        settled=True,
        found_on=len(torch.unique(call.resid_pre, dim=0)),
    )


def inside_of(call: BlockCall, seen: Seen) -> Inside | None:
    """Attention's nodes, where a block shows them and the W_O between them."""
    paths = next((p for p in _Z_PATHS if p[0] in seen.values and p[1] in seen.values), None)
    if paths is None:
        return None
    W_O = None
    with contextlib.suppress(ValueError):  # of a bridge that takes heads to have another size than they have
        W_O = _output_map(call, seen.values[paths[0]])
    if not isinstance(W_O, Tensor) or W_O.ndim != 3:
        return None
    W_O = W_O.detach().to(seen.output.dtype)
    z = seen.values[paths[0]].reshape(-1, *W_O.shape[:2])
    check_finite(call, "hook_z", z)
    return Inside(call, *paths, W_O, z, seen)


def _with_heads(block: Block, inside: Inside, replayed: bool) -> Block:
    """A block with attention's nodes.

    Raises:
        BoundaryError: the block fits no layout.
    """
    call, z = inside.call, inside.z
    probe = Probe(call, block.eps)
    common = find_common_layout(inside, probe)
    found = find_formula(call, inside.seen.values, z, probe)
    # That layout and formula hold on other residual vectors, with what the model's run showed, says it too.
    if not replayed and (common is None or isinstance(found, str)):
        replay(call)
    layout, b_O = common or diagnose(inside)
    formula = found if isinstance(found, str) else found.formula
    block = _joined(block, inside, layout, b_O, formula)
    seen_norms = int(norm_before(inside.seen.order, inside.z_path)) + int(qk_normed(inside))
    return replace(
        block,
        norms_to_z=seen_norms if isinstance(formula, str) else formula.depth,
        tail_norms=tuple(tail_scales(call, inside.seen, inside.attn_out_path if layout.norms_in_series else None)),
        settled=found != UNTOLD,
    )


def _with_heads_across(block: Block, inside: Inside, replayed: bool) -> Block:
    """A block with the nodes of cross-attention, of which nothing behind the heads is asked.

    Raises:
        BoundaryError: head outputs do not give the attention output, or the block does something else alone.
    """
    b_O = find_bias(inside)
    if not replayed:
        replay(inside.call)
    block = _joined(block, inside, ACROSS, b_O, find_across(inside))
    return replace(block, norms_to_z=int(qk_normed(inside)), tail_norms=())


def _joined(
    block: Block, inside: Inside, layout: Layout, b_O: Tensor, formula: AttentionFormula | AcrossFormula | str
) -> Block:
    """A block with what was found of its attention; `formula` may be why there is none."""
    call, z, values = inside.call, inside.z, inside.seen.values
    resid_mid = layout.middle(inside)
    mid_path = None if resid_mid is None else _hook_with_value(values, resid_mid, first=True)
    n_heads, d_head = z.shape[1:]
    boundaries = replace(
        block.boundaries,
        layout=layout.name,
        hook_z=_hook_name(call, inside.z_path, "attn.hook_z"),
        resid_mid=mid_path and _hook_name(call, mid_path, "hook_resid_mid"),
        n_heads=n_heads,
        n_key_value_heads=getattr(call.stack.model.cfg, "n_key_value_heads", None) or n_heads,
        d_head=d_head,
        engine="hooks" if isinstance(formula, str) else "closed_form",
        why_hooks=formula if isinstance(formula, str) else "",
    )
    nodes = AttentionNodes(
        layout,
        inside.z_path,
        inside.attn_out_path,
        _ends_with(inside.attn_out_path, values),
        b_O,
        relative(z.flatten(1) @ inside.W_O.flatten(0, 1) + b_O - inside.attn_out, inside.attn_out),
        None if isinstance(formula, str) else formula,
        layout.reads(inside),
    )
    return replace(block, boundaries=boundaries, attention=nodes)


def _output_map(call: BlockCall, z: Tensor) -> Any:
    """W_O; where it cannot be read, as of quantised weights, what its module makes of unit vectors."""
    try:
        return getattr(call.modules.get("attn"), "W_O", None)
    except NotImplementedError:
        width, n_heads = z[0].numel(), int(call.stack.model.cfg.n_heads)
        units = torch.eye(width, dtype=z.dtype, device=z.device)
        made, nothing = (call.modules["attn.o"](one[None])[0] for one in (units, units[:1] * 0))
        return (made - nothing).reshape(n_heads, width // n_heads, -1)


def _ends_with(attn_out_path: str, values: Mapping[str, Tensor]) -> bool:
    """Whether what attention returns is the attention output, with nothing done to it."""
    if attn_out_path == "attn":
        return True
    out, returned = values[attn_out_path], values.get("attn.hook_out")
    return returned is not None and returned.shape == out.shape and relative(returned - out, out) <= 1e-6


def _rounding(call: BlockCall, output: Tensor) -> float:
    """Relative rounding error of a block, measured: Hugging Face norms cast to float32 whatever the dtype is.

    Steps near float32's are small enough for a block to be straight, if it is in float64. One that rounds to float32
    inside goes by stairs there, whatever its skip connection adds.
    """
    single, double = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
    if output.dtype != torch.float64:
        return single
    step = 2e-8 * call.resid_pre
    step[..., ::2] *= -1  # a norm would not see one factor for all
    once, twice = (call.run((call.resid_pre + count * step)[None])[0] for count in (1, 2))
    return double if relative(twice - 2 * once + output, output) <= 1e-10 else single


def _norm_kind(module: Any) -> str:
    rms = getattr(module, "uses_rms_norm", None)
    if isinstance(getattr(module, "original_component", None), nn.Identity):
        return "Identity"
    if rms is None:
        return type(module).__name__
    return "RMSNorm" if rms else "LayerNorm"


def _hook_with_value(values: Mapping[str, Tensor], wanted: Tensor, first: bool) -> str | None:
    allowed = 1e-5 * float(wanted.abs().max())
    paths = [
        path
        for path, value in values.items()
        if value.shape == wanted.shape
        and "hook_" in path
        # The first position settles most cases.
        and all(float((value[part] - wanted[part]).abs().max()) <= allowed for part in (slice(1), slice(None)))
    ]
    # An outer hook names a node better than one deep inside a component.
    paths.sort(key=lambda p: p.count("."))
    shallow = [p for p in paths if p.count(".") == paths[0].count(".")]
    return (shallow[0] if first else shallow[-1]) if shallow else None


def _hook_name(call: BlockCall, path: str | None, familiar: str) -> str:
    """Full hook name, in TransformerLens' familiar spelling where that is the same hook on this model."""
    if path is None:
        return f"{call.stack.name(call.layer)} (no hook)"
    name = call.stack.hook_name(call.layer, familiar)
    return name if call.stack.hook_dict.get(name) is call.modules[path] else call.stack.hook_name(call.layer, path)


def check_finite(call: BlockCall, node: str, value: Tensor) -> None:
    """Raise NonFiniteError if a node's value is NaN or infinite."""
    if bool(torch.isfinite(value).all()):
        return
    raise NonFiniteError(
        f"NaN or infinite values at {node} of block {call.layer}: check the weights before it, and the dtype "
        "(float16 overflows at 65504)."
    )
