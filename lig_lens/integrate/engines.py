"""Engines: who integrates a block's attention, in order of preference."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.across import AcrossValues
from lig_lens.blocks.values import Values
from lig_lens.errors import InputError
from lig_lens.integrate import autograd, closed_form
from lig_lens.integrate.across import across_integrand
from lig_lens.integrate.attention_path import SharedPath
from lig_lens.integrate.between import Between, ClosedBetween, MessagesByAutograd, SourcesByAutograd
from lig_lens.integrate.closed_form import NUMBERS_PER_TOKEN
from lig_lens.integrate.integrand import Budget, PathIntegrand
from lig_lens.paths.path import ResidPath
from lig_lens.targets.target import DestinationTarget


class Engine(ABC):
    """One way of integrating from residual vectors to head outputs, to a block's output, or to a metric."""

    name: str

    @abstractmethod
    def serves(self, values: Values) -> bool:
        """Whether it works on a block."""

    @abstractmethod
    def resid_integrand(
        self,
        values: Values,
        path: ResidPath,
        target: DestinationTarget,
        dst: Int[Tensor, "dst"],
        to_heads: bool,
        budget: Budget,
    ) -> PathIntegrand:
        """Contributions of sources to head outputs or to the block's output, parts [dst, head or 1, src]."""

    @abstractmethod
    def between(self, values: Values, start: Float[Tensor, "pos d_model"], budget: Budget, by_message: bool) -> Between:
        """What a metric's integrand needs between residual vectors and head outputs.

        Args:
            values: of the prompt at the block.
            start: of the path.
            budget: how hard to try.
            by_message: whether to split by message instead of by source.
        """

    def check_messages(self, values: Values) -> None:
        """Raise InputError if the engine cannot split a block's head outputs by message; by default it can."""
        return


class ClosedForm(Engine):
    """Attention differentiated by hand; see `closed_form.py`."""

    name = "closed_form"

    def serves(self, values: Values) -> bool:
        """See the base class."""
        return values.attention is not None and values.attention.formula is not None

    def resid_integrand(
        self,
        values: Values,
        path: ResidPath,
        target: DestinationTarget,
        dst: Int[Tensor, "dst"],
        to_heads: bool,
        budget: Budget,
    ) -> PathIntegrand:
        """See the base class."""
        if isinstance(values.heads.formula, AcrossValues):
            size = NUMBERS_PER_TOKEN * budget.max_batch_tokens
            return across_integrand(values, values.heads.formula, path, target, dst, size)
        return closed_form.resid_integrand(values, path, target, dst, to_heads, budget)

    def between(self, values: Values, start: Float[Tensor, "pos d_model"], budget: Budget, by_message: bool) -> Between:
        """See the base class."""
        formula, every = values.heads.closed, torch.arange(len(values), device=start.device)
        with torch.no_grad():
            path = SharedPath(formula, every, formula.tokens(start))
        return ClosedBetween(values, path, NUMBERS_PER_TOKEN * budget.max_batch_tokens, by_message)


class Hooks(Engine):
    """Automatic differentiation; see `autograd.py`."""

    name = "hooks"

    def serves(self, values: Values) -> bool:
        """See the base class."""
        return True

    def resid_integrand(
        self,
        values: Values,
        path: ResidPath,
        target: DestinationTarget,
        dst: Int[Tensor, "dst"],
        to_heads: bool,
        budget: Budget,
    ) -> PathIntegrand:
        """See the base class."""
        return autograd.resid_integrand(values, path, target, dst, to_heads, budget)

    def between(self, values: Values, start: Float[Tensor, "pos d_model"], budget: Budget, by_message: bool) -> Between:
        """See the base class."""
        step = values.resid_pre - start
        return MessagesByAutograd(values, step, _v_path(values)) if by_message else SourcesByAutograd(values, step)

    def check_messages(self, values: Values) -> None:
        """See the base class."""
        _v_path(values)


def _v_path(values: Values) -> str:
    path = values.heads.v_path
    if path is None:
        raise InputError(
            f"split='message': the pattern and values of block {values.layer} cannot be read, or head outputs are not "
            "their product. Use split='source', or load the model with eager attention."
        )
    return path


CLOSED_FORM, HOOKS = ClosedForm(), Hooks()
ENGINES: tuple[Engine, ...] = (CLOSED_FORM, HOOKS)
