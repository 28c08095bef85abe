"""Residual vectors sent on through a model in parts, one for each position that they came from.

A batch holds the prompt, the part that every position has in it, and a part for biases that are still to be shared:
[prompt, position ..., bias]. With every function taken for `y = c + J x` at the prompt (`rules.py`; patterns of
attention are held, so that each is a function of one activation), parts go through J, and `c` is shared among them: by
the absolute value of the dot product of a part with it. So parts add up to the prompt's vector everywhere.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lig_lens.blocks.values import Values
from lig_lens.errors import BoundaryError
from lig_lens.models.running import first_tensor, with_first_tensor
from lig_lens.relevance.explained import Explained
from lig_lens.relevance.rules import Norm, Rules, slope

T = TypeVar("T")
_MARK = "_lig_lens_parts"


class Decomposition(Rules):
    """While it is entered, batches that are marked hold a prompt, its parts, and what is to be shared among them."""

    def __init__(self, method: str, n_parts: int) -> None:
        """State how many parts there are, the position of each being its number."""
        super().__init__(method, hold_softmax=True)
        self.n_items = n_parts + 2
        self.in_attention = False

    def start(self, resid: Float[Tensor, "pos d_model"]) -> Float[Tensor, "item pos d_model"]:
        """The batch of a prompt's residual vectors, each being the part of its own position."""
        alone = torch.eye(len(resid)).to(resid)[:, :, None] * resid
        return self._marked(torch.cat([resid[None], alone, torch.zeros_like(resid)[None]]))

    def attention_hooks(self, values: Values) -> list[tuple[nn.Module, Any, bool]]:
        """Torch hooks by which it is seen that attention runs: its biases are put off while it does.

        They are shared behind the skip connection, or, where more than attention's output joins that, among the parts
        of this output.
        """
        modules, joins = values.call.modules, values.block.boundaries.layout in ("post_ln", "pre_ln")

        def before(*_: Any) -> None:
            self.in_attention = True

        def after(_module: Any, _args: Any, output: Any) -> Any:
            self.in_attention = False
            if joins:
                return None
            with self.aside():
                return with_first_tensor(output, self._shared(first_tensor(output)))

        return [(modules["attn"], before, True), (modules[values.heads.nodes.attn_out_path], after, False)]

    def is_hot(self, value: Tensor) -> bool:
        """See the base class."""
        return hasattr(value, _MARK)

    def passed(self, name: str, output: Any, n_hot: int) -> Any:
        """See the base class."""
        if name in ("add", "iadd") and n_hot == 2 and not self.in_attention:
            return self._shared(output)
        return self._marked(output)

    def shifted(self, output: Tensor, constant: Tensor) -> Tensor:
        """See the base class."""
        items, constants = self._items(output), self._items(constant)
        return self._batch(output, items[0], items - constants, constants[0])

    def product(self, output: Tensor) -> Tensor:
        """See the base class: it is the prompt's alone, and of no use but to a softmax."""
        items = self._items(output).clone()
        items[1:] = torch.nan
        return self._marked(items.reshape(output.shape))

    def held(self, output: Tensor) -> Tensor:
        """See the base class."""
        items = self._items(output)
        return items[:1].expand(items.shape).contiguous().reshape(output.shape)

    def single(self, func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """See the base class."""
        items = self._items(x)
        value, held = slope(func, items[0])
        parts = held * items
        return self._batch(x, value, parts, value - parts[0])

    def normed(self, value: Tensor, x: Tensor, norm: Norm) -> Tensor:
        """See the base class."""
        parts, whole = self._items(norm.over(x, self.held(norm.divisor(x)))), self._items(value)[0]
        return self._batch(value, whole, parts, whole - parts[0])

    def _shared(self, output: Tensor) -> Tensor:
        """With what was put off shared among the parts."""
        items = self._items(output)
        if not bool((items[-1] != 0).any()):
            return self._marked(output)
        parts = torch.cat([items[:-1], torch.zeros_like(items[-1:])])
        return self._batch(output, items[0], parts, items[-1])

    def _batch(self, like: Tensor, whole: Tensor, parts: Tensor, constant: Tensor) -> Tensor:
        """A batch of the prompt's vectors and parts, once a constant is shared, or is put off."""
        own, late = parts[1:-1], parts[-1]
        if self.in_attention:
            late = late + constant
        else:
            weight = (own * constant).sum(-1, keepdim=True).abs()
            total = weight.sum(0, keepdim=True)
            weight = torch.where(total > 0, weight / total, 1 / len(own))
            own = own + weight * constant
        return self._marked(torch.cat([whole[None], own, late[None]]).reshape(like.shape))

    def _items(self, batch: Tensor) -> Tensor:
        if batch.ndim == 0 or len(batch) % self.n_items:
            raise self.unknown(f"a batch of {list(batch.shape)}")
        return batch.reshape(self.n_items, -1, *batch.shape[1:])

    def _marked(self, output: T) -> T:
        for one in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(one, Tensor) and one.is_floating_point():
                setattr(one, _MARK, True)
        return output


def decompose(what: Explained, method: str) -> tuple[Float[Tensor, "pos"], float]:
    """What each position's part contributes to the number that is explained, and what they have to add up to.

    Raises:
        InputError: the model calls something on its activations that has no rule.
        BoundaryError: parts do not come through: the model keeps something between its blocks.
    """
    forward, first, metric = what.down.forward, what.values[what.layers[0]].call, what.down.metric
    rules = Decomposition(method, len(what))
    with torch.no_grad():
        batch = rules.start(first.resid_pre)
        pairs = [first.entering(batch)]
        for values in what.values.values():
            pairs += rules.attention_hooks(values)
        with rules.over(forward.stack.model):  # type: ignore[arg-type]
            output = forward.onward(first.layer, batch, pairs)
    if not hasattr(output, _MARK):
        raise BoundaryError(f"method={method!r}: the model's output does not come from its residual vectors.")
    if not bool(output.isfinite().all()):
        raise rules.unknown("a product of activations")
    whole = output[:1].detach().clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(metric.checked(metric(whole)).sum(), whole)
    parts = (gradient * output).flatten(1).sum(-1)
    return parts[1:-1], float(parts[0])
