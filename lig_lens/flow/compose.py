"""Maps put together: within a block, and across blocks.

Within a block, source i reaches destination j through head h (attn map, then mlp map), or past all heads (skip). How
much each of these edges weighs is up to a rule (`rules.py`).

Across blocks the weights of each destination are divided by their sum and multiplied.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lig_lens.choose import Words, find_places
from lig_lens.errors import CancellationWarning, CollapseWarning, InputError, check_whole, warn_caller
from lig_lens.flow import rules
from lig_lens.flow.data import FlowData
from lig_lens.flow.rules import Edges

RULES = rules.RULES.names()
# A sum is said to nearly cancel where its terms are this many times larger. Shares amplify what is uncertain in the
# terms as much. Steps with the default baselines stay below 4 on the packaged models, `zero` for the mlp map goes up to
# 200. Figures leave shares of such sums grey.
CANCELS = 10.0
# A rollout is said to be the same for all destinations where its columns differ by less than this part of their length.
# MiniLM's keep 20 % and more with baselines and a rule that fit, and 1 % with the defaults (benchmarks/rollout.py).
ALIKE = 0.05


def edges(flow: FlowData, rule: str) -> Edges:
    """Weights of all edges within blocks, in float64 and in the units of the rule.

    Raises:
        InputError: unknown rule, or a Flow without attn and mlp maps.
    """
    return rules.rule_of(rule).edges(rules.head_maps(flow))


def compose(flow: FlowData, rule: str = "product") -> Float[Tensor, "layer src dst"]:
    """All edges of a block between two tokens added up; see `Flow.compose`."""
    return _composed(edges(flow, rule), flow.destinations).float()


def _composed(found: Edges, destinations: tuple[int, ...]) -> Float[Tensor, "layer src dst"]:
    result = found.heads.sum(1)
    result[:, list(destinations), torch.arange(len(destinations))] += found.skip
    return result


def shares(flow: FlowData, rule: str = "conserving", rows: Sequence[int] | None = None) -> Edges:
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
        CollapseWarning: several layers, through which all destinations come to be made of the same tokens.
    """
    found = edges(flow, rule)
    used = range(len(flow.layers)) if rows is None else rows
    sums = _sums(found)
    _warn_of_cancelling(flow, sums.times, used)
    divided = _divided(found, sums)
    if _alike(divided, flow, used):
        warn_caller(
            f"Through {len(used)} layers all destinations come to be made of the same tokens: their columns of the "
            f"rollout differ by less than {ALIKE:.0%}. {_remedy(found, used, rule)[0]}.",
            CollapseWarning,
        )
    return divided


def _divided(found: Edges, sums: "_Sums") -> Edges:
    divisor = sums.total.masked_fill(sums.rests, 1.0)
    heads = torch.where(sums.rests[:, None, None], 0.0, found.heads / divisor[:, None, None])
    return Edges(heads, torch.where(sums.rests, 1.0, found.skip / divisor))


class _Sums(NamedTuple):
    """What enters each destination: its sum, whether that is rounding, and how many times larger its terms are."""

    total: Float[Tensor, "layer dst"]
    rests: Bool[Tensor, "layer dst"]
    times: Float[Tensor, "layer dst"]


def _sums(found: Edges) -> _Sums:
    total = found.heads.sum((1, 2)) + found.skip
    size = found.heads.abs().sum((1, 2)) + found.skip.abs()
    # Of float32 contributions.
    rounding = torch.finfo(torch.float32).eps * math.prod(found.heads.shape[1:3])
    rests = total.abs() <= rounding * size.amax(-1, keepdim=True)
    return _Sums(total, rests, torch.where(rests, 1.0, size / total.masked_fill(rests, 1.0).abs()))


def _alike(divided: Edges, flow: FlowData, rows: Sequence[int]) -> bool:
    """Whether the columns of a rollout through several layers are nearly the same."""
    if len(rows) < 2 or not flow.has_all_destinations or len(flow.tokens) < 2:
        return False
    columns = _rolled(divided, flow, rows)
    return bool((columns - columns.mean(1, keepdim=True)).norm() < ALIKE * columns.norm())


def _remedy(found: Edges, rows: Sequence[int], rule: str) -> tuple[str, str]:
    """What to do about columns that are alike, at length and in a few words."""
    if rule == "product":
        return "The rule 'product' leaves out what stays with a token: take another", "take rule='conserving'"
    skip, heads = found.skip[list(rows)].abs(), found.heads[list(rows)].abs()
    if bool((skip <= 1e-6 * heads.sum((1, 2)).amax(-1, keepdim=True)).all()):
        return (
            "With this mlp_baseline nothing of a token stays with it: ask attribute() for attn_baseline='zero' and "
            "mlp_baseline='zero', which counts the skip connection",
            "use mlp_baseline='zero'",
        )
    return "Pass fewer layers (start, stop): what a few of them do still differs by destination", "pass fewer layers"


def doubts(flow: FlowData, start: int | None, stop: int | None, rule: str) -> list[str]:
    """What a figure of shares through the layers has to say against itself, in a few words each."""
    rows, found = span(flow, start, stop), edges(flow, rule)
    sums = _sums(found)
    times = sums.times[list(rows)]
    cancelling = int((times > CANCELS).sum())
    said = []
    if _alike(_divided(found, sums), flow, rows):
        said.append(f"<b>all destinations look alike</b>, {_remedy(found, rows, rule)[1]}")
    if cancelling:
        said.append(
            f"<b>contributions nearly cancel in {cancelling} of {times.numel()} steps</b>: shares are unreliable"
        )
    return said


def _warn_of_cancelling(flow: FlowData, times: Float[Tensor, "layer dst"], rows: Sequence[int]) -> None:
    """Warn where the terms of a sum are `times` as large as the sum."""
    times = times[list(rows)]
    count = int((times > CANCELS).sum())
    if not count:
        return
    row, column = divmod(int(times.argmax()), times.shape[1])
    where = flow.destinations[column]
    used = {name: flow.settings.get(name) for name in ("attn_baseline", "mlp_baseline")}
    warn_caller(
        f"In {count} of {times.numel()} steps to a destination what its sources contribute nearly cancels; most of "
        f"all in layer {flow.layers[rows[row]]} at {flow.tokens[where]!r} ({where}), where its size is "
        f"{float(times.max()):.0f} times the sum. Shares there, and of what passes through, are large and of both "
        f"signs (baselines: attn {used['attn_baseline']!r}, mlp {used['mlp_baseline']!r}). Nothing cancels with "
        "rule='sizes', which knows no signs"
        + ("." if used["attn_baseline"] == "itb_map_ratio" else "; less with attn_baseline='itb_map_ratio'."),
        CancellationWarning,
    )


def span(flow: FlowData, start: int | None, stop: int | None) -> range:
    """Rows of the layer axis from layer `start` up to, not including, layer `stop`.

    Raises:
        InputError: a layer that is missing, in any place, or a destination that is.
    """
    flow.check_square("A path through layers")
    first, last = flow.layers[0], flow.layers[-1] + 1
    start = first if start is None else check_whole("start", start)
    stop = last if stop is None else check_whole("stop", stop)
    problem = (
        f"Paths from layer {start} up to layer {stop} need every block between: this Flow has the layers "
        f"{list(flow.layers)}. Ask attribute() for consecutive layers, and name them in order."
    )
    consecutive = flow.layers == tuple(range(first, last))
    # One layer more than there are is enough to see that some are missing.
    wanted = range(start, stop)[: len(flow.layers) + 1]
    rows = find_places(wanted, flow.layers if consecutive else (), Words(missing=problem, none=problem))
    if not flow.has_all_destinations:
        raise InputError(
            f"Paths go through all positions, and this Flow has {len(flow.destinations)} destinations of "
            f"{len(flow.tokens)}: ask attribute() for all."
        )
    return range(rows[0], rows[-1] + 1)


def rollout(flow: FlowData, start: int | None, stop: int | None, rule: str) -> Float[Tensor, "src dst"]:
    """See `Flow.rollout`."""
    rows = span(flow, start, stop)
    return _rolled(shares(flow, rule, rows), flow, rows).float()


def _rolled(divided: Edges, flow: FlowData, rows: Sequence[int]) -> Float[Tensor, "src dst"]:
    by_layer = _composed(divided, flow.destinations)
    result = torch.eye(len(flow.tokens), dtype=torch.float64)
    for row in rows:
        result = result @ by_layer[row]
    return result
