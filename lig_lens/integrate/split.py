"""Panels under work, and how one becomes several."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lig_lens.integrate import cuts
from lig_lens.integrate.rules import SHORT, Rule
from lig_lens.integrate.stretch import unstretch

# Points of a path that are so few steps of the dtype apart are not told apart.
_FLOATS = 4.0
# Gauss's rule misses at most this share of a panel's length times an integrand's jump; and all jumps in a panel that it
# is not cut at may together miss this share of what is allowed, divided by the cell's open panels.
_MISSED, _OF_ALLOWED = 0.1, 0.25


@runtime_checkable
class Integrand(Protocol):
    """What an engine provides: scalars and their gradient parts at given points of the paths.

    Everything handed over is on the CPU, so that engines can plan their work without waiting for a device; what
    they give back is on theirs.
    """

    n_dst: int
    n_groups: int
    n_parts: int
    dtype: torch.dtype
    device: torch.device
    chunk: int

    def scalars(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item group"]:
        """L at `a` on the path of destination number `dst`."""

    def sums(
        self,
        dst: Int[Tensor, "panel"],
        a: Float[Tensor, "panel node"],
        factors: Float[Tensor, "panel node column"],
        groups: Bool[Tensor, "panel group"],
    ) -> Float[Tensor, "column panel group part"]:
        """Parts `<x_i - x0_i, dL/dx_i>` at the nodes, times `factors`, added up over nodes.

        Groups that are not asked for may hold any finite number.
        """

    def switches(self) -> bool:
        """Whether the model may switch on the way."""

    def margins(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item unit"]:
        """Numbers that change their sign where the model switches; of `chunk` points at most."""


@dataclass
class OpenPanels:
    """Panels under work: one row each, with the groups it is still open for.

    On the CPU, but for what a panel that nodes are to be added to already has, see `rules.Asked`.
    """

    dst: Tensor  # [panel]
    low: Tensor  # [panel] in t
    high: Tensor
    scalar_low: Tensor  # [panel group] L at the ends
    scalar_high: Tensor
    groups: Tensor  # bool [panel group]
    rule: Rule = field(default=SHORT, kw_only=True)
    gauss: Tensor | None = field(default=None, kw_only=True)
    kronrod: Tensor | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.dst)

    def only(self, groups: Tensor) -> "OpenPanels":
        """The panels that are open for any of `groups`."""
        rows = groups.any(-1).nonzero()[:, 0]
        kept = [x[rows] for x in (self.dst, self.low, self.high, self.scalar_low, self.scalar_high, groups)]
        return OpenPanels(*kept)


def scalars_of(integrand: Integrand, dst: Tensor, a: Tensor) -> Tensor:
    """`integrand.scalars`, brought to the CPU."""
    return integrand.scalars(dst, a).cpu().double()


def split(
    integrand: Integrand,
    opened: list[OpenPanels],
    s0: Tensor,
    s1: Tensor,
    noise: Tensor,
    allowed: Tensor,
    spare: Tensor,
) -> tuple[list[OpenPanels], Tensor, Tensor]:
    """Every panel in pieces, in t: cut where something switches, if that is known, and else in the middle.

    Args:
        integrand: what is integrated.
        opened: the panels.
        s0: widths of the layers.
        s1: the same at the other end.
        noise: change of each scalar that rounding alone can cause.
        allowed: what a cell may miss [dst group].
        spare: how many more pieces than two for each panel a cell can pay for [dst group].

    Returns:
        the pieces, how far each cell's L jumps at the cuts [dst group], and how many pieces more than two for each
        panel its panels are now.
    """
    names = ("dst", "low", "high", "scalar_low", "scalar_high", "groups")
    p = OpenPanels(*(torch.cat([getattr(one, name) for one in opened]) for name in names))
    jumped, more = torch.zeros_like(noise), torch.zeros_like(spare)
    if not len(p):
        return [], jumped, more
    cut = _cuts(integrand, p, s0, s1, noise, allowed, spare)
    p, width = cut.panels, cut.panels.high - cut.panels.low
    before, after = (p.low[cut.row] + width[cut.row] * x for x in (cut.at - cut.around, cut.at + cut.around))
    # A place that switches has two sides, any other point one.
    two = (cut.around > 0).nonzero()[:, 0]
    dst = p.dst[cut.row]
    points, own = torch.cat([before, after[two]]), torch.cat([dst, dst[two]])
    scalars = scalars_of(integrand, own, unstretch(points, s0[own], s1[own]))
    left, right = scalars[: len(dst)], scalars[: len(dst)].clone()
    right[two] = scalars[len(dst) :]
    groups = p.groups[cut.row]
    jump = (right - left).abs() * groups
    jumped.index_add_(0, dst, torch.where(jump > noise[dst], jump, 0.0))
    more.index_add_(0, dst, groups.long())
    more.index_add_(0, p.dst, -p.groups.long())
    # A panel's pieces start where it starts and behind its cuts, and end before them and where it ends.
    every = torch.arange(len(p))
    row = torch.cat([every, cut.row])
    place = torch.cat([torch.full_like(p.low, -1.0), cut.at])
    starts = _by_row(row, place)
    ends = _by_row(torch.cat([cut.row, every]), torch.cat([cut.at, torch.full_like(p.low, 2.0)]))
    own = row[starts]
    return (
        [
            OpenPanels(
                p.dst[own],
                torch.cat([p.low, after])[starts],
                torch.cat([before, p.high])[ends],
                torch.cat([p.scalar_low, right])[starts],
                torch.cat([left, p.scalar_high])[ends],
                p.groups[own],
            )
        ],
        jumped,
        more,
    )


def _by_row(row: Tensor, place: Tensor) -> Tensor:
    """Order by row, and by place where that is the same."""
    by_place = torch.argsort(place)
    return by_place[torch.argsort(row[by_place], stable=True)]


@dataclass(frozen=True)
class _Cuts:
    """Points where panels are cut, at least one for each, and how much around them is left out, in shares of panels."""

    panels: OpenPanels
    row: Tensor
    at: Tensor
    around: Tensor


def _cuts(
    integrand: Integrand,
    p: OpenPanels,
    s0: Tensor,
    s1: Tensor,
    noise: Tensor,
    allowed: Tensor,
    spare: Tensor,
) -> _Cuts:
    """Where to cut, group by group where something switches that matters to them."""
    in_halves = _Cuts(p, torch.arange(len(p)), torch.full_like(p.low, 0.5), torch.zeros_like(p.low))
    if not integrand.switches():
        return in_halves
    count = torch.zeros_like(spare).index_add_(0, p.dst, p.groups.long())[p.dst].clamp(min=1)
    share = spare[p.dst] // count
    # Where there are more places than pieces that can be paid for, looking for them is in vain.
    most = share.amax(-1).clamp(max=cuts.MANY)
    worth = (most > 0).nonzero()[:, 0]
    if not len(worth):
        return in_halves
    found = []
    for rows in torch.split(worth, integrand.chunk):

        def at(index: Tensor, x: Tensor, rows: Tensor = rows) -> tuple[Tensor, Tensor]:
            row = rows[index]
            own = p.dst[row]
            return own, unstretch(torch.lerp(p.low[row], p.high[row], x), s0[own], s1[own])

        def margins(index: Tensor, x: Tensor, at: Callable[..., tuple[Tensor, Tensor]] = at) -> Tensor:
            portions = zip(*(torch.split(one, integrand.chunk) for one in at(index, x)), strict=True)
            return torch.cat([integrand.margins(dst, a) for dst, a in portions])

        def scalars(index: Tensor, x: Tensor, at: Callable[..., tuple[Tensor, Tensor]] = at) -> Tensor:
            return scalars_of(integrand, *at(index, x))

        first, last = (at(torch.arange(len(rows)), torch.full((len(rows),), end).double())[1] for end in (0, 1))
        resolution = _FLOATS * torch.finfo(integrand.dtype).eps * last / (last - first)
        one = cuts.places(margins, scalars, noise[p.dst[rows]], resolution, most[rows])
        found.append((rows[one.panel], one.at, one.around, one.weight))
    row, place, around, weight = (torch.cat(one) for one in zip(*found, strict=True))
    weight *= p.groups[row]
    # Of each panel and group the weightiest, as many as can be paid for.
    share = 1 + share
    group, number = (weight > 0).T.nonzero(as_tuple=True)
    pair, weights = group * len(p) + row[number], weight[number, group]
    order = _by_row(pair, -weights)
    pair, number = pair[order], number[order]
    new = torch.ones_like(pair, dtype=torch.bool)
    new[1:] = pair[1:] != pair[:-1]
    first = torch.cummax(torch.where(new, torch.arange(len(pair)), 0), 0).values
    rank = torch.arange(len(pair)) - first
    # Those left out lie in pieces that get shorter with every cut.
    weights = weights[order]
    before = torch.cumsum(weights, 0) - weights
    whole = torch.zeros(len(p) * p.groups.shape[1], dtype=weights.dtype).index_add_(0, pair, weights)
    left_out = whole[pair] - (before - before[first])
    matters = _MISSED * left_out / (rank + 1) > (_OF_ALLOWED * allowed[p.dst] / count).T.flatten()[pair]
    taken = (rank == 0) | (matters & (rank < share.T.flatten()[pair]))
    pair, number = pair[taken], number[taken]
    # Groups with cuts of their own are panels of their own; one group after the other, as engines work.
    pairs, index = torch.unique(pair, return_inverse=True)
    group, own = pairs // len(p), pairs % len(p)
    alone = torch.nn.functional.one_hot(group, p.groups.shape[1]) > 0
    shared = p.groups.clone()
    shared[own, group] = False
    rest = p.only(shared)
    names = ("dst", "low", "high", "scalar_low", "scalar_high")
    dst, low, high, scalar_low, scalar_high = (
        torch.cat([getattr(rest, name), getattr(p, name)[own]]) for name in names
    )
    panels = OpenPanels(dst, low, high, scalar_low, scalar_high, torch.cat([rest.groups, alone]))
    middles = torch.full_like(rest.low, 0.5)
    return _Cuts(
        panels,
        torch.cat([torch.arange(len(rest)), len(rest) + index]),
        torch.cat([middles, place[number]]),
        torch.cat([torch.zeros_like(middles), around[number]]),
    )
