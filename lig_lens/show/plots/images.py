"""Contributions of patches, laid over the image that they are patches of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from lig_lens.arguments import checked
from lig_lens.choose import Words, find_places, of_flow
from lig_lens.errors import InputError, check_choice
from lig_lens.flow.flow import Flow
from lig_lens.names import head_name
from lig_lens.show.plots.facts import about, baselines, unit, worst_gap
from lig_lens.show.plots.matrix import Heatmap, Scale, Values, signed_scale, strongest
from lig_lens.show.plots.overlay import background_of, grid_of, over_image
from lig_lens.show.plots.style import token_label
from lig_lens.show.text import signed_number, signed_percent

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
    grid = grid_of("image_map", flow.tokens, "Flow", "head_map")
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
            caption=f"{head_name(layer, head)} · {grid.sums(found[number], write)}",
        )
        for number, (layer, one) in enumerate(zip(asked, values, strict=True))
    ]
    background = background_of("image_map", flow.settings, "Flow", image)
    return over_image(panels, grid, background, shown.heading, shown.facts)


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
