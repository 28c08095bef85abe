"""What integrands share: how hard to try, points run in portions, the scalars along a path, and its boundary layers."""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lig_lens.blocks.tail import Scales
from lig_lens.blocks.values import Values
from lig_lens.integrate.quadrature import Integral, integrate
from lig_lens.models.switches import Switches
from lig_lens.paths.path import ResidPath
from lig_lens.targets.target import Scalar


@dataclass(frozen=True)
class Budget:
    """How hard to try: relative tolerance, nodes per cell, and tokens that are run through a block at once."""

    tol: float
    max_nodes: int
    max_batch_tokens: int

    def items(self, n_pos: int) -> int:
        """Interpolation points that fit into one run of the block."""
        return max(1, self.max_batch_tokens // n_pos)


class ByPoints(ABC):
    """An integrand that is evaluated at single points, `chunk` of them at a time. See `split.Integrand`."""

    n_dst: int
    n_groups: int
    n_parts: int
    dtype: torch.dtype
    device: torch.device
    chunk: int
    row = 1
    """Points may stand in rows of this length, the last of them filled up."""

    @abstractmethod
    def _scalars(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item group"]:
        """L at single points; everything is on the device."""

    @abstractmethod
    def _parts(
        self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"], groups: list[int]
    ) -> Float[Tensor, "item group part"]:
        """Parts at single points, for the groups asked for; everything is on the device."""

    def scalars(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item group"]:
        """See `split.Integrand`."""
        portions = zip(self._portions(dst), self._portions(self._on_device(a)), strict=True)
        with torch.no_grad():
            return torch.cat([self._scalars(d.to(self.device), x) for d, x in portions])

    def sums(
        self,
        dst: Int[Tensor, "panel"],
        a: Float[Tensor, "panel node"],
        factors: Float[Tensor, "panel node column"],
        groups: Bool[Tensor, "panel group"],
    ) -> Float[Tensor, "column panel group part"]:
        """See `split.Integrand`."""
        n_nodes = a.shape[1]
        shape = (factors.shape[2], len(dst), self.n_groups, self.n_parts)
        result = torch.zeros(shape, dtype=self.dtype, device=self.device)
        points, factors = self._on_device(a.flatten()), self._on_device(factors.flatten(0, 1))
        for part in self._portions(torch.arange(a.numel())):
            panel = part // n_nodes
            wanted = groups[panel].any(0).nonzero()[:, 0].tolist()
            values = self._parts(dst[panel].to(self.device), points[part], wanted)
            rows = panel.to(self.device)
            for column, factor in zip(result, factors[part].T, strict=True):
                column.index_add_(0, rows, values * factor[:, None, None])
        return result

    def margins(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item unit"]:
        """See `split.Integrand`."""
        points = dst.to(self.device), self._on_device(a)
        return self._switches.margins(len(dst), lambda: self._scalars(*points))

    def switches(self) -> bool:
        """See `split.Integrand`."""
        return bool(self._switches)

    @functools.cached_property
    def _switches(self) -> Switches:
        zero = torch.zeros(1, dtype=torch.long, device=self.device)
        return Switches(lambda n: self._scalars(zero.expand(n), zero.to(self.dtype).expand(n)), self.row)

    def _portions(self, points: Tensor) -> tuple[Tensor, ...]:
        """As few as there can be, and all but equally long: short ones cost more by the point."""
        return torch.tensor_split(points, max(1, -(-len(points) // self.chunk)))

    def _on_device(self, values: Tensor) -> Tensor:
        # Cast first: a device may not have float64.
        return values.to(self.dtype).to(self.device)


class PathIntegrand(ABC):
    """Base of integrands to destinations: scalars measure how far their vectors have moved from the start of a path.

    Attributes:
        start: the vectors there.
        scales: what norms behind attention divide by there; None where the path ends at head outputs.
    """

    start: Float[Tensor, "dst group dim"]
    scales: Scales | None = None
    chunk: int
    """Points that fit into one run of the block."""
    all_norms_known = False
    """Whether every norm on the way is known, so that none can hide."""

    def __init__(self, values: Values, scalar: Scalar, dst: Int[Tensor, "dst"], n_groups: int, n_parts: int) -> None:
        self.values, self.scalar, self.positions = values, scalar, dst.cpu()
        self.n_dst, self.n_groups, self.n_parts = len(dst), n_groups, n_parts
        self.dtype, self.device = values.resid_pre.dtype, values.resid_pre.device

    @abstractmethod
    def scalars(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item group"]:
        """See `split.Integrand`."""

    @abstractmethod
    def sums(
        self,
        dst: Int[Tensor, "panel"],
        a: Float[Tensor, "panel node"],
        factors: Float[Tensor, "panel node column"],
        groups: Bool[Tensor, "panel group"],
    ) -> Float[Tensor, "column panel group part"]:
        """See `split.Integrand`."""

    @abstractmethod
    def switches(self) -> bool:
        """See `split.Integrand`."""

    @abstractmethod
    def margins(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item unit"]:
        """See `split.Integrand`."""

    def noise(self, end: Float[Tensor, "pos group dim"]) -> Float[Tensor, "dst group"]:
        """Change of each scalar that rounding alone can cause, `end` being what comes out at a = 1."""
        dst = self.positions.to(self.device)
        lengths = [self.scalar.size(vectors, dst) for vectors in (self.start, end[dst])]
        return 8 * self.values.block.rounding * torch.maximum(*lengths)

    def integrate(
        self, s0: Float[Tensor, "dst"], s1: Float[Tensor, "dst"], end: Float[Tensor, "pos group dim"], budget: Budget
    ) -> Integral:
        """Integrate every cell; `s0` and `s1` are the widths of the layers, `end` what comes out at a = 1."""
        return integrate(
            self,
            s0,
            s1,
            self.noise(end),
            tol=budget.tol,
            max_nodes=budget.max_nodes,
            all_layers_known=self.all_norms_known,
        )


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


def integrate_resid(integrand: PathIntegrand, path: ResidPath, dst: Int[Tensor, "dst"], budget: Budget) -> Integral:
    """Integrate along paths of residual vectors, to head outputs or through the block."""
    values, scales = integrand.values, integrand.scales
    s0, s1 = layers_of_paths(path, dst, values.block.eps, values.block.norms_to_z)
    if scales is None:
        return integrand.integrate(s0, s1, values.heads.z, budget)
    if values.block.norms_in_series:
        later = scales.widths(dst)
        s0, s1 = s0 * later[0], s1 * later[1]
    return integrand.integrate(s0, s1, values.resid_post[:, None], budget)


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
