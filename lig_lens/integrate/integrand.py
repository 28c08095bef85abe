"""What the engines share: how hard to try, the scalars along a path, and where its boundary layers are."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lig_lens.blocks.find import BlockNodes
from lig_lens.blocks.tail import Scales
from lig_lens.integrate.quadrature import Integral, integrate
from lig_lens.paths.baselines import ResidPath
from lig_lens.targets.targets import Scalar


@dataclass(frozen=True)
class Budget:
    """How hard to try: relative tolerance, nodes per cell, and tokens that are run through a block at once."""

    tol: float
    max_nodes: int
    max_batch_tokens: int

    def items(self, n_pos: int) -> int:
        """Interpolation points that fit into one run of the block."""
        return max(1, self.max_batch_tokens // n_pos)


class PathIntegrand(ABC):
    """Base of the integrands: scalars measure how far `outputs` has moved from the start of a destination's path."""

    start: Float[Tensor, "dst group dim"]

    def __init__(self, nodes: BlockNodes, scalar: Scalar, dst: Int[Tensor, "dst"], n_groups: int, n_parts: int) -> None:
        self.nodes, self.scalar, self.positions = nodes, scalar, dst.cpu()
        self.n_dst, self.n_groups, self.n_parts = len(dst), n_groups, n_parts
        self.dtype, self.device = nodes.resid_pre.dtype, nodes.resid_pre.device

    @abstractmethod
    def scalars(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item group"]:
        """See `quadrature.Integrand`."""

    @abstractmethod
    def sums(
        self,
        dst: Int[Tensor, "panel"],
        a: Float[Tensor, "panel node"],
        factors: Float[Tensor, "panel node column"],
        groups: Bool[Tensor, "panel group"],
    ) -> Float[Tensor, "column panel group part"]:
        """See `quadrature.Integrand`."""

    def noise(self, end: Float[Tensor, "pos group dim"]) -> Float[Tensor, "dst group"]:
        """Change of each scalar that rounding alone can cause, `end` being what comes out at a = 1."""
        dst = self.positions.to(self.device)
        lengths = [self.scalar.size(vectors, dst) for vectors in (self.start, end[dst])]
        return 8 * self.nodes.rounding * torch.maximum(*lengths)

    def integrate(
        self, s0: Float[Tensor, "dst"], s1: Float[Tensor, "dst"], end: Float[Tensor, "pos group dim"], budget: Budget
    ) -> Integral:
        """Integrate every cell; `s0` and `s1` are the widths of the layers, `end` what comes out at a = 1."""
        return integrate(self, s0, s1, self.noise(end), tol=budget.tol, max_nodes=budget.max_nodes)


def layers_of_paths(
    path: ResidPath, dst: Int[Tensor, "dst"], eps: float, depth: int
) -> tuple[Float[Tensor, "dst"], Float[Tensor, "dst"]]:
    """Widths of the boundary layers at both ends of each destination's path, narrowest source first."""
    if depth == 0:
        one = torch.ones(len(dst), dtype=torch.float64)
        return one, one
    end = rms(path.end)
    start = end[dst.cpu()][:, None] if path.start is None else rms(path.start).expand(len(dst), -1)
    s0, s1 = widths(start, end.expand(len(dst), -1), eps, depth)
    return s0.amin(-1), s1.amin(-1)


def integrate_resid(
    integrand: PathIntegrand, path: ResidPath, scales: Scales | None, dst: Int[Tensor, "dst"], budget: Budget
) -> Integral:
    """Integrate along paths of residual vectors, to head outputs or, where `scales` are given, through the block."""
    nodes = integrand.nodes
    s0, s1 = layers_of_paths(path, dst, nodes.eps, nodes.norms_to_z)
    # In parallel blocks the norms after attention see what the first one sees.
    if scales is not None and nodes.boundaries.layout != "parallel":
        later = scales.widths(dst)
        s0, s1 = s0 * later[0], s1 * later[1]
    end = nodes.z if scales is None else nodes.resid_post[:, None]
    assert end is not None
    return integrand.integrate(s0, s1, end, budget)


def widths(start: Tensor, end: Tensor, eps: float, depth: int) -> tuple[Tensor, Tensor]:
    """Where a norm turns from one end's direction to the other's: rms of the ends, eps standing in for 0.

    A path from 0 through several norms in a row has a layer for each: the next norm sees the first one's steep
    rise, and so turns within the square of the width, and so on.
    """
    narrow_start, narrow_end = ((side.double() ** 2 + eps).sqrt() for side in (start, end))
    s0, s1 = (narrow_start / narrow_end).clamp(max=1.0), (narrow_end / narrow_start).clamp(max=1.0)
    from_zero, to_zero = (side.double() ** 2 <= eps for side in (start, end))
    return torch.where(from_zero, s0**depth, s0), torch.where(to_zero, s1**depth, s1)


def rms(vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
    """Root mean square, in float64 on the CPU."""
    return vectors.cpu().double().pow(2).mean(-1).sqrt()
