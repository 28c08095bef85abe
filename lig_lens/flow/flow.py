"""Flow: the contribution tensors of one prompt, with their labels, completeness gaps and settings."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from lig_lens.errors import FlowFileError, InputError, check_choice
from lig_lens.flow.labels import AXES, axis_places, check_labels, check_shapes
from lig_lens.names import MAPS

if TYPE_CHECKING:
    import networkx
    import pandas
    import xarray

    from lig_lens.flow.compose import Consistency
    from lig_lens.flow.compose import Path as Route
    from lig_lens.show.explorer import Explorer


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

    With a metric as target everything is in the metric's units, and at every layer `attn[l]` and `skip[l]` together
    add up to its change from baseline to prompt, `total["attn"][l]`: `attn[l, h, i, j]` is what source i contributes
    through head h at destination j and all that follows, `skip[l, i]` what it contributes past that layer's heads. With
    `split="message"` `attn[l, h, i, j]` is what the movement of the message from i to j contributes, whatever moves it.

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
        skip: see `mlp`; with a metric "layer src", beside `attn`.
        bias: see `mlp`.
        block: "layer src dst", or None.
        total: for each map, L(x) - L(x0): the exact change of the target that a column adds up to. Axes
            "layer head dst" for attn, "layer dst" for mlp and block, "layer" with a metric, as in `gap` and
            `converged`.
        gap: for each map, how far the column is from adding up, relative to |total| (floored at rounding). The
            pieces of the integral are added up in absolute value, so |column sum - total| is never larger.
        converged: for each map, whether gap and the estimated error of the worst single contribution (relative to
            the column's largest) are both within tol.
        metric: name of the metric that is the target, or None.

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
        check_labels(self)
        check_shapes(self)
        try:
            json.dumps(self.settings, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"Flow settings cannot be written as JSON ({error}): use plain values.") from error

    @property
    def maps(self) -> tuple[str, ...]:
        """Names of the maps that are present, in the order attn, mlp, block."""
        return tuple(name for name in MAPS if getattr(self, name) is not None)

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
            total = self.total[map].reshape(-1, 1, 1, 1)
            return torch.where(total == 0, 0.0, terms / total.masked_fill(total == 0, 1.0))
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

    def compose(self, rule: str = "product") -> Float[Tensor, "layer src dst"]:
        """Block map put together from the attn and mlp maps.

        Args:
            rule: `product` (the paper's, arXiv 2606.21564), `sum_h attn[h, i, j] mlp[h, j]`; or `conserving` (ours),
                `sum_h attn[h, i, j] / sum_i attn[h, i, j] mlp[h, j]`, and skip and bias of j on i = j, so that a
                column adds up to what the mlp map explains.

        Raises:
            InputError: unknown rule, or no attn and mlp maps.
        """
        from lig_lens.flow import compose

        return compose.compose(self, rule)

    def consistency(self, direct: "Flow | None" = None, rule: str = "product") -> "Consistency":
        """How far `compose(rule)` is from the directly measured block map of `direct`, by default this Flow's own.

        Raises:
            InputError: unknown rule, a map that is missing, or Flows of different prompts.
        """
        from lig_lens.flow import compose

        return compose.consistency(self, self if direct is None else direct, rule)

    def rollout(
        self, start: int | None = None, stop: int | None = None, rule: str = "conserving"
    ) -> Float[Tensor, "src dst"]:
        """Shares multiplied through the layers: how much of each residual leaving layer `stop - 1` is which token's.

        Columns add up to 1, single shares may be negative or exceed 1. A destination that nothing moves keeps what
        it has.

        Args:
            start: number of the first block, the Flow's first by default.
            stop: number of the block before which to stop; by default all are passed.
            rule: of composition, see `compose`.

        Raises:
            InputError: layers or destinations missing in between.

        Warns:
            CancellationWarning: in some step what is added up nearly cancels, so that shares are huge.
        """
        from lig_lens.flow import compose

        return compose.rollout(self, start, stop, rule)

    def paths(
        self, dst: int, k: int = 10, start: int | None = None, stop: int | None = None, rule: str = "conserving"
    ) -> "list[Route]":
        """Find the k strongest paths from any token entering layer `start` to token `dst` leaving `stop - 1`.

        A step passes a block through one head, or past all of them at its own position. The weight of a path is the
        product of its steps' shares, and the weights of all paths to a destination add up to 1. The search is exact.

        Args:
            dst: position of the destination; negative ones count from the end.
            k: how many; fewer come back if there are fewer. Strongest first, by absolute value.
            start: see `rollout`.
            stop: see `rollout`.
            rule: see `compose`.

        Raises:
            InputError: as `rollout`, or k below 1, or a position outside the prompt.

        Warns:
            CancellationWarning: as `rollout`.
        """
        from lig_lens.flow import compose

        return compose.paths(self, dst, k, start, stop, rule)

    def graph(
        self, threshold: float = 0.01, start: int | None = None, stop: int | None = None, rule: str = "conserving"
    ) -> "networkx.DiGraph":
        """The edges that paths follow, as a graph.

        Nodes are `("resid", layer, pos)`, the residual stream that enters a layer, and `("head", layer, head, dst)`.
        Edges carry `kind` (`attn`, `mlp`, `skip`) and `weight`: of `attn` edges the share of the whole step through
        that head, of `mlp` edges the sum over all sources; `attn` edges also have `share`, that of the head's output.

        Args:
            threshold: steps with a smaller absolute weight are left out.
            start: see `rollout`.
            stop: see `rollout`.
            rule: see `compose`.

        Raises:
            InputError: as `rollout`, or a negative threshold.

        Warns:
            CancellationWarning: as `rollout`.
        """
        from lig_lens.flow import compose

        return compose.graph(self, threshold, start, stop, rule)

    def explore(self, height: int = 900) -> "Explorer":
        """Make a page to explore this Flow in; a notebook shows it, `.save(path)` writes it. See `lig_lens.explore`.

        Args:
            height: of the frame in a notebook, in pixels.

        Raises:
            InputError: more numbers than a page holds.
        """
        from lig_lens.show.explorer import explore

        return explore(self, height=height)

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
            InputError: a layer or destination that this Flow does not have, or destinations of a metric.
        """
        if self.metric is not None and destinations is not None:
            raise InputError("Contributions to a metric add up over all destinations: select layers only.")
        layers = self.layers if layers is None else tuple(layers)
        destinations = self.destinations if destinations is None else tuple(destinations)
        rows = axis_places("layer", layers, self.layers)
        columns = axis_places("destination", destinations, self.destinations)

        def cut(tensor: Tensor) -> Tensor:
            return tensor[rows] if self.metric is not None else tensor[rows][..., columns]

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
            metric=self.metric,
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write tensors and labels to a safetensors file with a JSON header, in one step (never pickle).

        Raises:
            InputError: `path` cannot be written.
        """
        from lig_lens.flow import file as flow_io  # knows Flow, so it cannot be imported above

        return flow_io.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Flow":
        """Read a Flow that `save` wrote.

        Raises:
            FlowFileError: no such file, a damaged one, one that is no Flow, or one with a newer schema.
        """
        from lig_lens.flow import file as flow_io

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
        from lig_lens.flow import file as flow_io

        return flow_io.to_json(self, path)

    def to_dataframe(self, map: str = "attn") -> "pandas.DataFrame":
        """One map in long form, one row per contribution.

        Columns: map, layer, part, head (missing where no head is meant), src, src_token, dst, dst_token,
        contribution (units of the target), share, and the gap and converged mark of the column it belongs to.

        Raises:
            InputError: an unknown map, or one that this Flow does not have.
            MissingPackageError: pandas is not installed (`pip install pandas`).
        """
        from lig_lens.flow import file as flow_io

        return flow_io.to_dataframe(self, map)

    def to_xarray(self) -> "xarray.Dataset":
        """All tensors with labelled axes layer, head, src, dst (the model's numbers) and token coordinates.

        Raises:
            MissingPackageError: xarray is not installed (`pip install xarray`).
        """
        from lig_lens.flow import file as flow_io

        return flow_io.to_xarray(self)

    def __repr__(self) -> str:
        maps = ", ".join(
            f"{name} {list(getattr(self, name).shape)} gap ≤ {self.worst_gap(name):.1e}" for name in self.maps
        )
        return (
            f"Flow({self.model_name!r}, {len(self.tokens)} tokens, layers {_ranges(self.layers)}: {maps}; "
            f"{f'metric {self.metric}, ' if self.metric is not None else ''}"
            f"{self.converged_share():.1%} converged)"
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
