"""Flow: the result of `attribute`, and all that can be made of it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

import lig_lens
from lig_lens.arguments import checked
from lig_lens.errors import FlowFileError, InputError
from lig_lens.flow import compose, consistency, file, routes
from lig_lens.flow.consistency import Consistency
from lig_lens.flow.data import FlowData, check_sums
from lig_lens.flow.routes import Path as Route
from lig_lens.flow.to_json import json_of
from lig_lens.flow.to_networkx import graph_of
from lig_lens.flow.to_pandas import dataframe_of
from lig_lens.flow.to_xarray import dataset_of

if TYPE_CHECKING:
    import networkx
    import pandas
    import xarray


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Flow(FlowData):
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
    With `hold` nothing goes past the heads, and they add up to what patching them does; with `hold="others"` each head
    by itself, `total["attn"][l, h]`.

    Args:
        tokens: one string per position, as the tokenizer prints them.
        special: True where the position holds a special token such as [CLS].
        layers: the model's block numbers that the layer axis stands for.
        destinations: the positions that the dst axis stands for; all of them by default.
        model_name: as given to `load_model`.
        settings: what was asked for (maps, baselines, target, tol, engine, versions, model processing);
            JSON-able.
        layouts: one per layer (`pre_ln`, `post_ln`, `no_norm`, `pre_post_ln`, `scaled_pre_ln`, `parallel`,
            `block_only`; `cross`).
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
        stream: of a model with an encoder and a decoder, which was explained; None of others.
        dst_tokens: one string per position that the dst axis may stand for: `tokens`, but for `stream="cross"`, where
            sources are tokens of the source and destinations of the target.
        dst_special: the same for `special`.

    Raises:
        InputError: labels, tensors and masks whose shapes do not belong together, or settings that JSON
            cannot hold.
    """

    @checked
    def compose(self, rule: str = "product") -> Float[Tensor, "layer src dst"]:
        """Block map put together from the attn and mlp maps.

        Args:
            rule: `product` (the paper's, arXiv 2606.21564), `sum_h attn[h, i, j] mlp[h, j]`; or `conserving` (ours),
                `sum_h attn[h, i, j] / sum_i attn[h, i, j] mlp[h, j]`, and skip and bias of j on i = j, so that a
                column adds up to what the mlp map explains; or `sizes` (ours), which is `conserving` of absolute
                values, so that nothing cancels.

        Raises:
            InputError: unknown rule, or no attn and mlp maps.
        """
        return compose.compose(self, rule)

    @checked
    def consistency(self, direct: FlowData | None = None, rule: str = "product") -> Consistency:
        """How far `compose(rule)` is from the directly measured block map of `direct`, by default this Flow's own.

        Raises:
            InputError: unknown rule, a map that is missing, or Flows of different prompts.
        """
        return consistency.consistency(self, self if direct is None else direct, rule)

    @checked
    def rollout(
        self, start: int | None = None, stop: int | None = None, rule: str = "conserving"
    ) -> Float[Tensor, "src dst"]:
        """Shares multiplied through the layers: how much of each residual leaving layer `stop - 1` is which token's.

        Columns add up to 1, single shares may be negative or exceed 1 (but with `sizes`). A destination that nothing
        moves keeps what it has. Ask `attribute` for `attn_baseline="zero"` and `mlp_baseline="zero"`: the defaults
        leave out what each token keeps.

        Args:
            start: number of the first block, the Flow's first by default.
            stop: number of the block before which to stop; by default all are passed.
            rule: of composition, see `compose`.

        Raises:
            InputError: layers or destinations missing in between.

        Warns:
            CancellationWarning: in some step what is added up nearly cancels, so that shares are huge.
            CollapseWarning: the columns are nearly the same, as through many layers, or without a skip connection.
        """
        return compose.rollout(self, start, stop, rule)

    @checked
    def paths(
        self, dst: int, k: int = 10, start: int | None = None, stop: int | None = None, rule: str = "conserving"
    ) -> list[Route]:
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
            CancellationWarning, CollapseWarning: as `rollout`.
        """
        return routes.paths(self, dst, k, start, stop, rule)

    @checked
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
            CancellationWarning, CollapseWarning: as `rollout`.
        """
        return graph_of(self, threshold, start, stop, rule)

    @checked
    def explore(self, height: int = 900) -> "lig_lens.Explorer":
        """Make a page to explore this Flow in; a notebook shows it, `.save(path)` writes it. See `lig_lens.explore`.

        Args:
            height: of the frame in a notebook, in pixels.

        Raises:
            InputError: more numbers than a page holds.
        """
        # The one step up: the package resolves the name when it is asked for.
        return lig_lens.explore(self, height=height)

    @checked
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write tensors and labels to a safetensors file with a JSON header, in one step (never pickle).

        Raises:
            InputError: `path` cannot be written.
        """
        return file.save(self, path)

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike[str]) -> "Flow":
        """Read a Flow that `save` wrote.

        Raises:
            FlowFileError: no such file, a damaged one, one that is no Flow, or one with a newer schema.
        """
        fields, tensors, vouched = file.read(path)
        try:
            flow = cls(**fields, **tensors)
            if not vouched:
                check_sums(flow)
        except InputError as error:
            raise FlowFileError(f"{str(path)!r} is damaged ({error}) Save the Flow again.") from error
        return flow

    @checked
    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Everything as JSON text, schema `lig_lens.flow` version 1 (docs/flow-json.md).

        Also written to `path`, if given.

        Raises:
            InputError: `path` cannot be written.
        """
        return json_of(self, path)

    @checked
    def to_dataframe(self, map: str = "attn") -> "pandas.DataFrame":
        """One map in long form, one row per contribution.

        Columns: map, layer, part, head (missing where no head is meant), src, src_token, dst, dst_token,
        contribution (units of the target), share, and the gap and converged mark of the column it belongs to.

        Raises:
            InputError: an unknown map, or one that this Flow does not have.
            MissingPackageError: pandas is not installed (`pip install pandas`).
        """
        return dataframe_of(self, map)

    def to_xarray(self) -> "xarray.Dataset":
        """All tensors with labelled axes layer, head, src, dst (the model's numbers) and token coordinates.

        Raises:
            MissingPackageError: xarray is not installed (`pip install xarray`).
        """
        return dataset_of(self)
