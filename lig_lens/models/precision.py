"""Half-precision weights that compute in float32, without a second copy of all of them."""

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

HALF = (torch.float16, torch.bfloat16)
# How many numbers of a weight outside blocks are raised at a time: few enough to be used while in the cache.
_AT_A_TIME = 2**21

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

    What is not a block's (embeddings, head) looks like float32 throughout, since models ask such weights for their
    dtype from elsewhere, and is raised where it is used. Autograd would keep each block's float32 copy until the way
    back; it is told to keep the half-precision weight instead. Within itself it does nothing more.

    Args:
        model: the model.
        blocks: all of its blocks.
    """
    if any(block in _RAISING for block in blocks) or not _half(model):
        yield
        return
    inside = {id(weight) for block in blocks for weight in _half(block)}
    outside = [weight for weight in _half(model) if id(weight) not in inside]
    saved = [(weight, weight.data) for weight in outside]
    large = {id(weight): data for weight, data in saved if weight.ndim > 1 and not is_traceable_wrapper_subclass(data)}
    try:
        with contextlib.ExitStack() as stack:
            for weight, data in saved:
                weight.data = _empty(data) if id(weight) in large else data.float()
            for block in blocks:
                stack.enter_context(_Raised(block).while_running())
            if large:
                stack.enter_context(_RaisedInUse(large))
            yield
    finally:
        for weight, data in saved:
            weight.data = data


def _empty(data: Tensor) -> Tensor:
    """What looks like a raised weight and takes no memory; whoever computes with it gets nan."""
    return torch.full((1,) * data.ndim, torch.nan, device=data.device).expand(data.shape)


_SHAPES = ("size", "dim", "numel", "nelement", "stride", "is_floating_point", "element_size", "__len__")


class _RaisedInUse(TorchFunctionMode):
    """Lets torch's functions have weights in float32 that are kept in half precision, by the weights' ids.

    Rows that an embedding looks up are raised alone, and a linear map's some at a time.
    """

    def __init__(self, kept: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._has_kept([*args, *kwargs.values()]):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _SHAPES or (name == "__get__" and not isinstance(func(*args), Tensor)):  # a dtype, a shape
            return func(*args, **kwargs)
        if name == "__getitem__" and not self._has_kept(args[1:]):
            return func(self.kept[id(args[0])], *args[1:]).float()
        if func is functional.embedding:
            half = {name: self.kept.get(id(value), value) for name, value in kwargs.items()}
            return func(*(self.kept.get(id(one), one) for one in args), **half).float()
        if func is functional.linear and len(args) > 1 and id(args[1]) in self.kept and not self._has_kept(args[:1]):
            made = _linear(args[0], self.kept[id(args[1])])
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return made if bias is None else made + bias
        return func(*self._raised(args), **{name: self._raised(value) for name, value in kwargs.items()})

    def _has_kept(self, values: Any) -> bool:
        return any(self._has_kept(one) if isinstance(one, (list, tuple)) else id(one) in self.kept for one in values)

    def _raised(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._raised(one) for one in value)
        return self.kept[id(value)].float() if id(value) in self.kept else value


def _linear(x: Tensor, weight: Float[Tensor, "out in"], transposed: bool = False) -> Tensor:
    """`x W^T`, or `x W`, in float32 of a weight in half precision."""
    made: Tensor = _Linear.apply(x, weight, transposed)  # type: ignore[no-untyped-call]
    return made


class _Linear(torch.autograd.Function):
    """A linear map whose weight is raised some rows at a time, and again on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Float[Tensor, "out in"], transposed: bool) -> Tensor:
        """See `_linear`."""
        ctx.weight, ctx.transposed = weight, transposed
        rows = max(1, _AT_A_TIME // weight.shape[1])
        pieces = torch.split(weight, rows)
        if not transposed:
            return torch.cat([functional.linear(x, piece.float()) for piece in pieces], -1)
        result = x.new_zeros(*x.shape[:-1], weight.shape[1])
        for given, piece in zip(torch.split(x, rows, -1), pieces, strict=True):
            result += given @ piece.float()
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The same map the other way."""
        return _linear(gradient, ctx.weight, not ctx.transposed), None, None


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
            return tensor.detach()  # an operation's own output would hold what holds it, and never be freed
        return _SavedWeight(weight, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _unpack(kept: "Tensor | _SavedWeight") -> Tensor:
    return kept.made() if isinstance(kept, _SavedWeight) else kept


def _half(module: nn.Module) -> list[Tensor]:
    """Half-precision weights and buffers, each once."""
    found = [*module.parameters(), *module.buffers()]
    return list({id(tensor): tensor for tensor in found if tensor.dtype in HALF}.values())
