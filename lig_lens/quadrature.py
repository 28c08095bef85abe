"""Integrals along paths: where nodes go, and when they are enough.

A *cell* is one integral whose completeness can be checked: a destination, or a destination and a head. Its
integrand has several *parts* (source tokens, or heads, skip and bias) that share the path, and for each cell
the sum of the parts is the derivative of a known scalar L along the path. So every panel [a, b] of the rule
comes with its own error estimate for free: how far the sum of its parts is from L(b) - L(a). Errors of single
parts can cancel in that sum, so each part is also asked how much of it lies in the two highest Legendre modes
that the nodes resolve. Panels are halved where either is too large, and only for the cells that still need it.

Norms put boundary layers at the ends of a path: `LN(a x)` jumps from 0 to its final value within
a ~ sqrt(eps / var(x)). Panels are therefore laid out, and halved, in a stretched variable t with

    t(a) = asinh(a / s0) - asinh((1 - a) / s1),

in which layers of width s0 at a = 0 and s1 at a = 1 are of order one, and which is nearly linear for s ~ 1.
Gauss-Legendre nodes leave out the end points, where the gradient of a norm does not exist.

Where nodes go and which panels to halve is worked out in float64 on the CPU, since not every device has float64;
only the integrand's values live on the model's device.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Nodes of one Gauss-Legendre rule, and the length in t of the panels that a path starts with.
NODES_PER_PANEL = 8
PANEL_LENGTH = 4.0
_NARROWEST = 1e-18


@runtime_checkable
class Integrand(Protocol):
    """What an engine provides: scalars and their gradient parts at given points of the paths."""

    n_dst: int
    n_groups: int
    n_parts: int
    dtype: torch.dtype
    device: torch.device

    def scalars(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item group"]:
        """L at `a` on the path of destination number `dst`."""

    def parts(
        self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"], groups: Bool[Tensor, "item group"]
    ) -> Float[Tensor, "item group part"]:
        """`<x_i - x0_i, dL/dx_i>` at `a`, for the groups asked for."""


@dataclass(frozen=True)
class Integral:
    """Integrated parts with their error.

    `gap` adds the panels' gaps up without letting them cancel, so the plain completeness gap
    |sum of parts - total| is never larger (beyond rounding). It is relative to |total|, or, where a cell moves
    by less than rounding, to the smallest change that `tol` could be asked of. `error` estimates how far the
    worst part is off, relative to the cell's largest part. A cell has converged when both are within `tol`.
    """

    parts: Float[Tensor, "dst group part"]
    total: Float[Tensor, "dst group"]
    gap: Float[Tensor, "dst group"]
    error: Float[Tensor, "dst group"]
    converged: Bool[Tensor, "dst group"]
    nodes: Int[Tensor, "dst group"]


def stretch(a: Tensor, s0: Tensor, s1: Tensor) -> Tensor:
    """`t(a)` of the module's docstring."""
    return torch.asinh(a / s0) - torch.asinh((1 - a) / s1)


def unstretch(t: Tensor, s0: Tensor, s1: Tensor) -> Tensor:
    """Inverse of `stretch`: bisection to the float64 grid, then exact to rounding."""
    low, high = torch.zeros_like(t), torch.ones_like(t)
    # Halve in log scale first: the interesting a may be 1e-12.
    for _ in range(100):
        middle = torch.where(low > 0, torch.sqrt(low * high), high * 0.5**8)
        middle = torch.where(low > 0.25 * high, 0.5 * (low + high), middle)
        below = stretch(middle, s0, s1) < t
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return 0.5 * (low + high)


def density(a: Tensor, s0: Tensor, s1: Tensor) -> Tensor:
    """`da / dt` at `a`."""
    return 1 / (1 / torch.sqrt(a**2 + s0**2) + 1 / torch.sqrt((1 - a) ** 2 + s1**2))


@dataclass
class _Panels:
    """Panels under work: one row each, with the groups it is still open for. All on the CPU."""

    dst: Tensor  # [panel]
    low: Tensor  # [panel] in t
    high: Tensor
    scalar_low: Tensor  # [panel group] L at the ends
    scalar_high: Tensor
    groups: Tensor  # bool [panel group]

    def __len__(self) -> int:
        return len(self.dst)


def integrate(
    integrand: Integrand,
    s0: Float[Tensor, "dst"],
    s1: Float[Tensor, "dst"],
    noise: Float[Tensor, "dst group"],
    *,
    tol: float,
    max_nodes: int,
    chunk: int,
) -> Integral:
    """Integrate every cell to `tol`, or until `max_nodes` nodes are spent on it.

    Args:
        integrand: scalars and parts along the paths.
        s0: width of the boundary layer at a = 0, per destination, in (0, 1].
        s1: the same at a = 1.
        noise: change of each scalar that rounding alone can cause; gaps below it are not refined.
        tol: largest gap relative to the cell's total.
        max_nodes: budget of nodes per cell; the first panels are evaluated in any case.
        chunk: items (points on paths) evaluated together.
    """
    n_dst = integrand.n_dst
    s0, s1 = (side.cpu().double().clamp(_NARROWEST, 1.0) for side in (s0, s1))
    tiny = torch.finfo(torch.float32).tiny
    noise = noise.cpu().double().clamp(min=tiny)
    total = _scalars(integrand, torch.arange(n_dst), torch.ones(n_dst, dtype=torch.float64), chunk)
    allowed = torch.maximum(tol * total.abs(), noise)
    shape = (n_dst, integrand.n_groups, integrand.n_parts)
    parts = torch.zeros(shape, dtype=integrand.dtype, device=integrand.device)
    gaps, errors, largest = (torch.zeros_like(total) for _ in range(3))
    spent = torch.zeros_like(total, dtype=torch.long)
    panels = _first_panels(integrand, s0, s1, total, chunk)
    while len(panels):
        values, gap, error = _evaluate(integrand, panels, s0, s1, chunk)
        spent.index_put_((panels.dst,), NODES_PER_PANEL * panels.groups.long(), accumulate=True)
        owner = panels.dst.to(integrand.device)
        largest = parts.index_put((owner,), values, accumulate=True).abs().amax(-1).cpu().double()
        bound = torch.maximum(tol * largest, noise)
        # In units of what the cell may miss. A gap within rounding would not shrink by halving.
        use = torch.where(gap > noise[panels.dst], gap / allowed[panels.dst], 0.0)
        use = torch.maximum(use, error / bound[panels.dst])
        used = torch.maximum(torch.where(gaps > noise, gaps / allowed, 0.0), errors / bound)
        keep = _choose(panels, use, used)
        open_panels = torch.zeros_like(spent)
        open_panels.index_put_((panels.dst,), (panels.groups & ~keep).long(), accumulate=True)
        # A cell that cannot pay for halving what is open is left as it is.
        broke = spent + 2 * NODES_PER_PANEL * open_panels > max_nodes
        keep |= broke[panels.dst] & panels.groups
        parts.index_put_((owner,), values * keep[..., None].to(integrand.device), accumulate=True)
        gaps.index_put_((panels.dst,), gap * keep, accumulate=True)
        errors.index_put_((panels.dst,), error * keep, accumulate=True)
        panels = _halve(integrand, panels, panels.groups & ~keep, s0, s1, chunk)
    # Rounding is allowed for by `noise`; a gap relative to less than that would be meaningless.
    gap = gaps / torch.maximum(total.abs(), noise / tol)
    error = errors / torch.maximum(largest, noise / tol)
    converged = (gap <= tol) & (error <= tol)
    return Integral(parts, total.to(parts), gap.to(parts), error.to(parts), converged.to(parts.device), spent)


def _scalars(integrand: Integrand, dst: Tensor, a: Tensor, chunk: int) -> Tensor:
    """`integrand.scalars` in chunks, brought to the CPU."""
    pairs = zip(torch.split(dst, chunk), torch.split(a, chunk), strict=True)
    return torch.cat([integrand.scalars(*_on_device(integrand, d, p)) for d, p in pairs]).cpu().double()


def _on_device(integrand: Integrand, dst: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    # Cast first: a device may not have float64.
    return dst.to(integrand.device), a.to(integrand.dtype).to(integrand.device)


def _first_panels(integrand: Integrand, s0: Tensor, s1: Tensor, total: Tensor, chunk: int) -> _Panels:
    """Panels of about `PANEL_LENGTH` in t over the whole path of each destination."""
    zero, one = torch.zeros_like(s0), torch.ones_like(s0)
    start, end = stretch(zero, s0, s1), stretch(one, s0, s1)
    counts = ((end - start) / PANEL_LENGTH).ceil().clamp(min=1).long()
    dst = torch.repeat_interleave(torch.arange(len(s0)), counts)
    first = torch.cumsum(counts, 0) - counts
    number = torch.arange(len(dst)) - first[dst]
    width = ((end - start) / counts)[dst]
    low, high = start[dst] + width * number, start[dst] + width * (number + 1)
    scalar_low, scalar_high = torch.zeros_like(total)[dst], total[dst].clone()
    inner = (number > 0).nonzero()[:, 0]
    if len(inner):
        at = unstretch(low[inner], s0[dst[inner]], s1[dst[inner]])
        scalar_low[inner] = _scalars(integrand, dst[inner], at, chunk)
        scalar_high[inner - 1] = scalar_low[inner]
    groups = torch.ones(len(dst), total.shape[1], dtype=torch.bool)
    return _Panels(dst, low, high, scalar_low, scalar_high, groups)


def _evaluate(
    integrand: Integrand, panels: _Panels, s0: Tensor, s1: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Parts of every panel by Gauss-Legendre, the gap of their sum, and the estimated error of the worst one.

    With n nodes the rule is exact up to mode 2n - 1 while its values show modes up to n - 1. Where modes fall off
    geometrically, mode 2n is about (mode n - 1)^(2n / (n - 1)): that, with the two highest visible modes standing
    in for the last (one of them vanishes for odd or even integrands), is the estimate.
    """
    n = NODES_PER_PANEL
    nodes, weights = np.polynomial.legendre.leggauss(n)
    modes = [np.polynomial.legendre.Legendre.basis(m)(nodes) * (2 * m + 1) for m in (0, n - 2, n - 1)]
    rule = torch.as_tensor(np.stack([*(mode * 0.5 * weights for mode in modes), np.sqrt(0.5 * weights)]))
    width = panels.high - panels.low
    t = panels.low[:, None] + width[:, None] * torch.as_tensor(0.5 * (nodes + 1))
    dst = panels.dst.repeat_interleave(n)
    a = unstretch(t.reshape(-1), s0[dst], s1[dst])
    # One column per quantity to sum: the integral, the two modes, and the root of the square.
    factors = (density(a, s0[dst], s1[dst]) * width.repeat_interleave(n))[:, None] * rule.T.repeat(len(panels), 1)
    groups = panels.groups.repeat_interleave(n, 0)
    owner = torch.arange(len(panels)).repeat_interleave(n)
    shape = (len(panels), integrand.n_groups, integrand.n_parts)
    sums = [torch.zeros(shape, dtype=integrand.dtype, device=integrand.device) for _ in range(4)]
    for d, p, f, g, o in zip(*(torch.split(x, chunk) for x in (dst, a, factors, groups, owner)), strict=True):
        values = integrand.parts(*_on_device(integrand, d, p), g.to(integrand.device))
        rows, columns = o.to(integrand.device), f.to(integrand.dtype).to(integrand.device)
        for power, total, column in zip((1, 1, 1, 2), sums, columns.T, strict=True):
            total.index_add_(0, rows, (values * column[:, None, None]) ** power)
    integral, *top, square = sums
    tail, size = torch.hypot(*top), square.sqrt()
    ratio = (tail / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(max=1.0)
    error = (size * ratio ** (2 * n / (n - 1))).amax(-1).cpu().double()
    gap = (integral.sum(-1).cpu().double() - (panels.scalar_high - panels.scalar_low)).abs()
    return integral, gap * panels.groups, error * panels.groups


def _choose(panels: _Panels, use: Tensor, used: Tensor) -> Tensor:
    """Which panels to keep as they are, per group, given what share of its allowance each uses up.

    All panels of a cell if they fit into what is left; else those that use least, up to half of the allowance, so
    that something is left for the halves of the others.
    """
    open_use = torch.zeros_like(used).index_put_((panels.dst,), use * panels.groups, accumulate=True)
    done = used + open_use <= 1
    # Cells sorted together, least use first: one running sum serves all of them.
    keep = torch.zeros_like(panels.groups)
    for group in range(use.shape[1]):
        by_use = torch.argsort(use[:, group], stable=True)
        order = by_use[torch.argsort(panels.dst[by_use], stable=True)]
        d = panels.dst[order]
        running = torch.cumsum(use[order, group], 0)
        starts = torch.ones_like(d, dtype=torch.bool)
        starts[1:] = d[1:] != d[:-1]
        before = torch.where(starts, running - use[order, group], torch.zeros_like(running))
        within = running - torch.cummax(before, 0).values
        keep[order, group] = used[d, group] + within <= 0.5
    return (keep | done[panels.dst]) & panels.groups


def _halve(integrand: Integrand, panels: _Panels, groups: Tensor, s0: Tensor, s1: Tensor, chunk: int) -> _Panels:
    """Two halves, in t, of every panel that is still open for some group."""
    rows = groups.any(-1).nonzero()[:, 0]
    dst, low, high, groups = panels.dst[rows], panels.low[rows], panels.high[rows], groups[rows]
    if not len(rows):
        empty = panels.scalar_low[:0]
        return _Panels(dst, low, high, empty, empty, groups)
    middle = 0.5 * (low + high)
    scalar = _scalars(integrand, dst, unstretch(middle, s0[dst], s1[dst]), chunk)
    return _Panels(
        torch.cat([dst, dst]),
        torch.cat([low, middle]),
        torch.cat([middle, high]),
        torch.cat([panels.scalar_low[rows], scalar]),
        torch.cat([scalar, panels.scalar_high[rows]]),
        torch.cat([groups, groups]),
    )
