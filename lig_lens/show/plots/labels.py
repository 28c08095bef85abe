"""Names beside the dots of a scatter plot, each where it covers nothing that matters."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lig_lens.show.plots.style import LETTER

Points = NDArray[np.float64]  # in pixels, [point, x and y], upwards

_HEIGHT, _AWAY = 13.0, 5.0  # pixels: height of a line, from a dot's centre to its name
_RADIUS = 3.5  # of a dot
# Where a name may stand, most legible first: plotly's word, and where its box's centre is, in half sizes of the box.
_SIDES = {
    "middle right": (1, 0),
    "middle left": (-1, 0),
    "top center": (0, 1),
    "bottom center": (0, -1),
    "top right": (1, 1),
    "top left": (-1, 1),
    "bottom right": (1, -1),
    "bottom left": (-1, -1),
}


@dataclass(frozen=True)
class _Box:
    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: "_Box") -> bool:
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )

    def holds_any(self, points: Points, radius: float = 0.0) -> bool:
        x, y = points.T
        across = (x > self.left - radius) & (x < self.right + radius)
        return bool((across & (y > self.bottom - radius) & (y < self.top + radius)).any())


def place_names(
    points: Points, names: Sequence[str], wanted: Sequence[int], count: int, line: Points, size: tuple[float, float]
) -> dict[int, str]:
    """Choose where names stand: inside the plot, and on no dot, no other name and not on the line.

    A dot that has no such place gets no name, and the next one has its turn.

    Args:
        points: all dots.
        names: of all dots, as they are shown.
        wanted: dots to name, the most important first.
        count: names to place at most.
        line: points along a line, as close as a name is high; empty where there is none.
        size: width and height within which names stay, from the lower left corner of the plot.

    Returns:
        plotly's `textposition` of each dot that is named.
    """
    found: dict[int, str] = {}
    taken: list[_Box] = []
    for place in wanted:
        if len(found) == count:
            break
        for side, at in _SIDES.items():
            box = _box(points[place], len(names[place]), at)
            inside = box.left > 0 and box.bottom > 0 and box.right < size[0] and box.top < size[1]
            on_dots = box.holds_any(points, _RADIUS) or box.holds_any(line)
            covers = on_dots or any(box.overlaps(other) for other in taken)
            if inside and not covers:
                found[place] = side
                taken.append(box)
                break
    return found


def _box(point: Points, n_letters: int, at: tuple[int, int]) -> _Box:
    """What a name covers on one side of its dot."""
    half_width, half_height = LETTER * n_letters / 2, _HEIGHT / 2
    x = float(point[0]) + at[0] * (half_width + _AWAY)
    y = float(point[1]) + at[1] * (half_height + _AWAY)
    return _Box(x - half_width, y - half_height, x + half_width, y + half_height)
