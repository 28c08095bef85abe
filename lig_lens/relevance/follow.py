"""Follow relevance back through the blocks: what stood at a destination goes to sources, block by block.

`r_i = sum_j M_l[i, j] r_j` with the matrix M_l that a block's edges of attention are made into. Attention rollout,
Chefer et al. 2021 and the attention part of CA-LIG differ in edges, matrix, and what they start with behind the last
block.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.errors import CancellationWarning, warn_caller
from lig_lens.flow.compose import CANCELS
from lig_lens.relevance.method import Answer

VANISHING = 1e-8
"""Sums that are this small beside the sum of absolute values are taken to be 0."""


def identity(edges: Float[Tensor, "src dst"]) -> Float[Tensor, "src dst"]:
    """Half of what stood at a position stays, half goes where attention took it from (Abnar and Zuidema 2020)."""
    return 0.5 * (torch.eye(len(edges)).to(edges) + edges)


def additive(edges: Float[Tensor, "src dst"]) -> Float[Tensor, "src dst"]:
    """All that stood at a position stays, and what attention adds comes on top (Chefer et al. 2021, eq. 6)."""
    return torch.eye(len(edges)).to(edges) + edges


def conserving(edges: Float[Tensor, "src dst"]) -> Float[Tensor, "src dst"]:
    """As `additive`, each column divided by its sum: nothing is made or lost. A column without a sum stays in place."""
    eye = torch.eye(len(edges)).to(edges)
    moved = eye + edges
    total = moved.sum(0)
    vanishes = total.abs() <= VANISHING * moved.abs().sum(0)
    return torch.where(vanishes, eye, moved / total.masked_fill(vanishes, 1.0))


Through = Callable[[Tensor], Tensor]
"""Makes the matrix that relevance passes a block by out of the block's edges, both [src, dst]."""
THROUGH: dict[str, Through] = {"identity": identity, "additive": additive, "conserving": conserving}

Fuse = Callable[[int, Tensor, Tensor], Tensor]
"""Makes of a block's row, what attention moved [src, dst] and what stood at destinations [dst] what goes to sources."""


def moved_alone(row: int, moved: Float[Tensor, "src dst"], relevance: Float[Tensor, "dst"]) -> Float[Tensor, "src dst"]:
    """Nothing but what attention moves."""
    return moved


def follow(
    relevance: Float[Tensor, "pos"],
    edges: Float[Tensor, "layer src dst"],
    through: Through,
    fuse: Fuse = moved_alone,
) -> tuple[Float[Tensor, "layer src dst"], Float[Tensor, "layer pos"]]:
    """Follow relevance back through the blocks.

    Args:
        relevance: what stands at positions behind the last block.
        edges: attention relevance of each block.
        through: see `Through`.
        fuse: see `Fuse`.

    Returns:
        what goes from destinations to sources in each block, and what arrives at them.

    Warns:
        CancellationWarning: what a block hands on nearly cancels, and is `CANCELS` times as large as its sum.
    """
    fused, rolled, worst = [], [], (1.0, 0)
    for row in range(len(edges) - 1, -1, -1):
        moved = through(edges[row]) * relevance
        worst = max(worst, (_times(moved), row))
        both = fuse(row, moved, relevance)
        relevance = both.sum(-1)
        fused.append(both)
        rolled.append(relevance)
    if worst[0] > CANCELS:
        warn_caller(
            f"What attention hands on nearly cancels: in block {worst[1]} its size is {worst[0]:.0f} times its sum, so "
            "that scores are large and of both signs. Nothing cancels with keep='positive', and little with "
            "through='identity' or 'additive' and scale='none'.",
            CancellationWarning,
        )
    return torch.stack(fused[::-1]), torch.stack(rolled[::-1])


def _times(moved: Float[Tensor, "src dst"]) -> float:
    """How many times as large as the sums over sources are the terms, signs left aside."""
    size, sums = float(moved.abs().sum()), float(moved.sum(0).abs().sum())
    return size / sums if sums > 0 else float(size > 0) * float("inf") or 1.0


def read_back(readout: Float[Tensor, "pos"], edges: Float[Tensor, "layer head src dst"], through: Through) -> Answer:
    """The answer of a method that follows what the output looks at back along the mean of heads.

    Args:
        readout: how much the output looks at each position behind the last block.
        edges: attention relevance, head by head.
        through: see `Through`.
    """
    fused, rolled = follow(readout.to(edges), edges.mean(1), through)
    return Answer(scores=rolled[0], rolled=rolled, attention=edges, fused=fused)
