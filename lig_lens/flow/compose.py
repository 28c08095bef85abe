"""Maps put together: within a block, across blocks, and the strongest paths.

Within a block, source i reaches destination j through head h (attn map, then mlp map), or past all heads (skip). The
weight of that edge is, by `product` (the paper's, arXiv 2606.21564), `attn[h, i, j] mlp[h, j]` for heads, and by
`conserving` (ours) `attn[h, i, j] / sum_i attn[h, i, j] * mlp[h, j]` for heads and `skip[j] + bias[j]` past them: what
the mlp map explains is dealt out to sources, none made and none lost.

Across blocks the weights of each destination are divided by their sum and multiplied.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.errors import CancellationWarning, InputError, check_choice, check_whole, optional
from lig_lens.flow.flow import Flow
from lig_lens.names import MAPS, head_name

if TYPE_CHECKING:
    import networkx
    import pandas

RULES = ("product", "conserving")
# A sum is said to nearly cancel where its terms are this many times larger. Shares amplify what is uncertain in the
# terms as much. Steps with the default baselines stay below 4 on the packaged models, `zero` for the mlp map goes up to
# 200. Figures leave shares of such sums grey.
CANCELS = 10.0
_STEADIER = {"attn_baseline": "itb_map_ratio", "mlp_baseline": "att_itb_a0"}  # with which the least cancels


@dataclass(frozen=True)
class Step:
    """One step of a path through one block: `head` is None on the skip connection, where src = dst."""

    layer: int
    head: int | None
    src: int
    src_token: str
    dst: int
    dst_token: str
    weight: float


@dataclass(frozen=True)
class Path:
    """Steps from an input token to a destination; `weight` is the product of theirs."""

    weight: float
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        # Steps past the heads move nothing, and there are many of them.
        by_heads = [step for step in self.steps if step.head is not None]
        places = [f"{self.steps[0].src_token!r} ({self.steps[0].src})"]
        places += [f"{head_name(step.layer, step.head)} → {step.dst_token!r} ({step.dst})" for step in by_heads]
        return f"{self.weight:+.3g}: " + " ".join(places if by_heads else [*places, "skip"])


@dataclass(frozen=True)
class Edges:
    """Weights of all edges within blocks: through heads, and past them at the destination's own position."""

    heads: Float[Tensor, "layer head src dst"]
    skip: Float[Tensor, "layer dst"]


def edges(flow: Flow, rule: str) -> Edges:
    """Weights in float64, in the units of the rule; see the module's docstring.

    Where a head's output does not move along its path (an `itb` path of the first token of a causal model, say), the
    destination itself gets what the mlp map says of that head.

    Raises:
        InputError: unknown rule, or a Flow without attn and mlp maps.
    """
    check_choice("rule", rule, RULES)
    if flow.attn is None or flow.mlp is None or flow.skip is None or flow.bias is None:
        raise InputError(
            f"compose needs the attn and mlp maps of one Flow, and this one has {', '.join(flow.maps)}: ask "
            "attribute() for maps=('attn', 'mlp') and a target of each destination's vector, such as 'l2'."
        )
    mlp = flow.mlp.double()[:, :, None]
    if rule == "product":
        return Edges(flow.attn.double() * mlp, torch.zeros_like(flow.skip).double())
    shares = flow.shares("attn").double()
    total = shares.sum(-2, keepdim=True)
    rests = total == 0
    shares = torch.where(rests, 0.0, shares / total.masked_fill(rests, 1.0))
    columns = torch.arange(len(flow.destinations))
    shares[:, :, list(flow.destinations), columns] += rests[:, :, 0].double()
    return Edges(shares * mlp, (flow.skip + flow.bias).double())


def compose(flow: Flow, rule: str = "product") -> Float[Tensor, "layer src dst"]:
    """All edges of a block between two tokens added up; see `Flow.compose`."""
    return _composed(edges(flow, rule), flow.destinations).float()


def _composed(found: Edges, destinations: tuple[int, ...]) -> Float[Tensor, "layer src dst"]:
    result = found.heads.sum(1)
    result[:, list(destinations), torch.arange(len(destinations))] += found.skip
    return result


def shares(flow: Flow, rule: str = "conserving", rows: Sequence[int] | None = None) -> Edges:
    """Weights of edges divided by the sum of all that enter the same destination in the same layer.

    A destination that nothing moves keeps what it has: its skip connection gets all.

    Args:
        flow: with attn and mlp maps.
        rule: see `edges`.
        rows: of the layer axis, those that are used; for the warning.

    Raises:
        InputError: see `edges`.

    Warns:
        CancellationWarning: a sum is less than 1 / CANCELS of what is added up in it.
    """
    found = edges(flow, rule)
    total = found.heads.sum((1, 2)) + found.skip
    size = found.heads.abs().sum((1, 2)) + found.skip.abs()
    # Of float32 contributions.
    rounding = torch.finfo(torch.float32).eps * math.prod(found.heads.shape[1:3])
    rests = total.abs() <= rounding * size.amax(-1, keepdim=True)
    divisor = total.masked_fill(rests, 1.0)
    _warn_of_cancelling(flow, torch.where(rests, 1.0, size / divisor.abs()), rows)
    heads = torch.where(rests[:, None, None], 0.0, found.heads / divisor[:, None, None])
    return Edges(heads, torch.where(rests, 1.0, found.skip / divisor))


def _warn_of_cancelling(flow: Flow, times: Float[Tensor, "layer dst"], rows: Sequence[int] | None) -> None:
    """Warn where the terms of a sum are `times` as large as the sum."""
    rows = range(len(flow.layers)) if rows is None else rows
    times = times[list(rows)]
    count = int((times > CANCELS).sum())
    if not count:
        return
    row, column = divmod(int(times.argmax()), times.shape[1])
    where = flow.destinations[column]
    used = {name: flow.settings.get(name) for name in ("attn_baseline", "mlp_baseline")}
    others = [f"{name}={value!r}" for name, value in _STEADIER.items() if used[name] != value]
    warnings.warn(
        f"In {count} of {times.numel()} steps to a destination what its sources contribute nearly cancels; most of "
        f"all in layer {flow.layers[rows[row]]} at {flow.tokens[where]!r} ({where}), where its size is "
        f"{float(times.max()):.0f} times the sum. Shares there, and of what passes through, are large and of both "
        f"signs (baselines: attn {used['attn_baseline']!r}, mlp {used['mlp_baseline']!r})."
        + (f" Less may cancel with {' or '.join(others)}." if others else ""),
        CancellationWarning,
        stacklevel=5,
    )


def _span(flow: Flow, start: int | None, stop: int | None) -> range:
    """Rows of the layer axis from layer `start` up to, not including, layer `stop`."""
    first, last = flow.layers[0], flow.layers[-1] + 1
    start = first if start is None else check_whole("start", start)
    stop = last if stop is None else check_whole("stop", stop)
    if flow.layers != tuple(range(first, last)) or not first <= start < stop <= last:
        raise InputError(
            f"Paths from layer {start} up to layer {stop} need every block between: this Flow has the layers "
            f"{list(flow.layers)}. Ask attribute() for consecutive layers, and name them in order."
        )
    if flow.destinations != tuple(range(len(flow.tokens))):
        raise InputError(
            f"Paths go through all positions, and this Flow has {len(flow.destinations)} destinations of "
            f"{len(flow.tokens)}: ask attribute() for all."
        )
    return range(start - first, stop - first)


def rollout(flow: Flow, start: int | None, stop: int | None, rule: str) -> Float[Tensor, "src dst"]:
    """See `Flow.rollout`."""
    rows = _span(flow, start, stop)
    by_layer = _composed(shares(flow, rule, rows), flow.destinations)
    result = torch.eye(len(flow.tokens), dtype=torch.float64)
    for row in rows:
        result = result @ by_layer[row]
    return result.float()


def paths(flow: Flow, dst: int, k: int, start: int | None, stop: int | None, rule: str) -> list[Path]:
    """See `Flow.paths`. The k best ways to each token of a layer are among the k best to its predecessors."""
    rows = _span(flow, start, stop)
    n_pos, dst, k = len(flow.tokens), check_whole("paths: destination", dst), check_whole("paths: k", k)
    if not -n_pos <= dst < n_pos:
        raise InputError(f"paths: destination {dst} is outside the prompt's {n_pos} tokens.")
    if k < 1:
        raise InputError(f"paths: k is {k}: ask for at least 1.")
    found = shares(flow, rule, rows)
    n_heads = found.heads.shape[1]
    # Of the best ways to every token: weight [token, way], and where each came from, layer by layer.
    best = torch.ones(n_pos, 1, dtype=torch.float64)
    back: list[tuple[Tensor, Tensor, Tensor]] = []
    for row in rows:
        ways = best.shape[1]
        through = found.heads[row].permute(2, 0, 1)[..., None] * best  # dst head src way
        past = found.skip[row][:, None] * best
        options = torch.cat([through.flatten(1), past], 1)
        chosen = options.abs().topk(min(k, options.shape[1]), sorted=True).indices
        best = options.gather(1, chosen)
        edge, way = chosen // ways, chosen % ways
        skips = edge == n_heads * n_pos
        head = torch.where(skips, -1, edge // n_pos)
        src = torch.where(skips, torch.arange(n_pos)[:, None], edge % n_pos)
        back.append((head, src, way))
    result = []
    for number, weight in enumerate(best[dst].tolist()):
        if weight == 0:
            break
        result.append(Path(weight, _walk_back(flow, found, rows, back, dst % n_pos, number)))
    return result


def _walk_back(
    flow: Flow, found: Edges, rows: range, back: list[tuple[Tensor, Tensor, Tensor]], here: int, way: int
) -> tuple[Step, ...]:
    """Steps of one of the best ways to a token, from where each layer's best ways came from."""
    steps = []
    for row, (heads, sources, ways_back) in zip(reversed(rows), reversed(back), strict=True):
        head, src, before = (int(table[here, way]) for table in (heads, sources, ways_back))
        share = found.skip[row, here] if head < 0 else found.heads[row, head, src, here]
        ends = (src, flow.tokens[src], here, flow.tokens[here])
        steps.append(Step(flow.layers[row], None if head < 0 else head, *ends, float(share)))
        here, way = src, before
    return tuple(reversed(steps))


def graph(flow: Flow, threshold: float, start: int | None, stop: int | None, rule: str) -> "networkx.DiGraph":
    """See `Flow.graph`."""
    import networkx

    rows = _span(flow, start, stop)
    if not threshold >= 0:
        raise InputError(f"graph: threshold is {threshold}: give a share of at least 0, such as 0.01.")
    found, into = shares(flow, rule, rows), flow.shares("attn")
    result = networkx.DiGraph(model_name=flow.model_name, rule=rule, threshold=threshold)
    last = flow.layers[rows[-1]] + 1
    for layer in range(flow.layers[rows[0]], last + 1):
        for pos, token in enumerate(flow.tokens):
            result.add_node(("resid", layer, pos), kind="resid", layer=layer, pos=pos, token=token)
    for row in rows:
        layer = flow.layers[row]
        for pos, weight in enumerate(found.skip[row].tolist()):
            if weight and abs(weight) >= threshold:
                result.add_edge(("resid", layer, pos), ("resid", layer + 1, pos), kind="skip", weight=weight)
        strong = (found.heads[row].abs() >= threshold) & (found.heads[row] != 0)
        for head, src, dst in strong.nonzero().tolist():
            node = ("head", layer, head, dst)
            result.add_node(node, kind="head", layer=layer, head=head, pos=dst, token=flow.tokens[dst])
            weight, by_head = float(found.heads[row, head, src, dst]), float(found.heads[row, head, :, dst].sum())
            result.add_edge(
                ("resid", layer, src),
                node,
                kind="attn",
                share=float(into[row, head, src, dst]),
                weight=weight,
            )
            result.add_edge(node, ("resid", layer + 1, dst), kind="mlp", weight=by_head)
    return result


# Agreement of compositions with the directly measured block map.


@dataclass(frozen=True)
class Consistency:
    """How far a composition is from the directly measured block map, column by column.

    Each "layer dst". `l2` is the length of the difference, in the direct map's units; `l2_normalised` the same
    divided by the length of the direct column; `pearson` the correlation over sources. NaN where a column is 0 or
    constant. `layers` are the model's numbers of the layer axis.
    """

    l2: Float[Tensor, "layer dst"]
    l2_normalised: Float[Tensor, "layer dst"]
    pearson: Float[Tensor, "layer dst"]
    labels: dict[str, str]
    layers: tuple[int, ...]

    def means(self) -> dict[str, float]:
        """Mean over layers and destinations, NaN left out."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("labels", "layers")]
        return {name: float(getattr(self, name).nanmean()) for name in names}


def consistency(flow: Flow, direct: Flow, rule: str) -> Consistency:
    """See `Flow.consistency`."""
    if direct.block is None:
        raise InputError(f"consistency compares with the block map, and that Flow has {', '.join(direct.maps)}.")
    _check_same_prompt([flow, direct])
    targets = [str(side.settings.get("target")) for side in (flow, direct)]
    if targets[0] != targets[1]:
        raise InputError(
            f"consistency: the Flows have the targets {targets[0]} and {targets[1]}: compare like with like."
        )
    labels = {name: str(flow.settings.get(name)) for name in ("attn_baseline", "mlp_baseline")}
    labels |= {"rule": rule, "block_baseline": str(direct.settings.get("block_baseline"))}
    composed, measured = compose(flow, rule).double(), direct.block.double()
    # In causal models later sources are 0 on both sides, which is no agreement.
    later = torch.arange(len(flow.tokens))[:, None] > torch.tensor(flow.destinations)
    causal = not bool((composed[:, later] != 0).any() | (measured[:, later] != 0).any())
    seen = ~later if causal else torch.ones_like(later)
    difference = torch.linalg.vector_norm(composed - measured, dim=1)
    length = torch.linalg.vector_norm(measured, dim=1)
    x, y = (_centred(side, seen) for side in (composed, measured))
    pearson = (x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt()
    return Consistency(difference.float(), (difference / length).float(), pearson.float(), labels, flow.layers)


def _centred(values: Float[Tensor, "layer src dst"], seen: Tensor) -> Float[Tensor, "layer src dst"]:
    mean = (values * seen).sum(1, keepdim=True) / seen.sum(0)
    return torch.where(seen, values - mean, 0.0)


def _check_same_prompt(flows: Sequence[Flow]) -> None:
    for name in ("tokens", "layers", "destinations", "model_name"):
        if len({getattr(flow, name) for flow in flows}) > 1:
            raise InputError(f"The Flows differ in their {name}: give Flows of one prompt, model and selection.")


def consistency_table(flows: Sequence[Flow], rules: Sequence[str] = RULES) -> "pandas.DataFrame":
    """Compare every composition of some Flows of one prompt with every direct block map among them.

    Args:
        flows: results of `attribute` for one prompt, with the attn, mlp and block maps from different baselines;
            every attn map is put together with every mlp map.
        rules: of composition.

    Returns:
        one row for each attn baseline, mlp baseline, rule and block baseline, with the means over layers and
        destinations of `l2`, `l2_normalised` and `pearson` (see `Consistency`).

    Raises:
        InputError: Flows of different prompts, or none with one of the maps.
        MissingPackageError: pandas is not installed.
    """
    if not flows:
        raise InputError("consistency_table needs Flows of one prompt: got none.")
    _check_same_prompt(flows)
    for name in MAPS:
        if not any(name in flow.maps for flow in flows):
            raise InputError(f"consistency_table: no Flow has the {name!r} map: ask attribute() for it.")
    rows = []
    for first in (flow for flow in flows if flow.attn is not None):
        for second in (flow for flow in flows if flow.mlp is not None):
            both = _put_together(first, second)
            for rule in rules:
                for direct in (flow for flow in flows if flow.block is not None):
                    found = consistency(both, direct, rule)
                    rows.append(found.labels | found.means())
    frame: pandas.DataFrame = optional("pandas", "consistency_table").DataFrame(rows)
    return frame


def _put_together(first: Flow, second: Flow) -> Flow:
    """The attn map of one Flow and the mlp map of another."""
    cells: dict[str, Any] = {}
    for group in ("total", "gap", "converged", "engines"):
        cells[group] = {"attn": getattr(first, group)["attn"], "mlp": getattr(second, group)["mlp"]}
    settings = first.settings | {"mlp_baseline": second.settings.get("mlp_baseline")}
    parts = {name: getattr(second, name) for name in ("mlp", "skip", "bias")}
    return dataclasses.replace(first, **parts, **cells, block=None, settings=settings)
