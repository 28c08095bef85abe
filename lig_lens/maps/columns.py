"""One map of one layer of a prompt, by whichever engine works there."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lig_lens.blocks.find import BlockNodes
from lig_lens.errors import NonFiniteError
from lig_lens.inputs.prompts import Prompt
from lig_lens.inputs.request import Settings
from lig_lens.integrate import autograd as hooks
from lig_lens.integrate import closed_form
from lig_lens.integrate.integrand import Budget
from lig_lens.integrate.quadrature import Integral
from lig_lens.integrate.to_metric import integrate_metric
from lig_lens.models.stack import Rest
from lig_lens.paths.baselines import describe_baseline, refill_self, resid_path, self_share, tail_path
from lig_lens.targets.metrics import BatchMetric

# Contributions of unfinished panels that may be held at once, in bytes, and how many panels a column may have open.
_PANEL_BYTES = 2**28
_OPEN_PANELS = 32


@dataclass(frozen=True)
class Downstream:
    """What a metric needs of the whole model, and its values on both prompts."""

    rest: Rest
    metric: BatchMetric
    clean: float
    corrupted: float | None


@dataclass(frozen=True)
class Job:
    """One prompt, checked and recorded, ready for the engine."""

    prompt: Prompt
    layers: tuple[int, ...]
    destinations: tuple[int, ...]
    nodes: dict[int, BlockNodes]
    corrupted: dict[int, BlockNodes]
    second: Prompt | None
    downstream: Downstream | None


def columns_of(settings: Settings, job: Job, index: int, name: str, bar: Any) -> dict[str, Tensor]:
    """All columns of one map at one layer, on the CPU."""
    if job.downstream is not None:
        columns = {key: value.cpu() for key, value in _metric_columns(settings, job, index, job.downstream).items()}
        bar.update(len(job.destinations))
    else:
        compute = _tail_columns if name == "mlp" else _attention_columns
        pieces = []
        for part in _portions(job, job.layers[index], name):
            pieces.append(compute(settings, job, index, name, part))
            bar.update(len(part))
        columns = {key: torch.cat([piece[key] for piece in pieces], -1).cpu() for key in pieces[0]}
    if not bool(torch.isfinite(columns["contributions"]).all()):
        raise NonFiniteError(
            f"The {name} map of block {job.layers[index]} is NaN or infinite along the path from "
            f"{name}_baseline={describe_baseline(settings.baselines[name])!r}: choose another baseline."
        )
    return columns


def _portions(job: Job, layer: int, name: str) -> Iterator[Int[Tensor, "dst"]]:
    """Destinations in portions whose unfinished panels fit into `_PANEL_BYTES`."""
    nodes = job.nodes[layer]
    width = len(job.prompt) * (nodes.boundaries.n_heads if name == "attn" else 1)
    size = max(1, _PANEL_BYTES // (width * 4 * 4 * _OPEN_PANELS))  # four float32 sums for each
    dst = torch.tensor(job.destinations, device=nodes.resid_pre.device)
    yield from torch.split(dst, size)


def _attention_columns(
    settings: Settings, job: Job, index: int, name: str, dst: Int[Tensor, "dst"]
) -> dict[str, Tensor]:
    """Columns of the `attn` or `block` map at one layer: contributions [head] src dst, and cells [head] dst."""
    layer = job.layers[index]
    nodes, corrupted = job.nodes[layer], job.corrupted.get(layer)
    baseline, to_heads = settings.baselines[name], name == "attn"

    def along(start: "str | Tensor", tol: float = settings.tol) -> Integral:
        budget = Budget(tol, settings.max_nodes, settings.max_batch_tokens)
        path = resid_path(nodes, start, corrupted, index)
        closed = engine_of(settings, nodes, name) == "closed_form"
        integrate = closed_form.integrate_resid if closed else hooks.integrate_resid
        return integrate(nodes, path, settings.destination_target, dst, to_heads, budget)

    main = along(baseline)
    cells = _cells(main)
    contributions = main.parts.permute(1, 2, 0)  # dst head src -> head src dst
    if settings.starts_from(name, "itb_zero_ratio"):
        zero = along("zero", settings.tol / 4)  # its error grows when a share is taken
        share = self_share(zero.parts.permute(1, 2, 0), dst)
        contributions = refill_self(contributions, share, dst)
        # The share of a column takes over the error of the sum that it is a share of.
        cells["gap"] = torch.maximum(cells["gap"], zero.gap.T * (1 + share.abs()))
        cells["converged"] &= zero.converged.T & (cells["gap"] <= settings.tol)
    elif settings.starts_from(name, "itb_map_ratio"):
        assert nodes.pattern is not None  # checked in _prepare
        pattern = nodes.pattern.transpose(-1, -2)[..., dst]  # head dst src -> head src dst
        contributions = refill_self(contributions, self_share(pattern, dst), dst)
    result = {"contributions": contributions, **cells}
    return result if to_heads else {key: value[0] for key, value in result.items()}


def _tail_columns(settings: Settings, job: Job, index: int, name: str, dst: Int[Tensor, "dst"]) -> dict[str, Tensor]:
    """Columns of the `mlp` map at one layer: heads [head dst], skip, bias and cells [dst]."""
    layer = job.layers[index]
    nodes = job.nodes[layer]
    budget = Budget(settings.tol, settings.max_nodes, settings.max_batch_tokens)
    chunk = budget.items(len(job.prompt))
    path = tail_path(nodes, settings.baselines[name], job.corrupted.get(layer), index, dst, chunk)
    integral = hooks.integrate_tail(nodes, path, settings.destination_target, dst, budget)
    parts = integral.parts[:, 0].T
    cells = {key: value[0] for key, value in _cells(integral).items()}
    return {"contributions": parts[:-2], "skip": parts[-2], "bias": parts[-1], **cells}


def _metric_columns(settings: Settings, job: Job, index: int, downstream: Downstream) -> dict[str, Tensor]:
    """Contributions to a metric at one layer: heads [head src dst], skip [src] and one cell."""
    layer = job.layers[index]
    nodes = job.nodes[layer]
    budget = Budget(settings.tol, settings.max_nodes, settings.max_batch_tokens)
    path = resid_path(nodes, settings.baselines["attn"], job.corrupted.get(layer), index)
    closed = engine_of(settings, nodes, "attn") == "closed_form"
    start = downstream.corrupted if settings.starts_from("attn", "corrupted") else None
    heads, skip, integral = integrate_metric(
        nodes, path, downstream.rest, downstream.metric, (start, downstream.clean), budget, closed, settings.split
    )
    return {"contributions": heads, "skip": skip, **{key: value[0, 0] for key, value in _cells(integral).items()}}


def engine_of(settings: Settings, nodes: BlockNodes, name: str) -> str:
    """Engine of one map at one layer."""
    return "hooks" if settings.engine == "hooks" or name == "mlp" or nodes.formula is None else "closed_form"


def _cells(integral: Integral) -> dict[str, Tensor]:
    names = ("total", "gap", "error", "converged", "nodes")
    return {name: getattr(integral, name).T for name in names}
