"""What the explorer has to draw and tell, from a Flow's tensors alone.

A map's weights are [head, source, column]; the block map has one head that stands for the block. `row` counts the
layers of the Flow, a node is (row of nodes, position).
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Choice:
    """What is shown, as the page's state has it."""

    map: str
    layer: int = 0
    head: int | None = None
    node: tuple[int, int] | None = None
    scale: str = "share"
    threshold: float = 0.0
    skip: bool = True

    @classmethod
    def of(cls, state):
        node = state["node"] and (state["node"]["row"], state["node"]["pos"])
        return cls(node=node, **{key: state[key] for key in ("map", "layer", "head", "scale", "threshold", "skip")})

    def head_in(self, row):
        return self.head if row == self.layer else None


@dataclass(frozen=True)
class Told:
    """The exact numbers of an edge; `gap` None where it has none of its own."""

    value: float
    share: float
    gap: float | None
    converged: bool | None


def rows_of(layers):
    """Rows of nodes below and above each layer, and how many there are: one between layers that follow each other."""
    low, high, count = [], [], 0
    for i, layer in enumerate(layers):
        joined = i > 0 and layers[i - 1] == layer - 1
        low.append(high[-1] if joined else count)
        high.append(low[-1] + 1)
        count = high[-1] + 1
    return low, high, count


def heads_of(flow, map, row):
    columns = torch.arange(len(flow.destinations))
    own = list(flow.destinations)
    if map == "block":
        return flow.block[row].double()[None]
    if map in ("attn", "metric"):
        return flow.attn[row].double()
    mlp = flow.mlp[row].double()
    if map == "mlp":
        result = torch.zeros(len(mlp), len(flow.tokens), len(columns), dtype=torch.float64)
        result[:, own, columns] = mlp
        return result
    attn = flow.attn[row].double()
    if map == "product":
        return attn * mlp[:, None]
    sums = attn.sum(1)
    result = torch.where(sums[:, None] == 0, 0.0, attn / sums.masked_fill(sums == 0, 1.0)[:, None]) * mlp[:, None]
    result[:, own, columns] += torch.where(sums == 0, mlp, 0.0)
    return result


def past_of(flow, map, row):
    """What goes past the heads at each column, or None."""
    if map == "metric":
        return flow.skip[row].double()
    return (flow.skip[row] + flow.bias[row]).double() if map in ("mlp", "conserving") else None


def divisors_of(flow, map, row, head):
    """What a weight is divided by to be a share, at each column; 0 where there is nothing to share."""
    if map == "metric":
        return flow.total["attn"][row].double().expand(len(flow.tokens))
    heads, past = heads_of(flow, map, row), past_of(flow, map, row)
    if map == "attn" and head is not None:
        return heads[head].sum(0)
    return heads.sum((0, 1)) + (0 if past is None else past)


def told_of(flow, map, row, head, src, dst):
    """Of one head, of all (None), or of what goes past them ('past')."""
    c = flow.destinations.index(dst)
    heads = heads_of(flow, map, row)
    if head == "past":
        value = past_of(flow, map, row)[c]
    else:
        value = (heads.sum(0) if head is None else heads[head])[src, c]
    divisor = divisors_of(flow, map, row, None if head == "past" else head)[c]
    share = float(value / divisor) if divisor else math.nan
    gap, converged = flow.gap, flow.converged
    parts = {
        "metric": lambda: [("attn", row)],
        "block": lambda: [("block", (row, c))],
        "mlp": lambda: [("mlp", (row, c))],
        "attn": lambda: [("attn", (row, head, c))] if head is not None else [],
    }
    composed = [("mlp", (row, c))] if head == "past" else [("attn", (row, head, c)), ("mlp", (row, c))]
    where = parts[map]() if map in parts else composed if head is not None else []
    if not where:
        return Told(float(value), share, None, None)
    return Told(
        float(value),
        share,
        max(float(gap[name][at]) for name, at in where),
        all(bool(converged[name][at]) for name, at in where),
    )


def follows(flow, choice):
    chained = list(flow.layers) == list(range(flow.layers[0], flow.layers[0] + len(flow.layers)))
    return chained and len(flow.destinations) == len(flow.tokens) and choice.map in ("product", "conserving")


def _steps(flow, map, row, head=None):
    """Shares of a step [source, destination], and what of them goes past the heads; what nothing moves stays."""
    heads, past = heads_of(flow, map, row), past_of(flow, map, row)
    total = divisors_of(flow, map, row, None)
    rests = total == 0
    over = total.masked_fill(rests, 1.0)
    beyond = torch.where(rests, 1.0, torch.zeros_like(total) if past is None else past / over)
    through = torch.where(rests, 0.0, (heads.sum(0) if head is None else heads[head]) / over)
    return through, beyond


def cone_of(flow, choice):
    """Of every node how much it has to do with the chosen one, which flow can be followed to and from."""
    row, pos = choice.node
    n = len(flow.tokens)
    cone = {row: torch.eye(n, dtype=torch.float64)[pos]}
    for layer in reversed(range(row)):
        through, beyond = _steps(flow, choice.map, layer)
        cone[layer] = (through + torch.diag(beyond)) @ cone[layer + 1]
    for layer in range(row, len(flow.layers)):
        through, beyond = _steps(flow, choice.map, layer)
        cone[layer + 1] = cone[layer] @ (through + torch.diag(beyond))
    return cone


def _weights(flow, choice, row):
    """Weights [source, column] through the heads that are shown, and past them, in the scale that is shown."""
    head = choice.head_in(row)
    heads, past = heads_of(flow, choice.map, row), past_of(flow, choice.map, row)
    through = heads.sum(0) if head is None else heads[head]
    beyond = torch.zeros(through.shape[1], dtype=torch.float64) if past is None or head is not None else past
    if choice.scale == "share":
        divisors = divisors_of(flow, choice.map, row, head)
        through, beyond = (torch.where(divisors == 0, 0.0, part / divisors) for part in (through, beyond))
    return through, beyond


def edges_of(flow, choice):
    """Value, and size relative to what the threshold is of, by (row, source, destination, whether past the heads)."""
    low, high, _ = rows_of(flow.layers)
    cone = cone_of(flow, choice) if choice.node and follows(flow, choice) else None
    found = {}
    for row in range(len(flow.layers)):
        if cone:
            through, beyond = _steps(flow, choice.map, row, choice.head_in(row))
            if choice.head_in(row) is not None:
                beyond = torch.zeros_like(beyond)
            below = high[row] <= choice.node[0]
            passing = cone[high[row]] if below else cone[low[row]][:, None]
            through, beyond = through * passing, beyond * passing.flatten()
        else:
            through, beyond = _weights(flow, choice, row)
        sizes = torch.cat([through.abs().flatten(), beyond.abs() if choice.skip else torch.zeros(1)])
        unit = float(sizes.max()) if choice.scale == "absolute" and not cone else 1.0
        for c, dst in enumerate(flow.destinations):
            for src in range(len(flow.tokens)):
                touches = choice.node in ((high[row], dst), (low[row], src))
                if choice.node and not cone and not touches and choice.map != "metric":
                    continue
                found[row, src, dst, False] = float(through[src, c]), float(through[src, c].abs()) / unit
            if choice.skip and (row, dst, dst, False) in found:
                found[row, dst, dst, True] = float(beyond[c]), float(beyond[c].abs()) / unit
    return {key: edge for key, edge in found.items() if edge[1] > 1e-9}


def nodes_of(flow, choice):
    """Value of every node that has one."""
    low, high, _ = rows_of(flow.layers)
    if choice.node and follows(flow, choice):
        return {(row, i): float(v) for row, values in cone_of(flow, choice).items() for i, v in enumerate(values)}
    found = {}
    columns = list(flow.destinations)
    for row in range(len(flow.layers)):
        through, beyond = _weights(flow, choice, row)
        whole = through.clone()
        whole[columns, torch.arange(len(columns))] += beyond
        mean = choice.scale == "share" and choice.map != "metric"
        for i in range(len(flow.tokens)):
            if choice.map == "mlp":
                if i in columns:
                    found[low[row], i] = float(through[i, columns.index(i)])
            elif not choice.node or choice.map == "metric":
                found[low[row], i] = float(whole[i].mean() if mean else whole[i].sum())
            else:
                at, pos = choice.node
                if high[row] == at and pos in columns:
                    found[low[row], i] = float(whole[i, columns.index(pos)])
                if low[row] == at and i in columns:
                    found[high[row], i] = float(whole[pos, columns.index(i)])
    return found
