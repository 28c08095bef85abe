"""The experts that a block's routers choose: seen on a prompt, and kept while other vectors run through the block.

A router takes the k largest of its scores, so what a block with experts puts out jumps where the choice changes. Held,
it chooses what it chose on the prompt at each position, and weighs the experts by its scores on the vectors at hand.
Whatever a model's routers look like, they choose with `topk`; attention may too (which tokens it looks at), and is left
alone.
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


class _TopK(TorchFunctionMode):
    """Sees the choices of routers, or makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        chosen = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk) or self.paused:
            return chosen
        return self.chosen(args[0] if args else kwargs["input"], chosen)

    def chosen(self, scores: Tensor, free: Any) -> Any:
        """What is handed on instead of the largest of the scores."""
        return free


class _Seen(_TopK):
    def __init__(self, n_pos: int) -> None:
        super().__init__()
        self.n_pos, self.routes = n_pos, list[Tensor]()

    def chosen(self, scores: Tensor, free: Any) -> Any:
        """See the base class."""
        if free.indices.shape[0] == 1 < self.n_pos:
            self.routes.append(free.indices[0])
        else:
            self.routes.append(free.indices)
        return free


class _Held(_TopK):
    def __init__(self, routes: Routes, positions: Int[Tensor, "item"]) -> None:
        super().__init__()
        self.waiting, self.positions = list(routes), positions

    def chosen(self, scores: Tensor, free: Any) -> Any:
        """See the base class.

        Raises:
            BoundaryError: the router chooses of something else than on the prompt.
        """
        held = self.waiting.pop(0)[self.positions] if self.waiting else None
        if held is None or held.numel() != free.indices.numel():
            raise BoundaryError("A block's routers choose otherwise along the path: leave out experts='held'.")
        held = held.reshape(free.indices.shape)
        return torch.return_types.topk((scores.gather(-1, held), held))


@contextlib.contextmanager
def routes_seen(modules: Mapping[str, nn.Module], n_pos: int) -> Iterator[list[Tensor]]:
    """Note what the routers of a block choose on a prompt of `n_pos` positions."""
    with _outside_attention(_Seen(n_pos), modules) as seen:
        yield seen.routes


@contextlib.contextmanager
def routes_held(modules: Mapping[str, nn.Module], routes: Routes, positions: Int[Tensor, "item"]) -> Iterator[None]:
    """Let the routers of a block choose what they chose on the prompt.

    Args:
        modules: the block's, by path.
        routes: what they chose there.
        positions: of the prompt, at which each of the vectors that run through stands.
    """
    with _outside_attention(_Held(routes, positions), modules) if routes else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _outside_attention(mode: Any, modules: Mapping[str, nn.Module]) -> Iterator[Any]:
    def pause(*_: Any) -> None:
        mode.paused = True

    def go_on(*_: Any) -> None:
        mode.paused = False

    pairs = [(modules["attn"], pause, True), (modules["attn"], go_on, False)] if "attn" in modules else []
    with module_hooks(pairs), mode:
        yield mode
