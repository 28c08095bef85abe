"""Results of several prompts of one length averaged, position by position, with their standard errors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

from lig_lens.arguments import checked
from lig_lens.errors import InputError
from lig_lens.flow.effects import Effects
from lig_lens.flow.flow import Flow
from lig_lens.flow.labels import TENSORS


@dataclass(frozen=True)
class AverageFlow:
    """Mean Flow of `n` prompts, and standard errors of the mean under the names of its tensors (and `total`).

    In `mean`, gaps are the largest of all prompts', and cells have converged where all have. A position whose token
    differs between prompts is labelled `*`.
    """

    n: int
    mean: Flow
    stderr: dict[str, Tensor]


@dataclass(frozen=True)
class AverageEffects:
    """Mean Effects of `n` prompts with their standard error; entries that some prompt lacks are NaN."""

    n: int
    mean: Effects
    stderr: Effects


@overload
def average(results: Sequence[Flow]) -> AverageFlow: ...
@overload
def average(results: Sequence[Effects]) -> AverageEffects: ...


@checked
def average(results: Sequence[Flow] | Sequence[Effects]) -> AverageFlow | AverageEffects:
    """Average Flows, or Effects, of several prompts.

    Args:
        results: of one kind, for prompts of the same number of tokens; two at least, for a standard error.

    Raises:
        InputError: fewer than two, or results that do not belong together.
    """
    flows = [result for result in results if isinstance(result, Flow)]
    effects = [result for result in results if isinstance(result, Effects)]
    if len(results) < 2 or len(results) not in (len(flows), len(effects)):
        raise InputError(
            f"average needs two results or more of one kind: got {len(flows)} Flows and {len(effects)} Effects."
        )
    return _flows(flows) if flows else _effects(effects)


def _same(results: Sequence[object], names: Sequence[str]) -> None:
    first = results[0]
    for name in names:
        for number, result in enumerate(results):
            if getattr(result, name) != getattr(first, name):
                raise InputError(
                    f"average: results 0 and {number} differ in their {name}, {getattr(first, name)} and "
                    f"{getattr(result, name)}: average like with like."
                )


def _tokens(results: Sequence[Flow] | Sequence[Effects]) -> tuple[str, ...]:
    """Labels of positions, `*` where prompts differ."""
    lengths = sorted({len(result.tokens) for result in results})
    if len(lengths) > 1:
        raise InputError(f"average: the prompts have {lengths} tokens: positions can only be averaged in one length.")
    return _labels([result.tokens for result in results])


def _labels(tokens: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(names[0] if len(set(names)) == 1 else "*" for names in zip(*tokens, strict=True))


def _settings(flows: Sequence[Flow]) -> dict[str, object]:
    """Settings that hold for all, with the mean values of the metric on both prompts."""
    common = {k: v for k, v in flows[0].settings.items() if all(f.settings.get(k) == v for f in flows)}
    values = [flow.settings.get("metric") for flow in flows]
    if all(isinstance(value, dict) for value in values):
        mean = {}
        for key in ("clean", "corrupted"):
            known = [value[key] for value in values if value is not None and value.get(key) is not None]
            mean[key] = sum(known) / len(known) if len(known) == len(flows) else None
        common["metric"] = mean
    return common | {"averaged": len(flows)}


def _metric(results: Sequence[Flow] | Sequence[Effects]) -> str | None:
    """Name of the metric; where every prompt has answers of its own, what they have in common."""
    names = {result.metric for result in results}
    # logit_difference(' Mary', ' John', pos=3): the function and where it looks.
    kinds = {name and (name.split("(")[0], name.partition(", pos=")[2]) for name in names}
    if len(kinds) > 1:
        raise InputError(f"average: the results are of several metrics, {sorted(map(str, names))}: take one kind.")
    (kind,) = kinds
    return names.pop() if len(names) == 1 or kind is None else f"{kind[0]}(…" + (f", pos={kind[1]}" if kind[1] else ")")


def _mean(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    stacked = torch.stack([tensor.double() for tensor in tensors])
    return stacked.mean(0).float(), (stacked.std(0) / len(tensors) ** 0.5).float()


# What Flows that know nothing of these settings were asked for.
_USUAL = {"hold": None, "noising": False}


def _flows(flows: Sequence[Flow]) -> AverageFlow:
    _same(flows, ("layers", "destinations", "maps", "model_name", "stream"))
    targets = sorted({len(flow.dst_tokens) for flow in flows})
    if not flows[0].is_square and len(targets) > 1:
        raise InputError(f"average: the targets have {targets} tokens: positions can only be averaged in one length.")
    for key in ("attn_baseline", "mlp_baseline", "block_baseline", "split", "hold", "noising", "tol", "model"):
        known = [flow.settings for flow in flows if key in flow.settings or key in _USUAL]
        asked = [settings.get(key, _USUAL.get(key)) for settings in known]
        if any(value != asked[0] for value in asked):
            raise InputError(f"average: the Flows differ in their {key}: {asked}. Average like with like.")
    measured = {str(flow.settings.get("target")) for flow in flows}
    if flows[0].metric is None and len(measured) > 1:
        raise InputError(f"average: the Flows have the targets {sorted(measured)}: average like with like.")
    first, stderr = flows[0], dict[str, Tensor]()

    def part(name: str) -> Tensor | None:
        tensors = [getattr(flow, name) for flow in flows]
        if tensors[0] is None:
            return None
        mean, stderr[name] = _mean(tensors)
        return mean

    parts = {name: part(name) for name in TENSORS}
    total = {}
    for name in first.maps:
        total[name], stderr[f"total.{name}"] = _mean([flow.total[name] for flow in flows])
    mean = replace(
        first,
        tokens=_tokens(flows),
        special=tuple(all(marks) for marks in zip(*(flow.special for flow in flows), strict=True)),
        dst_tokens=_labels([flow.dst_tokens for flow in flows]),
        dst_special=tuple(all(marks) for marks in zip(*(flow.dst_special for flow in flows), strict=True)),
        settings=_settings(flows),
        metric=_metric(flows),
        total=total,
        gap={name: torch.stack([flow.gap[name] for flow in flows]).amax(0) for name in first.maps},
        converged={name: torch.stack([flow.converged[name] for flow in flows]).all(0) for name in first.maps},
        attn=parts["attn"],
        mlp=parts["mlp"],
        skip=parts["skip"],
        bias=parts["bias"],
        block=parts["block"],
    )
    return AverageFlow(len(flows), mean, stderr)


def _effects(effects: Sequence[Effects]) -> AverageEffects:
    _same(effects, ("on", "name", "measures", "layers"))
    shapes = sorted({tuple(effect.values.shape) for effect in effects})
    if len(shapes) > 1:
        raise InputError(f"average: the Effects have the shapes {shapes}: average those of one model.")
    mean, error = _mean([effect.values for effect in effects])
    first, tokens = effects[0], _tokens(effects)
    reference = sum(effect.reference for effect in effects) / len(effects)
    settings = {"averaged": len(effects)}
    metric = str(_metric(effects))
    both = [
        replace(first, values=value, tokens=tokens, metric=metric, reference=reference, settings=settings)
        for value in (mean, error)
    ]
    name, measures = (f"standard error of {of}" for of in (first.name, first.measures))
    return AverageEffects(len(effects), both[0], replace(both[1], name=name, measures=measures))
