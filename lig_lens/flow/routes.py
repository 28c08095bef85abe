"""The strongest paths from tokens to a destination, block by block."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lig_lens.choose import Words, find_places
from lig_lens.errors import InputError, check_whole
from lig_lens.flow.compose import shares, span
from lig_lens.flow.data import FlowData
from lig_lens.flow.rules import Edges
from lig_lens.names import head_name


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


def paths(flow: FlowData, dst: int, k: int, start: int | None, stop: int | None, rule: str) -> list[Path]:
    """See `Flow.paths`. The k best ways to each token of a layer are among the k best to its predecessors."""
    rows = span(flow, start, stop)
    n_pos = len(flow.tokens)
    words = Words(
        missing=f"paths: destination {{number}} is outside the prompt's {n_pos} tokens.", whole="paths: destination"
    )
    (dst,), k = find_places([dst], range(n_pos), words, from_end=True), check_whole("paths: k", k)
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
        result.append(Path(weight, _walk_back(flow, found, rows, back, dst, number)))
    return result


def _walk_back(
    flow: FlowData, found: Edges, rows: range, back: list[tuple[Tensor, Tensor, Tensor]], here: int, way: int
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
