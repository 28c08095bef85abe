"""The blocks of a model, each found once, and the values that prompts put there.

What was found is kept beside the model as long as the model lives, and used again while a stamp says that the block is
still the same: its weights (their sums, which are needed to see NaNs anyway), its hooks, its dtype, and the model's
settings. On every prompt the values themselves must still fit it: head outputs times W_O give the attention output, the
formula gives pattern and head outputs, and queries, keys and values of other vectors are what it says (a hook on them
may do something else each time). Where anything differs the block is found anew.
"""

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lig_lens.blocks.block import AttentionNodes, Block
from lig_lens.blocks.call import BlockCall, Seen
from lig_lens.blocks.find import check_finite, find_block, inside_of, replay
from lig_lens.blocks.inside import Inside, relative
from lig_lens.blocks.layouts.layout import SumLayout
from lig_lens.blocks.messages import ROWS_MISS, messages_of
from lig_lens.blocks.reading import PATTERN_PATH
from lig_lens.blocks.recording import Recording, record_calls
from lig_lens.blocks.values import HeadValues, Values
from lig_lens.errors import BoundaryError, InputError, NonFiniteError
from lig_lens.inputs.inputs import Inputs
from lig_lens.models.precision import HALF, raising_hooks
from lig_lens.models.running import prepared
from lig_lens.models.stack import Stack

# Different positions that a prompt needs for what is found on it to stand for longer ones.
_ENOUGH = 4
# How far rounding takes head outputs times W_O from the attention output, relative.
_ROUNDED = 1e-5


@dataclass(frozen=True)
class Needs:
    """What is wanted of a prompt's values; the rest is not kept, since of all blocks it may not fit into memory.

    Attributes:
        heads: values at attention's nodes; without them a block whose inside fits no layout will do.
        formula: attention's formula with the prompt's values.
        pattern: the attention pattern.
        v_path: where messages are read, pattern times values.
        messages: pattern and values.
        middle: resid_mid.
        routes: hold the experts that the prompt chooses.
        without_heads: what to do about a block whose heads are needed and cannot be told.
    """

    heads: bool = True
    formula: bool = True
    pattern: bool = False
    v_path: bool = False
    messages: bool = False
    middle: bool = False
    routes: bool = False
    without_heads: str = "leave the layer out."


@dataclass(frozen=True)
class _Stamp:
    """What must not have changed for a block to be the one that was found."""

    sums: tuple[float, ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device | None
    config: tuple[tuple[str, Any], ...]


_Hooks = tuple[tuple[int, ...], ...]
_Which = tuple[torch.dtype | None, str]
# By the dtype of the first weight, since a half-precision model also runs in float32, and by the attention that is
# asked about, of which a block may have two.
_KEPT: "weakref.WeakKeyDictionary[nn.Module, dict[_Which, tuple[_Stamp, _Hooks, Block]]]"
_KEPT = weakref.WeakKeyDictionary()


class Blocks:
    """Some blocks of a model, for prompts that run while its weights stay as they are."""

    def __init__(self, stack: Stack, layers: Sequence[int]) -> None:
        """Look up what is known of the blocks.

        Raises:
            NonFiniteError: a weight is NaN or infinite.
            InputError: a weight is quantised, and what it stands for cannot be read.
        """
        self.stack, self.layers = stack, tuple(layers)
        config = _config(stack)
        self._stamps = {layer: _stamp(stack.blocks[layer], layer, config) for layer in self.layers}
        self._known: dict[int, Block] = {}
        for layer in self.layers:
            module, stamp = stack.blocks[layer], self._stamps[layer]
            kept = _KEPT.get(module, {}).get((_dtype(stamp, module), stack.attention))
            if kept is not None and kept[0] == stamp and kept[1] == _hooks(module):
                self._known[layer] = kept[2]

    def record(self, inputs: Inputs, needs: Needs, *, whole: bool = False) -> Recording[Values]:
        """Run the model once on a prompt, and give the values at its blocks.

        Args:
            inputs: the prompt.
            needs: what of the values is kept.
            whole: whether to run the model to its end.

        Raises:
            BoundaryError: heads are needed, and the nodes of a block do not reproduce it.
            NonFiniteError: a node's value is NaN or infinite.
        """
        reads = {layer: block.reads for layer, block in self._known.items() if _covers(block, len(inputs))}

        def visit(call: BlockCall) -> Values:
            return self._values(call, needs, known=call.layer in reads)

        return record_calls(self.stack, inputs, self.layers, visit, reads=reads, whole=whole)

    def _values(self, call: BlockCall, needs: Needs, known: bool) -> Values:
        check_finite(call, "resid_pre", call.resid_pre)
        check_finite(call, "resid_post", call.resid_post)
        shown, call = call.seen, replace(call, seen=None)
        # Weights have to be float32 for what is run again.
        half = call.recorded_dtype in HALF
        with torch.no_grad(), prepared(self.stack.model, call.block) if half else nullcontext():
            if known:
                block = self._known[call.layer]
                seen = replay(call, block.reads) if shown is None else shown
                values = _fitted(block, call, seen, needs, fresh=False)
                if values is not None:
                    return _holding(values) if needs.routes else values
                shown = None  # only what the known block needs was read
            seen = replay(call) if shown is None else shown
            block = find_block(call, seen, replayed=shown is None)
            self._keep(call, block)
            values = _fitted(block, call, seen, needs, fresh=True)
            if values is not None and needs.routes:
                return _holding(values)
        if values is None:
            raise BoundaryError(
                f"Block {call.layer}: the formula that was found for its attention misses its head outputs. Use "
                "engine='hooks', and please report the model."
            )
        return values

    def _keep(self, call: BlockCall, block: Block) -> None:
        if not block.settled:
            return
        self._known[call.layer] = block
        stamp = self._stamps[call.layer]
        _KEPT.setdefault(call.block, {})[_dtype(stamp, call.block), self.stack.attention] = (
            stamp,
            _hooks(call.block),
            block,
        )


def _covers(block: Block, n_pos: int) -> bool:
    """Whether a prompt on which a block was found tells enough about one of `n_pos` positions."""
    return block.found_on >= min(n_pos, _ENOUGH)


def _fitted(block: Block, call: BlockCall, seen: Seen, needs: Needs, fresh: bool) -> Values | None:
    """Values of a prompt at a block, or None where they do not fit it.

    Args:
        block: what was found.
        call: the block on the prompt.
        seen: what its hooks show there.
        needs: what is kept.
        fresh: whether the block was found on this very prompt.
    """
    if needs.heads and block.problem:
        raise BoundaryError(f"{block.problem} Take off hooks that edit the model, or {needs.without_heads}")
    scales = {path: seen.values[path][..., 0] for path in block.tail_norms if path in seen.values}
    if len(scales) < len(block.tail_norms):
        return None
    attention = None
    if block.attention is not None:
        inside = inside_of(call, seen)
        if inside is None:
            return None
        attention = _at_heads(block.attention, inside, needs, fresh)
        if attention is None:
            return None
    elif not fresh:
        replay(call, ())
    return Values(block, call, seen.output, scales, attention)


def _holding(values: Values) -> Values:
    return replace(values, call=values.call.with_routes())


def _at_heads(nodes: AttentionNodes, inside: Inside, needs: Needs, fresh: bool) -> HeadValues | None:
    call, values, z = inside.call, inside.seen.values, inside.z
    if not fresh:
        made = z.flatten(1) @ inside.W_O.flatten(0, 1) + nodes.b_O
        if not relative(made - inside.attn_out, inside.attn_out) <= max(_ROUNDED, 2 * nodes.missed):
            return None
    formula = None
    if nodes.formula is not None and (needs.formula or not fresh):
        formula = nodes.formula.on(call, values, z)
        if formula is None:
            return None
    if not fresh and (formula is None or not isinstance(nodes.layout, SumLayout)):
        replay(call, ())
    pattern = messages = None
    if needs.pattern or needs.messages or needs.v_path:
        pattern = _pattern(values.get(PATTERN_PATH), z)
    if needs.messages or needs.v_path:
        messages = messages_of(z, pattern, values)
    if pattern is not None and not bool((pattern.sum(-1) >= 1 - ROWS_MISS).all()):
        pattern = None  # a sink has some of it, and shares of a row are not what they are called
    return HeadValues(
        nodes,
        z,
        inside.W_O,
        pattern=pattern if needs.pattern else None,
        resid_mid=nodes.layout.middle(inside) if needs.middle else None,
        formula=formula if needs.formula else None,
        v_path=None if messages is None else messages.v_path,
        messages=messages if needs.messages else None,
    )


def _pattern(pattern: Tensor | None, z: Tensor) -> Tensor | None:
    """The attention pattern, if that is what the hook shows: rows that add up to 1, or less where a sink takes part."""
    if pattern is None or pattern.shape != (z.shape[1], z.shape[0], z.shape[0]):
        return None
    pattern = pattern.to(z.dtype)
    return pattern if bool((pattern >= 0).all() and (pattern.sum(-1) <= 1 + ROWS_MISS).all()) else None


def _stamp(module: nn.Module, layer: int, config: tuple[tuple[str, Any], ...]) -> _Stamp:
    """See `_Stamp`; also finds weights that are NaN or infinite.

    A HookedTransformer turns NaN patterns into 0, and a bad weight would show nowhere.
    """
    named = list(module.named_parameters())
    _check_unpacked(named, layer)
    # One sum is several times cheaper than a look at every number; where it overflows, look.
    sums = torch.stack([_sum(w.detach()) for _, w in named]).tolist() if named else []
    for (name, weight), total in zip(named, sums, strict=True):
        if not abs(total) < float("inf") and not bool(torch.isfinite(weight).all()):
            shown = name.replace("_original_component.", "")
            raise NonFiniteError(f"NaN or infinite values in the weight {shown!r} of block {layer}: reload the model.")
    device = named[0][1].device if named else None
    return _Stamp(tuple(sums), tuple(w.dtype for _, w in named), device, (("training", module.training), *config))


def _check_unpacked(named: Sequence[tuple[str, Tensor]], layer: int) -> None:
    """Raise InputError if weights are codes of a quantisation, whose products round on the way."""
    for name, weight in named:
        if not weight.is_floating_point() or weight.dtype.itemsize < torch.float16.itemsize:
            shown = name.replace("_original_component.", "")
            raise InputError(
                f"The weight {shown!r} of block {layer} is quantised ({type(weight).__name__}, {weight.dtype}): its "
                "codes cannot be read as numbers, and products with them round on the way. Load the model with "
                "transformers, and save and load model.dequantize(dtype=torch.float32)."
            )
        if weight.dtype in HALF and is_traceable_wrapper_subclass(weight):
            shown = name.replace("_original_component.", "")
            raise InputError(
                f"The weight {shown!r} of block {layer} is quantised ({type(weight).__name__}) and computes in "
                f"{str(weight.dtype).removeprefix('torch.')}, which is too coarse for an integral and cannot be raised "
                "from outside: quantise the model in float32."
            )


def _sum(weight: Tensor) -> Tensor:
    """Sum of a weight's numbers; of one that wraps others, such as a quantised one, of those."""
    if is_traceable_wrapper_subclass(weight):
        inner, _ = weight.__tensor_flatten__()
        return torch.stack([_sum(getattr(weight, name)) for name in inner]).sum()
    return weight.sum(dtype=torch.float32)


def _dtype(stamp: _Stamp, module: nn.Module) -> torch.dtype | None:
    """What a block computes in, by its first weight."""
    if raising_hooks(module):
        return torch.float32
    return stamp.dtypes[0] if stamp.dtypes else None


def _config(stack: Stack) -> tuple[tuple[str, Any], ...]:
    """The model's settings, as far as they are plain values; some decide what blocks show and do."""
    cfg = stack.model.cfg
    plain = (bool, int, float, str, torch.dtype)
    named = sorted((key, value) for key, value in vars(cfg).items() if isinstance(value, plain))
    hf = getattr(getattr(stack.model, "original_model", None), "config", None)
    return (*named, ("attention", getattr(hf, "_attn_implementation", None)))


def _hooks(module: nn.Module) -> _Hooks:
    """The hooks on a block's modules (torch numbers them), and what stands in for their `forward`."""
    return tuple(
        (
            *sorted({*one._forward_pre_hooks, *one._forward_hooks} - raising_hooks(one)),
            id(one.__dict__.get("forward")),
        )
        for one in module.modules()
    )
