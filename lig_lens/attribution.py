"""The one entry: prompt in, Flow out."""

import importlib.metadata
import itertools
import operator
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from lig_lens import __version__
from lig_lens.baselines import (
    check_baseline,
    describe_baseline,
    refill_self,
    resid_path,
    self_share,
    tail_path,
)
from lig_lens.block import prepared, record_calls
from lig_lens.boundaries import BlockNodes, find_nodes
from lig_lens.config import BASELINES, ENGINES, MAPS, MAX_BATCH_TOKENS, MAX_NODES
from lig_lens.engines import closed_form, hooks
from lig_lens.engines.common import Budget
from lig_lens.errors import ConvergenceWarning, InputError, NonFiniteError, check_choice
from lig_lens.flow import Flow
from lig_lens.loading import check_evaluating, check_hooked, describe_processing, model_name
from lig_lens.prompts import Prompt, check_same_length, is_batch, read_prompt
from lig_lens.quadrature import NODES_PER_PANEL, Integral
from lig_lens.targets import Direction, check_target, describe_target

Selection = Any
"""Layers or destinations: one number, several (list, array, tensor), or None for all; checked in `_chosen`."""

# Contributions of unfinished panels that may be held at once, in bytes, and how many panels a column may have open.
_PANEL_BYTES = 2**28
_OPEN_PANELS = 32
_OUR_FRAMES = ("lig_lens", "torch", "jaxtyping", "beartype")


@dataclass(frozen=True)
class Settings:
    """What was asked for, checked as far as it can be without a prompt."""

    maps: tuple[str, ...]
    baselines: dict[str, Any]
    target: "str | Direction"
    tol: float
    max_nodes: int
    max_batch_tokens: int
    engine: str
    progress: bool

    def __post_init__(self) -> None:
        if not self.maps:
            raise InputError("maps is empty: name at least one of 'attn', 'mlp', 'block'.")
        for name in self.maps:
            check_choice("map", name, MAPS)
        for name, baseline in self.baselines.items():  # a slip is a slip, also where the map is not asked for
            if not isinstance(baseline, Tensor):
                check_choice(f"{name}_baseline", baseline, BASELINES[name])
        check_choice("engine", self.engine, ENGINES)
        if not isinstance(self.tol, float) or not 0 < self.tol < 1:
            raise InputError(f"tol={self.tol!r} is not between 0 and 1: it is a relative gap, such as 1e-3.")
        if self.max_nodes < NODES_PER_PANEL:
            raise InputError(f"max_nodes={self.max_nodes} is too few: give at least {NODES_PER_PANEL}.")
        if self.max_batch_tokens < 1:
            raise InputError(f"max_batch_tokens={self.max_batch_tokens} is too few: give at least 1.")

    def starts_from(self, name: str, baseline: str) -> bool:
        """Whether map `name` has the named baseline; tensors have no name."""
        return isinstance(self.baselines[name], str) and self.baselines[name] == baseline


@dataclass(frozen=True)
class _Job:
    """One prompt, checked and recorded, ready for the engine."""

    prompt: Prompt
    layers: tuple[int, ...]
    destinations: tuple[int, ...]
    nodes: dict[int, BlockNodes]
    corrupted: dict[int, BlockNodes]
    second: Prompt | None


@torch.inference_mode(False)  # gradients are needed, whatever mode the caller is in
def attribute(
    model: Any,
    prompt: Any,
    *,
    maps: str | Sequence[str] = ("attn", "mlp", "block"),
    layers: Selection = None,
    destinations: Selection = None,
    attn_baseline: str | Tensor = "itb",
    mlp_baseline: str | Tensor = "att_itb_a0",
    block_baseline: str | Tensor = "itb",
    target: "str | Direction" = "l2",
    corrupted: Any = None,
    tol: float = 1e-3,
    max_nodes: int = MAX_NODES,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    engine: str = "auto",
    prepend_bos: bool | None = None,
    attention_mask: Any = None,
    progress: bool = True,
) -> Flow | list[Flow]:
    """Layer-wise Integrated Gradients of one prompt or of several (LIG, arXiv 2606.21564).

    Args:
        model: a `TransformerBridge`, `HookedTransformer` or `HookedEncoder`; see `load_model`.
        prompt: a text, or token ids [pos] or [1, pos]; a list of such prompts gives a list of Flows, each equal
            to that of its own single run.
        maps: any of `attn` (resid_pre -> hook_z, `[layer, head, src, dst]`), `mlp` (hook_z, skip -> resid_post,
            `[layer, head, dst]`) and `block` (resid_pre -> resid_post, `[layer, src, dst]`). Mind the order:
            TransformerLens patterns are `[head, dst(query), src(key)]`.
        layers: block numbers, all by default; negative ones count from the end.
        destinations: positions whose columns are computed, all by default; negative ones count from the end.
        attn_baseline: `zero`, `itb`, `itb_zero_ratio`, `itb_map_ratio`, `corrupted`, or resid_pre as a tensor
            [pos, d_model], with a leading layer axis if it differs by layer.
        mlp_baseline: `zero`, `att_itb_a0`, `corrupted`, or hook_z as a tensor [pos, head, d_head].
        block_baseline: `zero`, `itb`, `itb_zero_ratio`, `corrupted`, or resid_pre as a tensor.
        target: `l2`, the distance that a destination's vector has moved, or `direction(w)`.
        corrupted: second prompt of the same length, for the `corrupted` baseline.
        tol: largest completeness gap of a cell, relative to the change of the target that it explains.
        max_nodes: nodes that may be spent on one cell; what still misses `tol` is marked and warned of.
        max_batch_tokens: tokens that are run through a block at once; bounds memory, changes nothing else.
        engine: `auto` takes `closed_form` for the `attn` and `block` maps where a block's attention follows its
            formula and `hooks` elsewhere, block by block; `closed_form` insists on it, `hooks` uses autograd
            throughout. The `mlp` map costs one backward pass per node whichever is named.
        prepend_bos: for texts, handed to the model's tokenizer; its own default with None.
        attention_mask: for token ids, 0 marks padding, which is dropped before the model runs.
        progress: show a progress bar.

    Returns:
        A Flow with float32 contributions (float64 models are integrated in float64, half-precision ones in
        float32), gaps and `converged` masks; a list of Flows for a list of prompts.

    Raises:
        InputError: an argument that cannot be used; raised before any contribution is computed.
        BoundaryError: the nodes of a block could not be verified on this model.
        NonFiniteError: NaN or infinite values in weights or activations.

    Warns:
        ConvergenceWarning: once per prompt, with the number of cells that missed `tol`.
    """
    model = check_hooked(model)
    settings = Settings(
        maps=tuple(dict.fromkeys([maps] if isinstance(maps, str) else maps)),
        baselines={"attn": attn_baseline, "mlp": mlp_baseline, "block": block_baseline},
        target=target,
        tol=tol,
        max_nodes=max_nodes,
        max_batch_tokens=max_batch_tokens,
        engine=engine,
        progress=progress,
    )
    if corrupted is not None and not any(settings.starts_from(name, "corrupted") for name in settings.maps):
        raise InputError(
            f"corrupted is given, but no baseline of the maps {', '.join(settings.maps)} is 'corrupted': set one, or "
            "leave corrupted out."
        )
    check_evaluating(model)
    read = _read_prompts(model, prompt, corrupted, attention_mask, prepend_bos)
    chosen = _chosen("layer", layers, int(model.cfg.n_layers))
    wanted = [_chosen("destination", destinations, len(clean)) for clean, _ in read]
    first = _prepare(model, settings, *read[0], chosen, wanted[0])
    for clean, second in read:
        _check_shapes(settings, first.nodes[chosen[0]], len(clean), len(chosen), second is not None)
    rest = (_prepare(model, settings, *pair, chosen, dst) for pair, dst in zip(read[1:], wanted[1:], strict=True))
    flows = [_run(model, settings, job) for job in itertools.chain([first], rest)]
    return flows if is_batch(prompt) else flows[0]


def _read_prompts(
    model: Any, prompt: Any, corrupted: Any, attention_mask: Any, prepend_bos: bool | None
) -> list[tuple[Prompt, Prompt | None]]:
    """Clean and corrupted prompt of every run."""
    several = is_batch(prompt)
    prompts, others, masks = (
        _one_each(several, prompt, prompt),
        _one_each(several, prompt, corrupted, "corrupted"),
        _one_each(several, prompt, attention_mask, "attention_mask"),
    )
    read: list[tuple[Prompt, Prompt | None]] = []
    for number, (one, other, mask) in enumerate(zip(prompts, others, masks, strict=True)):
        try:
            clean = read_prompt(model, one, prepend_bos=prepend_bos, attention_mask=mask)
            second = None
            if other is not None:
                second = read_prompt(model, other, prepend_bos=prepend_bos, what="corrupted prompt")
                check_same_length(clean, second)
        except InputError as error:
            where = f"Prompt {number} of {len(prompts)}: " if several else ""
            raise InputError(f"{where}{error}") from error
        read.append((clean, second))
    return read


def _one_each(several: bool, prompt: Any, value: Any, what: str = "prompt") -> list[Any]:
    """`value` as a list with one entry per prompt."""
    if not several:
        return [value]
    if value is None:
        return [None] * len(prompt)
    if isinstance(value, str) or len(value) != len(prompt):
        given = "one text" if isinstance(value, str) else f"{len(value)} entries"
        raise InputError(f"{what} has {given} for {len(prompt)} prompts: give a list with one per prompt.")
    return list(value)


def _chosen(what: str, values: Selection, count: int) -> tuple[int, ...]:
    """Indices in `values`, made non-negative; all of `count` for None."""
    if values is None:
        return tuple(range(count))
    try:
        several = [values] if isinstance(values, (int, np.integer)) else list(values)
        chosen = [operator.index(v) for v in several]
    except TypeError as error:
        raise InputError(f"{what}s={values!r} is not a number or a list of numbers such as [0, 3].") from error
    if not chosen:
        raise InputError(f"{what}s is empty: name at least one, or leave it out for all {count}.")
    outside = [v for v in chosen if not -count <= v < count]
    if outside:
        raise InputError(
            f"{what} {outside[0]} is out of range: this {'model' if what == 'layer' else 'prompt'} has {count}, "
            f"numbered 0 to {count - 1}."
        )
    return tuple(dict.fromkeys(v % count for v in chosen))


def _prepare(
    model: Any,
    settings: Settings,
    clean: Prompt,
    second: Prompt | None,
    layers: tuple[int, ...],
    destinations: tuple[int, ...],
) -> _Job:
    """Record the prompt's blocks, verify their nodes, and check that they have what the maps need."""
    heads = [name for name in settings.maps if name in ("attn", "mlp")]
    # The formula saves work on the attn and block maps only.
    formula = settings.engine != "hooks" and set(settings.maps) != {"mlp"}
    nodes = _nodes(model, clean, layers, bool(heads), formula)
    corrupted = _nodes(model, second, layers, bool(heads), False) if second is not None else {}
    for layer in layers:
        if heads and nodes[layer].z is None:
            raise InputError(
                f"Block {layer} has no attention with separable heads, so it has no {heads[0]!r} map: "
                "use maps=('block',) or leave the layer out."
            )
        if settings.engine == "closed_form" and nodes[layer].formula is None and set(settings.maps) - {"mlp"}:
            raise InputError(
                f"engine='closed_form' cannot work on block {layer}: {nodes[layer].boundaries.why_hooks}. Use "
                "engine='auto', which takes 'hooks' for such blocks."
            )
        if "attn" in heads and settings.starts_from("attn", "itb_map_ratio") and nodes[layer].pattern is None:
            raise InputError(
                f"attn_baseline='itb_map_ratio' needs the attention pattern, which block {layer} does not show "
                "(attn.hook_pattern): use 'itb_zero_ratio', or load the model with eager attention."
            )
    return _Job(clean, layers, destinations, nodes, corrupted, second)


def _check_shapes(settings: Settings, nodes: BlockNodes, n_pos: int, n_layers: int, has_corrupted: bool) -> None:
    """Check target and baselines against a prompt of `n_pos` tokens."""
    d_model = nodes.resid_pre.shape[-1]
    check_target(settings.target, n_pos, d_model)
    for name in settings.maps:
        shape = (n_pos, d_model)
        if name == "mlp" and nodes.z is not None:
            shape = (n_pos, *nodes.z.shape[1:])
        check_baseline(name, settings.baselines[name], n_layers, shape, has_corrupted)


def _nodes(model: Any, prompt: Prompt, layers: tuple[int, ...], heads: bool, formula: bool) -> dict[int, BlockNodes]:
    calls = record_calls(model, prompt.ids, layers)
    return {layer: find_nodes(model, calls[layer], heads, formula) for layer in layers}


def _run(model: Any, settings: Settings, job: _Job) -> Flow:
    total = len(job.layers) * len(settings.maps) * len(job.destinations)
    results: dict[str, list[dict[str, Tensor]]] = {name: [] for name in settings.maps}
    with tqdm(
        total=total, desc="lig_lens", unit="col", disable=not settings.progress, file=sys.stderr, leave=False
    ) as bar:
        for index, layer in enumerate(job.layers):
            with prepared(model, model.blocks[layer]):
                for name in settings.maps:
                    bar.set_postfix_str(f"layer {layer} {name}")
                    results[name].append(_columns(settings, job, index, name, bar))
    tensors = {
        name: {key: torch.stack([r[key] for r in layered]) for key in layered[0]} for name, layered in results.items()
    }
    _warn(settings, tensors)
    return _flow(model, settings, job, tensors)


def _columns(settings: Settings, job: _Job, index: int, name: str, bar: Any) -> dict[str, Tensor]:
    """All columns of one map at one layer, on the CPU."""
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


def _portions(job: _Job, layer: int, name: str) -> Iterator[Int[Tensor, "dst"]]:
    """Destinations in portions whose unfinished panels fit into `_PANEL_BYTES`."""
    nodes = job.nodes[layer]
    width = len(job.prompt) * (nodes.boundaries.n_heads if name == "attn" else 1)
    size = max(1, _PANEL_BYTES // (width * 4 * 4 * _OPEN_PANELS))  # four float32 sums for each
    dst = torch.tensor(job.destinations, device=nodes.resid_pre.device)
    yield from torch.split(dst, size)


def _attention_columns(
    settings: Settings, job: _Job, index: int, name: str, dst: Int[Tensor, "dst"]
) -> dict[str, Tensor]:
    """Columns of the `attn` or `block` map at one layer: contributions [head] src dst, and cells [head] dst."""
    layer = job.layers[index]
    nodes, corrupted = job.nodes[layer], job.corrupted.get(layer)
    baseline, to_heads = settings.baselines[name], name == "attn"

    def along(start: "str | Tensor", tol: float = settings.tol) -> Integral:
        budget = Budget(tol, settings.max_nodes, settings.max_batch_tokens)
        path = resid_path(nodes, start, corrupted, index)
        closed = _engine(settings, nodes, name) == "closed_form"
        integrate = closed_form.integrate_resid if closed else hooks.integrate_resid
        return integrate(nodes, path, settings.target, dst, to_heads, budget)

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


def _tail_columns(settings: Settings, job: _Job, index: int, name: str, dst: Int[Tensor, "dst"]) -> dict[str, Tensor]:
    """Columns of the `mlp` map at one layer: heads [head dst], skip, bias and cells [dst]."""
    layer = job.layers[index]
    nodes = job.nodes[layer]
    budget = Budget(settings.tol, settings.max_nodes, settings.max_batch_tokens)
    chunk = budget.items(len(job.prompt))
    path = tail_path(nodes, settings.baselines[name], job.corrupted.get(layer), index, dst, chunk)
    integral = hooks.integrate_tail(nodes, path, settings.target, dst, budget)
    parts = integral.parts[:, 0].T
    cells = {key: value[0] for key, value in _cells(integral).items()}
    return {"contributions": parts[:-2], "skip": parts[-2], "bias": parts[-1], **cells}


def _engine(settings: Settings, nodes: BlockNodes, name: str) -> str:
    """Engine of one map at one layer."""
    return "hooks" if settings.engine == "hooks" or name == "mlp" or nodes.formula is None else "closed_form"


def _cells(integral: Integral) -> dict[str, Tensor]:
    names = ("total", "gap", "error", "converged", "nodes")
    return {name: getattr(integral, name).T for name in names}


def _warn(settings: Settings, tensors: dict[str, dict[str, Tensor]]) -> None:
    missed = {name: ~t["converged"] for name, t in tensors.items() if not bool(t["converged"].all())}
    if not missed:
        return
    cells = sum(t["converged"].numel() for t in tensors.values())
    listed = ", ".join(
        f"{name} {int(mask.sum())} (worst gap {float(tensors[name]['gap'].max()):.1e}, worst estimated error of a "
        f"contribution {float(tensors[name]['error'].max()):.1e})"
        for name, mask in missed.items()
    )
    # A cell that stopped with half its budget left has only gaps that rounding can explain.
    rounded = sum(
        int((mask & (tensors[name]["nodes"] < settings.max_nodes // 2)).sum()) for name, mask in missed.items()
    )
    limited = f" {rounded} of them are limited by rounding: use a float64 model or a larger tol." if rounded else ""
    # Point at the code that called into this package, past wrappers that others put around our functions.
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _OUR_FRAMES:
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"{sum(int(mask.sum()) for mask in missed.values())} of {cells} cells missed tol={settings.tol:g} within "
        f"max_nodes={settings.max_nodes}: {listed}. See flow.gap and flow.converged; raise max_nodes or tol.{limited}",
        ConvergenceWarning,
        stacklevel=level,
    )


def _flow(model: Any, settings: Settings, job: _Job, tensors: dict[str, dict[str, Tensor]]) -> Flow:
    def read(name: str, key: str = "contributions") -> Tensor | None:
        return tensors[name][key] if name in tensors else None

    return Flow(
        tokens=job.prompt.tokens,
        special=job.prompt.special,
        layers=job.layers,
        destinations=job.destinations,
        model_name=model_name(model),
        settings=_record(model, settings, job),
        layouts=tuple(job.nodes[layer].boundaries.layout for layer in job.layers),
        engines={
            name: tuple(_engine(settings, job.nodes[layer], name) for layer in job.layers) for name in settings.maps
        },
        attn=read("attn"),
        mlp=read("mlp"),
        skip=read("mlp", "skip"),
        bias=read("mlp", "bias"),
        block=read("block"),
        total={name: t["total"] for name, t in tensors.items()},
        gap={name: t["gap"] for name, t in tensors.items()},
        converged={name: t["converged"] for name, t in tensors.items()},
    )


def _record(model: Any, settings: Settings, job: _Job) -> dict[str, Any]:
    """Settings as a Flow keeps them."""
    return {
        "maps": list(settings.maps),
        **{f"{name}_baseline": describe_baseline(settings.baselines[name]) for name in settings.maps},
        "target": describe_target(settings.target),
        "tol": settings.tol,
        "max_nodes": settings.max_nodes,
        "engine": settings.engine,
        "token_ids": job.prompt.ids[0].tolist(),
        "corrupted_token_ids": None if job.second is None else job.second.ids[0].tolist(),
        "model": describe_processing(model),
        "versions": {
            "lig_lens": __version__,
            **{name: importlib.metadata.version(name) for name in ("transformer_lens", "torch")},
        },
    }
