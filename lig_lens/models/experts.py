"""The experts that a block's routers choose: seen on a prompt, and kept while other vectors run through the block.

A router takes the k largest of its scores, so what a block with experts puts out jumps where the choice changes. Held,
it chooses what it chose on the prompt at each position, and weighs the experts by its scores on the vectors at hand.
Whatever a model's routers look like, they choose with `topk`, or with `max` along an axis and `masked_fill` (PhiMoE's
take one expert after the other, and weigh it against those that come near it). The latter two are looked at within
routers alone, since others use them as well. Attention may choose which tokens it looks at, and is left alone, but for
routers of its own (JetMoE, whose heads are experts).
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lig_lens.errors import BoundaryError
from lig_lens.models.running import module_hooks

Routes = tuple[Tensor, ...]
"""Choices of a block's routers in the order in which they are made: [pos, ..., k] each."""


def has_experts(block: nn.Module) -> bool:
    """Whether there are experts in a block, by what transformers calls them."""
    return any(is_experts(one) for one in block.modules())


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a block's experts."""
    return type(module).__name__.endswith("Experts")


_TOP_K, _MAX, _MASKED = (torch.topk, Tensor.topk), (torch.max, Tensor.max), (torch.masked_fill, Tensor.masked_fill)


class _Choices(TorchFunctionMode):
    """Sees the choices of routers, or makes them.

    Attributes:
        fixed: whether what routers would choose is of no account.
        paused: while attention runs.
        routers: how many routers are running, one within another.
    """

    fixed = False

    def __init__(self) -> None:
        super().__init__()
        self.paused, self.routers = False, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (self.paused and not self.routers) or not (func in _TOP_K or (self.routers and func in _MAX + _MASKED)):
            return func(*args, **kwargs)
        named = {**dict(zip(("input",), args, strict=False)), **kwargs}
        if func in _MASKED:
            named |= dict(zip(("mask", "value"), args[1:], strict=False))
            return func(named["input"], self.choice(named["mask"]), named["value"])
        with torch._C.DisableTorchFunction() if self.fixed else contextlib.nullcontext():  # nobody is to see a choice
            found = func(*args, **kwargs)
        if func in _MAX and not _keeps_axes(found, named["input"]):
            return found
        held = self.choice(found.indices)
        return found if held is found.indices else type(found)((named["input"].gather(-1, held), held))

    def choice(self, free: Tensor) -> Tensor:
        """What is chosen, instead of what the router would choose."""
        return free


def _keeps_axes(found: Any, scores: Tensor) -> bool:
    """Whether a maximum was taken along the last axis, which stays."""
    indices = getattr(found, "indices", None)
    return isinstance(indices, Tensor) and indices.shape == (*scores.shape[:-1], 1)


class _Seen(_Choices):
    def __init__(self, n_pos: int) -> None:
        super().__init__()
        self.n_pos, self.routes = n_pos, list[Tensor]()

    def choice(self, free: Tensor) -> Tensor:
        """See the base class."""
        self.routes.append(free[0] if free.shape[0] == 1 < self.n_pos else free)
        return free


class _Held(_Choices):
    fixed = True

    def __init__(self, routes: Routes, positions: Int[Tensor, "item"]) -> None:
        super().__init__()
        self.waiting, self.positions = list(routes), positions

    def choice(self, free: Tensor) -> Tensor:
        """See the base class.

        Raises:
            BoundaryError: the router chooses of something else than on the prompt.
        """
        held = self.waiting.pop(0)[self.positions] if self.waiting else None
        if held is None or held.numel() != free.numel():
            raise BoundaryError("A block's routers choose otherwise along the path: leave out experts='held'.")
        return held.reshape(free.shape)


@contextlib.contextmanager
def routes_seen(modules: Mapping[str, nn.Module], n_pos: int) -> Iterator[list[Tensor]]:
    """Note what the routers of a block choose on a prompt of `n_pos` positions."""
    with _watching(_Seen(n_pos), modules) as seen:
        yield seen.routes


@contextlib.contextmanager
def routes_held(modules: Mapping[str, nn.Module], routes: Routes, positions: Int[Tensor, "item"]) -> Iterator[None]:
    """Let the routers of a block choose what they chose on the prompt.

    Args:
        modules: the block's, by path.
        routes: what they chose there.
        positions: of the prompt, at which each of the vectors that run through stands.
    """
    with _watching(_Held(routes, positions), modules) if routes else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _watching(mode: _Choices, modules: Mapping[str, nn.Module]) -> Iterator[Any]:
    def pause(*_: Any) -> None:
        mode.paused = True

    def go_on(*_: Any) -> None:
        mode.paused = False

    def enter(*_: Any) -> None:
        mode.routers += 1

    def leave(*_: Any) -> None:
        mode.routers -= 1

    pairs = [(modules["attn"], pause, True), (modules["attn"], go_on, False)] if "attn" in modules else []
    for one in {id(one): one for one in modules.values() if "Router" in type(one).__name__}.values():
        pairs += [(one, enter, True), (one, leave, False)]
    with module_hooks(pairs), mode:
        yield mode
