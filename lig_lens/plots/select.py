"""What of a Flow a figure draws: positions, and what is subtracted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lig_lens.errors import InputError, check_whole
from lig_lens.flow import Flow
from lig_lens.plots.matrix import Axis
from lig_lens.plots.style import short, signed_number, token_label


def chosen_positions(call: str, tokens: Sequence[int] | None, n_pos: int) -> list[int]:
    """Positions to show, all by default; negative ones count from the end.

    Raises:
        InputError: one outside the prompt, or none at all.
    """
    if tokens is None:
        return list(range(n_pos))
    found = []
    for position in tokens:
        place = check_whole(f"{call}: a position of tokens", position)
        if not -n_pos <= place < n_pos:
            raise InputError(f"{call}: tokens={list(tokens)}: {place} is outside the prompt's {n_pos} tokens.")
        found.append(place % n_pos)
    if not found:
        raise InputError(f"{call}: tokens=[] shows nothing: name a position, or leave it out for all.")
    return found


@dataclass(frozen=True)
class Positions:
    """Sources and destinations that are shown: as positions, and destinations also as places on a Flow's dst axis."""

    sources: list[int]
    destinations: list[int]
    places: list[int]


def pick(call: str, flow: Flow, tokens: Sequence[int] | None) -> Positions:
    """Sources and destinations of a Flow among some positions.

    Raises:
        InputError: see `chosen_positions`, or none of them is a destination.
    """
    if tokens is None:
        return Positions(list(range(len(flow.tokens))), list(flow.destinations), list(range(len(flow.destinations))))
    sources = chosen_positions(call, tokens, len(flow.tokens))
    destinations = [position for position in sources if position in flow.destinations]
    if not destinations:
        raise InputError(
            f"{call}: tokens={list(tokens)} has none of this Flow's destinations {list(flow.destinations)}: name some."
        )
    return Positions(sources, destinations, [flow.destinations.index(position) for position in destinations])


def token_axis(flow: Flow, positions: Sequence[int], name: str, numbered: bool = False) -> Axis:
    """Labels of some positions.

    Args:
        flow: has the tokens.
        positions: to show.
        name: `source` or `destination`.
        numbered: labels have the position beside the token.
    """
    labels = [token_label(flow.tokens[at], flow.special[at], at if numbered else None) for at in positions]
    return Axis(f"{name} token", labels, name, None if numbered else positions)


def whole(flow: Flow) -> str:
    """What shares are shares of: in figures, where destinations stand down, "column" would mislead."""
    return "destination's total" if flow.metric is None else "layer's total"


@dataclass(frozen=True)
class Drawn:
    """Terms of a map to be drawn: `columns` or `shares`, or their difference from those of another Flow."""

    map: str
    terms: torch.Tensor
    share: bool
    minus: bool
    what: str
    hover: str
    facts: list[str]

    @property
    def signed(self) -> bool:
        """Whether negative values mean something that the colours have to show."""
        return self.minus or not self.share


def drawn(call: str, flow: Flow, map: str, share: bool, minus: Flow | None) -> Drawn:
    """Contributions or shares of one map, less those of another Flow.

    Raises:
        InputError: the map is missing, or the Flows do not belong together.
    """
    terms = flow.shares(map) if share else flow.columns(map)
    what = f"share of each {whole(flow)}" if share else "signed contribution"
    value = "%{z:+.2%}" if share and minus is not None else "%{z:.2%}" if share else "%{z:+.4g}"
    words = f"share of the {whole(flow)}" if share else "contribution"
    facts = describe(flow)
    baseline = flow.settings.get(f"{map}_baseline")
    gap = flow.worst_gap(map)
    if minus is not None:
        _check_alike(call, flow, minus, map, share)
        terms = terms - (minus.shares(map) if share else minus.columns(map))
        gap = max(gap, minus.worst_gap(map))
        what = words = "difference of shares" if share else "difference of contributions"
        facts.append(_difference(flow, minus, map))
    elif baseline:
        facts.append(f"baseline {short(str(baseline))}")
    tol = flow.settings.get("tol")
    facts.append(f"worst completeness gap {gap:.1e}" + (f" (tol {tol:g})" if isinstance(tol, float) else ""))
    return Drawn(map, terms, share, minus is not None, what, f"{words} {value}", facts)


def describe(flow: Flow, target: bool = True) -> list[str]:
    """Model, number of tokens and prompts and, if asked for, target of a Flow, as escaped text."""
    facts = [short(flow.model_name), f"{len(flow.tokens)} tokens", averaged(flow.settings)]
    if target and flow.metric is not None:
        by_message = ", by message" if flow.settings.get("split") == "message" else ""
        facts.append(f"metric {short(flow.metric)}{metric_change(flow)}{by_message}")
    elif target and "target" in flow.settings:
        facts.append(f"target {short(str(flow.settings['target']))}")
    return [fact for fact in facts if fact]


def averaged(settings: dict[str, Any]) -> str:
    """Over how many prompts `average` has gone, or nothing."""
    return f"mean of {settings['averaged']} prompts" if "averaged" in settings else ""


def metric_change(flow: Flow) -> str:
    """From where to where the metric goes, if the Flow knows."""
    ends = flow.settings.get("metric")
    known = [ends.get(name) for name in ("corrupted", "clean")] if isinstance(ends, dict) else []
    numbers = [signed_number(end) for end in known if isinstance(end, float)]
    return f" ({' → '.join(numbers)})" if len(numbers) == 2 else ""


def unit(flow: Flow) -> str:
    """What contributions are measured in, as escaped text."""
    return "in the target's unit" if flow.metric is None else "in the metric's units"


def _check_alike(call: str, flow: Flow, minus: Flow, map: str, share: bool) -> None:
    for name in ("tokens", "layers", "destinations"):
        if getattr(flow, name) != getattr(minus, name):
            raise InputError(
                f"{call}: minus= has other {name} ({getattr(minus, name)}, not {getattr(flow, name)}): give a Flow of "
                "the same tokens, layers and destinations (see Flow.select)."
            )
    shapes = [list(side.columns(map).shape) for side in (flow, minus)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{call}: minus= has a {map!r} map of shape {shapes[1]}, not {shapes[0]}: give a Flow with as many heads."
        )
    kinds = [side.metric is not None for side in (flow, minus)]
    targets = [str(side.settings.get("target")) for side in (flow, minus)]
    if kinds[0] != kinds[1] or (targets[0] != targets[1] and not share):
        raise InputError(
            f"{call}: minus= has the target {targets[1]}, not {targets[0]}, and so another unit: give a Flow of the "
            "same target" + ("." if kinds[0] != kinds[1] else ", or compare shares (share=True).")
        )


def _difference(flow: Flow, minus: Flow, map: str) -> str:
    """What sets two Flows apart, in words."""
    phrases = [] if flow.model_name == minus.model_name else [_sides("model", flow.model_name, minus.model_name)]
    for name in (f"{map}_baseline", "target", "split", "corrupted_token_ids", "tol", "engine"):
        first, second = flow.settings.get(name), minus.settings.get(name)
        if first != second:
            other = name == "corrupted_token_ids"
            phrases.append("other corrupted prompts" if other else _sides(name.replace("_", " "), first, second))
    return "; ".join(phrases) or "minus another Flow of the same settings"


def _sides(name: str, first: object, second: object) -> str:
    return f"{name}: {short(str(first), 40)} minus {short(str(second), 40)}"
