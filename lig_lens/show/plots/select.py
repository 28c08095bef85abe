"""What of a Flow a figure draws: positions, and what is subtracted."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lig_lens.choose import find_places, of_tokens
from lig_lens.errors import InputError
from lig_lens.flow.compose import CANCELS
from lig_lens.flow.describe import describe
from lig_lens.flow.flow import Flow
from lig_lens.show.plots.facts import about, baselines, whole, worst_gap
from lig_lens.show.plots.matrix import Axis
from lig_lens.show.plots.style import short, token_label


@dataclass(frozen=True)
class Positions:
    """Sources and destinations that are shown: as positions, and destinations also as places on a Flow's dst axis."""

    sources: list[int]
    destinations: list[int]
    places: list[int]


def pick(call: str, flow: Flow, tokens: Sequence[int] | None) -> Positions:
    """Sources and destinations of a Flow among some positions, all by default; negative ones count from the end.

    Raises:
        InputError: one outside the prompt, none at all, or none that is a destination; any of a Flow from one text to
            another.
    """
    if tokens is None:
        return Positions(list(range(len(flow.tokens))), list(flow.destinations), list(range(len(flow.destinations))))
    if not flow.is_square:
        raise InputError(
            f"{call}: tokens={list(tokens)} names positions of one text, and this Flow goes from one to another "
            "(stream='cross'): leave it out, and choose destinations with Flow.select."
        )
    sources = find_places(tokens, range(len(flow.tokens)), of_tokens(call, len(flow.tokens)), from_end=True)
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
    to = name == "destination"
    tokens, special = (flow.dst_tokens, flow.dst_special) if to else (flow.tokens, flow.special)
    labels = [token_label(tokens[at], special[at], at if numbered else None) for at in positions]
    return Axis(f"{name} token", labels, name, None if numbered else positions)


@dataclass(frozen=True)
class Drawn:
    """Terms of a map to be drawn: `columns` or `shares`, or their difference from those of another Flow.

    Shares are NaN where `cancels` (one entry for each total, with the axes `cells`, see `cancelling`).
    """

    map: str
    terms: torch.Tensor
    share: bool
    minus: bool
    what: str
    hover: str
    facts: list[str]
    cancels: torch.Tensor
    cells: tuple[str, ...]

    @property
    def signed(self) -> bool:
        """Whether negative values mean something that the colours have to show."""
        return self.minus or not self.share


def drawn(call: str, flow: Flow, map: str, share: bool, minus: Flow | None) -> Drawn:
    """Contributions or shares of one map, less those of another Flow.

    Raises:
        InputError: the map is missing, or the Flows do not belong together.
    """
    terms, cancels = _terms(flow, map, share)
    what = f"share of each {whole(flow)}" if share else "signed contribution"
    value = "%{z:+.2%}" if share and minus is not None else "%{z:.2%}" if share else "%{z:+.4g}"
    words = f"share of the {whole(flow)}" if share else "contribution"
    facts = about(flow)
    if minus is None:
        facts += [*baselines(flow, [map]), worst_gap([flow], [map])]
    else:
        _check_alike(call, flow, minus, map, share)
        others, cancel_too = _terms(minus, map, share)
        terms, cancels = terms - others, cancels | cancel_too
        what = words = "difference of shares" if share else "difference of contributions"
        same = flow.settings.get(f"{map}_baseline") == minus.settings.get(f"{map}_baseline")
        facts += [*(baselines(flow, [map]) if same else []), _difference(flow, minus, map)]
        facts += [worst_gap([flow, minus], [map])]
    return Drawn(map, terms, share, minus is not None, what, f"{words} {value}", facts, cancels, flow.axes.cells[map])


def _terms(flow: Flow, map: str, share: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Contributions or shares of a map, and of which totals these cannot be shares."""
    if not share:
        terms = flow.columns(map)
        return terms, torch.zeros_like(flow.total[map], dtype=torch.bool)
    terms, cancels = flow.shares(map), cancelling(flow, map)
    return terms.masked_fill(flow.axes.spread(map, cancels), torch.nan), cancels


def cancelling(flow: Flow, map: str) -> torch.Tensor:
    """Which totals nearly cancel: what is added up is more than `CANCELS` times as large.

    Returns:
        as `flow.total[map]`. What `shares` gives as 0 does not count: nothing is divided there.
    """
    terms, shares = flow.columns(map), flow.shares(map)
    if flow.metric is not None:
        size, total = terms.abs().sum(flow.axes.within(map)), flow.total[map]
        if flow.skip is not None and total.ndim == 1:
            size = size + flow.skip.abs().sum(-1)
        return (size > CANCELS * total.abs()) & (total != 0)
    size, total = terms.abs().sum(-2), terms.sum(-2)
    return (size > CANCELS * total.abs()) & (shares != 0).any(-2)


def _check_alike(call: str, flow: Flow, minus: Flow, map: str, share: bool) -> None:
    holds = [describe(one).hold for one in (flow, minus)]
    if holds[0] != holds[1]:
        raise InputError(
            f"{call}: minus= has hold={holds[1]!r}, not {holds[0]!r}, so that its totals are of something else: give a "
            "Flow that was asked for in the same way."
        )
    for name in ("tokens", "dst_tokens", "layers", "destinations"):
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
    for name in (f"{map}_baseline", "target", "split", "hold", "noising", "corrupted_token_ids", "tol", "engine"):
        first, second = flow.settings.get(name), minus.settings.get(name)
        if first != second:
            other = name == "corrupted_token_ids"
            phrases.append("other corrupted prompts" if other else _sides(name.replace("_", " "), first, second))
    return "; ".join(phrases) or "minus another Flow of the same settings"


def _sides(name: str, first: object, second: object) -> str:
    return f"{name}: {short(str(first), 40)} minus {short(str(second), 40)}"
