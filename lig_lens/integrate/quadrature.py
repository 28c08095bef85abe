"""Integrals along paths: where nodes go, and when they are enough.

A *cell* is one integral whose completeness can be checked: a destination, or a destination and a head. Its
integrand has several *parts* (source tokens, or heads, skip and bias) that share the path, and for each cell
the sum of the parts is the derivative of a known scalar L along the path. So every panel [a, b] of the rule
comes with its own error estimate for free: how far the sum of its parts is from L(b) - L(a). Errors of single
parts can cancel in that sum, so each part is also asked how much of it lies in the highest Legendre modes
that the nodes resolve (`rules.py`). Panels are split where either is too large, and only for the cells that still
need it: where the model switches, if it does (`split.py`), and else in the middle.

Norms put boundary layers at the ends of a path: `LN(a x)` jumps from 0 to its final value within
a ~ sqrt(eps / var(x)). Panels are therefore laid out, and halved, in a stretched variable t with

    t(a) = asinh(a / s0) - asinh((1 - a) / s1),

in which layers of width s0 at a = 0 and s1 at a = 1 are of order one, and which is nearly linear for s ~ 1.
Gauss-Legendre nodes leave out the end points, where the gradient of a norm does not exist.

Where nodes go and which panels to halve is worked out in float64 on the CPU, since not every device has float64;
only the integrand's values live on the model's device.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lig_lens.integrate.rules import ADDED, NODES_PER_PANEL, SHORT, Asked, Found, Rule, long_rule
from lig_lens.integrate.split import Integrand, OpenPanels, scalars_of, split
from lig_lens.integrate.stretch import density, stretch, unstretch

# Length in t of the panels that a path starts with.
PANEL_LENGTH = 4.0
# Most nodes of a rule for a whole panel: beyond, halves do with fewer.
_LONGEST = 64
# Most numbers that its sums over nodes may be.
_MOST_NUMBERS = 2**25
_NARROWEST = 1e-18
# Layers that are as narrow as this may have others inside, and where parts are looked at there, in units of the width.
_NARROW = 0.1
_LADDER = (1e-2, 10**-3.5, 1e-5, 10**-6.5)
# A change is resolved where rounding is at most this share of it.
RESOLVED = 1e-3


@dataclass(frozen=True)
class Integral:
    """Integrated parts with their error.

    `gap` adds the panels' gaps up without letting them cancel, so the plain completeness gap
    |sum of parts - total| is never larger (beyond rounding). It is relative to `scale`: |total|, or, where a cell moves
    by little more than rounding, the smallest change of which `RESOLVED` can be told. `error` estimates how far the
    worst part is off, relative to the cell's largest part, or to that change. A cell has converged when both are within
    the tolerance. Neither is measured in units of the tolerance, so that asking for more does not make them smaller.
    """

    parts: Float[Tensor, "dst group part"]
    total: Float[Tensor, "dst group"]
    gap: Float[Tensor, "dst group"]
    error: Float[Tensor, "dst group"]
    converged: Bool[Tensor, "dst group"]
    nodes: Int[Tensor, "dst group"]
    scale: Float[Tensor, "dst group"]
    jumped: Float[Tensor, "dst group"]
    """What of the gap is jumps of L itself, which belong to no integral."""
    needed: Float[Tensor, "dst group"]
    """How many nodes each cell would have needed had they been placed at once, as the first panels saw it."""


def integrate(
    integrand: Integrand,
    s0: Float[Tensor, "dst"],
    s1: Float[Tensor, "dst"],
    noise: Float[Tensor, "dst group"],
    *,
    tol: float,
    max_nodes: int,
    all_layers_known: bool = False,
    first_nodes: int | None = None,
) -> Integral:
    """Integrate every cell to `tol`, or until `max_nodes` nodes are spent on it.

    Args:
        integrand: scalars and parts along the paths.
        s0: width of the boundary layer at a = 0, per destination, in (0, 1].
        s1: the same at a = 1.
        noise: change of each scalar that rounding alone can cause; gaps below it are not refined.
        tol: largest gap relative to the cell's total.
        max_nodes: budget of nodes per cell; the first panels are evaluated in any case.
        all_layers_known: whether `s0` is sure to be as narrow as anything that happens at a = 0.
        first_nodes: how many nodes a path is thought to need, if that is known; a wrong guess costs time alone.
    """
    n_dst = integrand.n_dst
    s0, s1 = (side.cpu().double().clamp(_NARROWEST, 1.0) for side in (s0, s1))
    tiny = torch.finfo(torch.float32).tiny
    needed: Tensor | None = None
    noise = noise.cpu().double().clamp(min=tiny)
    looked_at = (s0 < _NARROW) & (not all_layers_known)
    s0 = _narrowed(integrand, s0, looked_at.nonzero()[:, 0], tol, noise)
    panels, total = _first_panels(integrand, s0, s1, first_nodes, max_nodes)
    allowed = torch.maximum(tol * total.abs(), noise)
    shape = (n_dst, integrand.n_groups, integrand.n_parts)
    parts = torch.zeros(shape, dtype=integrand.dtype, device=integrand.device)
    gaps, errors, largest, jumped = (torch.zeros_like(total) for _ in range(4))
    spent = torch.zeros_like(total, dtype=torch.long)
    # Nodes are charged when they are planned, so that what waits cannot overdraw a cell.
    spent.index_add_(0, panels.dst, len(panels.rule) * panels.groups.long())
    spent += len(_LADDER) * looked_at[:, None]
    work = [panels]
    while work:
        found = [_evaluate(integrand, p, s0, s1, noise) for p in work]
        owners = [p.dst.to(integrand.device) for p in work]
        now = parts.clone()
        for p, v, owner in zip(work, found, owners, strict=True):
            now.index_add_(0, owner, v.integral * p.groups[..., None].to(owner.device))
        largest = now.abs().amax(-1).cpu().double()
        bound = torch.maximum(tol * largest, noise)
        dst, groups = torch.cat([p.dst for p in work]), torch.cat([p.groups for p in work])
        gap, error, after = (torch.cat([getattr(v, name) for v in found]) for name in ("gap", "error", "error_after"))
        # In units of what the cell may miss. A gap within rounding would not shrink by halving.
        use = torch.where(gap > noise[dst], gap / allowed[dst], 0.0)
        use = torch.maximum(use, error / bound[dst])
        used = torch.maximum(torch.where(gaps > noise, gaps / allowed, 0.0), errors / bound)
        keep = _choose(dst, groups, use, used)
        if needed is None:
            needed = _needed(spent, torch.zeros_like(total).index_add_(0, dst, use), tol)
        extend = groups & ~keep & (after / bound[dst] <= 0.5)
        planned = torch.where(extend, len(ADDED), 2 * NODES_PER_PANEL) * (groups & ~keep)
        cost = torch.zeros_like(spent).index_add_(0, dst, planned)
        # A cell that cannot pay for what is open is left as it is.
        broke = spent + cost > max_nodes
        keep |= broke[dst] & groups
        spent += torch.where(broke, 0, cost)
        gaps.index_add_(0, dst, gap * keep)
        errors.index_add_(0, dst, error * keep)
        missed, extended, row = [], [], 0
        for p, v, owner in zip(work, found, owners, strict=True):
            own = slice(row, row + len(p))
            row += len(p)
            parts.index_add_(0, owner, v.integral * keep[own, :, None].to(owner.device))
            unfinished = p.groups & ~keep[own]
            missed.append(p.only(unfinished & ~extend[own]))
            extended += _extend(p, unfinished & extend[own], v)
        spare = (max_nodes - spent).clamp(min=0) // NODES_PER_PANEL
        pieces, jumps, more = split(integrand, missed, s0, s1, noise, allowed, spare)
        jumped += jumps
        spent += NODES_PER_PANEL * more
        work = pieces + extended
    assert needed is not None
    # A gap relative to what rounding hides would be meaningless.
    scale = torch.maximum(total.abs(), noise / RESOLVED)
    gap, error = (gaps + jumped) / scale, errors / torch.maximum(largest, noise / RESOLVED)
    converged = (gap <= tol) & (error <= tol)
    # Where nothing moves, what is left of the scalar is rounding.
    total = torch.where(total.abs() <= noise, 0.0, total)
    total, gap, error, scale, jumped = (one.to(parts) for one in (total, gap, error, scale, jumped / scale))
    return Integral(parts, total, gap, error, converged.to(parts.device), spent, scale, jumped, needed.to(parts))


def _needed(spent: Tensor, use: Tensor, tol: float) -> Tensor:
    """How many nodes a rule needs whose errors fall off geometrically with them.

    Args:
        spent: how many it had.
        use: its error with them, in units of `tol`.
        tol: the tolerance.
    """
    # Where errors are as large as what is integrated, nodes say nothing of how many are needed.
    missed = (use * tol).clamp(min=_NARROWEST, max=0.5)
    return spent * math.log(min(tol, 0.5)) / missed.log()


def _narrowed(integrand: Integrand, s0: Tensor, narrow: Tensor, tol: float, noise: Tensor) -> Tensor:
    """Widths of the layers at a = 0, made smaller where something still happens far inside of them.

    A norm that follows another one has a layer within that one's. Nodes that do not know of it step over it, sums of
    parts need not change there, and so neither gap nor error would show it. Parts are therefore looked at on a ladder
    that leads down to a = 0: where nothing happens they stay what they are. (Near a = 1 single precision has no such
    points; paths that end at vectors near 0 are rare.)

    Args:
        integrand: the parts.
        s0: the widths.
        narrow: the destinations to look at.
        tol: how much may be missed, relative to the total.
        noise: what rounding alone can do.
    """
    if not len(narrow):
        return s0
    a = s0[narrow, None] * torch.tensor(_LADDER, dtype=torch.float64)
    # By how much parts differ between two rungs, times the upper one: how much may lie between.
    factors = torch.zeros(*a.shape, a.shape[1] - 1, dtype=torch.float64)
    for rung in range(a.shape[1] - 1):
        factors[:, rung, rung], factors[:, rung + 1, rung] = -a[:, rung], a[:, rung]
    groups = torch.ones(len(narrow), integrand.n_groups, dtype=torch.bool)
    between = integrand.sums(narrow, a, factors, groups).abs().amax(-1).cpu().double()
    total = scalars_of(integrand, narrow, torch.ones_like(s0[narrow])).abs()
    hides = (between > torch.maximum(tol * total, noise[narrow])).any(-1).T  # dst rung
    deepest = torch.where(hides, a[:, 1:], torch.inf).amin(-1)
    s0 = s0.clone()
    s0[narrow] = torch.minimum(s0[narrow], deepest)
    return s0


def _first_rule(integrand: Integrand, nodes: int | None, n_panels: int, max_nodes: int) -> Rule:
    """The long rule with as many nodes as are thought to be needed, where it is of use; else the short one.

    Args:
        integrand: where it switches, a long rule would have to be cut.
        nodes: how many, if that is known.
        n_panels: of the path that has most; parts of a path need fewer.
        max_nodes: enough has to be left to go on with, should they be too few.
    """
    each = min(nodes or 0, _LONGEST)
    if each <= NODES_PER_PANEL or n_panels > 1 or 4 * each > max_nodes or integrand.switches():
        return SHORT
    rule = long_rule(each)
    # Its many sums are held at once.
    numbers = rule.factors.shape[1] * integrand.n_dst * integrand.n_groups * integrand.n_parts
    return rule if numbers <= _MOST_NUMBERS else SHORT


def _first_panels(
    integrand: Integrand, s0: Tensor, s1: Tensor, nodes: int | None, max_nodes: int
) -> tuple[OpenPanels, Tensor]:
    """Panels of about `PANEL_LENGTH` in t over the whole path of each destination, and the totals."""
    zero, one = torch.zeros_like(s0), torch.ones_like(s0)
    start, end = stretch(zero, s0, s1), stretch(one, s0, s1)
    counts = ((end - start) / PANEL_LENGTH).ceil().clamp(min=1).long()
    dst = torch.repeat_interleave(torch.arange(len(s0)), counts)
    first = torch.cumsum(counts, 0) - counts
    number = torch.arange(len(dst)) - first[dst]
    width = ((end - start) / counts)[dst]
    low, high = start[dst] + width * number, start[dst] + width * (number + 1)
    inner = (number > 0).nonzero()[:, 0]
    at = unstretch(low[inner], s0[dst[inner]], s1[dst[inner]])
    scalars = scalars_of(integrand, torch.cat([torch.arange(len(s0)), dst[inner]]), torch.cat([one, at]))
    total, between = scalars[: len(s0)], scalars[len(s0) :]
    scalar_low, scalar_high = torch.zeros_like(total)[dst], total[dst].clone()
    scalar_low[inner], scalar_high[inner - 1] = between, between
    groups = torch.ones(len(dst), total.shape[1], dtype=torch.bool)
    rule = _first_rule(integrand, nodes, int(counts.max()), max_nodes)
    return OpenPanels(dst, low, high, scalar_low, scalar_high, groups, rule=rule), total


def _evaluate(integrand: Integrand, panels: OpenPanels, s0: Tensor, s1: Tensor, noise: Tensor) -> Found:
    """Parts of every panel, the gap of their sum, and the estimated error of the worst one."""
    rule, width = panels.rule, panels.high - panels.low
    t = panels.low[:, None] + width[:, None] * rule.nodes
    ends = s0[panels.dst, None].expand_as(t), s1[panels.dst, None].expand_as(t)
    a = unstretch(t, *ends)
    factors = (density(a, *ends) * width[:, None])[..., None] * rule.factors
    sums = integrand.sums(panels.dst, a, factors, panels.groups)
    change = panels.scalar_high - panels.scalar_low
    noises = noise[panels.dst]
    return rule.judged(sums, Asked(change, noises, panels.groups, integrand.switches(), panels.gauss, panels.kronrod))


def _choose(dst: Tensor, groups: Tensor, use: Tensor, used: Tensor) -> Tensor:
    """Which panels to keep as they are, per group, given what share of its allowance each uses up.

    All panels of a cell if they fit into what is left; else those that use least, up to half of the allowance, so
    that something is left for the halves of the others.
    """
    panel, group = groups.nonzero(as_tuple=True)
    cell, use = dst[panel] * groups.shape[1] + group, use[panel, group].clamp(max=2.0)
    used = used.flatten()
    done = used + torch.zeros_like(used).index_add_(0, cell, use) <= 1
    # Cells one after the other, least use first: one running sum serves all of them.
    by_use = torch.argsort(use)
    order = by_use[torch.argsort(cell[by_use], stable=True)]
    cell, use = cell[order], use[order]
    before = torch.cumsum(use, 0) - use
    starts = torch.ones_like(cell, dtype=torch.bool)
    starts[1:] = cell[1:] != cell[:-1]
    before -= torch.cummax(torch.where(starts, before, 0.0), 0).values
    keep = torch.zeros_like(groups)
    keep[panel[order], group[order]] = (used[cell] + before + use <= 0.5) | done[cell]
    return keep


def _extend(panels: OpenPanels, groups: Tensor, values: Found) -> list[OpenPanels]:
    """The panels that are to get Kronrod's nodes, with what they have already."""
    if values.gauss is None or values.kronrod is None or not bool(groups.any()):
        return []
    rows = groups.any(-1).nonzero()[:, 0].to(values.gauss.device)
    return [replace(panels.only(groups), rule=ADDED, gauss=values.gauss[rows], kronrod=values.kronrod[rows])]
