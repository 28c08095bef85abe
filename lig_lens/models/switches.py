"""Where a forward pass switches: a ReLU, a clamp, a router whose `topk` takes other experts.

What a model computes has a kink there, or jumps. Each function that switches is given margins, numbers that change
their sign when it does: of a ReLU its input, of a clamp the distances to its bounds, of the k largest scores how far
each is from being left out.
"""

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
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


def _of_two(input: Tensor, other: Any = None, **_: Any) -> list[Tensor]:
    """Of the larger of two tensors; the largest along an axis is mostly taken to be subtracted."""
    return [input - other] if isinstance(other, Tensor) else []


def _of_largest(input: Tensor, k: int, dim: int = -1, largest: bool = True, **_: Any) -> list[Tensor]:
    if k >= input.shape[dim]:
        return []
    ranked = input.sort(dim, descending=largest).values
    return [input - ranked.narrow(dim, k - 1, 2).mean(dim, keepdim=True)]


# By the name of the function, whether it is torch's, a tensor's, or of torch.nn.functional, in place or not.
_MARGINS: dict[str, Margins] = {
    **dict.fromkeys(("relu", "leaky_relu", "rrelu", "prelu", "abs", "absolute"), _of_input),
    **dict.fromkeys(("clamp", "clip"), _of_bounds),
    "clamp_min": lambda input, min, **_: [input - min],
    "clamp_max": lambda input, max, **_: [input - max],
    **dict.fromkeys(("maximum", "minimum"), _of_pair),
    **dict.fromkeys(("max", "min"), _of_two),
    **dict.fromkeys(("hardswish", "hardsigmoid"), _between(-3.0, 3.0)),
    "relu6": _between(0.0, 6.0),
    "hardtanh": lambda input, min_val=-1.0, max_val=1.0, *_, **__: [input - min_val, input - max_val],
    "threshold": lambda input, threshold, *_, **__: [input - threshold],
    **dict.fromkeys(("hardshrink", "softshrink"), lambda input, lambd=0.5: [input - lambd, input + lambd]),
    "topk": _of_largest,
}


class _Seen(TorchFunctionMode):
    """Notes the margins of all that switches while it is entered, but for experts: which run depends on the items."""

    def __init__(self) -> None:
        super().__init__()
        self.margins: list[Tensor] = []
        self.experts = 0  # how many are running, one within another
        self.hidden = False  # whether anything in them switches

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, margins = kwargs or {}, _MARGINS.get(getattr(func, "__name__", "").strip("_"))
        if margins is not None:  # before the call, which may work in place
            found = [one.detach().clone() for one in margins(*args, **kwargs) if one.is_floating_point()]
            if self.experts:
                self.hidden |= bool(found)
            else:
                self.margins += found
        return func(*args, **kwargs)


class Switches:
    """What switches in a forward pass of items, each of which runs by itself.

    Which of the margins belong to items, and not to masks and the like, shows in how they grow with the number of them.
    Of what switches inside experts there are none, but it makes all this true, as what nobody can cut at is rough too.
    """

    def __init__(self, run: Callable[[int], object], row: int = 1) -> None:
        """Look at a pass, and at another where something switches in that.

        Args:
            run: the pass, of so many items.
            row: length of the rows in which the items stand, the last of them filled up.
        """
        self.row, few, many = row, 2, 2 * row + 1
        seen = [self._seen(functools.partial(run, few))]
        if seen[0].margins or seen[0].hidden:
            seen.append(self._seen(functools.partial(run, many)))
        self.hidden = any(one.hidden for one in seen)
        self.device = next((one.device for of in seen for one in of.margins), None)
        pairs = [[one.numel() for one in of.margins] for of in (seen[0], seen[-1])]
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
        return self.width > 0 or self.hidden

    def margins(self, n_items: int, run: Callable[[], object]) -> Float[Tensor, "item unit"]:
        """Margins of so many items, in a pass of them."""
        if not self.width:
            return torch.zeros(n_items, 0, device=self.device)
        seen = self._seen(run).margins
        if [one.numel() for one in seen] != [
            n(n_items) * size for n, size in zip(self._grow, self._sizes, strict=True)
        ]:
            # Something else ran than for other items, so that nobody can tell what became of what.
            return torch.zeros(n_items, self.width, device=self.device)
        kept = [one.reshape(grow(n_items), -1)[:n_items] for one, grow in zip(seen, self._grow, strict=True)]
        return torch.cat([one for one, grow in zip(kept, self._grow, strict=True) if grow != self._not], -1)

    @staticmethod
    def _seen(run: Callable[[], object]) -> _Seen:
        seen, thread = _Seen(), threading.get_ident()

        # These hooks are there for all modules of the process, whoever runs them.
        def pause(module: nn.Module, *_: Any) -> None:
            seen.experts += int(is_experts(module) and threading.get_ident() == thread)

        def go_on(module: nn.Module, *_: Any) -> None:
            seen.experts -= int(is_experts(module) and threading.get_ident() == thread)

        before, after = register_module_forward_pre_hook(pause), register_module_forward_hook(go_on)
        with torch.no_grad(), before, after, seen:
            run()
        return seen

    def _not(self, n_items: int) -> int:
        return 1

    def _alone(self, n_items: int) -> int:
        return n_items

    def _in_rows(self, n_items: int) -> int:
        return -(-n_items // self.row) * self.row
