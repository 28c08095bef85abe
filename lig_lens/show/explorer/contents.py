"""What the explorer's page holds of some Flows: labels as JSON, tensors as base64 of halves or floats."""

import base64
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lig_lens.errors import InputError
from lig_lens.flow.compose import CANCELS, RULES, edges
from lig_lens.flow.flow import Flow
from lig_lens.show.plots.select import metric_change
from lig_lens.show.plots.style import QUALITATIVE, show_token

# Numbers of one Flow: up to the first they are written as float32, up to the second a page holds them at all.
EXACT_NUMBERS = 2**20
MOST_NUMBERS = 2**23
_UNITS = {"l2": "vector length (l2)"}


@dataclass(frozen=True)
class Contents:
    """What the page is filled with: the header and the arrays by their element's id."""

    header: dict[str, Any]
    arrays: dict[str, str]


def contents_of(flows: Mapping[str, Flow]) -> Contents:
    """Pack Flows, those of one prompt under one entry.

    Args:
        flows: by the label under which they are to be chosen.

    Raises:
        InputError: a Flow that has more numbers than a page can hold, even without single heads.
    """
    arrays: dict[str, str] = {}
    samples: dict[tuple[str, ...], dict[str, Any]] = {}
    for number, (label, flow) in enumerate(flows.items()):
        if flow.tokens not in samples:
            samples[flow.tokens] = _sample(flow)
        samples[flow.tokens]["views"].append(_view(label, flow, f"a{number}", arrays))
    # What the page's numbers depend on is said in Python alone.
    rules = [{"name": rule, "conserves": rule == "conserving"} for rule in RULES]
    composing = {"rules": rules, "cancels": CANCELS}
    return Contents({"schema": 1, "samples": list(samples.values()), "colours": QUALITATIVE, **composing}, arrays)


def _sample(flow: Flow) -> dict[str, Any]:
    # Half a surrogate pair, which some tokens are, cannot be written.
    texts = [token.encode("utf-8", "replace").decode() for token in flow.tokens]
    label = " ".join(("" if any(text.startswith(" ") for text in texts[1:]) else " ").join(texts).split())
    averaged = "averaged" in flow.settings  # then a * stands for tokens that differ
    tokens = [
        {
            "text": text,
            "shown": show_token(text, 24),
            "special": special,
            "punctuation": _is_punctuation(text) and not (averaged and text == "*"),
        }
        for text, special in zip(texts, flow.special, strict=True)
    ]
    return {"label": label if len(label) <= 90 else f"{label[:88]}…", "tokens": tokens, "views": []}


def _is_punctuation(text: str) -> bool:
    return bool(text.strip()) and all(unicodedata.category(char).startswith("P") for char in text.strip())


def _view(label: str, flow: Flow, prefix: str, arrays: dict[str, str]) -> dict[str, Any]:
    tensors, dropped = _fitting(label, flow)
    half = sum(tensor.numel() for tensor in tensors.values()) > EXACT_NUMBERS
    large = {"attn", "block", "metric", *RULES} if half else set()

    def packed(name: str, tensor: Tensor, half: bool) -> dict[str, Any]:
        key = f"{prefix}-{name}"
        arrays[key], spec = _encoded(tensor.numpy(), half)
        return {"id": key, **spec}

    heads = flow.attn if flow.attn is not None else flow.mlp
    n_heads = 0 if heads is None else heads.shape[1]
    view: dict[str, Any] = {
        "label": label,
        "facts": _facts(flow),
        "model": flow.model_name,
        "layers": list(flow.layers),
        "destinations": list(flow.destinations),
        "n_heads": n_heads,
        "by_head": flow.attn is not None and dropped is None,
        "unit": f"the metric {flow.metric}"
        if flow.metric
        else _UNITS.get(str(flow.settings.get("target")), "the target"),
        "half": half,
        "dropped": dropped,
        "split": flow.settings.get("split", "source"),
        "rounding": _rounding(flow, n_heads),
        "arrays": {name: packed(name, tensor, name in large) for name, tensor in tensors.items()},
    }
    # Halves of a column that nearly cancels do not add up to its sum, and without single heads its size is not known.
    sums = {f"{name}-sums": tensors[name].sum(-2) for name in large & tensors.keys() - set(RULES)}
    if (half or dropped) and flow.attn is not None and flow.mlp is not None:
        for rule in RULES:
            found = edges(flow, rule)
            sums[f"{rule}-sums"] = (found.heads.sum((1, 2)) + found.skip).float()
            sums[f"{rule}-sizes"] = (found.heads.abs().sum((1, 2)) + found.skip.abs()).float()
    view["arrays"] |= {name: packed(name, tensor, False) for name, tensor in sums.items()}
    for name in flow.maps:
        view["arrays"][f"{name}-gap"] = packed(f"{name}-gap", flow.gap[name], False)
        view["arrays"][f"{name}-converged"] = packed(f"{name}-converged", flow.converged[name].float(), False)
    if flow.metric is not None:
        view["totals"] = [total if math.isfinite(total) else None for total in flow.total["attn"].tolist()]
    return view


def _rounding(flow: Flow, n_heads: int) -> dict[str, float]:
    """What of the largest size of a layer's columns is rounding, by map: as `Flow.shares` and `compose.shares` say."""
    terms = {map: flow.columns(map).shape[-2] for map in flow.maps}
    terms |= dict.fromkeys(RULES, n_heads * len(flow.tokens))
    return {map: torch.finfo(torch.float32).eps * count for map, count in terms.items()}


def _fitting(label: str, flow: Flow) -> tuple[dict[str, Tensor], str | None]:
    """A Flow's tensors as far as a page can hold them, and what was left out, in words."""
    named = ("attn", "mlp", "skip", "bias", "block")
    tensors: dict[str, Tensor] = {name: getattr(flow, name) for name in named if getattr(flow, name) is not None}
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


def _facts(flow: Flow) -> str:
    """Model, size and certainty, in a line."""
    facts = [flow.model_name or "model", f"{len(flow.tokens)} tokens", f"{len(flow.layers)} blocks"]
    if "averaged" in flow.settings:
        facts.append(f"mean of {flow.settings['averaged']} prompts")
    if flow.metric is not None:
        facts.append(f"metric {flow.metric}{_split(flow)}{metric_change(flow)}")
    tol = flow.settings.get("tol")
    facts.append(f"worst gap {flow.worst_gap():.0e}" + (f" (tol {tol:g})" if isinstance(tol, float) else ""))
    if flow.converged_share() < 1:
        sums = "layers" if flow.metric is not None else "columns"
        facts.append(f"{1 - flow.converged_share():.1%} of the {sums} not converged")
    return " · ".join(facts)


def _encoded(values: NDArray[np.float32], half: bool) -> tuple[str, dict[str, Any]]:
    """Base64 of an array, for halves each layer divided by its largest value, so that none overflows or fades."""
    by_layer = values.reshape(len(values), -1).astype("<f4")
    scales = np.abs(by_layer).max(axis=1, initial=0.0) if half else np.ones(len(by_layer), dtype=np.float32)
    scales = np.where(scales > 0, scales, 1.0)
    raw = (by_layer / scales[:, None]).astype("<f2" if half else "<f4")
    return base64.b64encode(raw.tobytes()).decode(), {"dtype": "f2" if half else "f4", "scales": scales.tolist()}


def labelled(flows: Any) -> dict[str, Flow]:
    """Flows by their labels; those without get their baselines, or metric, as one.

    Args:
        flows: as `explore` takes them.

    Raises:
        InputError: no Flow, or something else.
    """
    if isinstance(flows, Flow):
        flows = [flows]
    given = list(flows.items()) if isinstance(flows, Mapping) else None
    if given is None and isinstance(flows, Iterable) and not isinstance(flows, str):
        given = [(None, flow) for flow in flows]
    odd = [flow for _, flow in given if not isinstance(flow, Flow)] if given is not None else [flows]
    if given is None or odd:
        raise InputError(
            f"explore: got {type(odd[0]).__name__}: give a Flow, several, or a mapping of labels to Flows (of an "
            "average its .mean)."
        )
    named = [(_name(flow) if label is None else str(label), flow) for label, flow in given]
    if not named:
        raise InputError("explore: no Flow: give at least one.")
    return dict(_unique(named))


def _name(flow: Flow) -> str:
    """The baselines of a Flow, or its metric."""
    if flow.metric is not None:
        return f"{flow.metric}{_split(flow)}, from {flow.settings.get('attn_baseline')}"
    parts = [f"{name} {flow.settings.get(f'{name}_baseline', '?')}" for name in flow.maps]
    return ", ".join(parts)


def _split(flow: Flow) -> str:
    return ", by message" if flow.settings.get("split") == "message" else ""


def _unique(named: Sequence[tuple[str, Flow]]) -> Iterator[tuple[str, Flow]]:
    """Labels that are equal for one prompt get numbers; across prompts the page tells them apart, a dict does not."""
    seen: dict[str, int] = {}
    for label, flow in named:
        seen[label] = seen.get(label, 0) + 1
        yield (label if seen[label] == 1 else f"{label} ({seen[label]})"), flow
