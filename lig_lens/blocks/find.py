"""Which hooks are the nodes of a block, found on the model at hand and checked numerically.

Hook names mean different things by architecture (`hook_resid_mid` of a BERT bridge is the sum that enters the
*second* LayerNorm, `hook_resid_post` of a HookedEncoder comes before the last one), so no name is trusted.
All hooks of a block are read in the model's own run, then it is run with its nodes changed (`layout.py`), and the
layout follows from what the block's output did.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.call import BlockCall, Hook, Seen, prepared
from lig_lens.blocks.formula import PATTERN_PATH, Formula, Probe, find_formula
from lig_lens.blocks.layout import (
    Inside,
    diagnose,
    find_common_layout,
    middle,
    norm_before,
    norm_paths,
    qk_normed,
    relative,
    tail_scales,
)
from lig_lens.blocks.recording import record_calls
from lig_lens.errors import BoundaryError, NonFiniteError
from lig_lens.models.loading import check_evaluating, check_hooked, load_model

LAYOUTS = ("pre_ln", "post_ln", "pre_post_ln", "parallel", "block_only")

# Where the two generations keep the head outputs before W_O, and the output of W_O with its bias.
_Z_PATHS = (("attn.o.hook_in", "attn.o.hook_out"), ("attn.hook_z", "attn"))


@dataclass(frozen=True)
class BlockBoundaries:
    """The nodes of one block, by TransformerLens hook name, as `describe_boundaries` returns them.

    `hook_z` is None where attention has no separable heads, `resid_mid` where no hook carries the sum of skip
    connection and attention output (parallel blocks have no such sum). `engine` is what `engine="auto"` takes for the
    `attn` and `block` maps: `closed_form`, or `hooks` for the reason in `why_hooks`.
    """

    layer: int
    layout: str
    resid_pre: str
    hook_z: str | None
    resid_mid: str | None
    resid_post: str
    n_heads: int
    n_key_value_heads: int
    d_head: int
    norms: tuple[str, ...]
    engine: str
    why_hooks: str = ""


@dataclass(frozen=True)
class BlockNodes:
    """One block of one prompt with its nodes' values: what the engines work on.

    `resid_post` is in the dtype of integration, replayed if the model is not; `resid_mid` is what the layout has
    between attention and the rest; `W_O` and `b_O` reproduce the attention output from `z`.
    `norms_to_z` counts the norms in a row on the way there, `tail_scales` holds what those behind it divide by on the
    prompt (path of its hook -> value), `attention_is_attn_out` says that attention ends there, and `rounding` is the
    relative rounding error of the block: larger than its dtype's where it casts to float32. `v_path` is where messages
    are read, if somebody looked for them (`messages.attention_of`).
    """

    call: BlockCall
    boundaries: BlockBoundaries
    resid_post: Float[Tensor, "pos d_model"] = field(repr=False)
    resid_mid: Float[Tensor, "pos d_model"] | None = field(default=None, repr=False)
    eps: float = 1e-5
    z_path: str | None = None
    attn_out_path: str | None = None
    v_path: str | None = None
    norms_to_z: int = 1
    tail_scales: Mapping[str, Float[Tensor, "pos"]] = field(default_factory=dict, repr=False)
    attention_is_attn_out: bool = False
    rounding: float = torch.finfo(torch.float32).eps
    z: Float[Tensor, "pos head d_head"] | None = field(default=None, repr=False)
    pattern: Float[Tensor, "head dst src"] | None = field(default=None, repr=False)
    W_O: Float[Tensor, "head d_head d_model"] | None = field(default=None, repr=False)
    b_O: Float[Tensor, "d_model"] | None = field(default=None, repr=False)
    formula: Formula | None = field(default=None, repr=False)

    @property
    def layer(self) -> int:
        """Index of the block in the model."""
        return self.call.layer

    @property
    def resid_pre(self) -> Float[Tensor, "pos d_model"]:
        """Residual vectors that entered the block."""
        return self.call.resid_pre

    def read_z(self, resid_pre: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos head d_head"]:
        """Head outputs (before W_O) for given residual vectors; the rest of the block does not run."""
        assert self.z_path is not None and self.z is not None  # callers asked for attention nodes
        read: list[Tensor] = []
        self.call.run(resid_pre, {self.z_path: read.append}, stop_at=self.z_path)
        return read[0].reshape(*read[0].shape[:2], *self.z.shape[1:])

    def run_tail(
        self,
        attn_out: Float[Tensor, "batch pos d_model"],
        skip: Float[Tensor, "batch pos d_model"],
        hooks: Mapping[str, Hook] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """resid_post from the attention output (W_O z + b_O, before any norm on it) and the skip connection."""
        assert self.attn_out_path is not None
        result = self.call.run(skip, {**(hooks or {}), self.attn_out_path: lambda _: attn_out})
        assert result is not None
        return result

    def attn_out(self, z: Float[Tensor, "*batch head d_head"], bias: float) -> Float[Tensor, "*batch d_model"]:
        """Attention output of head outputs `z`, with `bias` times b_O."""
        assert self.W_O is not None and self.b_O is not None
        return torch.einsum("...he,hem->...m", z, self.W_O) + bias * self.b_O


def find_nodes(model: Any, call: BlockCall, heads: bool = True, formula: bool = True) -> BlockNodes:
    """Find and check the nodes of the block that `call` recorded.

    Args:
        model: the model that the block belongs to.
        call: the block on one prompt.
        heads: whether head outputs are needed; if not, a block whose inside does not fit any layout is `block_only`.
        formula: whether to look for a formula of its attention.

    Raises:
        BoundaryError: the nodes do not reproduce the block.
        NonFiniteError: a node's value, or a weight, is NaN or infinite.
    """
    _check_weights(call)
    _check_finite(call, "resid_pre", call.resid_pre)
    _check_finite(call, "resid_post", call.resid_post)
    with torch.no_grad(), prepared(model, call.block):
        seen = call.seen or _replay(call)
        nodes = _whole_block(model, replace(call, seen=None), seen)
        inside = _inside(nodes, seen)
        if inside is not None:
            try:
                return _with_heads(model, nodes, inside, formula, replayed=call.seen is None)
            except BoundaryError:
                if heads:
                    raise
        if call.seen is not None:
            _replay(call)
        return nodes


def _whole_block(model: Any, call: BlockCall, seen: Seen) -> BlockNodes:
    """The nodes that every block has, resid_pre and resid_post."""
    norms = {path: call.modules[path] for path in norm_paths(call)}
    output = seen.output
    boundaries = BlockBoundaries(
        layer=call.layer,
        layout="block_only",
        resid_pre=_hook_name(call, _hook_with_value(seen.values, call.resid_pre, first=True), "hook_resid_pre"),
        hook_z=None,
        resid_mid=None,
        resid_post=_hook_name(call, _hook_with_value(seen.values, output, first=False), "hook_resid_post"),
        n_heads=0,
        n_key_value_heads=0,
        d_head=0,
        norms=tuple(f"{path} {_norm_kind(module)}" for path, module in norms.items()),
        engine="hooks",
        why_hooks="no attention with separable heads",
    )
    return BlockNodes(
        call,
        boundaries,
        resid_post=output,
        eps=float(getattr(model.cfg, "eps", 1e-5) or 1e-5),
        tail_scales=tail_scales(call, seen, next(iter(norms), None)),
        rounding=_rounding(call, output),
    )


def _inside(nodes: BlockNodes, seen: Seen) -> Inside | None:
    """Attention's nodes, where a block shows them and the W_O between them."""
    call = nodes.call
    paths = next((p for p in _Z_PATHS if p[0] in seen.values and p[1] in seen.values), None)
    W_O = getattr(getattr(call.block, "attn", None), "W_O", None)
    if paths is None or not isinstance(W_O, Tensor) or W_O.ndim != 3:
        return None
    W_O = W_O.detach().to(nodes.resid_post.dtype)
    z = seen.values[paths[0]].reshape(-1, *W_O.shape[:2])
    _check_finite(call, "hook_z", z)
    return Inside(call, *paths, W_O, z, seen)


def _with_heads(model: Any, nodes: BlockNodes, inside: Inside, formula: bool, replayed: bool) -> BlockNodes:
    """The nodes of a block with attention nodes.

    Args:
        model: the model that the block belongs to.
        nodes: those that every block has.
        inside: attention's.
        formula: whether to look for one.
        replayed: whether the block is known to do alone what it does in the model.

    Raises:
        BoundaryError: the block fits no layout.
    """
    call, z, values = inside.call, inside.z, inside.seen.values
    probe = Probe(call, nodes.eps) if formula else None
    common = find_common_layout(inside, probe)
    found = find_formula(call, values, z, probe) if probe is not None else "not asked for"
    # That layout and formula hold on other residual vectors, with what the model's run showed, says it too.
    if not replayed and (common is None or isinstance(found, str)):
        _replay(call)
    layout, b_O = common or diagnose(inside)
    resid_mid = middle(layout, inside)
    mid_path = None if resid_mid is None else _hook_with_value(values, resid_mid, first=True)
    n_heads, d_head = z.shape[1:]
    boundaries = replace(
        nodes.boundaries,
        layout=layout,
        hook_z=_hook_name(call, inside.z_path, "attn.hook_z"),
        resid_mid=mid_path and _hook_name(call, mid_path, "hook_resid_mid"),
        n_heads=n_heads,
        n_key_value_heads=getattr(model.cfg, "n_key_value_heads", None) or n_heads,
        d_head=d_head,
        engine="hooks" if isinstance(found, str) else "closed_form",
        why_hooks=found if isinstance(found, str) else "",
    )
    order = inside.seen.order
    return replace(
        nodes,
        boundaries=boundaries,
        resid_mid=resid_mid,
        z_path=inside.z_path,
        attn_out_path=inside.attn_out_path,
        norms_to_z=int(norm_before(order, inside.z_path)) + int(qk_normed(order, inside.z_path)),
        tail_scales=tail_scales(call, inside.seen, None if layout == "parallel" else inside.attn_out_path),
        attention_is_attn_out=_ends_with(inside.attn_out_path, values),
        z=z,
        pattern=_pattern(values.get(PATTERN_PATH), z),
        W_O=inside.W_O,
        b_O=b_O,
        formula=None if isinstance(found, str) else found,
    )


def _replay(call: BlockCall) -> Seen:
    """What the block's hooks show when it runs alone, which must be what it does in the model."""
    seen = Seen()
    result = call.run(call.resid_pre[None], seen.hooks(call.modules))
    assert result is not None
    seen.output = result[0]
    # A half-precision model was recorded in its own rounding and is replayed in float32.
    tolerance = max(1e-4, 8 * torch.finfo(call.recorded_dtype).eps)
    error = relative(seen.output - call.resid_post, call.resid_post)
    if error > tolerance:
        raise BoundaryError(
            f"Running block {call.layer} alone differs from the full model by {error:.1e} of its output "
            f"(allowed {tolerance:.0e}): the block takes input that its call does not show, or is random."
        )
    return seen


def _ends_with(attn_out_path: str, values: Mapping[str, Tensor]) -> bool:
    """Whether what attention returns is the attention output, with nothing done to it."""
    if attn_out_path == "attn":
        return True
    out, returned = values[attn_out_path], values.get("attn.hook_out")
    return returned is not None and returned.shape == out.shape and relative(returned - out, out) <= 1e-6


def _rounding(call: BlockCall, output: Tensor) -> float:
    """Relative rounding error of a block, measured: Hugging Face norms cast to float32 whatever the dtype is."""
    single, double = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
    if output.dtype != torch.float64:
        return single
    nudged = call.run(call.resid_pre[None] * (1 + 1e-10))
    assert nudged is not None
    moved = relative(nudged[0] - output, output)
    # A block in float64 follows the nudge; one that rounds to float32 inside jumps by its eps, or not at all.
    return double if 1e-13 < moved < 1e-8 else single


def _norm_kind(module: Any) -> str:
    rms = getattr(module, "uses_rms_norm", None)
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
    prefix = f"blocks.{call.layer}."
    if path is None:
        return f"blocks.{call.layer} (no hook)"
    name = prefix + familiar
    return name if call.hook_dict.get(name) is call.modules[path] else prefix + path


def _check_finite(call: BlockCall, node: str, value: Tensor) -> None:
    if bool(torch.isfinite(value).all()):
        return
    raise NonFiniteError(
        f"NaN or infinite values at {node} of block {call.layer}: check the weights before it, and the dtype "
        "(float16 overflows at 65504)."
    )


def _check_weights(call: BlockCall) -> None:
    # First of all: a HookedTransformer turns NaN patterns into 0, and a bad weight would show nowhere.
    for name, weight in call.block.named_parameters():
        # One sum is several times cheaper than a look at every number; where it overflows, look.
        if not bool(torch.isfinite(weight.sum())) and not bool(torch.isfinite(weight).all()):
            shown = name.replace("_original_component.", "")
            raise NonFiniteError(
                f"NaN or infinite values in the weight {shown!r} of block {call.layer}: reload the model."
            )


def _pattern(pattern: Tensor | None, z: Tensor) -> Tensor | None:
    """The attention pattern, if that is what the hook shows: rows over sources that add up to 1."""
    if pattern is None or pattern.shape != (z.shape[1], z.shape[0], z.shape[0]):
        return None
    pattern = pattern.to(z.dtype)
    return pattern if bool(((pattern.sum(-1) - 1).abs() <= 1e-3).all()) else None


def describe_boundaries(
    model: Any, tokens: Int[Tensor, "1 pos"] | None = None, *, config_only: bool = False
) -> list[BlockBoundaries]:
    """Hooks, layout, norms, heads and engine of every block, checked numerically on `model`.

    Args:
        model: a hooked model, or a name for `load_model`.
        tokens: token ids to check on, [1, pos]; a few arbitrary ids by default.
        config_only: with a name, build the model with random weights instead of loading them.

    Raises:
        BoundaryError: a block's nodes do not reproduce it.
        InputError: not a hooked model, or one in train mode with dropout.
    """
    if isinstance(model, (str, Path)):
        model = load_model(model, load_weights=not config_only)
    check_evaluating(check_hooked(model))
    if tokens is None:
        length = min(6, model.cfg.n_ctx)
        tokens = torch.arange(1, length + 1, device=model.cfg.device)[None] * 7 % model.cfg.d_vocab
    layers = range(model.cfg.n_layers)
    found = record_calls(model, tokens, layers, lambda call: find_nodes(model, call).boundaries)
    return [found[layer] for layer in layers]
