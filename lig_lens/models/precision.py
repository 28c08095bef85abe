"""Half-precision weights that compute in float32, without a second copy of all of them."""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


# Modules whose weights are raised while they run, and the numbers of the hooks that do it.
_RAISING: "weakref.WeakKeyDictionary[nn.Module, frozenset[int]]" = weakref.WeakKeyDictionary()


def raising_hooks(module: nn.Module) -> frozenset[int]:
    """Numbers of the hooks by which a module's weights are raised while it runs; none where they are not."""
    return _RAISING.get(module, frozenset())


@dataclass(frozen=True)
class _Part:
    """A weight, or a view of one, as autograd keeps it for the way back: made again from the half-precision weight."""

    weight: Tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def made(self) -> Tensor:
        """The part, raised."""
        return self.weight.float().as_strided(self.size, self.stride, self.offset)


@contextlib.contextmanager
def raised(model: nn.Module) -> Iterator[None]:
    """Let a model compute in float32, its half-precision weights raised while their module runs, one at a time.

    Blocks are raised as they run, and whatever else owns weights by itself. Autograd would keep each float32 copy until
    the way back; it is told to keep the half-precision weight instead.
    """
    kept = _Raised()
    with contextlib.ExitStack() as stack:
        for module, recurse in _units(model):
            weights = [w for w in _tensors(module, recurse) if w.dtype in HALF]
            if weights:
                stack.enter_context(kept.while_running(module, weights))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(kept.pack, _unpack))
        yield


class _Raised:
    """What is raised at the moment."""

    def __init__(self) -> None:
        # By the address of the copy, which nothing else can have while it is held.
        self._held: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def while_running(self, module: nn.Module, weights: list[Tensor]) -> Iterator[None]:
        """Raise these weights whenever a module runs."""
        saved: list[tuple[Tensor, Tensor]] = []

        def enter(_module: nn.Module, _args: Any) -> None:
            if saved or "forward" in module.__dict__:  # it runs within itself, or something answers for it
                return
            for weight in weights:
                saved.append((weight, weight.data))
                weight.data = weight.data.float()
                self._held[weight.untyped_storage().data_ptr()] = saved[-1][1]

        def leave(*_: Any) -> None:
            while saved:
                weight, data = saved.pop()
                del self._held[weight.untyped_storage().data_ptr()]
                weight.data = data

        handles = (
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave, always_call=True),
        )
        _RAISING[module] = frozenset(handle.id for handle in handles)
        try:
            yield
        finally:
            del _RAISING[module]
            leave()
            for handle in handles:
                handle.remove()

    def pack(self, tensor: Tensor) -> "Tensor | _Part":
        """What autograd keeps of a tensor."""
        weight = self._held.get(tensor.untyped_storage().data_ptr()) if self._held else None
        if weight is None:
            return tensor
        return _Part(weight, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _unpack(kept: "Tensor | _Part") -> Tensor:
    return kept.made() if isinstance(kept, _Part) else kept


def _units(model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """Modules that are raised together, and whether with all they hold.

    Members of lists are (blocks), and what holds no list (embedding, head; a bridge's components look at the weights of
    those within them). Of what holds a list only what is its own is raised with it.
    """
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, nn.ModuleList):
            members = [member for member in module if id(member) not in seen]
            seen.update(id(member) for member in members)
            yield from ((member, True) for member in members)
        elif module is not model and not any(isinstance(part, nn.ModuleList) for part in module.modules()):
            yield module, True
        else:
            yield module, False
            waiting += module.children()


def _tensors(module: nn.Module, recurse: bool) -> list[Tensor]:
    """Weights and buffers, each once."""
    found = [*module.parameters(recurse), *module.buffers(recurse)]
    return list({id(tensor): tensor for tensor in found}.values())
