"""What the explorer's page holds of some Flows: labels as JSON, tensors as base64 of halves or floats."""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from lig_lens.errors import InputError
from lig_lens.flow import compose
from lig_lens.flow.compose import CANCELS, edges
from lig_lens.flow.describe import Facts, averaged, describe
from lig_lens.flow.flow import Flow
from lig_lens.flow.labels import TENSORS
from lig_lens.flow.rules import rule_of
from lig_lens.show.explorer.packed import Packed, encoded
from lig_lens.show.plots.style import QUALITATIVE
from lig_lens.show.text import show_token
from lig_lens.show.words import beside_gap, change, mean_of, moving

# Rules of composition that the page has; it composes by them itself.
RULES = tuple(name for name in compose.RULES if rule_of(name).in_explorer)

# Numbers of one Flow: up to the first they are written as float32, up to the second a page holds them at all.
EXACT_NUMBERS = 2**20
MOST_NUMBERS = 2**23
_UNITS = {"l2": "vector length (l2)"}


class Token(TypedDict):
    """A token: its text, how it is shown, and of which kind it is."""

    text: str
    shown: str
    special: bool
    punctuation: bool


class View(TypedDict):
    """One Flow: labels and arrays."""

    label: str
    facts: str
    model: str
    layers: list[int]
    destinations: list[int]
    n_heads: int
    by_head: bool
    unit: str
    half: bool
    dropped: str | None
    split: str
    rounding: dict[str, float]
    arrays: dict[str, Packed]


class MetricView(View):
    """One Flow of contributions to a metric, with the metric's change at each layer; None where it is not finite."""

    totals: list[float | None]


class RuleSpec(TypedDict):
    """A rule of composition, and whether it deals out what the mlp map explains, none made and none lost."""

    name: str
    conserves: bool


class Sample(TypedDict):
    """One prompt and its Flows."""

    label: str
    tokens: list[Token]
    views: list[View]


class Header(TypedDict):
    """All that the page holds beside its arrays."""

    schema: int
    samples: list[Sample]
    colours: list[str]
    rules: list[RuleSpec]
    cancels: float


@dataclass(frozen=True)
class Contents:
    """What the page is filled with: the header and the arrays by their element's id."""

    header: Header
    arrays: dict[str, str]


def contents_of(flows: Mapping[str, Flow]) -> Contents:
    """Pack Flows, those of one prompt under one entry.

    Args:
        flows: by the label under which they are to be chosen.

    Raises:
        InputError: a Flow that has more numbers than a page can hold, even without single heads.
    """
    arrays: dict[str, str] = {}
    samples: dict[tuple[str, ...], Sample] = {}
    for number, (label, flow) in enumerate(flows.items()):
        flow.check_square("explore")
        if flow.tokens not in samples:
            samples[flow.tokens] = _sample(flow)
        samples[flow.tokens]["views"].append(_view(label, flow, f"a{number}", arrays))
    # What the page's numbers depend on is said in Python alone.
    rules: list[RuleSpec] = [{"name": name, "conserves": rule_of(name).conserves} for name in RULES]
    header: Header = {
        "schema": 1,
        "samples": list(samples.values()),
        "colours": QUALITATIVE,
        "rules": rules,
        "cancels": CANCELS,
    }
    return Contents(header, arrays)


def _sample(flow: Flow) -> Sample:
    # Half a surrogate pair, which some tokens are, cannot be written.
    texts = [token.encode("utf-8", "replace").decode() for token in flow.tokens]
    label = " ".join(("" if any(text.startswith(" ") for text in texts[1:]) else " ").join(texts).split())
    mean = averaged(flow.settings) is not None  # then a * stands for tokens that differ
    tokens: list[Token] = [
        {
            "text": text,
            "shown": show_token(text, 24),
            "special": special,
            "punctuation": _is_punctuation(text) and not (mean and text == "*"),
        }
        for text, special in zip(texts, flow.special, strict=True)
    ]
    return {"label": label if len(label) <= 90 else f"{label[:88]}…", "tokens": tokens, "views": []}


def _is_punctuation(text: str) -> bool:
    return bool(text.strip()) and all(unicodedata.category(char).startswith("P") for char in text.strip())


def _view(label: str, flow: Flow, prefix: str, arrays: dict[str, str]) -> View:
    tensors, dropped = _fitting(label, flow)
    half = sum(tensor.numel() for tensor in tensors.values()) > EXACT_NUMBERS
    large = {"attn", "block", "metric", *RULES} if half else set()
    packed: dict[str, Packed] = {}

    def pack(name: str, tensor: Tensor, half: bool = False) -> None:
        key = f"{prefix}-{name}"
        arrays[key], packed[name] = encoded(key, tensor.numpy(), half)

    if describe(flow).hold == "others":
        raise InputError(
            f"explore: the Flow {label!r} has a total for each head (hold='others'), and the page knows one for each "
            "layer: draw it with plots.head_map or plots.importance, or explore a Flow of hold='skip'."
        )
    facts, heads = describe(flow), flow.attn if flow.attn is not None else flow.mlp
    n_heads = 0 if heads is None else heads.shape[1]
    for name, tensor in tensors.items():
        pack(name, tensor, name in large)
    # Halves of a column that nearly cancels do not add up to its sum, and without single heads its size is not known.
    for name in large & tensors.keys() - set(RULES):
        pack(f"{name}-sums", tensors[name].sum(-2))
    if (half or dropped) and flow.attn is not None and flow.mlp is not None:
        for rule in RULES:
            found = edges(flow, rule)
            pack(f"{rule}-sums", (found.heads.sum((1, 2)) + found.skip).float())
            pack(f"{rule}-sizes", (found.heads.abs().sum((1, 2)) + found.skip.abs()).float())
    for name in flow.maps:
        pack(f"{name}-gap", flow.gap[name])
        pack(f"{name}-converged", flow.converged[name].float())
    view: View = {
        "label": label,
        "facts": _in_a_line(facts),
        "model": facts.model,
        "layers": list(flow.layers),
        "destinations": list(flow.destinations),
        "n_heads": n_heads,
        "by_head": flow.attn is not None and dropped is None,
        "unit": f"the metric {facts.metric}" if facts.metric else _UNITS.get(facts.target or "", "the target"),
        "half": half,
        "dropped": dropped,
        "split": "message" if facts.by_message else "source",
        "rounding": _rounding(flow, n_heads),
        "arrays": packed,
    }
    if flow.metric is None:
        return view
    totals = [total if math.isfinite(total) else None for total in flow.total["attn"].tolist()]
    return MetricView(**view, totals=totals)


def _rounding(flow: Flow, n_heads: int) -> dict[str, float]:
    """What of the largest size of a layer's columns is rounding, by map: as `Flow.shares` and `compose.shares` say."""
    terms = {map: flow.columns(map).shape[-2] for map in flow.maps}
    terms |= dict.fromkeys(RULES, n_heads * len(flow.tokens))
    return {map: torch.finfo(torch.float32).eps * count for map, count in terms.items()}


def _fitting(label: str, flow: Flow) -> tuple[dict[str, Tensor], str | None]:
    """A Flow's tensors as far as a page can hold them, and what was left out, in words."""
    tensors: dict[str, Tensor] = {name: getattr(flow, name) for name in TENSORS if getattr(flow, name) is not None}
    count = sum(tensor.numel() for tensor in tensors.values())
    if count <= MOST_NUMBERS:
        return tensors, None
    dropped = None
    if flow.attn is not None:
        # Token to token, heads added up, is smaller by the number of heads.
        heads = tensors.pop("attn")
        if flow.metric is not None:
            tensors["metric"] = heads.sum(1) + torch.diag_embed(tensors["skip"])
        elif flow.mlp is not None:
            tensors |= {rule: flow.compose(rule) for rule in RULES}
        else:
            tensors["attn"] = heads.sum(1)
        dropped = (
            f"Single heads are left out: this Flow has {count:,} numbers, and a page holds {MOST_NUMBERS:,}. "
            f"See them with flow.select(layers=…{'' if flow.metric is not None else ', destinations=…'})."
        )
    left = sum(tensor.numel() for tensor in tensors.values())
    if left > MOST_NUMBERS:
        without = f", {left:,} without single heads" if dropped else ""
        choose = "layers=..." if flow.metric is not None else "layers=..., destinations=..."
        raise InputError(
            f"explore: the Flow {label!r} has {count:,} numbers{without}, and a page holds {MOST_NUMBERS:,}: choose "
            f"fewer with flow.select({choose})."
        )
    return tensors, dropped


def _in_a_line(facts: Facts) -> str:
    """Model, size and certainty."""
    said = [facts.model or "model", f"{facts.n_tokens} tokens", f"{facts.n_layers} blocks", *mean_of(facts.averaged)]
    if facts.metric is not None:
        said.append(f"metric {facts.metric}{moving(facts)}{change(facts)}")
    said.append(f"worst gap {facts.worst_gap:.0e}{beside_gap(facts)}")
    if facts.missed:
        said.append(f"{1 - facts.converged_share:.1%} of the {facts.counted} not converged")
    return " · ".join(said)


def flow_names(flows: Sequence[Flow]) -> list[str]:
    """Baselines of Flows, or their metrics."""
    return [_name(describe(flow)) for flow in flows]


def _name(facts: Facts) -> str:
    """The baselines of a Flow, or its metric."""
    if facts.metric is not None:
        return f"{facts.metric}{moving(facts)}, from {facts.baselines.get('attn')}"
    return ", ".join(f"{name} {facts.baselines.get(name, '?')}" for name in facts.maps)
