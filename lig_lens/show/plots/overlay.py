"""Panels over an image whose patches they are of."""

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lig_lens.errors import InputError
from lig_lens.inputs.pictures import picture_of, picture_uri, pixels_of
from lig_lens.names import patch_place
from lig_lens.show.plots.matrix import Axis, Heatmap, Values, draw
from lig_lens.show.plots.style import DIVERGING, token_label

_WIDE, _LARGE = 980, 420  # pixels: of a row of panels at most, and of one panel
_SHARP = 400  # pixels up to which an image's own are repeated: browsers blur what they enlarge
_KEPT = 0.5  # of an image's contrast below contributions, which have the colours
_SOLID = 0.9  # opacity of the strongest contribution


@dataclass(frozen=True)
class Grid:
    """Which positions are patches, row by row, and which are not."""

    tokens: Sequence[str]
    shape: tuple[int, int]
    patches: list[int]
    rest: list[int]

    def spread(self, sources: Float[Tensor, "src"]) -> Values:
        """Patches of all positions, by row and column."""
        spread: Values = sources[self.patches].reshape(self.shape).double().numpy()
        return spread

    def sums(self, sources: Float[Tensor, "src"], write: Callable[[float], str]) -> str:
        """What all patches contribute, and what other positions do, in words."""
        listed = [(token_label(self.tokens[at], True), float(sources[at])) for at in self.rest]
        if len(listed) > 2:  # registers
            listed = [listed[0], (f"{len(listed) - 1} others", sum(value for _, value in listed[1:]))]
        listed.insert(0, ("patches", float(sources[self.patches].sum())))
        return ", ".join(f"{name} {write(value)}" for name, value in listed)


def grid_of(call: str, tokens: Sequence[str], what: str, remedy: str) -> Grid:
    """Rows and columns of the patches among some tokens.

    Args:
        call: who asks, for messages.
        tokens: of all positions.
        what: they are those of, a Flow say.
        remedy: what draws tokens that are no patches.

    Raises:
        InputError: they are no patches of one image.
    """
    places = [patch_place(token) for token in tokens]
    patches = [at for at, place in enumerate(places) if place is not None]
    rows, columns = (max((place[axis] for place in places if place is not None), default=-1) + 1 for axis in (0, 1))
    if not patches or [places[at] for at in patches] != list(itertools.product(range(rows), range(columns))):
        raise InputError(
            f"{call}: the positions of this {what}, {list(tokens[:4])} …, are no patches of an image: use {remedy}."
        )
    return Grid(tokens, (rows, columns), patches, [at for at, place in enumerate(places) if place is None])


def background_of(
    call: str, settings: Mapping[str, Any], what: str, image: Any
) -> UInt8[Tensor, "channel height width"] | None:
    """The image that is given, or else the one that the settings of a result keep; None where there is none.

    Raises:
        InputError: one that cannot be drawn.
    """
    if image is not None:
        return _given(call, image)
    kept = settings.get("pixels")
    picture = kept.get("image") if isinstance(kept, dict) else None
    try:
        return pixels_of(picture) if isinstance(picture, str) else None
    except ValueError as error:
        raise InputError(f"{call}: the image in this {what} is damaged, {error}: give it as image=.") from error


def _given(call: str, image: Any) -> UInt8[Tensor, "channel height width"]:
    """An image of Pillow, bytes, or floats, the smallest of which is shown black and the largest white."""
    remedy = "give one of Pillow, or an array [channel, height, width] with one channel or three, without NaN"
    pillow = sys.modules.get("PIL.Image")
    if pillow is not None and isinstance(image, pillow.Image):
        image = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    try:
        values = image if isinstance(image, Tensor) else torch.as_tensor(np.array(image))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{call}: image is of type {type(image).__name__}: {remedy}.") from error
    values = values[0] if values.ndim == 4 and len(values) == 1 else values
    if values.ndim != 3 or len(values) not in (1, 3) or not values.numel() or not bool(values.isfinite().all()):
        raise InputError(f"{call}: image has shape {list(values.shape)}: {remedy}.")
    return values.cpu() if values.dtype == torch.uint8 else pixels_of(str(picture_of(values)))


def over_image(
    panels: Sequence[Heatmap],
    grid: Grid,
    background: UInt8[Tensor, "channel height width"] | None,
    heading: str,
    facts: Sequence[str],
) -> go.Figure:
    """Draw panels over an image, after the image itself where there is one."""
    if background is not None:
        panels = [Heatmap(np.full(grid.shape, np.nan), panels[0].scale, caption="the image"), *panels]
    rows, columns = grid.shape
    n_columns = min(len(panels), 4)
    side = min(_LARGE, _WIDE / n_columns) / max(rows, columns)
    figure = draw(
        panels,
        Axis("row", [str(row) for row in range(rows)], "row"),
        Axis("column", [str(column) for column in range(columns)], "column"),
        heading,
        facts,
        n_columns=n_columns,
        cell=(side, side),
    )
    figure.update_traces(xgap=0, ygap=0)
    if background is None:
        return figure
    figure.for_each_coloraxis(lambda axis: axis.update(colorscale=_see_through()))
    times = max(1, _SHARP // max(background.shape[1:]))
    large = background.repeat_interleave(times, 1).repeat_interleave(times, 2)
    picture, faded = picture_uri(large), picture_uri(_faded(large))
    for number, trace in enumerate(figure.data):
        figure.add_layout_image(
            source=faded if number else picture,
            xref=trace.xaxis or "x",
            yref=trace.yaxis or "y",
            x=-0.5,
            y=-0.5,
            sizex=columns,
            sizey=rows,
            sizing="stretch",
            layer="below",
        )
    return figure


def _faded(image: UInt8[Tensor, "channel height width"]) -> UInt8[Tensor, "1 height width"]:
    """An image in pale grey."""
    weights = torch.tensor([0.299, 0.587, 0.114]) if len(image) == 3 else torch.ones(1)
    grey = (weights[:, None, None] * image).sum(0, keepdim=True)
    return (255 - _KEPT * (255 - grey)).round().to(torch.uint8)


def _see_through() -> list[tuple[float, str]]:
    """The diverging colours, clear in the middle and more solid towards the ends."""
    middle = (len(DIVERGING) - 1) / 2
    scale = []
    for number, colour in enumerate(DIVERGING):
        red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
        opacity = _SOLID * (abs(number - middle) / middle) ** 0.7
        scale.append((number / (2 * middle), f"rgba({red},{green},{blue},{opacity:.2f})"))
    return scale
