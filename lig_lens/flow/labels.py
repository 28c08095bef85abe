"""Axes of a Flow's tensors, and whether its labels and tensors belong together."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lig_lens.errors import InputError

if TYPE_CHECKING:
    from lig_lens.flow.flow import Flow

# The axes of each tensor, and of the total, gap and converged mask of each map.
AXES: dict[str, tuple[str, ...]] = {
    "attn": ("layer", "head", "src", "dst"),
    "mlp": ("layer", "head", "dst"),
    "skip": ("layer", "dst"),
    "bias": ("layer", "dst"),
    "block": ("layer", "src", "dst"),
}
CELL_AXES: dict[str, tuple[str, ...]] = {
    "attn": ("layer", "head", "dst"),
    "mlp": ("layer", "dst"),
    "block": ("layer", "dst"),
}
# A metric is one number for all heads and destinations of a layer.
_METRIC_AXES = AXES | {"skip": ("layer", "src")}
_METRIC_CELL_AXES: dict[str, tuple[str, ...]] = {"attn": ("layer",)}


def tensor_axes(metric: bool) -> dict[str, tuple[str, ...]]:
    """Axes of a Flow's tensors, of contributions to a metric or to the destinations' vectors."""
    return _METRIC_AXES if metric else AXES


def cell_axes(metric: bool) -> dict[str, tuple[str, ...]]:
    """Axes of a Flow's totals, gaps and converged masks."""
    return _METRIC_CELL_AXES if metric else CELL_AXES


def check_labels(flow: "Flow") -> None:
    """Raise InputError unless labels, maps and settings of a Flow belong together."""
    n_pos, n_layers = len(flow.tokens), len(flow.layers)
    if not n_pos or not n_layers or not flow.maps:
        raise InputError(
            f"A Flow needs tokens, layers and a map: got {n_pos} tokens, {n_layers} layers, maps {flow.maps}."
        )
    for name, length, expected, what in (
        ("special", len(flow.special), n_pos, "tokens"),
        ("layouts", len(flow.layouts), n_layers, "layers"),
        *((f"engines[{name!r}]", len(e), n_layers, "layers") for name, e in flow.engines.items()),
    ):
        if length != expected:
            raise InputError(f"Flow: {name} has {length} entries for {expected} {what}: give one for each.")
    outside = [j for j in flow.destinations if not 0 <= j < n_pos]
    if outside:
        raise InputError(f"Flow: destination {outside[0]} is outside the positions 0 to {n_pos - 1}.")
    for name, values in (("destinations", flow.destinations), ("layers", flow.layers)):
        if len(set(values)) < len(values):
            raise InputError(f"Flow: {name} {values} repeat a number: give each once.")
    parts = [name for name in ("mlp", "skip", "bias") if getattr(flow, name) is not None]
    if flow.metric is not None:
        if flow.maps != ("attn",) or parts != ["skip"] or flow.destinations != tuple(range(n_pos)):
            raise InputError(
                f"Flow: the metric {flow.metric} needs attn and skip for all destinations, and nothing else: got "
                f"the maps {list(flow.maps)}, {parts} and {len(flow.destinations)} destinations of {n_pos}."
            )
    elif parts and len(parts) < 3:
        raise InputError(f"Flow: the mlp map has only {', '.join(parts)}: give mlp, skip and bias together.")
    for name in ("total", "gap", "converged", "engines"):
        keys = set(getattr(flow, name))
        if keys != set(flow.maps):
            raise InputError(f"Flow: {name} has keys {sorted(keys)} for the maps {list(flow.maps)}: give one each.")


def check_shapes(flow: "Flow") -> None:
    """Raise InputError unless all tensors of a Flow have the shapes that its labels ask for."""
    sizes = {"layer": len(flow.layers), "src": len(flow.tokens), "dst": len(flow.destinations)}
    for name in ("attn", "mlp"):
        value = getattr(flow, name)
        if value is not None and value.ndim == len(AXES[name]):
            sizes.setdefault("head", value.shape[1])
    axes_of, cell_axes_of = tensor_axes(flow.metric is not None), cell_axes(flow.metric is not None)
    named = [(name, getattr(flow, name), axes_of[name]) for name in AXES]
    for group in ("total", "gap", "converged"):
        tensors = getattr(flow, group)
        named += [(f"{group}[{name!r}]", tensors[name], cell_axes_of[name]) for name in flow.maps]
    for label, value, axes in named:
        if value is None:
            continue
        expected = tuple(sizes.get(axis, -1) for axis in axes)
        if tuple(value.shape) != expected:
            raise InputError(
                f"Flow: {label} has shape {list(value.shape)}, expected {list(expected)} "
                f"({' '.join(axes)}): check tokens, layers and destinations."
            )


def axis_places(what: str, wanted: Sequence[int], present: Sequence[int]) -> list[int]:
    """Where the `wanted` numbers stand in `present`, the labels of an axis called `what`.

    Raises:
        InputError: a number that is not present, or none at all.
    """
    for number in wanted:
        if number not in present:
            raise InputError(f"This Flow has no {what} {number}: use some of {list(present)}.")
    if not wanted:
        raise InputError(f"Selection: no {what} is named: name at least one, or leave it out for all.")
    return [list(present).index(number) for number in wanted]
