"""The numbers of a Flow with their labels, checked, and what can be read off them."""

import json
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from lig_lens.arguments import checked
from lig_lens.choose import find_places, of_flow
from lig_lens.errors import InputError, check_choice
from lig_lens.flow.labels import CELLS, TENSORS, Axes, axes_of
from lig_lens.names import ACROSS, MAPS

F = TypeVar("F", bound="FlowData")


class Edge(NamedTuple):
    """One contribution with its labels.

    `part` says what carries it: `"head"`, or `"skip"` and `"bias"` (mlp map), or `"block"`. `head` is None
    where no head is meant. In the mlp map everything happens at one position, so there src = dst.
    """

    layer: int
    part: str
    head: int | None
    src: int
    src_token: str
    dst: int
    dst_token: str
    contribution: float
    share: float


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class FlowData:
    """The contribution tensors of one prompt, with their labels, completeness gaps and settings.

    What is derived from a Flow takes this, and `Flow`, where the fields are documented, offers all of it as methods.

    Raises:
        InputError: labels, tensors and masks whose shapes do not belong together, or settings that JSON
            cannot hold.
    """

    tokens: tuple[str, ...]
    special: tuple[bool, ...]
    layers: tuple[int, ...]
    destinations: tuple[int, ...] = ()
    model_name: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    layouts: tuple[str, ...]
    engines: dict[str, tuple[str, ...]]
    attn: Float[Tensor, "layer head src dst"] | None = None
    mlp: Float[Tensor, "layer head dst"] | None = None
    skip: Float[Tensor, "layer dst"] | None = None
    bias: Float[Tensor, "layer dst"] | None = None
    block: Float[Tensor, "layer src dst"] | None = None
    total: dict[str, Float[Tensor, "..."]]
    gap: dict[str, Float[Tensor, "..."]]
    converged: dict[str, Bool[Tensor, "..."]]
    metric: str | None = None
    stream: str | None = None
    dst_tokens: tuple[str, ...] = ()
    dst_special: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        for name, of_sources in (("dst_tokens", self.tokens), ("dst_special", self.special)):
            if self.is_square or not getattr(self, name):
                object.__setattr__(self, name, of_sources)
        if not self.destinations:
            object.__setattr__(self, "destinations", tuple(range(len(self.dst_tokens))))
        for name in TENSORS:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _plain(value, torch.float32))
        for group in CELLS:
            dtype = torch.bool if group == "converged" else torch.float32
            cells = {name: _plain(value, dtype) for name, value in getattr(self, group).items()}
            object.__setattr__(self, group, cells)
        _check_labels(self)
        _check_shapes(self)
        try:
            json.dumps(self.settings, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"Flow settings cannot be written as JSON ({error}): use plain values.") from error

    @property
    def maps(self) -> tuple[str, ...]:
        """Names of the maps that are present, in the order attn, mlp, block."""
        return tuple(name for name in MAPS if getattr(self, name) is not None)

    @property
    def axes(self) -> Axes:
        """Names of the axes of all tensors, and of the cells of each map."""
        return axes_of(self.metric is not None, self.settings.get("hold") == "others")

    @property
    def has_all_destinations(self) -> bool:
        """Whether the dst axis stands for all positions, in order."""
        return self.destinations == tuple(range(len(self.dst_tokens)))

    @property
    def is_square(self) -> bool:
        """Whether sources and destinations are positions of one text."""
        return self.stream != ACROSS

    def check_square(self, what: str) -> None:
        """Raise InputError if sources and destinations are positions of two texts, which `what` cannot use."""
        if not self.is_square:
            raise InputError(
                f"{what} joins destinations with the sources of the same text, and this Flow goes from one text to "
                "another (stream='cross'): ask attribute() for stream='encoder' or 'decoder'."
            )

    @checked
    def columns(self, map: str = "attn") -> Float[Tensor, "layer *rest dst"]:
        """Return the terms that add up to `total[map]`, along the axis before the last.

        With a metric: along all axes of a layer, together with `skip`.

        Returns:
            attn: "layer head src dst". block: "layer src dst". mlp: "layer head+2 dst", the heads in order,
            then skip, then bias.

        Raises:
            InputError: an unknown map, or one that this Flow does not have.
        """
        check_choice("map", map, MAPS)
        if map not in self.maps:
            raise InputError(
                f"This Flow has no {map!r} map, only {', '.join(self.maps)}: ask attribute() for it with maps=."
            )
        if map == "mlp" and self.mlp is not None and self.skip is not None and self.bias is not None:
            return torch.cat([self.mlp, self.skip[:, None], self.bias[:, None]], dim=1)
        tensor: Tensor = getattr(self, map)
        return tensor

    @checked
    def shares(self, map: str = "attn") -> Float[Tensor, "layer *rest dst"]:
        """Columns divided by their sum, so that each adds up to 1; axes as in `columns`.

        With a metric: contributions divided by its total change, so that a layer adds up to 1 with its `skip`.

        A share is positive where the source pushes the way the whole column goes, negative where it pushes
        against it, and may exceed 1. A column whose sum is rounding gives zeros: |sum| at most the float32
        epsilon, times the number of terms, times the largest sum of absolute values in a column of that
        layer.

        Raises:
            InputError: an unknown map, or one that this Flow does not have.
        """
        terms = self.columns(map)
        if self.metric is not None:
            total = self.axes.spread(map, self.total[map])
            return torch.where(total == 0, 0.0, terms / total.masked_fill(total == 0, 1.0))
        column_sum = terms.sum(dim=-2, keepdim=True)
        strongest = terms.abs().sum(dim=-2).flatten(1).amax(dim=1).reshape(-1, *[1] * (terms.ndim - 1))
        rounding = torch.finfo(terms.dtype).eps * terms.shape[-2] * strongest
        vanishing = column_sum.abs() <= rounding
        return torch.where(vanishing, torch.zeros_like(terms), terms / column_sum.masked_fill(vanishing, 1.0))

    @checked
    def to_tl(self, map: str = "attn") -> Float[Tensor, "layer *head dst src"]:
        """Contributions in TransformerLens' order: attn "layer head dst src", block "layer dst src".

        `flow.to_tl()[l, h]` lies on `cache["pattern", layer][0, h]` when all destinations were asked for.

        Raises:
            InputError: the map is absent, or `mlp`, which has no source axis.
        """
        terms = self.columns(map)
        if map == "mlp":
            raise InputError("The 'mlp' map has no source axis to transpose: use flow.mlp, or map='attn' or 'block'.")
        return rearrange(terms, "... src dst -> ... dst src").contiguous()

    @checked
    def top(self, k: int, map: str = "attn", layer: int | None = None) -> list[Edge]:
        """Find the k strongest contributions by absolute value, strongest first; ties in index order.

        Args:
            k: how many; fewer come back if there are fewer.
            map: attn, mlp (heads, skip and bias compete) or block.
            layer: only this block of the model; all layers of the Flow by default.

        Raises:
            InputError: k below 1, a map or layer that this Flow does not have.
        """
        terms, shares = self.columns(map), self.shares(map)
        if k < 1:
            raise InputError(f"top: k is {k}: ask for at least 1.")
        first, chosen = 0, terms
        if layer is not None:
            (first,) = find_places([layer], self.layers, of_flow("layer", "one"))
            chosen = terms[first : first + 1]
        order = torch.sort(chosen.abs().flatten(), descending=True, stable=True).indices[:k]
        edges = []
        for flat in order:
            row, *rest = (int(i) for i in torch.unravel_index(flat, chosen.shape))
            index = (first + row, *rest)
            edges.append(self._edge(map, index, float(terms[index]), float(shares[index])))
        return edges

    def _edge(self, map: str, index: tuple[int, ...], contribution: float, share: float) -> Edge:
        at = dict(zip(self.axes.columns[map], index, strict=True))
        head, part = at.get("head"), "block" if map == "block" else "head"
        if map == "mlp":
            n_heads = self.columns(map).shape[1] - 2
            part = ("head", "skip", "bias")[max(0, at["part"] - n_heads + 1)]
            head = at["part"] if part == "head" else None
        dst = self.destinations[at["dst"]]
        src = at.get("src", dst)
        return Edge(
            layer=self.layers[at["layer"]],
            part=part,
            head=head,
            src=src,
            src_token=self.tokens[src],
            dst=dst,
            dst_token=self.dst_tokens[dst],
            contribution=contribution,
            share=share,
        )

    @checked
    def worst_gap(self, map: str | None = None) -> float:
        """Largest relative completeness gap of one map, or of all of them.

        Raises:
            InputError: an unknown map, or one that this Flow does not have.
        """
        if map is not None:
            self.columns(map)
        return max(float(self.gap[name].max()) for name in ([map] if map else self.maps))

    def converged_share(self) -> float:
        """Share of all columns, over all maps, whose gap is within the tolerance."""
        masks = [self.converged[name] for name in self.maps]
        return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    @checked
    def select(self: F, layers: tuple[int, ...] | None = None, destinations: tuple[int, ...] | None = None) -> F:
        """Keep only some layers (block numbers) or destinations (positions), in the order given.

        Raises:
            InputError: a layer or destination that this Flow does not have, or destinations of a metric.
        """
        if self.metric is not None and destinations is not None:
            raise InputError("Contributions to a metric add up over all destinations: select layers only.")
        layers = self.layers if layers is None else tuple(layers)
        destinations = self.destinations if destinations is None else tuple(destinations)
        rows = find_places(layers, self.layers, of_flow("layer"))
        chosen = {"layer": rows, "dst": find_places(destinations, self.destinations, of_flow("destination"))}

        def cut(tensor: Tensor, axes: tuple[str, ...]) -> Tensor:
            for number, axis in enumerate(axes):
                if axis in chosen:
                    tensor = tensor.index_select(number, torch.tensor(chosen[axis]))
            return tensor

        def part(name: str) -> Tensor | None:
            tensor = getattr(self, name)
            return None if tensor is None else cut(tensor, self.axes.tensors[name])

        def cells(group: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: cut(tensor, self.axes.cells[name]) for name, tensor in group.items()}

        return replace(
            self,
            layers=layers,
            destinations=destinations,
            layouts=tuple(self.layouts[row] for row in rows),
            engines={name: tuple(engine[row] for row in rows) for name, engine in self.engines.items()},
            attn=part("attn"),
            mlp=part("mlp"),
            skip=part("skip"),
            bias=part("bias"),
            block=part("block"),
            total=cells(self.total),
            gap=cells(self.gap),
            converged=cells(self.converged),
        )

    def __repr__(self) -> str:
        maps = ", ".join(
            f"{name} {list(getattr(self, name).shape)} gap ≤ {self.worst_gap(name):.1e}" for name in self.maps
        )
        return (
            f"{type(self).__name__}({self.model_name!r}, "
            f"{len(self.tokens)} {'' if self.is_square else f'to {len(self.dst_tokens)} '}tokens, "
            f"layers {_ranges(self.layers)}: {maps}; "
            f"{f'metric {self.metric}, ' if self.metric is not None else ''}"
            f"{self.converged_share():.1%} converged)"
        )


def _check_labels(flow: FlowData) -> None:
    """Raise InputError unless labels, maps and settings of a Flow belong together."""
    n_pos, n_layers = len(flow.tokens), len(flow.layers)
    if not n_pos or not n_layers or not flow.maps:
        raise InputError(
            f"A Flow needs tokens, layers and a map: got {n_pos} tokens, {n_layers} layers, maps {flow.maps}."
        )
    for name, length, expected, what in (
        ("special", len(flow.special), n_pos, "tokens"),
        ("dst_special", len(flow.dst_special), len(flow.dst_tokens), "dst_tokens"),
        ("layouts", len(flow.layouts), n_layers, "layers"),
        *((f"engines[{name!r}]", len(e), n_layers, "layers") for name, e in flow.engines.items()),
    ):
        if length != expected:
            raise InputError(f"Flow: {name} has {length} entries for {expected} {what}: give one for each.")
    outside = [j for j in flow.destinations if not 0 <= j < len(flow.dst_tokens)]
    if outside:
        raise InputError(f"Flow: destination {outside[0]} is outside the positions 0 to {len(flow.dst_tokens) - 1}.")
    for name, values in (("destinations", flow.destinations), ("layers", flow.layers)):
        if len(set(values)) < len(values):
            raise InputError(f"Flow: {name} {values} repeat a number: give each once.")
    parts = [name for name in ("mlp", "skip", "bias") if getattr(flow, name) is not None]
    if flow.metric is not None:
        if flow.maps != ("attn",) or parts != ["skip"] or not flow.has_all_destinations:
            raise InputError(
                f"Flow: the metric {flow.metric} needs attn and skip for all destinations, and nothing else: got "
                f"the maps {list(flow.maps)}, {parts} and {len(flow.destinations)} destinations of {n_pos}."
            )
    elif parts and len(parts) < 3:
        raise InputError(f"Flow: the mlp map has only {', '.join(parts)}: give mlp, skip and bias together.")
    for name in (*CELLS, "engines"):
        keys = set(getattr(flow, name))
        if keys != set(flow.maps):
            raise InputError(f"Flow: {name} has keys {sorted(keys)} for the maps {list(flow.maps)}: give one each.")


def _check_shapes(flow: FlowData) -> None:
    """Raise InputError unless all tensors of a Flow have the shapes that its labels ask for."""
    sizes = {"layer": len(flow.layers), "src": len(flow.tokens), "dst": len(flow.destinations)}
    for name in ("attn", "mlp"):
        value = getattr(flow, name)
        if value is not None and value.ndim == len(flow.axes.tensors[name]):
            sizes.setdefault("head", value.shape[1])
    named = [(name, getattr(flow, name), flow.axes.tensors[name]) for name in TENSORS]
    for group in CELLS:
        cells = getattr(flow, group)
        named += [(f"{group}[{name!r}]", cells[name], flow.axes.cells[name]) for name in flow.maps]
    for label, value, axes in named:
        if value is None:
            continue
        expected = tuple(sizes.get(axis, -1) for axis in axes)
        if tuple(value.shape) != expected:
            raise InputError(
                f"Flow: {label} has shape {list(value.shape)}, expected {list(expected)} "
                f"({' '.join(axes)}): check tokens, layers and destinations."
            )


def _plain(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to(device="cpu", dtype=dtype).contiguous()


def _ranges(numbers: tuple[int, ...]) -> str:
    """`(0, 1, 2, 5)` as `0-2, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# How far the sums of a file without checksum may be off: beyond their gap, relative to the map's largest total.
_SLACK = 1e-3


def check_sums(flow: FlowData) -> None:
    """Check a Flow against itself: contributions against their totals, and gaps against what has converged.

    Raises:
        InputError: numbers that cannot belong together.
    """
    for name in flow.maps:
        terms, total, gap = flow.columns(name).double(), flow.total[name].double(), flow.gap[name].double()
        within = flow.axes.within(name)
        found, rounding = terms.sum(within), terms.abs().sum(within)
        if flow.metric is not None and flow.skip is not None and found.ndim == 1:
            found, rounding = found + flow.skip.double().sum(-1), rounding + flow.skip.double().abs().sum(-1)
        allowed = gap * total.abs() + _SLACK * total.abs().max() + 1e-5 * rounding
        wrong = ~((found - total).abs() <= allowed)
        if bool(wrong.any()):
            at = tuple(wrong.nonzero()[0].tolist())
            summed, told = float(found[at]), float(total[at])
            raise InputError(f"{name} adds up to {summed:.6g} at {list(at)}, and its total there is {told:.6g}.")
        tol = flow.settings.get("tol")
        if isinstance(tol, float) and bool((flow.converged[name] & ~(gap <= tol * (1 + 1e-6))).any()):
            raise InputError(f"{name} is marked as converged where its gap is above tol={tol:g}.")
