"""Token relevance: what the vectors at boundaries between blocks contribute, and how certain that is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lig_lens.errors import ConvergenceWarning, NonFiniteError, warn_caller
from lig_lens.relevance.explained import Explained
from lig_lens.relevance.method import Advance


@dataclass(frozen=True)
class TokenRelevance:
    """Contributions of positions at some boundaries, with what they have to add up to.

    Attributes:
        boundaries: their numbers.
        token: contributions.
        total: change of the number along the path there.
        gap: how far sums are from it, relative.
        converged: whether gaps and estimated errors are within the tolerance.
    """

    boundaries: tuple[int, ...]
    token: Float[Tensor, "boundary pos"]
    total: Float[Tensor, "boundary"]
    gap: Float[Tensor, "boundary"]
    converged: Bool[Tensor, "boundary"]


def token_relevance(what: Explained, boundaries: Sequence[int], advance: Advance) -> TokenRelevance:
    """Integrate at some boundaries, the last first: it costs least.

    Raises:
        NonFiniteError: a contribution is NaN or infinite.

    Warns:
        ConvergenceWarning: with the boundaries that missed the tolerance.
    """
    found = {}
    for boundary in sorted(boundaries, reverse=True):
        found[boundary] = what.token_relevance(boundary)
        if not bool(found[boundary].parts.isfinite().all()):
            raise NonFiniteError(f"Contributions at boundary {boundary} are NaN or infinite: choose another baseline.")
        advance()
    cells = [found[boundary] for boundary in boundaries]
    token = torch.stack([cell.parts[0, 0] for cell in cells])
    total, gap = (torch.stack([getattr(cell, name)[0, 0] for cell in cells]) for name in ("total", "gap"))
    converged = torch.stack([cell.converged[0, 0] for cell in cells])
    missed = [boundary for boundary, done in zip(boundaries, converged.tolist(), strict=True) if not done]
    if missed:
        warn_caller(
            f"{len(missed)} of {len(boundaries)} boundaries missed tol={what.budget.tol:g} within "
            f"max_nodes={what.budget.max_nodes}: {', '.join(map(str, missed))} (worst gap {float(gap.max()):.1e}). See "
            "gap and converged; raise max_nodes or tol.",
            ConvergenceWarning,
        )
    return TokenRelevance(tuple(boundaries), token, total, gap, converged)
