"""Gradient times input (Shrikumar et al. 2016, "Not Just a Black Box"): `<x_i, dF/dx_i>` for vectors x at a boundary.

One backward pass gives it at all boundaries; the answer is the one at the embeddings, the vectors that enter the first
block. Signed. It is the first term of the number's expansion around vectors of zeros, and adds up to no change of it.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lig_lens.relevance.explained import Explained
from lig_lens.relevance.method import Advance, Answer, Method


def gradient_times_input(what: Explained) -> Float[Tensor, "boundary pos"]:
    """`<x_i, dF/dx_i>` at all boundaries."""
    return (what.resid * what.gradients.resid).sum(-1)


@dataclass(frozen=True)
class GradXInput(Method):
    """Gradient times input; see the module."""

    name = "grad_x_input"
    needs_heads = False

    def explain(self, what: Explained, advance: Advance) -> Answer:
        """See the base class."""
        token = gradient_times_input(what)
        return Answer(scores=token[0], token=token, boundaries=tuple(range(len(token))))
