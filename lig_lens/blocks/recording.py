"""See how the model calls its blocks in one run."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lig_lens.blocks.call import HALF, BlockCall, Seen, Stop, first_tensor, module_hooks, submodules, torch_hooks
from lig_lens.errors import BoundaryError

T = TypeVar("T")


class _FoldedError(Exception):
    """Some argument's first axis is more than the batch; never reaches a user."""


def record_calls(
    model: Any, tokens: Int[Tensor, "1 pos"], layers: Sequence[int], visit: Callable[[BlockCall], T]
) -> dict[int, T]:
    """Run the model once on `tokens`, as far as needed, and see how it calls the blocks `layers`.

    Args:
        model: a hooked model.
        tokens: token ids.
        layers: indices of blocks.
        visit: gets each call as soon as its block has run, and may run the block again. It should keep no more than
            it needs: what the hooks of all blocks show may not fit into memory.

    Returns:
        layer -> what `visit` returned.
    """
    try:
        return _watch(model, tokens, layers, visit, None)
    except _FoldedError:
        # Which first axes hold the batch, only a batch of two can tell. Two tokens are enough.
        short, unfolded = tokens[:, :2], dict.fromkeys(layers, frozenset[int | str]())
        one, two = (
            _watch(model, short.expand(n, -1), layers, lambda call: _tensors(call.args, call.kwargs), unfolded)
            for n in (1, 2)
        )
        return _watch(model, tokens, layers, visit, {layer: _folded(one[layer], two[layer]) for layer in layers})


def _watch(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    layers: Sequence[int],
    visit: Callable[[BlockCall], T],
    folded: Mapping[int, frozenset[int | str]] | None,
) -> dict[int, T]:
    results: dict[int, T] = {}
    hook_dict = model.hook_dict

    def visit_one(layer: int, call: BlockCall) -> None:
        results[layer] = visit(call)
        if layer == max(layers):
            raise Stop

    with contextlib.ExitStack() as stack:
        for layer in layers:
            known = None if folded is None else folded[layer]
            watcher = _Watcher(model.blocks[layer], layer, hook_dict, known, functools.partial(visit_one, layer))
            stack.callback(watcher.close)
        with torch.no_grad(), contextlib.suppress(Stop):
            model(tokens)
    return results


class _Watcher:
    """Keeps how one block is called and what its hooks show then, and hands it over as soon as the block has run."""

    def __init__(
        self,
        block: nn.Module,
        layer: int,
        hook_dict: Mapping[str, nn.Module],
        folded: frozenset[int | str] | None,
        visit: Callable[[BlockCall], None],
    ) -> None:
        self._block, self._layer, self._hook_dict, self._folded, self._visit = block, layer, hook_dict, folded, visit
        self._modules = dict(submodules(block))
        self._hooks = contextlib.ExitStack()
        self._hooks.enter_context(module_hooks([(block, self._before, True), (block, self._after, False)]))

    def close(self) -> None:
        """Take all hooks off."""
        self._hooks.close()

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._folded is None and any(x.ndim >= 2 and len(x) != 1 for _, x in _tensors(args, kwargs)):
            raise _FoldedError
        self._args, self._kwargs, self._seen = args, kwargs, Seen()
        self._hooks.enter_context(module_hooks(torch_hooks(self._modules, self._seen.hooks(self._modules))))

    def _after(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.close()  # the visitor may run the block again
        call = self._call(first_tensor(output))
        del self._args, self._kwargs, self._seen  # large, and the visitor's to keep
        self._visit(call)

    def _call(self, output: Tensor) -> BlockCall:
        args, kwargs = self._args, self._kwargs
        resid_key: int | str | None = next((i for i, a in enumerate(args) if isinstance(a, Tensor)), None)
        if resid_key is None:
            resid_key = next((k for k in ("hidden_states", "resid_pre", "x") if k in kwargs), None)
        if resid_key is None:
            raise BoundaryError(
                f"Block {self._layer} was called without a residual tensor (arguments: {sorted(kwargs)}): "
                "this architecture is not supported."
            )
        resid = args[resid_key] if isinstance(resid_key, int) else kwargs[resid_key]
        if resid.shape != output.shape or resid.ndim != 3:
            raise BoundaryError(
                f"Block {self._layer} maps shape {tuple(resid.shape)} to {tuple(output.shape)}; "
                "a block must keep [batch, pos, d_model]."
            )
        # What runs decides: a config's dtype stays as it was loaded when the model is cast.
        half = output.dtype in HALF
        dtype = torch.float32 if half else output.dtype
        resid_post = self._seen.output = output[0].detach().to(dtype).clone()
        return BlockCall(
            layer=self._layer,
            block=self._block,
            resid_pre=resid[0].detach().to(dtype).clone(),
            resid_post=resid_post,
            args=tuple(_without_cache(a) for a in args),
            kwargs={k: _without_cache(v) for k, v in kwargs.items()},
            resid_key=resid_key,
            modules=self._modules,
            hook_dict=self._hook_dict,
            recorded_dtype=output.dtype,
            folded=self._folded or frozenset(),
            seen=None if half else self._seen,
        )


def _without_cache(value: Any) -> Any:
    """A key-value cache would grow at every replay, so it is dropped from the recorded call."""
    return None if hasattr(value, "get_seq_length") or "KeyValueCache" in type(value).__name__ else value


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[int | str, Tensor]]:
    """Tensors among the arguments, by position or name."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return [(key, value) for key, value in named if isinstance(value, Tensor)]


def _folded(one: list[tuple[int | str, Tensor]], two: list[tuple[int | str, Tensor]]) -> frozenset[int | str]:
    """Arguments whose first axis doubles with the batch although it is longer."""
    lengths = {key: len(tensor) for key, tensor in two if tensor.ndim >= 2}
    return frozenset(key for key, x in one if x.ndim >= 2 and 1 < len(x) and lengths.get(key) == 2 * len(x))
