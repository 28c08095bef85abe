"""See how a model calls its blocks in one run."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lig_lens.blocks.call import BlockCall, Seen
from lig_lens.errors import BoundaryError, InputError
from lig_lens.inputs.inputs import Inputs
from lig_lens.models.precision import HALF
from lig_lens.models.randomness import no_random_numbers
from lig_lens.models.running import Stop, first_tensor, module_hooks, torch_hooks
from lig_lens.models.stack import Forward, Stack

T = TypeVar("T")
_Key = int | str
Folded = frozenset[_Key]


class _FoldedError(Exception):
    """Some argument's first axis is more than the batch; never reaches a user."""


@dataclass(frozen=True)
class Recording(Generic[T]):
    """What the visitor made of each block's call, and the run itself, if it went through to the output."""

    visited: dict[int, T]
    forward: Forward | None

    @property
    def whole(self) -> Forward:
        """The run, where it was asked to go through to the output.

        Raises:
            InputError: it did not.
        """
        if self.forward is None:
            raise InputError("The model ended before its output: take off hooks that stop it.")
        return self.forward


def record_calls(
    stack: Stack,
    inputs: Inputs,
    layers: Sequence[int],
    visit: Callable[[BlockCall], T],
    *,
    reads: Mapping[int, Iterable[str]] | None = None,
    whole: bool = False,
) -> Recording[T]:
    """Run the model once on a prompt, and see how it calls the blocks `layers`.

    Args:
        stack: the blocks.
        inputs: the prompt.
        layers: indices of blocks.
        visit: gets each call as soon as its block has run, and may run the block again. It should keep no more than
            it needs: what the hooks of all blocks show may not fit into memory.
        reads: layer -> paths of the submodules whose output is read; all that may be nodes for a layer that is left
            out.
        whole: whether to run the model to its end; no further than the last of `layers` otherwise.
    """
    reads = reads or {}
    try:
        return _watch(stack, inputs, layers, visit, None, reads, whole)
    except _FoldedError:
        # Which first axes hold the batch, only a batch of two can tell. Two positions are enough.
        short, unfolded = inputs.shortened(), dict.fromkeys(layers, Folded())
        none: dict[int, Iterable[str]] = {layer: () for layer in layers}

        def look(call: BlockCall) -> list[tuple[_Key, Tensor]]:
            return _tensors(call.args, call.kwargs)

        one, two = (_watch(stack, short, layers, look, unfolded, none, False, n).visited for n in (1, 2))
        folded = {layer: _folded(one[layer], two[layer]) for layer in layers}
        return _watch(stack, inputs, layers, visit, folded, reads, whole)


def _watch(
    stack: Stack,
    inputs: Inputs,
    layers: Sequence[int],
    visit: Callable[[BlockCall], T],
    folded: Mapping[int, Folded] | None,
    reads: Mapping[int, Iterable[str]],
    whole: bool,
    batch: int = 1,
) -> Recording[T]:
    results: dict[int, T] = {}
    usual: dict[int, Any] = {}
    before: list[Any] = []

    def ran(layer: int, output: Any, call: BlockCall | None = None) -> None:
        if whole:
            usual[layer] = output
        if call is not None:
            results[layer] = visit(call)
        if layer == max(layers) and not whole:
            raise Stop

    forward = None
    last = None if whole else max(layers)
    with contextlib.ExitStack() as on:
        # First, so that no watcher is on the blocks when it runs them again.
        on.enter_context(no_random_numbers(stack.model.cfg.device, lambda: _result(stack, inputs, batch, last)))
        for layer in layers:
            known = None if folded is None else folded[layer]
            watcher = _Watcher(stack, layer, known, reads.get(layer), functools.partial(ran, layer))
            on.callback(watcher.close)
        if whole:
            others = [layer for layer in range(len(stack)) if layer not in layers]
            pairs = [(stack.blocks[n], lambda _m, _a, output, n=n: ran(n, output), False) for n in others]
            on.enter_context(module_hooks(pairs))
            earlier = [(block, lambda *seen: before.append(seen[-1]), False) for block in stack.before]
            on.enter_context(module_hooks(earlier))
        with torch.no_grad(), contextlib.suppress(Stop):
            output = stack.run(inputs, batch)
            forward = Forward(stack, inputs, output, [usual[n] for n in sorted(usual)], before)
    return Recording(results, forward)


def _result(stack: Stack, inputs: Inputs, batch: int, last: int | None) -> Tensor:
    """The output of block `last`, or of the model with None."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(first_tensor(output))
        raise Stop

    pairs = [] if last is None else [(stack.blocks[last], keep, False)]
    with torch.no_grad(), module_hooks(pairs), contextlib.suppress(Stop):
        found.append(stack.run(inputs, batch))
    return found[0]


class _Watcher:
    """Keeps how one block is called and what its hooks show then, and hands it over as soon as the block has run."""

    def __init__(
        self,
        stack: Stack,
        layer: int,
        folded: Folded | None,
        reads: Iterable[str] | None,
        ran: Callable[[Any, BlockCall], None],
    ) -> None:
        self._stack, self._layer, self._folded, self._reads, self._ran = stack, layer, folded, reads, ran
        self._block = block = stack.blocks[layer]
        self._modules = stack.parts(layer)
        self._hooks = contextlib.ExitStack()
        self._hooks.enter_context(module_hooks([(block, self._before, True), (block, self._after, False)]))

    def close(self) -> None:
        """Take all hooks off."""
        self._hooks.close()

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._folded is None and any(x.ndim >= 2 and len(x) != 1 for _, x in _tensors(args, kwargs)):
            raise _FoldedError
        self._args, self._kwargs, self._seen = args, kwargs, Seen()
        hooks = self._seen.hooks(self._modules, self._reads)
        self._hooks.enter_context(module_hooks(torch_hooks(self._modules, hooks)))

    def _after(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.close()  # the visitor may run the block again
        call = self._call(first_tensor(output))
        del self._args, self._kwargs, self._seen  # large, and the visitor's to keep
        self._ran(output, call)

    def _call(self, output: Tensor) -> BlockCall:
        args, kwargs = self._args, self._kwargs
        resid_key: _Key | None = next((i for i, a in enumerate(args) if isinstance(a, Tensor)), None)
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
        if self._stack.crosses:
            resid_key = self._from_other_stack(resid_key)
            resid = args[resid_key] if isinstance(resid_key, int) else kwargs[resid_key]
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
            stack=self._stack,
            recorded_dtype=output.dtype,
            folded=self._folded or Folded(),
            seen=None if half else self._seen,
        )

    def _from_other_stack(self, resid_key: _Key) -> _Key:
        """Where the call has the vectors that the other stack put out.

        Raises:
            BoundaryError: it has none, or more than one such tensor.
        """
        found = [
            key
            for key, value in _tensors(self._args, self._kwargs)
            if key != resid_key and value.ndim == 3 and value.is_floating_point()
        ]
        if len(found) != 1:
            raise BoundaryError(
                f"Block {self._layer} was called with {len(found)} tensors [batch, pos, d_model] beside its residual "
                "vectors, where the encoder's output was expected: this architecture is not supported."
            )
        return found[0]


def _without_cache(value: Any) -> Any:
    """A key-value cache would grow at every replay, so it is dropped from the recorded call."""
    return None if hasattr(value, "get_seq_length") or "KeyValueCache" in type(value).__name__ else value


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[_Key, Tensor]]:
    """Tensors among the arguments, by position or name."""
    named: list[tuple[_Key, Any]] = [*enumerate(args), *kwargs.items()]
    return [(key, value) for key, value in named if isinstance(value, Tensor)]


def _folded(one: list[tuple[_Key, Tensor]], two: list[tuple[_Key, Tensor]]) -> Folded:
    """Arguments whose first axis doubles with the batch although it is longer."""
    lengths = {key: len(tensor) for key, tensor in two if tensor.ndim >= 2}
    return frozenset(key for key, x in one if x.ndim >= 2 and 1 < len(x) and lengths.get(key) == 2 * len(x))
