"""Contributions of patches, laid over the image that they are patches of."""

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lig_lens.arguments import checked
from lig_lens.choose import Words, find_places, of_flow
from lig_lens.errors import InputError, check_choice
from lig_lens.flow.flow import Flow
from lig_lens.inputs.pictures import picture_of, picture_uri, pixels_of
from lig_lens.names import head_name, patch_place
from lig_lens.show.plots.facts import about, baselines, unit, worst_gap
from lig_lens.show.plots.matrix import Axis, Heatmap, Scale, Values, draw, signed_scale, strongest
from lig_lens.show.plots.style import DIVERGING, token_label
from lig_lens.show.text import signed_number, signed_percent

_WIDE, _LARGE = 980, 420  # pixels: of a row of panels at most, and of one panel
_SHARP = 400  # pixels up to which an image's own are repeated: browsers blur what they enlarge
_KEPT = 0.5  # of an image's contrast below contributions, which have the colours
_SOLID = 0.9  # opacity of the strongest contribution
_OUTPUTS = {"attn": "heads' outputs", "block": "block's output"}


@checked
def image_map(
    flow: Flow,
    layers: int | Sequence[int] | None = None,
    head: int | None = None,
    dst: int | None = None,
    map: str = "attn",
    scale: str | None = None,
    image: Any = None,
) -> go.Figure:
    """What patches of an image contribute, over the image: red what pushes up, blue what pushes down.

    The first panel is the image, and each other one is a layer. Contributions of special positions, such as [CLS], are
    on no patch: the captions give them, beside the sum of all patches.

    Args:
        flow: of an image.
        layers: block numbers, in the order to draw; all layers of the Flow by default.
        head: number of a head, for the attn map; by default all heads are added up.
        dst: position of the destination, negative ones count from the end; by default the first, [CLS], and with a
            metric all of them, with what bypasses the heads (`skip`) where no head is named: patches and special
            positions of a layer then add up to the metric's change.
        map: attn, block, or `rollout`: shares of the destination's vector behind the layer in the image's patches, by
            `Flow.rollout` from the Flow's first layer on.
        scale: `layer` gives every layer its own colours, `shared` all of them one scale. By default `shared` for a
            metric and for shares, whose unit all layers share, and `layer` otherwise.
        image: of Pillow, or an array [channel, height, width], of what the patches cover; by default the one that the
            Flow keeps. Without any the contributions stand alone.

    Raises:
        InputError: a Flow without patches, a map, layer, head or destination that it does not have, or an image that
            cannot be drawn.

    Warns:
        CancellationWarning, CollapseWarning: with `rollout`, as that does.
    """
    check_choice("map", map, ("attn", "block", "rollout"))
    grid = _grid(flow)
    common = flow.metric is not None or map == "rollout"
    scale = ("shared" if common else "layer") if scale is None else scale
    check_choice("scale", scale, ("layer", "shared"))
    if head is not None and map != "attn":
        raise InputError(f"image_map: head={head} picks a head of the 'attn' map, not of {map!r}: leave it out.")
    asked = flow.layers if layers is None else (layers,) if isinstance(layers, int) else tuple(layers)
    places = find_places(asked, flow.layers, of_flow("layer"))
    shown = _Shown.of(flow, map, head, dst)
    found = [shown.sources(place) for place in places]
    values = [grid.spread(one) for one in found]
    scales = _scales(flow, map, scale, values)
    write = signed_percent if map == "rollout" else signed_number
    panels = [
        Heatmap(
            one,
            scales[number],
            hover=head_name(layer, head),
            value="share %{z:+.2%}" if map == "rollout" else "contribution %{z:+.4g}",
            caption=f"{head_name(layer, head)} · {grid.sums(flow, found[number], write)}",
        )
        for number, (layer, one) in enumerate(zip(asked, values, strict=True))
    ]
    background = _background(flow, image)
    if background is not None:
        panels.insert(0, Heatmap(np.full(grid.shape, np.nan), scales[0], caption="the image"))
    return _over_image(panels, grid, background, shown)


@dataclass(frozen=True)
class _Grid:
    """Which positions of a Flow are patches, row by row, and which are not."""

    shape: tuple[int, int]
    patches: list[int]
    rest: list[int]

    def spread(self, sources: Float[Tensor, "src"]) -> Values:
        """Patches of all positions, by row and column."""
        spread: Values = sources[self.patches].reshape(self.shape).double().numpy()
        return spread

    def sums(self, flow: Flow, sources: Float[Tensor, "src"], write: Callable[[float], str]) -> str:
        """What all patches contribute, and what other positions do, in words."""
        listed = [(token_label(flow.tokens[at], True), float(sources[at])) for at in self.rest]
        if len(listed) > 2:  # registers
            listed = [listed[0], (f"{len(listed) - 1} others", sum(value for _, value in listed[1:]))]
        listed.insert(0, ("patches", float(sources[self.patches].sum())))
        return ", ".join(f"{name} {write(value)}" for name, value in listed)


def _grid(flow: Flow) -> _Grid:
    """Rows and columns of a Flow's patches.

    Raises:
        InputError: it has none.
    """
    places = [patch_place(token) for token in flow.tokens]
    patches = [at for at, place in enumerate(places) if place is not None]
    rows, columns = (max((place[axis] for place in places if place is not None), default=-1) + 1 for axis in (0, 1))
    if not patches or [places[at] for at in patches] != list(itertools.product(range(rows), range(columns))):
        raise InputError(
            f"image_map: the positions of this Flow, {list(flow.tokens[:4])} …, are no patches of an image: use "
            "head_map."
        )
    return _Grid((rows, columns), patches, [at for at, place in enumerate(places) if place is None])


@dataclass(frozen=True)
class _Shown:
    """What of a Flow is drawn: for each layer one number for each source."""

    flow: Flow
    map: str
    head: int | None
    place: int | None  # on the dst axis; None adds all up
    heading: str
    facts: list[str]

    @classmethod
    def of(cls, flow: Flow, map: str, head: int | None, dst: int | None) -> "_Shown":
        maps = ("attn", "mlp") if map == "rollout" else (map,)
        for name in maps:
            flow.columns(name)  # raises what is to be said of a map that is missing
        if head is not None:
            find_places([head], range(flow.columns("attn").shape[1]), of_flow("head", "one"))
        place, whom = None, ""
        if flow.metric is None or dst is not None:
            n_pos = len(flow.tokens)
            words = Words(
                missing=f"image_map: dst={{number}} is outside the image's {n_pos} positions.", whole="image_map: dst"
            )
            (position,) = find_places([dst or 0], range(n_pos), words, from_end=True)
            (place,) = find_places([position], flow.destinations, of_flow("destination", "one"))
            whom = token_label(flow.tokens[position], flow.special[position])
        said = [] if map != "attn" else ["all heads added up" if head is None else f"head {head}"]
        if map == "rollout":
            heading, said = f"Which patches is the vector of {whom} made of?", ["rollout through all layers up to each"]
        elif flow.metric is not None:
            heading = "What each patch contributes to the metric" + (f" at {whom}" if whom else "")
            said[0] += ", and what bypasses them" if head is None and not whom else ""
        else:
            heading = f"What each patch contributes to the {_OUTPUTS[map]} at {whom}"
        facts = [*said, *about(flow), *baselines(flow, maps), worst_gap([flow], maps)]
        return cls(flow, map, head, place, f"<b>{heading}</b>", facts)

    def sources(self, row: int) -> Float[Tensor, "src"]:
        """One number for each source, of one layer."""
        flow = self.flow
        if self.map == "rollout":
            return flow.rollout(stop=flow.layers[row] + 1)[:, self.place]
        terms = flow.columns(self.map)[row]
        terms = terms.sum(-1) if self.place is None else terms[..., self.place]
        if self.map == "block":
            return terms
        if self.head is not None:
            return terms[self.head]
        past = flow.skip if self.place is None else None
        return terms.sum(0) if past is None else terms.sum(0) + past[row]


def _scales(flow: Flow, map: str, scale: str, values: Sequence[Values]) -> list[Scale]:
    """Colours of each layer."""
    shares = map == "rollout"
    if scale == "shared":
        title = "share of the vector" if shares else unit(flow)
        return [signed_scale(title, *values, percent=shares)] * len(values)
    cut = any(strongest(one) < strongest(one, cut=False) for one in values)
    end = "where each layer's colours end" if cut else "each layer's strongest patch"
    return [signed_scale(f"relative to {end}", one, relative=True) for one in values]


def _background(flow: Flow, image: Any) -> UInt8[Tensor, "channel height width"] | None:
    """The image that is given, or else the one that the Flow keeps; None where there is none.

    Raises:
        InputError: one that cannot be drawn.
    """
    if image is not None:
        return _given(image)
    kept = flow.settings.get("pixels")
    picture = kept.get("image") if isinstance(kept, dict) else None
    try:
        return pixels_of(picture) if isinstance(picture, str) else None
    except ValueError as error:
        raise InputError(f"image_map: the image in this Flow is damaged, {error}: give it as image=.") from error


def _given(image: Any) -> UInt8[Tensor, "channel height width"]:
    """An image of Pillow, bytes, or floats, the smallest of which is shown black and the largest white."""
    remedy = "give one of Pillow, or an array [channel, height, width] with one channel or three, without NaN"
    pillow = sys.modules.get("PIL.Image")
    if pillow is not None and isinstance(image, pillow.Image):
        image = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    try:
        values = image if isinstance(image, Tensor) else torch.as_tensor(np.array(image))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"image_map: image is of type {type(image).__name__}: {remedy}.") from error
    values = values[0] if values.ndim == 4 and len(values) == 1 else values
    if values.ndim != 3 or len(values) not in (1, 3) or not values.numel() or not bool(values.isfinite().all()):
        raise InputError(f"image_map: image has shape {list(values.shape)}: {remedy}.")
    return values.cpu() if values.dtype == torch.uint8 else pixels_of(str(picture_of(values)))


def _over_image(
    panels: Sequence[Heatmap], grid: _Grid, background: UInt8[Tensor, "channel height width"] | None, shown: _Shown
) -> go.Figure:
    """Draw panels, the first of which is the image where there is one."""
    rows, columns = grid.shape
    n_columns = min(len(panels), 4)
    side = min(_LARGE, _WIDE / n_columns) / max(rows, columns)
    figure = draw(
        panels,
        Axis("row", [str(row) for row in range(rows)], "row"),
        Axis("column", [str(column) for column in range(columns)], "column"),
        shown.heading,
        shown.facts,
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
