"""Where a forward pass switches: a ReLU, a clamp, a router that takes other experts.

What a model computes has a kink there, or jumps. Each function that switches is given margins, numbers that change
their sign when it does: of a ReLU its input, of a clamp the distances to its bounds, of the k largest scores how far
each is from being left out.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Margins = Callable[..., list[Tensor]]


def _of_input(input: Tensor, *_: Any, **__: Any) -> list[Tensor]:
    return [input]


def _of_bounds(input: Tensor, min: Any = None, max: Any = None, **_: Any) -> list[Tensor]:
    bounds = [
        bound for bound in (min, max) if bound is not None and (isinstance(bound, Tensor) or math.isfinite(bound))
    ]
    return [input - bound for bound in bounds]


def _between(low: float, high: float) -> Margins:
    return lambda input, *_, **__: [input - low, input - high]


def _of_pair(input: Tensor, other: Tensor, **_: Any) -> list[Tensor]:
    return [input - other]


def _of_largest(input: Tensor, k: int, dim: int = -1, largest: bool = True, **_: Any) -> list[Tensor]:
    if k >= input.shape[dim]:
        return []
    ranked = input.sort(dim, descending=largest).values
    return [input - ranked.narrow(dim, k - 1, 2).mean(dim, keepdim=True)]


_MARGINS: dict[Any, Margins] = {
    **dict.fromkeys((torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, functional.relu), _of_input),
    **dict.fromkeys((functional.leaky_relu, functional.prelu, torch.abs, Tensor.abs), _of_input),
    **dict.fromkeys((torch.clamp, torch.clamp_, torch.clip, Tensor.clamp, Tensor.clamp_, Tensor.clip), _of_bounds),
    **dict.fromkeys((torch.maximum, torch.minimum), _of_pair),
    **dict.fromkeys((functional.hardswish, functional.hardsigmoid), _between(-3.0, 3.0)),
    functional.relu6: _between(0.0, 6.0),
    **dict.fromkeys((torch.topk, Tensor.topk), _of_largest),
}


class _Seen(TorchFunctionMode):
    """Notes the margins of all that switches while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.margins: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, margins = kwargs or {}, _MARGINS.get(func)
        if margins is not None:  # before the call, which may work in place
            self.margins += [one.detach().clone() for one in margins(*args, **kwargs) if one.is_floating_point()]
        return func(*args, **kwargs)


class Switches:
    """What switches in a forward pass of items, each of which runs by itself.

    Which of the margins belong to items, and not to masks and the like, shows in how they grow with the number of them.
    """

    def __init__(self, run: Callable[[int], object], row: int = 1) -> None:
        """Look at two passes.

        Args:
            run: the pass, of so many items.
            row: length of the rows in which the items stand, the last of them filled up.
        """
        self.row, few, many = row, 2, 2 * row + 1
        pairs = [[one.numel() for one in self._seen(lambda n=n: run(n))] for n in (few, many)]
        self._kept: list[Callable[[int], int] | None] = []
        for first, second in zip(*pairs, strict=True):
            grows = [size for size in (self._alone, self._in_rows) if first * size(many) == second * size(few)]
            self._kept.append(grows[0] if grows else None)

    def __bool__(self) -> bool:
        return any(size is not None for size in self._kept)

    def margins(self, n_items: int, run: Callable[[], object]) -> Float[Tensor, "item unit"]:
        """Margins of so many items, in a pass of them."""
        seen = zip(self._seen(run), self._kept, strict=True)
        pieces = [one.reshape(size(n_items), -1)[:n_items] for one, size in seen if size is not None]
        return torch.cat(pieces, -1)

    @staticmethod
    def _seen(run: Callable[[], object]) -> list[Tensor]:
        with torch.no_grad(), _Seen() as seen:
            run()
        return seen.margins

    def _alone(self, n_items: int) -> int:
        return n_items

    def _in_rows(self, n_items: int) -> int:
        return -(-n_items // self.row) * self.row
