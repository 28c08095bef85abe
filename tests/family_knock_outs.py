"""An edge taken out of a plain transformers model by hand: the entry of its softmax is put to 0 as it is computed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_SOFTMAX = (functional.softmax, torch.softmax, Tensor.softmax)


class _WithoutEdge(TorchFunctionMode):
    """Puts one entry of the pattern of one layer to 0; patterns are told by their shape."""

    def __init__(self, call: int, head: int, src: int, dst: int, n_pos: int) -> None:
        super().__init__()
        self.waiting, self.at, self.n_pos = call, (head, dst, src), n_pos

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func not in _SOFTMAX or found.shape[-2] != self.n_pos or found.shape[-1] < self.n_pos:
            return found
        self.waiting -= 1
        if self.waiting != -1:
            return found
        changed = found.clone()
        changed.reshape(-1, *found.shape[-2:])[self.at] = 0.0
        return changed


def knocked_out(
    model: Any, ids: list[int], edge: tuple[int, int, int, int], metric: Callable[[Tensor], Tensor]
) -> float:
    """What a metric of the logits loses without an edge `(layer, head, src, dst)`.

    Args:
        model: a plain model with eager attention, one softmax in each layer.
        ids: the prompt.
        edge: as above; layers without attention are not counted.
        metric: of the logits.
    """
    layer, head, src, dst = edge
    with torch.no_grad():
        before = metric(model(torch.tensor([ids])).logits)
        with _WithoutEdge(layer, head, src, dst, len(ids)) as mode:
            after = metric(model(torch.tensor([ids])).logits)
    assert mode.waiting < 0, "no such layer"
    return float(before - after)
