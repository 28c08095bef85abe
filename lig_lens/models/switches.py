"""Where a forward pass switches: a ReLU, a clamp, a router that takes other experts.

What a model computes has a kink there, or jumps. Each function that switches is given margins, numbers that change
their sign when it does: of a ReLU its input, of a clamp the distances to its bounds, of the k largest scores how far
each is from being left out.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from lig_lens.models.experts import is_experts

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
    """Notes the margins of all that switches while it is entered, but for experts: which run depends on the items."""

    def __init__(self) -> None:
        super().__init__()
        self.margins: list[Tensor] = []
        self.paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, margins = kwargs or {}, _MARGINS.get(func)
        if margins is not None and not self.paused:  # before the call, which may work in place
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
        pairs = [[one.numel() for one in self._seen(functools.partial(run, n))] for n in (few, many)]
        self._grow: list[Callable[[int], int]] = []
        self._sizes: list[int] = []
        for first, second in zip(*pairs, strict=False):
            grow = next(
                (one for one in (self._alone, self._in_rows) if first * one(many) == second * one(few)), self._not
            )
            self._grow.append(grow)
            self._sizes.append(first // grow(few))
        self.width = sum(size for size, grow in zip(self._sizes, self._grow, strict=True) if grow != self._not)

    def __bool__(self) -> bool:
        return self.width > 0

    def margins(self, n_items: int, run: Callable[[], object]) -> Float[Tensor, "item unit"]:
        """Margins of so many items, in a pass of them."""
        seen = self._seen(run)
        if [one.numel() for one in seen] != [
            n(n_items) * size for n, size in zip(self._grow, self._sizes, strict=True)
        ]:
            # Something else ran than for other items, so that nobody can tell what became of what.
            return torch.zeros(n_items, self.width, device=seen[0].device if seen else None)
        kept = [one.reshape(grow(n_items), -1)[:n_items] for one, grow in zip(seen, self._grow, strict=True)]
        return torch.cat([one for one, grow in zip(kept, self._grow, strict=True) if grow != self._not], -1)

    @staticmethod
    def _seen(run: Callable[[], object]) -> list[Tensor]:
        seen = _Seen()

        def pause(module: nn.Module, *_: Any) -> None:
            seen.paused |= is_experts(module)

        def go_on(module: nn.Module, *_: Any) -> None:
            seen.paused &= not is_experts(module)

        before, after = register_module_forward_pre_hook(pause), register_module_forward_hook(go_on)
        with torch.no_grad(), before, after, seen:
            run()
        return seen.margins

    def _not(self, n_items: int) -> int:
        return 1

    def _alone(self, n_items: int) -> int:
        return n_items

    def _in_rows(self, n_items: int) -> int:
        return -(-n_items // self.row) * self.row
