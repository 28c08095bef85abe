"""The one entry: prompt in, Flow out."""

import importlib.metadata
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from lig_lens import __version__, flow_io
from lig_lens.baselines import (
    check_baseline,
    describe_baseline,
    refill_self,
    resid_path,
    self_share,
    tail_path,
)
from lig_lens.block import BlockCall, prepared
from lig_lens.boundaries import BlockNodes, find_nodes
from lig_lens.config import MAX_BATCH_TOKENS, MAX_NODES
from lig_lens.engines import closed_form, hooks
from lig_lens.engines.common import Budget
from lig_lens.errors import ConvergenceWarning, InputError, NonFiniteError
from lig_lens.files import check_writable
from lig_lens.flow import AXES, CELL_AXES, Flow
from lig_lens.loading import check_evaluating, check_hooked, describe_processing, model_name
from lig_lens.prompts import Prompt, is_batch
from lig_lens.quadrature import Integral
from lig_lens.recording import record_calls
from lig_lens.request import Selection, Settings, chosen_numbers, read_prompts
from lig_lens.targets import Direction, check_target, describe_target

# Contributions of unfinished panels that may be held at once, in bytes, and how many panels a column may have open.
_PANEL_BYTES = 2**28
_OPEN_PANELS = 32
# Of the mlp map, beside its heads.
_PARTS = {"skip", "bias"}
_OUR_FRAMES = ("lig_lens", "torch", "jaxtyping", "beartype")


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
    out: "str | os.PathLike[str] | None" = None,
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
        max_batch_tokens: about how many tokens are run through a block at once; bounds memory, changes nothing else.
        engine: `auto` takes `closed_form` for the `attn` and `block` maps where a block's attention follows its
            formula and `hooks` elsewhere, block by block; `closed_form` insists on it, `hooks` uses autograd
            throughout. The `mlp` map costs one backward pass per node whichever is named.
        prepend_bos: for texts, handed to the model's tokenizer; its own default with None.
        attention_mask: for token ids, 0 marks padding, which is dropped before the model runs.
        out: file to which each layer is written as soon as it is computed, for a Flow that need not fit into memory;
            what is returned then reads from that file. For one prompt.
        progress: show a progress bar.

    Returns:
        A Flow with float32 contributions (float64 models are integrated in float64, half-precision ones in
        float32), gaps and `converged` masks; a list of Flows for a list of prompts.

    Raises:
        InputError: an argument that cannot be used; raised before any contribution is computed.
        BoundaryError: the nodes of a block could not be verified on this model.
        NonFiniteError: NaN or infinite values in weights or activations.
        OSError: no room for `out`.

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
    if out is not None:
        if is_batch(prompt):
            raise InputError("out is one file, for one prompt: call attribute() for each prompt, or save the Flows.")
        check_writable(out, "out")
    check_evaluating(model)
    read = read_prompts(model, prompt, corrupted, attention_mask, prepend_bos)
    chosen = chosen_numbers("layer", layers, int(model.cfg.n_layers))
    wanted = [chosen_numbers("destination", destinations, len(clean)) for clean, _ in read]
    first = _prepare(model, settings, *read[0], chosen, wanted[0])
    for clean, second in read:
        _check_shapes(settings, first.nodes[chosen[0]], len(clean), len(chosen), second is not None)
    rest = (_prepare(model, settings, *pair, chosen, dst) for pair, dst in zip(read[1:], wanted[1:], strict=True))
    flows = [_run(model, settings, job, out) for job in itertools.chain([first], rest)]
    return flows if is_batch(prompt) else flows[0]


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
    formula = settings.engine != "hooks"
    needs_pattern = "attn" in heads and settings.starts_from("attn", "itb_map_ratio")
    nodes = _nodes(model, clean, layers, bool(heads), formula, needs_pattern)
    corrupted = _nodes(model, second, layers, bool(heads), False, False) if second is not None else {}
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
        if needs_pattern and nodes[layer].pattern is None:
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


def _nodes(
    model: Any, prompt: Prompt, layers: tuple[int, ...], heads: bool, formula: bool, pattern: bool
) -> dict[int, BlockNodes]:
    def visit(call: BlockCall) -> BlockNodes:
        nodes = find_nodes(model, call, heads, formula)
        # Patterns of all layers of a long prompt may be larger than all else.
        return nodes if pattern else replace(nodes, pattern=None)

    return record_calls(model, prompt.ids, layers, visit)


def _run(model: Any, settings: Settings, job: _Job, out: "str | os.PathLike[str] | None") -> Flow:
    labels, shapes = _labels(model, settings, job), _shapes(settings, job)
    if out is None or (Path(out).exists() and not Path(out).is_file()):  # a pipe cannot be written in pieces
        tensors = {
            name: torch.empty(shape, dtype=torch.bool if name.startswith("converged") else torch.float32)
            for name, shape in shapes.items()
        }
        _fill(model, settings, job, lambda name, index, value: tensors[name][index].copy_(value))
        grouped: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if "." not in name}
        for group in flow_io.CELLS:
            grouped[group] = {name: tensors[f"{group}.{name}"] for name in settings.maps}
        flow = Flow(**labels, **grouped)
        if out is not None:
            flow.save(out)
        return flow
    with flow_io.growing(out, labels, shapes) as file:
        _fill(model, settings, job, file.put)
    return Flow.load(out)


def _fill(model: Any, settings: Settings, job: _Job, put: Callable[[str, int, Tensor], Any]) -> None:
    """Compute every layer and hand its tensors over, under the names that they have in a Flow file."""
    total = len(job.layers) * len(settings.maps) * len(job.destinations)
    cells: dict[str, list[dict[str, Tensor]]] = {name: [] for name in settings.maps}
    with tqdm(
        total=total, desc="lig_lens", unit="col", disable=not settings.progress, file=sys.stderr, leave=False
    ) as bar:
        for index, layer in enumerate(job.layers):
            with prepared(model, model.blocks[layer]):
                for name in settings.maps:
                    bar.set_postfix_str(f"layer {layer} {name}")
                    columns = _columns(settings, job, index, name, bar)
                    put(name, index, columns.pop("contributions"))
                    for key in _PARTS & columns.keys():
                        put(key, index, columns.pop(key))
                    for key in flow_io.CELLS:
                        put(f"{key}.{name}", index, columns[key])
                    cells[name].append(columns)
    _warn(
        settings,
        {n: {key: torch.stack([c[key] for c in layered]) for key in layered[0]} for n, layered in cells.items()},
    )


def _shapes(settings: Settings, job: _Job) -> dict[str, tuple[int, ...]]:
    """Shapes of a Flow's tensors, under the names that they have in a Flow file."""
    sizes = {
        "layer": len(job.layers),
        "head": job.nodes[job.layers[0]].boundaries.n_heads,
        "src": len(job.prompt),
        "dst": len(job.destinations),
    }
    axes = {name: AXES[name] for name in settings.maps}
    if "mlp" in axes:
        axes |= {name: AXES[name] for name in _PARTS}
    axes |= {f"{group}.{name}": CELL_AXES[name] for group in flow_io.CELLS for name in settings.maps}
    return {name: tuple(sizes[axis] for axis in named) for name, named in axes.items()}


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


def _labels(model: Any, settings: Settings, job: _Job) -> dict[str, Any]:
    """What a Flow holds beside its tensors."""
    return {
        "tokens": job.prompt.tokens,
        "special": job.prompt.special,
        "layers": job.layers,
        "destinations": job.destinations,
        "model_name": model_name(model),
        "settings": _record(model, settings, job),
        "layouts": tuple(job.nodes[layer].boundaries.layout for layer in job.layers),
        "engines": {
            name: tuple(_engine(settings, job.nodes[layer], name) for layer in job.layers) for name in settings.maps
        },
    }


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
