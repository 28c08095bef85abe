"""Relevance handed back by one backward pass under rules: gradient times input of a model with some parts held.

With every function taken for `y = c + J_1 x_1 + J_2 x_2 + ...` (`rules.py`), relevance of `x_i` is `x_i` times what a
backward pass through J brings there, and `c` times what arrives at y is kept: it belongs to no input. Of a product of
two activations half goes to either, `J = x_2 / 2` and `x_1 / 2`; softmax hands back by its gradient, or nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lig_lens.relevance.rules import Norm, Rules, slope


class Propagation(Rules):
    """While it is entered, gradients are those of the rules.

    It counts what biases and the like keep, by `stage`: whoever runs the model moves that on.

    Attributes:
        stage: how many blocks have run.
        kept: relevance that belongs to no input, by stage; filled in by the backward pass.
    """

    def __init__(self, method: str, *, hold_softmax: bool, refuse_products: bool = False) -> None:
        """State the rules.

        Args:
            method: name of the method whose they are, for messages.
            hold_softmax: whether softmax is held, else its gradient is taken.
            refuse_products: whether products of two activations have no rule where relevance arrives at them.
        """
        super().__init__(method, hold_softmax=hold_softmax)
        self.refuse_products = refuse_products
        self.stage = 0
        self.kept: dict[int, float] = {}

    def is_hot(self, value: Tensor) -> bool:
        """See the base class."""
        return value.requires_grad and torch.is_grad_enabled()

    def passed(self, name: str, output: Any, n_hot: int) -> Any:
        """See the base class."""
        return output

    def shifted(self, output: Tensor, constant: Tensor) -> Tensor:
        """See the base class."""
        stage, constant = self.stage, constant.detach()

        def count(gradient: Tensor) -> None:
            share = torch.where(gradient == 0, 0.0, gradient * constant)  # a mask may be -inf
            self.kept[stage] = self.kept.get(stage, 0.0) + float(share.detach().double().sum())

        _on_gradient(output, count)
        return output

    def product(self, output: Tensor) -> Tensor:
        """See the base class."""
        if self.refuse_products:
            _on_gradient(output, self._refuse)
        return output / 2 + (output / 2).detach()

    def _refuse(self, _gradient: Tensor) -> None:
        raise self.unknown("a product of activations")

    def held(self, output: Tensor) -> Tensor:
        """See the base class."""
        return output.detach()

    def single(self, func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """See the base class."""
        value, held = slope(func, x)
        return self._as(value, held * x)

    def normed(self, value: Tensor, x: Tensor, norm: Norm) -> Tensor:
        """See the base class."""
        return self._as(value, norm.over(x, norm.divisor(x).detach()))

    def softmax(self, value: Tensor, x: Tensor) -> Tensor:
        """See the base class."""
        with torch.no_grad():
            weighted = torch.where(value == 0, 0.0, value * x)  # what is masked may be -inf
            constant = value - weighted + value * weighted.sum(-1, keepdim=True)
        return self.shifted(value, constant)

    def _as(self, value: Tensor, linear: Tensor) -> Tensor:
        """A value with the gradient of something else, to which a constant is added."""
        return self.shifted(value.detach() + (linear - linear.detach()), value - linear.detach())


def _on_gradient(output: Tensor, hook: Callable[[Tensor], None]) -> None:
    output.register_hook(hook)  # type: ignore[no-untyped-call]
