"""Run one block from given node values.

A full forward pass shows how the model calls each block (attention mask, position embeddings, ...). The call
is kept and replayed with other residual vectors in place of the recorded ones, and with hooks that read or
replace the nodes inside. This is exact, needs no knowledge of the architecture, runs no earlier block, and
works alike on a `TransformerBridge`, a `HookedTransformer` and a `HookedEncoder`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lig_lens.errors import BoundaryError

Hook = Callable[[Tensor], Tensor | None]
"""Receives the activation at a node; returns a replacement, or None to leave it."""


_HALF = (torch.float16, torch.bfloat16)


class _Stop(Exception):  # noqa: N818  (control flow, not an error)
    """Ends a replay as soon as the wanted node has been read."""


def submodules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield `(path, submodule)` in registration order, under the names TransformerLens shows.

    A bridge also reaches each component through the wrapped Hugging Face module; that second path is skipped.
    """
    for name, child in module._modules.items():
        if child is None or name.startswith("_original"):
            continue
        yield prefix + name, child
        yield from submodules(child, f"{prefix}{name}.")


def _first_tensor(output: Any) -> Tensor:
    """The hidden states in a block's or module's output, which may be a tuple."""
    tensor = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(tensor, Tensor):
        raise BoundaryError(
            f"A block returned {type(tensor).__name__} where a residual tensor was expected: "
            "this architecture is not supported."
        )
    return tensor


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """A module's output with other hidden states in it."""
    if isinstance(output, (tuple, list)):
        return type(output)((tensor, *output[1:]))
    return tensor


def _without_cache(value: Any) -> Any:
    """A key-value cache would grow at every replay, so it is dropped from the recorded call."""
    return None if hasattr(value, "get_seq_length") or "KeyValueCache" in type(value).__name__ else value


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map_tensors(item, change) for item in value)
    return value


@contextlib.contextmanager
def module_hooks(pairs: Sequence[tuple[nn.Module, Callable[..., Any], bool]]) -> Iterator[None]:
    """Attach torch hooks `(module, hook, is_pre)` and take every one off again, whatever happens inside."""
    handles = []
    try:
        for module, hook, is_pre in pairs:
            if is_pre:
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def prepared(model: Any, block: nn.Module) -> Iterator[None]:
    """Hold a block ready for integration: weights frozen, half precision raised to float32.

    The integrand is evaluated in float32 at least, because differences of half-precision outputs are mostly
    rounding. The original parameters are put back untouched on the way out.
    """
    parameters = list(block.parameters()) + list(block.buffers())
    saved = [(p, p.data, p.requires_grad) for p in parameters]
    cfg, dtype = model.cfg, model.cfg.dtype
    try:
        for p in parameters:
            if p.dtype in _HALF:
                p.data = p.data.float()
            if p.is_floating_point():
                p.requires_grad_(False)
        if dtype in _HALF:
            cfg.dtype = torch.float32
        yield
    finally:
        for p, data, requires_grad in saved:
            p.data = data
            if data.is_floating_point():
                p.requires_grad_(requires_grad)
        cfg.dtype = dtype


@dataclass(frozen=True)
class BlockCall:
    """How the model called one block on one prompt, ready to be replayed.

    `resid_pre` and `resid_post` are the vectors that entered and left it, shape [pos, d_model], in the dtype
    that integration uses.
    """

    layer: int
    block: nn.Module
    resid_pre: Float[Tensor, "pos d_model"]
    resid_post: Float[Tensor, "pos d_model"]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    resid_key: int | str
    """Where the residual stands in the call: position in `args`, or name in `kwargs`."""
    modules: dict[str, nn.Module] = field(repr=False)
    hook_dict: Mapping[str, nn.Module] = field(repr=False)
    """Hooks of the whole model by all their names."""
    recorded_dtype: torch.dtype = torch.float32
    folded: frozenset[int | str] = frozenset()
    """Arguments whose first axis is batch times something else, items of the batch one after the other."""

    def run(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        hooks: Mapping[str, Hook] | None = None,
        stop_at: str | None = None,
    ) -> Float[Tensor, "batch pos d_model"] | None:
        """Run the block on `resid_pre` with `hooks` on its submodules' outputs.

        Args:
            resid_pre: residual vectors to start from, one batch item per interpolation point.
            hooks: path of a submodule inside the block -> hook on its output (the first one, of a tuple).
            stop_at: path of the last submodule that is needed; the rest of the block does not run.

        Returns:
            resid_post, or None where `stop_at` cut the run short.
        """
        args = [self._adapted(key, value, resid_pre) for key, value in enumerate(self.args)]
        kwargs = {name: self._adapted(name, value, resid_pre) for name, value in self.kwargs.items()}
        if isinstance(self.resid_key, int):
            args[self.resid_key] = resid_pre
        else:
            kwargs[self.resid_key] = resid_pre
        with module_hooks(self._torch_hooks(hooks or {}, stop_at)):
            try:
                return _first_tensor(self.block(*args, **kwargs))
            except _Stop:
                return None

    def _adapted(self, key: int | str, value: Any, resid_pre: Float[Tensor, "batch pos d_model"]) -> Any:
        """An argument for as many items as `resid_pre` has; masks and positions were recorded for one."""
        return _map_tensors(value, functools.partial(_adapt, resid_pre, key in self.folded))

    def _torch_hooks(
        self, hooks: Mapping[str, Hook], stop_at: str | None
    ) -> list[tuple[nn.Module, Callable[..., Any], bool]]:
        pairs: list[tuple[nn.Module, Callable[..., Any], bool]] = []
        for path, hook in hooks.items():
            pairs.append((self.modules[path], functools.partial(_on_output, hook), False))
        if stop_at is not None:
            pairs.append((self.modules[stop_at], _stop, False))
        return pairs


def _adapt(resid_pre: Float[Tensor, "batch pos d_model"], folded: bool, tensor: Tensor) -> Tensor:
    batch = len(resid_pre)
    if tensor.is_floating_point():
        tensor = tensor.to(resid_pre.dtype)
    if batch == 1 or tensor.ndim < 2:
        return tensor
    if folded:
        return tensor.repeat(batch, *[1] * (tensor.ndim - 1))
    # Without copying.
    return tensor.expand(batch, *tensor.shape[1:]) if tensor.shape[0] == 1 else tensor


def _on_output(hook: Hook, _module: nn.Module, _inputs: Any, output: Any) -> Any:
    replacement = hook(_first_tensor(output))
    return None if replacement is None else with_first_tensor(output, replacement)


def _stop(*_: Any) -> None:
    raise _Stop


def record_calls(model: Any, tokens: Int[Tensor, "1 pos"], layers: Sequence[int]) -> dict[int, BlockCall]:
    """Run the model once on `tokens`, as far as needed, and keep how it called the blocks `layers`.

    Returns:
        layer -> `BlockCall`; values are copies, so the model's memory can be reused.
    """
    inputs, outputs = _inputs_and_outputs(model, tokens, layers)
    folded: dict[int, frozenset[int | str]] = {}
    if any(tensor.ndim >= 2 and tensor.shape[0] != 1 for call in inputs.values() for _, tensor in _tensors(*call)):
        # Which first axes hold the batch, only a batch of two can tell. Two tokens are enough.
        short = tokens[:, :2]
        one, two = (_inputs_and_outputs(model, short.expand(n, -1), layers)[0] for n in (1, 2))
        folded = {layer: _folded(_tensors(*one[layer]), _tensors(*two[layer])) for layer in layers}
    hook_dict = model.hook_dict
    return {
        layer: _block_call(model, hook_dict, layer, *inputs[layer], outputs[layer], folded.get(layer, frozenset()))
        for layer in layers
    }


def _inputs_and_outputs(
    model: Any, tokens: Int[Tensor, "batch pos"], layers: Sequence[int]
) -> tuple[dict[int, tuple[tuple[Any, ...], dict[str, Any]]], dict[int, Tensor]]:
    """Arguments and outputs of the blocks `layers` in a run of the model that ends with the last of them."""
    inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    outputs: dict[int, Tensor] = {}
    pairs: list[tuple[nn.Module, Callable[..., Any], bool]] = []
    for layer in layers:

        def before(_module: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
            inputs[layer] = (args, kwargs)

        def after(_module: nn.Module, _args: Any, output: Any, layer: int = layer) -> None:
            outputs[layer] = _first_tensor(output)
            if layer == max(layers):
                raise _Stop

        pairs += [(model.blocks[layer], before, True), (model.blocks[layer], after, False)]
    with torch.no_grad(), module_hooks(pairs), contextlib.suppress(_Stop):
        model(tokens)
    return inputs, outputs


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[int | str, Tensor]]:
    """Tensors among the arguments, by position or name."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return [(key, value) for key, value in named if isinstance(value, Tensor)]


def _folded(one: list[tuple[int | str, Tensor]], two: list[tuple[int | str, Tensor]]) -> frozenset[int | str]:
    """Arguments whose first axis doubles with the batch although it is longer."""
    lengths = {key: len(tensor) for key, tensor in two if tensor.ndim >= 2}
    return frozenset(key for key, x in one if x.ndim >= 2 and 1 < len(x) and lengths.get(key) == 2 * len(x))


def _block_call(
    model: Any,
    hook_dict: Mapping[str, nn.Module],
    layer: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
    folded: frozenset[int | str],
) -> BlockCall:
    resid_key: int | str | None = next((i for i, a in enumerate(args) if isinstance(a, Tensor)), None)
    if resid_key is None:
        resid_key = next((k for k in ("hidden_states", "resid_pre", "x") if k in kwargs), None)
    if resid_key is None:
        raise BoundaryError(
            f"Block {layer} was called without a residual tensor (arguments: {sorted(kwargs)}): "
            "this architecture is not supported."
        )
    resid = args[resid_key] if isinstance(resid_key, int) else kwargs[resid_key]
    if resid.shape != output.shape or resid.ndim != 3:
        raise BoundaryError(
            f"Block {layer} maps shape {tuple(resid.shape)} to {tuple(output.shape)}; "
            "a block must keep [batch, pos, d_model]."
        )
    # What runs decides: a config's dtype stays as it was loaded when the model is cast.
    dtype = torch.float32 if output.dtype in _HALF else output.dtype
    block = model.blocks[layer]
    return BlockCall(
        layer=layer,
        block=block,
        resid_pre=resid[0].detach().to(dtype).clone(),
        resid_post=output[0].detach().to(dtype).clone(),
        args=tuple(_without_cache(a) for a in args),
        kwargs={k: _without_cache(v) for k, v in kwargs.items()},
        resid_key=resid_key,
        modules=dict(submodules(block)),
        hook_dict=hook_dict,
        recorded_dtype=output.dtype,
        folded=folded,
    )
