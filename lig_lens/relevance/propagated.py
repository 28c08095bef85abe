"""Relevance of everything in a model by one backward pass under rules."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lig_lens.errors import ConvergenceWarning, warn_caller
from lig_lens.relevance.explained import Explained, pattern_gradient
from lig_lens.relevance.propagation import Propagation


@dataclass(frozen=True)
class Propagated:
    """What arrived where.

    Attributes:
        token: relevance of the residual vectors that enter each block, and of those that leave the last.
        edges: relevance of the messages `p_ji v_i` that make up head outputs.
        total: what `token` adds up to at each boundary, if the rules hold: the relevance of the output, less what
            biases, embeddings that are added and the like keep behind that boundary.
        gap: how far the sums are from that, relative to the largest of them.
        converged: whether gaps are within the tolerance.
    """

    token: Float[Tensor, "boundary pos"]
    edges: Float[Tensor, "layer head src dst"]
    total: Float[Tensor, "boundary"]
    gap: Float[Tensor, "boundary"]
    converged: Bool[Tensor, "boundary"]

    def answer(self) -> dict[str, Any]:
        """The fields of an `Answer` that it fills in."""
        last = len(self.token)
        return {
            "scores": self.token[0],
            "rolled": self.token[:-1],
            "token": self.token,
            "boundaries": tuple(range(last)),
            "total": self.total,
            "gap": self.gap,
            "converged": self.converged,
        }


def propagate(what: Explained, rules: Propagation) -> Propagated:
    """Hand relevance back from the number that is explained, each block's to its inputs.

    Raises:
        InputError: the model calls something on its activations that has no rule.

    Warns:
        ConvergenceWarning: relevance does not add up to what it has to.
    """

    def passed(boundary: int) -> None:
        rules.stage = boundary

    found = what.backward(rules.over(cast(nn.Module, what.down.forward.stack.model)), passed)
    token = (what.resid * found.resid).sum(-1)
    edges = what.patterns * torch.stack(
        [pattern_gradient(found.z[layer], what.messages(layer).values) for layer in what.layers]
    )
    kept = torch.tensor([rules.kept.get(stage, 0.0) for stage in range(len(token))], dtype=torch.float64)
    start = float((what.down.forward.output * found.output).double().sum())
    total = start - kept.flip(0).cumsum(0).flip(0)
    size = max(abs(start), float(total.abs().max()), torch.finfo(torch.float64).tiny)
    gap = (token.double().sum(-1).cpu() - total).abs() / size
    converged = gap <= what.budget.tol
    if not bool(converged.all()):
        warn_caller(
            f"Relevance by {rules.method!r} misses what it has to add up to by {float(gap.max()):.1e}: the model "
            "computes something in a way that no rule sees, such as a kernel of its own. Use method='ig' or 'ca_lig'.",
            ConvergenceWarning,
        )
    return Propagated(token, edges, total, gap, converged)
