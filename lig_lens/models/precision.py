"""Half-precision weights that compute in float32, without a second copy of all of them."""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

HALF = (torch.float16, torch.bfloat16)


# Blocks whose weights are raised while they run, and the numbers of the hooks that do it.
_RAISING: "weakref.WeakKeyDictionary[nn.Module, frozenset[int]]" = weakref.WeakKeyDictionary()


def raising_hooks(module: nn.Module) -> frozenset[int]:
    """Numbers of the hooks by which a block's weights are raised while it runs; none where they are not."""
    return _RAISING.get(module, frozenset())


@dataclass(frozen=True)
class _SavedWeight:
    """A weight, or a view of one, as autograd keeps it for the way back: made again from the half-precision weight."""

    weight: Tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def made(self) -> Tensor:
        """The part, raised."""
        return self.weight.float().as_strided(self.size, self.stride, self.offset)


@contextlib.contextmanager
def raised(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let a model compute in float32: its blocks' half-precision weights are raised while they run, one at a time.

    What is not a block's (embeddings, head) is raised throughout, since models look at such weights from elsewhere.
    Autograd would keep each block's float32 copy until the way back; it is told to keep the half-precision weight
    instead. Within itself it does nothing more.

    Args:
        model: the model.
        blocks: all of its blocks.
    """
    if any(block in _RAISING for block in blocks):
        yield
        return
    inside = {id(weight) for block in blocks for weight in _half(block)}
    outside = [weight for weight in _half(model) if id(weight) not in inside]
    saved = [(weight, weight.data) for weight in outside]
    try:
        with contextlib.ExitStack() as stack:
            for weight, data in saved:
                weight.data = data.float()
            for block in blocks:
                stack.enter_context(_Raised(block).while_running())
            yield
    finally:
        for weight, data in saved:
            weight.data = data


class _Raised:
    """One block, whose weights are raised while it runs."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.weights = block, _half(block)
        self.saved: list[tuple[Tensor, Tensor]] = []
        self.held: dict[int, Tensor] = {}  # by the address of the copy, while it is there
        self.keeping: contextlib.AbstractContextManager[Any] | None = None

    @contextlib.contextmanager
    def while_running(self) -> Iterator[None]:
        """Hooks that raise the weights and put them back."""
        handles = (
            self.block.register_forward_pre_hook(self._enter, prepend=True),
            self.block.register_forward_hook(self._leave, always_call=True),
        )
        _RAISING[self.block] = frozenset(handle.id for handle in handles)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            _RAISING.pop(self.block, None)
            self._leave()  # torch calls hooks after errors, and not after an interrupt

    def _enter(self, *_: Any) -> None:
        self._leave()  # what an interrupt left behind
        if "forward" in self.block.__dict__:  # something answers for it
            return
        for weight in self.weights:
            if weight.dtype in HALF:  # held by somebody else otherwise
                self.saved.append((weight, weight.data))
                weight.data = weight.data.float()
                if weight.numel():
                    self.held[weight.untyped_storage().data_ptr()] = self.saved[-1][1]
        self.keeping = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self.keeping.__enter__()

    def _leave(self, *_: Any) -> None:
        keeping, self.keeping = self.keeping, None
        if keeping is not None:
            keeping.__exit__(None, None, None)
        self.held.clear()
        while self.saved:
            weight, data = self.saved.pop()
            weight.data = data

    def _pack(self, tensor: Tensor) -> "Tensor | _SavedWeight":
        """What autograd keeps of a tensor."""
        if is_traceable_wrapper_subclass(tensor):  # such as a quantised weight, which has no storage of its own
            return tensor
        weight = self.held.get(tensor.untyped_storage().data_ptr())
        if weight is None:
            return tensor
        return _SavedWeight(weight, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _unpack(kept: "Tensor | _SavedWeight") -> Tensor:
    return kept.made() if isinstance(kept, _SavedWeight) else kept


def _half(module: nn.Module) -> list[Tensor]:
    """Half-precision weights and buffers, each once."""
    found = [*module.parameters(), *module.buffers()]
    return list({id(tensor): tensor for tensor in found if tensor.dtype in HALF}.values())
