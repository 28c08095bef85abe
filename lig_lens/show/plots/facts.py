"""What the lines below a figure's heading say of a Flow, as escaped text."""

from collections.abc import Sequence

import torch

from lig_lens.flow.describe import describe
from lig_lens.flow.flow import Flow
from lig_lens.show.plots.style import short
from lig_lens.show.words import beside_gap, change, mean_of, moving


def about(flow: Flow, target: bool = True) -> list[str]:
    """Model, number of tokens and prompts and, if asked for, target of a Flow."""
    facts = describe(flow)
    said = [short(facts.model)] if facts.model else []
    said += [f"{facts.n_tokens} tokens", *mean_of(facts.averaged)]
    if target and facts.metric is not None:
        said.append(f"metric {short(facts.metric)}{change(facts)}{moving(facts)}")
    elif target and facts.target is not None:
        said.append(f"target {short(facts.target)}")
    return said


def baselines(flow: Flow, maps: Sequence[str]) -> list[str]:
    """Where the paths of some maps start."""
    known = describe(flow).baselines
    return [f"{map} baseline {short(known[map])}" for map in maps if map in known]


def worst_gap(flows: Sequence[Flow], maps: Sequence[str]) -> str:
    """The largest completeness gap of some maps, beside the tolerance."""
    gap = max(flow.worst_gap(map) for flow in flows for map in maps)
    return f"worst completeness gap {gap:.1e}{beside_gap(describe(flows[0]))}"


def unit(flow: Flow) -> str:
    """What contributions are measured in."""
    facts = describe(flow)
    if facts.metric is not None:
        return "in the metric's units"
    return "in units of vector length (l2)" if facts.target == "l2" else "in the target's unit"


def whole(flow: Flow) -> str:
    """What shares are shares of: in figures, where destinations stand down, "column" would mislead."""
    if flow.metric is None:
        return "destination's total"
    return "head's total" if flow.axes.cells["attn"] == ("layer", "head") else "layer's total"


def cancelling_fact(cancels: torch.Tensor) -> list[str]:
    """What a reader has to know of shares that are not shown."""
    count = int(cancels.sum())
    return [f"{count:,} of {cancels.numel():,} totals nearly cancel: shares not shown (grey)"] if count else []
