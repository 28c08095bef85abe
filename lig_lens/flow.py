"""Flow: the contribution tensors of one prompt, with their labels, completeness gaps and settings."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from lig_lens.config import MAPS
from lig_lens.errors import FlowFileError, InputError, check_choice

if TYPE_CHECKING:
    import pandas
    import xarray

# The axes of each tensor, and of the total, gap and converged mask of each map.
AXES = {
    "attn": ("layer", "head", "src", "dst"),
    "mlp": ("layer", "head", "dst"),
    "skip": ("layer", "dst"),
    "bias": ("layer", "dst"),
    "block": ("layer", "src", "dst"),
}
CELL_AXES = {"attn": ("layer", "head", "dst"), "mlp": ("layer", "dst"), "block": ("layer", "dst")}


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
class Flow:
    """Layer-wise Integrated Gradients of one prompt (LIG: Suzuki, Hino, Murata, arXiv 2606.21564).

    Three maps, each None unless it was asked for. Axis order is always `layer head src dst`; TransformerLens
    patterns are `[head, dst(query), src(key)]`, and `to_tl()` gives that order.

    - `attn[l, h, i, j]`: contribution of source token i to the output of head h at destination j (resid_pre
      → hook_z).
    - `mlp[l, h, j]`, `skip[l, j]`, `bias[l, j]`: contribution of head h, of the skip connection and of the
      attention output's bias at j to the block's output at j (hook_z, skip → resid_post).
    - `block[l, i, j]`: contribution of source i to the block's output at j (resid_pre → resid_post).

    The unit is that of the target: for `l2` the length of the output vector's change between baseline and
    prompt, so raw values of different heads and layers live on different scales (`shares()` puts them on
    one). The sign says whether the source pushes the target up or down. All tensors are float32 (masks
    bool) on the CPU, whatever the model's dtype and device; others are converted.

    Args:
        tokens: one string per position, as the tokenizer prints them.
        special: True where the position holds a special token such as [CLS].
        layers: the model's block numbers that the layer axis stands for.
        destinations: the positions that the dst axis stands for; all of them by default.
        model_name: as given to `load_model`.
        settings: what was asked for (maps, baselines, target, tol, engine, versions, model processing);
            JSON-able.
        layouts: one per layer (`pre_ln`, `post_ln`, `pre_post_ln`, `parallel`, `block_only`).
        engines: for each map, the engine that computed each layer.
        attn: "layer head src dst", or None.
        mlp: "layer head dst", or None; comes with `skip` and `bias`, "layer dst" each.
        skip: see `mlp`.
        bias: see `mlp`.
        block: "layer src dst", or None.
        total: for each map, L(x) - L(x0): the exact change of the target that a column adds up to. Axes
            "layer head dst" for attn, "layer dst" for mlp and block, as in `gap` and `converged`.
        gap: for each map, how far the column is from adding up, relative to |total| (floored at rounding). The
            pieces of the integral are added up in absolute value, so |column sum - total| is never larger.
        converged: for each map, whether gap and the estimated error of the worst single contribution (relative to
            the column's largest) are both within tol.

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

    def __post_init__(self) -> None:
        if not self.destinations:
            object.__setattr__(self, "destinations", tuple(range(len(self.tokens))))
        for name in AXES:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _plain(value, torch.float32))
        for name, dtype in (("total", torch.float32), ("gap", torch.float32), ("converged", torch.bool)):
            tensors = getattr(self, name)
            object.__setattr__(self, name, {key: _plain(value, dtype) for key, value in tensors.items()})
        self._check_labels()
        self._check_shapes()
        try:
            json.dumps(self.settings, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"Flow settings cannot be written as JSON ({error}): use plain values.") from error

    def _check_labels(self) -> None:
        n_pos, n_layers = len(self.tokens), len(self.layers)
        if not n_pos or not n_layers or not self.maps:
            raise InputError(
                f"A Flow needs tokens, layers and a map: got {n_pos} tokens, {n_layers} layers, maps {self.maps}."
            )
        for name, length, expected, what in (
            ("special", len(self.special), n_pos, "tokens"),
            ("layouts", len(self.layouts), n_layers, "layers"),
            *((f"engines[{name!r}]", len(e), n_layers, "layers") for name, e in self.engines.items()),
        ):
            if length != expected:
                raise InputError(f"Flow: {name} has {length} entries for {expected} {what}: give one for each.")
        outside = [j for j in self.destinations if not 0 <= j < n_pos]
        if outside:
            raise InputError(f"Flow: destination {outside[0]} is outside the positions 0 to {n_pos - 1}.")
        for name, values in (("destinations", self.destinations), ("layers", self.layers)):
            if len(set(values)) < len(values):
                raise InputError(f"Flow: {name} {values} repeat a number: give each once.")
        parts = [name for name in ("mlp", "skip", "bias") if getattr(self, name) is not None]
        if parts and len(parts) < 3:
            raise InputError(f"Flow: the mlp map has only {', '.join(parts)}: give mlp, skip and bias together.")
        for name in ("total", "gap", "converged", "engines"):
            keys = set(getattr(self, name))
            if keys != set(self.maps):
                raise InputError(f"Flow: {name} has keys {sorted(keys)} for the maps {list(self.maps)}: give one each.")

    def _check_shapes(self) -> None:
        sizes = {"layer": len(self.layers), "src": len(self.tokens), "dst": len(self.destinations)}
        for name in ("attn", "mlp"):
            value = getattr(self, name)
            if value is not None and value.ndim == len(AXES[name]):
                sizes.setdefault("head", value.shape[1])
        named = [(name, getattr(self, name), AXES[name]) for name in AXES]
        for group in ("total", "gap", "converged"):
            tensors = getattr(self, group)
            named += [(f"{group}[{name!r}]", tensors[name], CELL_AXES[name]) for name in self.maps]
        for label, value, axes in named:
            if value is None:
                continue
            expected = tuple(sizes.get(axis, -1) for axis in axes)
            if tuple(value.shape) != expected:
                raise InputError(
                    f"Flow: {label} has shape {list(value.shape)}, expected {list(expected)} "
                    f"({' '.join(axes)}): check tokens, layers and destinations."
                )

    @property
    def maps(self) -> tuple[str, ...]:
        """Names of the maps that are present, in the order attn, mlp, block."""
        return tuple(name for name in MAPS if getattr(self, name) is not None)

    def columns(self, map: str = "attn") -> Float[Tensor, "layer *rest dst"]:
        """Return the terms that add up to `total[map]`, along the axis before the last.

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

    def shares(self, map: str = "attn") -> Float[Tensor, "layer *rest dst"]:
        """Columns divided by their sum, so that each adds up to 1; axes as in `columns`.

        A share is positive where the source pushes the way the whole column goes, negative where it pushes
        against it, and may exceed 1. A column whose sum is rounding gives zeros: |sum| at most the float32
        epsilon, times the number of terms, times the largest sum of absolute values in a column of that
        layer.

        Raises:
            InputError: an unknown map, or one that this Flow does not have.
        """
        terms = self.columns(map)
        column_sum = terms.sum(dim=-2, keepdim=True)
        strongest = terms.abs().sum(dim=-2).flatten(1).amax(dim=1).reshape(-1, *[1] * (terms.ndim - 1))
        rounding = torch.finfo(terms.dtype).eps * terms.shape[-2] * strongest
        vanishing = column_sum.abs() <= rounding
        return torch.where(vanishing, torch.zeros_like(terms), terms / column_sum.masked_fill(vanishing, 1.0))

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
        rows = range(len(self.layers))
        if layer is not None:
            if layer not in self.layers:
                raise InputError(f"This Flow has no layer {layer}: use one of {list(self.layers)}.")
            row = self.layers.index(layer)
            rows = range(row, row + 1)
        chosen = terms[rows.start : rows.stop]
        order = torch.sort(chosen.abs().flatten(), descending=True, stable=True).indices[:k]
        edges = []
        for flat in order.tolist():
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), chosen.shape))
            index = (index[0] + rows.start, *index[1:])
            edges.append(self._edge(map, index, float(terms[index]), float(shares[index])))
        return edges

    def _edge(self, map: str, index: tuple[int, ...], contribution: float, share: float) -> Edge:
        dst = self.destinations[index[-1]]
        part, head, src = "head", None, dst
        if map == "mlp":
            n_heads = 0 if self.mlp is None else self.mlp.shape[1]
            part = ("head", "skip", "bias")[max(0, index[1] - n_heads + 1)]
            head = index[1] if part == "head" else None
        elif map == "attn":
            head, src = index[1], index[2]
        else:
            part, src = "block", index[1]
        return Edge(
            self.layers[index[0]],
            part,
            head,
            src,
            self.tokens[src],
            dst,
            self.tokens[dst],
            contribution,
            share,
        )

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

    def select(self, layers: tuple[int, ...] | None = None, destinations: tuple[int, ...] | None = None) -> "Flow":
        """Keep only some layers (block numbers) or destinations (positions), in the order given.

        Raises:
            InputError: a layer or destination that this Flow does not have.
        """
        layers = self.layers if layers is None else tuple(layers)
        destinations = self.destinations if destinations is None else tuple(destinations)
        rows = axis_places("layer", layers, self.layers)
        columns = axis_places("destination", destinations, self.destinations)

        def cut(tensor: Tensor) -> Tensor:
            return tensor[rows][..., columns]

        tensors = {name: getattr(self, name) for name in AXES}
        return Flow(
            tokens=self.tokens,
            special=self.special,
            layers=layers,
            destinations=destinations,
            model_name=self.model_name,
            settings=self.settings,
            layouts=tuple(self.layouts[row] for row in rows),
            engines={name: tuple(engine[row] for row in rows) for name, engine in self.engines.items()},
            **{name: None if value is None else cut(value) for name, value in tensors.items()},
            total={name: cut(value) for name, value in self.total.items()},
            gap={name: cut(value) for name, value in self.gap.items()},
            converged={name: cut(value) for name, value in self.converged.items()},
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write tensors and labels to a safetensors file with a JSON header, in one step (never pickle).

        Raises:
            InputError: `path` cannot be written.
        """
        from lig_lens import flow_io  # knows Flow, so it cannot be imported above

        return flow_io.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Flow":
        """Read a Flow that `save` wrote.

        Raises:
            FlowFileError: no such file, a damaged one, one that is no Flow, or one with a newer schema.
        """
        from lig_lens import flow_io

        fields, tensors = flow_io.read(path)
        try:
            return cls(**fields, **tensors)
        except InputError as error:
            raise FlowFileError(f"{str(path)!r} is damaged ({error}) Save the Flow again.") from error

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Everything as JSON text, schema `lig_lens.flow` version 1 (docs/flow-json.md).

        Also written to `path`, if given.

        Raises:
            InputError: `path` cannot be written.
        """
        from lig_lens import flow_io

        return flow_io.to_json(self, path)

    def to_dataframe(self, map: str = "attn") -> "pandas.DataFrame":
        """One map in long form, one row per contribution.

        Columns: map, layer, part, head (missing where no head is meant), src, src_token, dst, dst_token,
        contribution (units of the target), share, and the gap and converged mark of the column it belongs to.

        Raises:
            InputError: an unknown map, or one that this Flow does not have.
            MissingPackageError: pandas is not installed (`pip install pandas`).
        """
        from lig_lens import flow_io

        return flow_io.to_dataframe(self, map)

    def to_xarray(self) -> "xarray.Dataset":
        """All tensors with labelled axes layer, head, src, dst (the model's numbers) and token coordinates.

        Raises:
            MissingPackageError: xarray is not installed (`pip install xarray`).
        """
        from lig_lens import flow_io

        return flow_io.to_xarray(self)

    def __repr__(self) -> str:
        maps = ", ".join(
            f"{name} {list(getattr(self, name).shape)} gap ≤ {self.worst_gap(name):.1e}" for name in self.maps
        )
        return (
            f"Flow({self.model_name!r}, {len(self.tokens)} tokens, layers {_ranges(self.layers)}: {maps}; "
            f"{self.converged_share():.1%} converged)"
        )


def _plain(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to(device="cpu", dtype=dtype).contiguous()


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


def _ranges(numbers: tuple[int, ...]) -> str:
    """`(0, 1, 2, 5)` as `0-2, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
