"""Where to cut a panel whose integrand may jump: at a place where the model switches.

Where a ReLU or a clamp switches on a path, L has a kink and its gradient jumps; where a router chooses other experts, L
itself jumps. Gauss's rule on a panel with such a place misses in proportion to the panel's length, so that halving
gains one bit at a time. Cut there, both sides are smooth. A forward pass at both ends of a panel tells what switches in
between (`models/switches.py`), and a few more, each at one point, where.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Places so near an end of a panel are cut already.
_AT_END = 1e-5
# Steps of the search for a place; it gains digits faster and faster.
_STEPS = 12

Margins = Callable[[Int[Tensor, "item"], Float[Tensor, "item"]], Float[Tensor, "item unit"]]
"""What changes its sign where the model switches, at shares of the length of these panels."""


@dataclass(frozen=True)
class Places:
    """Where panels are to be cut, in shares of their length, and whether something switches there."""

    at: Float[Tensor, "panel"]
    found: Bool[Tensor, "panel"]


def places(n_panels: int, margins: Margins, wanted: Float[Tensor, "panel"], resolution: Float[Tensor, "panel"]) -> Places:
    """The place in each panel where something switches that is nearest to where it is wanted.

    Args:
        n_panels: how many there are.
        margins: see there; asked for points of few panels at a time.
        wanted: in shares of a panel.
        resolution: the smallest share of a panel that the dtype can tell from none.
    """
    every = torch.arange(n_panels)
    zero = torch.zeros(n_panels, dtype=torch.float64)
    first, last = margins(every, zero), margins(every, zero + 1)
    switched = (first > 0) != (last > 0)
    share = torch.where(switched, first / (first - last), 0.5).double()
    switched &= (share > _AT_END) & (share < 1 - _AT_END)
    away = torch.where(switched, (share - wanted.to(share)[:, None]).abs(), torch.inf)
    unit = away.argmin(-1)
    found = switched.gather(-1, unit[:, None])[:, 0].cpu()
    at = zero + 0.5
    rows = found.nonzero()[:, 0]
    if len(rows):
        pick = unit[rows.to(unit.device)][:, None]
        ends = [one[rows.to(one.device)].gather(-1, pick)[:, 0].cpu().double().numpy() for one in (first, last)]

        def margin(chosen: np.ndarray, x: np.ndarray) -> np.ndarray:
            own = torch.from_numpy(chosen)
            values = margins(rows[own], torch.from_numpy(x))
            return values.gather(-1, pick[own.to(pick.device)])[:, 0].cpu().double().numpy()

        at[rows] = torch.from_numpy(_root(margin, *ends, resolution[rows].numpy()))
    return Places(at, found)


def _root(
    value: Callable[[np.ndarray, np.ndarray], np.ndarray], first: np.ndarray, last: np.ndarray, resolution: np.ndarray
) -> np.ndarray:
    """Roots in [0, 1] of functions with these values at 0 and 1, by the Illinois method."""
    low, high = np.zeros_like(first), np.ones_like(first)
    first, last = first.copy(), last.copy()
    at = first / (first - last)
    side = np.zeros(len(at))
    active = np.arange(len(at))
    for _ in range(_STEPS):
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
        active = active[(np.abs(at[active] - before) > 0.5 * resolution[active]) & (now != 0)]
        if not len(active):
            break
    return at
