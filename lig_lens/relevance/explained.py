"""One number of a model's output on one prompt, and what methods that explain it ask about."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.values import Messages, Values
from lig_lens.inputs.inputs import Inputs
from lig_lens.integrate.integrand import Budget
from lig_lens.integrate.onward import Downstream, Entry, OfPositions, behind, entry_of
from lig_lens.integrate.quadrature import Integral
from lig_lens.interventions.run import messages_at
from lig_lens.models.running import first_tensor, leaf_at, torch_hooks, with_first_tensor
from lig_lens.paths.path import ResidPath


@dataclass(frozen=True)
class Gradients:
    """Gradients of the number at the prompt itself, from one backward pass.

    Attributes:
        z: at the head outputs, by layer [pos head d_head]; without those of blocks that have no separable heads.
        resid: at the residual vectors that enter each block, and at those that leave the last.
        output: at what the model puts out.
    """

    z: Mapping[int, Float[Tensor, "pos head d_head"]]
    resid: Float[Tensor, "boundary pos d_model"]
    output: Float[Tensor, "1 *rest"]


class Explained:
    """A model's run on a prompt, the number that is explained, and where paths to the prompt start.

    Use it inside `prepared(model, model)`, where its runs were made. What is asked for is computed once.
    """

    def __init__(
        self,
        inputs: Inputs,
        values: Mapping[int, Values],
        start: Mapping[int, Values] | None,
        down: Downstream,
        budget: Budget,
    ) -> None:
        """Hold what was recorded.

        Args:
            inputs: the prompt.
            values: its own, at every block of the model.
            start: those of the baseline's prompt; None stands for vectors of zeros.
            down: the model's run, and the number.
            budget: how hard integrals try.
        """
        self.inputs, self.values, self.start, self.down, self.budget = inputs, values, start, down, budget
        self._integrals: dict[int, Integral] = {}

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the blocks."""
        return tuple(sorted(self.values))

    @functools.cached_property
    def resid(self) -> Float[Tensor, "boundary pos d_model"]:
        """Residual vectors that enter each block, and those that leave the last."""
        return _at_boundaries(self.values)

    @functools.cached_property
    def start_resid(self) -> Float[Tensor, "boundary pos d_model"]:
        """The same where paths start."""
        return torch.zeros_like(self.resid) if self.start is None else _at_boundaries(self.start)

    def entry(self, boundary: int) -> Entry:
        """The path to the prompt at a boundary: where vectors enter a block, or leave the last."""
        path = ResidPath(self.resid[boundary], self.start_resid[boundary])
        last = len(self.layers)
        return behind(self.values[last - 1], path) if boundary == last else entry_of(self.values[boundary], path)

    def token_relevance(self, boundary: int) -> Integral:
        """What the vectors at a boundary contribute along the path: one cell, whose parts are the positions."""
        if boundary not in self._integrals:
            integrand = OfPositions(self.entry(boundary), self.down, self.budget)
            known = (None if self.start is None else self.down.corrupted), self.down.clean
            self._integrals[boundary] = integrand.integrate(known, self.budget)
        return self._integrals[boundary]

    def messages(self, layer: int) -> Messages:
        """Pattern and values of a block's attention.

        Raises:
            InputError: no hook shows them, or head outputs are not their product.
        """
        return messages_at(self.values[layer], "take a method that needs no attention, such as 'ig'.")

    @functools.cached_property
    def patterns(self) -> Float[Tensor, "layer head src dst"]:
        """Attention patterns, source before destination.

        Raises:
            InputError: they cannot be read.
        """
        return torch.stack([self.messages(layer).pattern.mT for layer in self.layers])

    @functools.cached_property
    def gradients(self) -> Gradients:
        """Gradients at the prompt itself."""
        return self.backward(contextlib.nullcontext())

    def backward(
        self, rules: AbstractContextManager[object], passed: Callable[[int], object] = lambda _boundary: None
    ) -> Gradients:
        """One backward pass at the prompt itself.

        Args:
            rules: entered while the model runs, so that it can change what gradients are.
            passed: told of every boundary that the run has come to, before what follows it runs.
        """
        forward, first, leaves = self.down.forward, self.values[self.layers[0]].call, dict[Any, Tensor]()

        def behind_block(layer: int, output: Any) -> Any:
            passed(layer + 1)
            return with_first_tensor(output, leaf_at(leaves, layer + 1)(first_tensor(output)))

        resid = first.resid_pre[None].detach().requires_grad_()
        pairs = [first.entering(resid)]
        for layer, values in self.values.items():
            if values.attention is not None:
                path = values.attention.nodes.z_path
                pairs += torch_hooks(values.call.modules, {path: leaf_at(leaves, ("z", layer))})
            block = values.call.block
            pairs.append((block, lambda _m, _a, output, layer=layer: behind_block(layer, output), False))
        metric = self.down.metric
        with torch.enable_grad():
            with rules:
                passed(first.layer)
                output = leaf_at(leaves, "output")(forward.onward(first.layer, resid, pairs))
            value = metric.checked(metric(output))
            leaves[first.layer] = resid
            grads = torch.autograd.grad(value.sum(), list(leaves.values()), materialize_grads=True)
        metric.check_gradient(*grads)
        found = dict(zip(leaves, grads, strict=True))
        boundaries = torch.stack([found[number][0] for number in (*self.layers, len(self.layers))])
        z = {
            layer: found["z", layer].reshape(values.attention.z.shape)
            for layer, values in self.values.items()
            if values.attention is not None
        }
        return Gradients(z, boundaries, found["output"])

    @functools.cached_property
    def pattern_gradients(self) -> Float[Tensor, "layer head src dst"]:
        """Gradient of the number at every entry of the attention patterns: `dF/dp_ji = <dF/dz_j, v_i>`."""
        return torch.stack(
            [pattern_gradient(self.gradients.z[layer], self.messages(layer).values) for layer in self.layers]
        )

    @functools.cached_property
    def readout(self) -> Float[Tensor, "pos"]:
        """How much the output looks at each position behind the last block: lengths of gradients, adding up to 1.

        One position alone for a head that reads [CLS] or the last token.
        """
        lengths: Tensor = torch.linalg.vector_norm(self.gradients.resid[-1], dim=-1)
        return lengths / lengths.sum().clamp(min=torch.finfo(lengths.dtype).tiny)


def pattern_gradient(
    gradient: Float[Tensor, "dst head d_head"], values: Float[Tensor, "src head d_head"]
) -> Float[Tensor, "head src dst"]:
    """Gradient at the pattern of a number whose gradient at the head outputs is known."""
    return torch.einsum("jhe,ihe->hij", gradient, values)


def _at_boundaries(values: Mapping[int, Values]) -> Float[Tensor, "boundary pos d_model"]:
    layers = sorted(values)
    return torch.stack([*(values[layer].resid_pre for layer in layers), values[layers[-1]].resid_post])
