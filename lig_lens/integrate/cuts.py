"""Where a panel is to be cut, because its integrand may jump: where the model switches.

Where a ReLU or a clamp switches on a path, L has a kink and its gradient jumps; where a router chooses other experts, L
itself jumps. Gauss's rule on a panel with such a place misses in proportion to the panel's length, so that halving
gains one bit at a time. Cut there, both sides are smooth. A forward pass at both ends of a panel tells what switches in
between (`models/switches.py`), and a few more, each at one point, where.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

# Places so near an end of a panel, or another place, are cut already.
_AT_END = 1e-5
# Steps of the search for a place, which gains digits faster and faster, and the step that is small enough to end it.
_STEPS, _EXACT = 12, 1e-9
# Of a panel with more places than that, none is looked for. Each that is found is looked at: how much L's slope changes
# from so far on the left to so far on the right of it.
MANY = 64
_ASIDE = 1 / 64
# L jumps where it changes within this share of a panel, and so many times faster than around.
_BESIDE, _STEEP = 1e-6, 10.0

Points = Callable[[Int[Tensor, "item"], Float[Tensor, "item"]], Tensor]
"""Something at points of panels: their numbers, and shares of their lengths."""


@dataclass(frozen=True)
class Place:
    """Places where something switches, one to a row."""

    panel: Int[Tensor, "place"]
    at: Float[Tensor, "place"]
    """Share of the panel."""
    around: Float[Tensor, "place"]
    """Where L itself jumps, how far to both sides of the place that is sure to be; else 0."""
    weight: Float[Tensor, "place group"]
    """By how much the slope of L, per panel, jumps there; 0 where it cannot be seen to."""


def places(
    margins: Points,
    scalars: Points,
    noise: Float[Tensor, "panel group"],
    resolution: Float[Tensor, "panel"],
    most: Int[Tensor, "panel"],
) -> Place:
    """Where something switches.

    Args:
        margins: numbers that change their sign where the model switches, [item unit].
        scalars: L, [item group].
        noise: what rounding does to that.
        resolution: smallest share of a panel that the dtype can tell from none.
        most: places that a panel may have for them to be looked for, `MANY` at most.
    """
    every, zero = torch.arange(len(noise)), torch.zeros(len(noise), dtype=torch.float64)
    first, last = margins(every, zero), margins(every, zero + 1)
    switched = (first > 0) != (last > 0)
    share = torch.where(switched, first / (first - last), 0.5)
    switched &= (share > _AT_END) & (share < 1 - _AT_END)
    switched &= (switched.sum(-1) <= most.to(switched.device))[:, None]
    panel, unit = switched.nonzero(as_tuple=True)
    ends = [one[panel, unit].cpu().double().numpy() for one in (first, last)]
    panel = panel.cpu()

    def margin(chosen: np.ndarray, x: np.ndarray) -> np.ndarray:
        own = torch.from_numpy(chosen)
        values = margins(panel[own], torch.from_numpy(x)).gather(-1, unit[own.to(unit.device)][:, None])[:, 0]
        found: np.ndarray = values.cpu().double().numpy()
        return found

    at = torch.from_numpy(_root(margin, *ends))
    inside = (at > _AT_END) & (at < 1 - _AT_END)
    panel, at = panel[inside], at[inside]
    # Two things may switch at once: one expert goes, another comes.
    order = torch.argsort(panel + at)
    panel, at = panel[order], at[order]
    other = torch.ones_like(panel, dtype=torch.bool)
    other[1:] = (panel + at).diff() > _AT_END
    panel, at = panel[other], at[other]
    if not len(panel):
        return Place(panel, at, at, noise[panel])
    aside = torch.minimum(torch.minimum(at, 1 - at), torch.tensor(_ASIDE, dtype=torch.float64))
    left, here, right = (scalars(panel, at + side * aside) for side in (-1, 0, 1))
    beside = torch.minimum(resolution[panel].clamp(min=_BESIDE), aside)
    # Where a router decides, scores may tie for a while, so a jump is looked for within some distance.
    jump = (scalars(panel, at + beside) - scalars(panel, at - beside)).abs()
    steep = jump > noise[panel] + _STEEP * (right - left).abs() * (beside / aside)[:, None]
    around = torch.where(steep.any(-1), beside, 0.0)
    bend = (left - 2 * here + right).abs()
    # Seen from closer by, it is smaller by as much.
    weight = torch.where(bend > noise[panel], bend / aside[:, None], 0.0)
    return Place(panel, at, around, weight)


def _root(value: Callable[[np.ndarray, np.ndarray], np.ndarray], first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Roots in [0, 1] of functions with these values at 0 and 1, by the Illinois method."""
    low, high = np.zeros_like(first), np.ones_like(first)
    first, last = first.copy(), last.copy()
    at: np.ndarray = first / (first - last)
    side = np.zeros(len(first))
    active = np.arange(len(at))
    for _ in range(_STEPS):
        if not len(active):
            break
        now = value(active, at[active])
        left = (now > 0) == (first[active] > 0)
        # An end that stays for the second time counts half, so that it moves as well.
        rows, others = active[left], active[~left]
        last[rows] *= np.where(side[rows] > 0, 0.5, 1.0)
        first[others] *= np.where(side[others] < 0, 0.5, 1.0)
        side[rows], side[others] = 1, -1
        low[rows], first[rows] = at[rows], now[left]
        high[others], last[others] = at[others], now[~left]
        before = at[active]
        at[active] = low[active] + (high - low)[active] * first[active] / (first - last)[active]
        active = active[(np.abs(at[active] - before) > _EXACT) & (now != 0)]
    return at
