"""Which hooks are the nodes of a block, found on the model at hand and checked numerically.

Hook names mean different things by architecture (`hook_resid_mid` of a BERT bridge is the sum that enters the
*second* LayerNorm, `hook_resid_post` of a HookedEncoder comes before the last one), so no name is trusted.
Every block is run once with all its hooks read, then with one node changed at a time, and the layout follows
from what the block's output did.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.block import BlockCall, prepared, record_calls
from lig_lens.errors import BoundaryError, NonFiniteError
from lig_lens.formula import PATTERN_PATH, Formula, find_formula
from lig_lens.loading import check_evaluating, check_hooked, load_model

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

    `resid_post` is the replayed value in the dtype of integration; `W_O` and `b_O` reproduce the attention
    output from `z`. `norms_to_z` and `norms_to_resid_post` count the norms in a row on the way there, and
    `rounding` is the relative rounding error of the block: larger than its dtype's where it casts to float32.
    """

    call: BlockCall
    boundaries: BlockBoundaries
    resid_post: Float[Tensor, "pos d_model"] = field(repr=False)
    eps: float = 1e-5
    z_path: str | None = None
    attn_out_path: str | None = None
    norms_to_z: int = 1
    norms_to_resid_post: int = 2
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
        self, attn_out: Float[Tensor, "batch pos d_model"], skip: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """resid_post from the attention output (W_O z + b_O, before any norm on it) and the skip connection."""
        assert self.attn_out_path is not None
        result = self.call.run(skip, {self.attn_out_path: lambda _: attn_out})
        assert result is not None
        return result

    def run_tail_at(
        self, attn_out: Float[Tensor, "item d_model"], skip: Float[Tensor, "item d_model"]
    ) -> Float[Tensor, "item d_model"]:
        """The tail at single points: it acts token by token, so they are packed into rows of the prompt's length."""
        n_items, n_pos = len(attn_out), len(self.resid_pre)
        rows = -(-n_items // n_pos)
        index = torch.arange(rows * n_pos, device=attn_out.device).clamp(max=n_items - 1)
        packed = [leaf[index].reshape(rows, n_pos, -1) for leaf in (attn_out, skip)]
        return self.run_tail(*packed).reshape(rows * n_pos, -1)[:n_items]

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
    with torch.no_grad(), prepared(model, call.block):
        values, order, output = _read_everything(call)
        _check_replay(call, output)
        norms = {path: call.modules[path] for path in _norm_paths(call)}
        resid_pre_path = _hook_with_value(values, call.resid_pre, first=True)
        resid_post_path = _hook_with_value(values, output, first=False)
        fields: dict[str, Any] = {
            "layer": call.layer,
            "layout": "block_only",
            "resid_pre": _hook_name(model, call, resid_pre_path, "hook_resid_pre"),
            "hook_z": None,
            "resid_mid": None,
            "resid_post": _hook_name(model, call, resid_post_path, "hook_resid_post"),
            "n_heads": 0,
            "n_key_value_heads": 0,
            "d_head": 0,
            "norms": tuple(f"{path} {_norm_kind(module)}" for path, module in norms.items()),
            "engine": "hooks",
            "why_hooks": "no attention with separable heads",
        }
        eps = float(getattr(model.cfg, "eps", 1e-5) or 1e-5)
        nodes: dict[str, Any] = {"call": call, "resid_post": output, "eps": eps, "rounding": _rounding(call, output)}
        found = next((p for p in _Z_PATHS if p[0] in values and p[1] in values), None)
        W_O = getattr(getattr(call.block, "attn", None), "W_O", None)
        if found is None or not isinstance(W_O, Tensor) or W_O.ndim != 3:
            return BlockNodes(boundaries=BlockBoundaries(**fields), **nodes)
        z_path, attn_out_path = found
        W_O = W_O.detach().to(output.dtype)
        z = values[z_path].reshape(-1, *W_O.shape[:2])
        _check_finite(call, "hook_z", z)
        try:
            layout, b_O = _layout(call, z_path, attn_out_path, z, W_O, values, output, order)
        except BoundaryError:
            if heads:
                raise
            return BlockNodes(boundaries=BlockBoundaries(**fields), **nodes)
        found_formula = find_formula(call, values, z, eps) if formula else "not asked for"
        middle = _middle(layout, call, values, attn_out_path)
        mid_path = None if middle is None else _hook_with_value(values, middle, first=True)
        fields |= {
            "layout": layout,
            "hook_z": _hook_name(model, call, z_path, "attn.hook_z"),
            "resid_mid": mid_path and _hook_name(model, call, mid_path, "hook_resid_mid"),
            "n_heads": W_O.shape[0],
            "n_key_value_heads": getattr(model.cfg, "n_key_value_heads", None) or W_O.shape[0],
            "d_head": W_O.shape[1],
            "engine": "closed_form" if isinstance(found_formula, Formula) else "hooks",
            "why_hooks": found_formula if isinstance(found_formula, str) else "",
        }
        pattern = values.get(PATTERN_PATH)
        norms_to_z = int(_norm_before(order, z_path)) + int(_qk_normed(order, z_path))
        return BlockNodes(
            boundaries=BlockBoundaries(**fields),
            z_path=z_path,
            attn_out_path=attn_out_path,
            norms_to_z=norms_to_z,
            norms_to_resid_post=norms_to_z + (3 if layout == "pre_post_ln" else 1 if norms else 0),
            z=z,
            pattern=_pattern(pattern, z),
            W_O=W_O,
            b_O=b_O,
            formula=found_formula if isinstance(found_formula, Formula) else None,
            **nodes,
        )


def _read_everything(call: BlockCall) -> tuple[dict[str, Tensor], list[str], Tensor]:
    """Values at every hook (first batch item), the order in which they fired, and the block's output."""
    values: dict[str, Tensor] = {}
    order: list[str] = []

    def reader(path: str) -> Any:
        def read(tensor: Tensor) -> None:
            order.append(path)
            # Some bridges fire a hook twice; the first value is the one on the path.
            values.setdefault(path, tensor[0].detach().clone())

        return read

    paths = [p for p in call.modules if p.split(".")[-1].startswith("hook_")]
    if "attn.o.hook_in" not in call.modules and "attn" in call.modules:
        paths.append("attn")
    output = call.run(call.resid_pre[None], {path: reader(path) for path in paths})
    assert output is not None
    return values, order, output[0]


def _check_replay(call: BlockCall, output: Tensor) -> None:
    _check_finite(call, "resid_post", output)
    # A half-precision model was recorded in its own rounding and is replayed in float32.
    tolerance = max(1e-4, 8 * torch.finfo(call.recorded_dtype).eps)
    error = _relative(output - call.resid_post, call.resid_post)
    if error > tolerance:
        raise BoundaryError(
            f"Running block {call.layer} alone differs from the full model by {error:.1e} of its output "
            f"(allowed {tolerance:.0e}): the block takes input that its call does not show, or is random."
        )


def _layout(
    call: BlockCall,
    z_path: str,
    attn_out_path: str,
    z: Tensor,
    W_O: Tensor,
    values: dict[str, Tensor],
    output: Tensor,
    order: list[str],
) -> tuple[str, Tensor]:
    """Layout of a block with attention, and its b_O, from runs in which one node differs at a time.

    Run 0 moves a vector from the attention output to the skip connection: if nothing changes, the rest of the
    block sees only their sum (pre_ln, post_ln). Run 1 sets z to 0, which leaves b_O and, in parallel blocks,
    changes the output by exactly the attention output. Run 2 changes z at the last position only: no other
    position may follow, since the rest of the block is taken to act token by token. Run 3 turns all positions
    around, and the output must turn with them.
    """
    scale = call.resid_pre.std().clamp(min=1e-6)
    generator = torch.Generator().manual_seed(0)
    moved = torch.randn(call.resid_pre.shape, generator=generator).to(call.resid_pre) * scale
    changed_z = torch.stack([z, torch.zeros_like(z), z.clone(), z.flip(0)])
    changed_z[2, -1] = changed_z[2, -1].flip(-1) + z.std()
    shift = torch.stack([-moved, *torch.zeros_like(moved).expand(3, -1, -1)])
    skip = torch.stack([call.resid_pre + moved, call.resid_pre, call.resid_pre, call.resid_pre.flip(0)])
    attn_outs: list[Tensor] = []

    def on_attn_out(now: Tensor) -> Tensor:
        attn_outs.append(now.detach().clone())
        return now + shift

    hooks = {z_path: lambda now: changed_z.reshape(now.shape), attn_out_path: on_attn_out}
    outputs = call.run(skip, hooks)
    assert outputs is not None
    attn_out, b_O = values[attn_out_path], attn_outs[0][1, 0]
    error = _relative(torch.einsum("phd,hdm->pm", z, W_O) + b_O - attn_out, attn_out)
    if error > 1e-3:
        raise BoundaryError(
            f"Block {call.layer}: hook_z times W_O plus b_O misses the attention output at "
            f"'{attn_out_path}' by {error:.1e} of it. The hook is not the head output before W_O "
            "Take off hooks that edit the model, or use maps=('block',)."
        )
    if z.shape[0] > 1:
        leak = max(_relative((outputs[2] - output)[:-1], output), _relative(outputs[3].flip(0) - output, output))
        if leak > 1e-4:
            raise BoundaryError(
                f"Block {call.layer}: after attention it mixes positions or treats them differently (by {leak:.1e} of "
                "its output), but only what acts on each token alike can be attributed to heads. Take off hooks that "
                "edit the model, or use maps=('block',)."
            )
    if _relative(outputs[0] - output, output) <= 1e-3:
        return ("pre_ln" if _norm_before(order, z_path) else "post_ln"), b_O
    if _post_norm(call, values, attn_out) is not None:
        return "pre_post_ln", b_O
    without_attention = outputs[1] - b_O
    if _relative(output - attn_out - without_attention, output) <= 1e-3:
        return "parallel", b_O
    raise BoundaryError(
        f"Block {call.layer}: its output follows neither the sum of skip connection and attention output, nor a norm "
        "of the attention output, nor a parallel MLP. Take off hooks that edit the model, or use maps=('block',)."
    )


def _middle(layout: str, call: BlockCall, values: dict[str, Tensor], attn_out_path: str) -> Tensor | None:
    """The vector m that the rest of the block sees, where the layout has one."""
    attn_out = values[attn_out_path]
    if layout in ("pre_ln", "post_ln"):
        return call.resid_pre + attn_out
    post_norm = _post_norm(call, values, attn_out)
    if layout == "pre_post_ln" and post_norm is not None:
        normed = values.get(f"{post_norm}.hook_out", values.get("hook_attn_out"))
        return None if normed is None else call.resid_pre + normed
    return None


def _norm_paths(call: BlockCall) -> list[str]:
    """Norms of the block outside attention: TransformerLens gives each a `hook_normalized`."""
    suffix = ".hook_normalized"
    paths = [p.removesuffix(suffix) for p in call.modules if p.endswith(suffix)]
    return [p for p in paths if not p.startswith("attn.")]


def _norm_before(order: Sequence[str], z_path: str) -> bool:
    before = order[: order.index(z_path)]
    return any(p.endswith(".hook_normalized") and not p.startswith("attn.") for p in before)


def _qk_normed(order: Sequence[str], z_path: str) -> bool:
    before = order[: order.index(z_path)]
    return any(p.startswith("attn.") and p.endswith(".hook_normalized") for p in before)


def _rounding(call: BlockCall, output: Tensor) -> float:
    """Relative rounding error of a block, measured: Hugging Face norms cast to float32 whatever the dtype is."""
    single, double = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
    if output.dtype != torch.float64:
        return single
    nudged = call.run(call.resid_pre[None] * (1 + 1e-10))
    assert nudged is not None
    moved = _relative(nudged[0] - output, output)
    # A block in float64 follows the nudge; one that rounds to float32 inside jumps by its eps, or not at all.
    return double if 1e-13 < moved < 1e-8 else single


def _post_norm(call: BlockCall, values: dict[str, Tensor], attn_out: Tensor) -> str | None:
    """Path of the norm that is applied to the attention output alone, if there is one."""
    for path in _norm_paths(call):
        scale = values.get(f"{path}.hook_scale")
        normalized = values.get(f"{path}.hook_normalized")
        if scale is None or normalized is None:
            continue
        # x = normalized * scale, up to the mean that LayerNorm takes off.
        rebuilt = normalized * scale
        centred = attn_out - attn_out.mean(-1, keepdim=True)
        if min(_relative(rebuilt - attn_out, attn_out), _relative(rebuilt - centred, attn_out)) <= 1e-3:
            return path
    return None


def _norm_kind(module: Any) -> str:
    rms = getattr(module, "uses_rms_norm", None)
    if rms is None:
        return type(module).__name__
    return "RMSNorm" if rms else "LayerNorm"


def _hook_with_value(values: dict[str, Tensor], wanted: Tensor, first: bool) -> str | None:
    paths = [
        path
        for path, value in values.items()
        if value.shape == wanted.shape and _relative(value - wanted, wanted) <= 1e-5 and "hook_" in path
    ]
    # An outer hook names a node better than one deep inside a component.
    paths.sort(key=lambda p: p.count("."))
    shallow = [p for p in paths if p.count(".") == paths[0].count(".")]
    return (shallow[0] if first else shallow[-1]) if shallow else None


def _hook_name(model: Any, call: BlockCall, path: str | None, familiar: str) -> str:
    """Full hook name, in TransformerLens' familiar spelling where that is the same hook on this model."""
    prefix = f"blocks.{call.layer}."
    if path is None:
        return f"blocks.{call.layer} (no hook)"
    name = prefix + familiar
    return name if model.hook_dict.get(name) is call.modules[path] else prefix + path


def _relative(difference: Tensor, reference: Tensor) -> float:
    if difference.numel() == 0:
        return 0.0
    return float(difference.abs().max() / reference.abs().max().clamp(min=1e-30))


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
    calls = record_calls(model, tokens, layers)
    return [find_nodes(model, calls[layer]).boundaries for layer in layers]
