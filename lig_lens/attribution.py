"""The one entry: prompt in, Flow out."""

import importlib.metadata
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lig_lens import __version__
from lig_lens.blocks.call import BlockCall, prepared
from lig_lens.blocks.find import BlockNodes, find_nodes
from lig_lens.blocks.messages import attention_of
from lig_lens.blocks.recording import record_calls
from lig_lens.errors import ConvergenceWarning, InputError
from lig_lens.files import check_writable
from lig_lens.flow import file as flow_io
from lig_lens.flow.flow import Flow
from lig_lens.flow.labels import cell_axes, tensor_axes
from lig_lens.inputs.prompts import Prompt, is_batch
from lig_lens.inputs.request import Selection, Settings, chosen_numbers, read_prompts
from lig_lens.maps.columns import Downstream, Job, columns_of, engine_of
from lig_lens.models.loading import check_evaluating, check_hooked, describe_processing, model_name
from lig_lens.models.stack import Rest
from lig_lens.names import MAPS
from lig_lens.paths.baselines import (
    check_baseline,
    describe_baseline,
)
from lig_lens.settings import DEFAULTS
from lig_lens.targets.metrics import Metric
from lig_lens.targets.metrics import metric as as_metric
from lig_lens.targets.targets import Direction, check_target, describe_target

# Of the mlp map, beside its heads.
_PARTS = {"skip", "bias"}
_OUR_FRAMES = ("lig_lens", "torch", "jaxtyping", "beartype")


@torch.inference_mode(False)  # gradients are needed, whatever mode the caller is in
def attribute(
    model: Any,
    prompt: Any,
    *,
    maps: str | Sequence[str] | None = DEFAULTS.maps,
    layers: Selection = DEFAULTS.layers,
    destinations: Selection = DEFAULTS.destinations,
    attn_baseline: str | Tensor | None = DEFAULTS.attn_baseline,
    mlp_baseline: str | Tensor = DEFAULTS.mlp_baseline,
    block_baseline: str | Tensor = DEFAULTS.block_baseline,
    target: "str | Direction | Metric | Callable[[Tensor], Any]" = DEFAULTS.target,
    corrupted: Any = DEFAULTS.corrupted,
    tol: float = DEFAULTS.tol,
    max_nodes: int = DEFAULTS.max_nodes,
    max_batch_tokens: int = DEFAULTS.max_batch_tokens,
    engine: str = DEFAULTS.engine,
    split: str = DEFAULTS.split,
    prepend_bos: bool | None = DEFAULTS.prepend_bos,
    attention_mask: Any = DEFAULTS.attention_mask,
    out: "str | os.PathLike[str] | None" = DEFAULTS.out,
    progress: bool = DEFAULTS.progress,
) -> Flow | list[Flow]:
    """Layer-wise Integrated Gradients of one prompt or of several (LIG, arXiv 2606.21564).

    Args:
        model: a `TransformerBridge`, `HookedTransformer` or `HookedEncoder`; see `load_model`.
        prompt: a text, or token ids [pos] or [1, pos]; a list of such prompts gives a list of Flows, each equal
            to that of its own single run.
        maps: any of `attn` (resid_pre -> hook_z, `[layer, head, src, dst]`), `mlp` (hook_z, skip -> resid_post,
            `[layer, head, dst]`) and `block` (resid_pre -> resid_post, `[layer, src, dst]`). Mind the order:
            TransformerLens patterns are `[head, dst(query), src(key)]`. All of them by default, with a metric `attn`.
        layers: block numbers, all by default; negative ones count from the end.
        destinations: positions whose columns are computed, all by default; negative ones count from the end.
        attn_baseline: `zero`, `itb`, `itb_zero_ratio`, `itb_map_ratio`, `corrupted`, or resid_pre as a tensor
            [pos, d_model], with a leading layer axis if it differs by layer. `itb` by default, `corrupted` with a
            metric, which takes no `itb`.
        mlp_baseline: `zero`, `att_itb_a0`, `corrupted`, or hook_z as a tensor [pos, head, d_head].
        block_baseline: `zero`, `itb`, `itb_zero_ratio`, `corrupted`, or resid_pre as a tensor.
        target: `l2`, the distance that a destination's vector has moved; `direction(w)`; or a metric of the logits
            (`metric(f)`, `logit_difference(...)`, ...), with the rest of the model in the path: then contributions
            are in the metric's units and at every layer add up, with `skip`, to f(prompt) - f(corrupted). Positive
            is what raises the metric on the way from corrupted to clean, as in TransformerLens' denoising.
        corrupted: second prompt of the same length, for the `corrupted` baseline.
        tol: largest completeness gap of a cell, relative to the change of the target that it explains.
        max_nodes: nodes that may be spent on one cell; what still misses `tol` is marked and warned of.
        max_batch_tokens: about how many tokens are run through a block at once; bounds memory, changes nothing else.
        engine: `auto` takes `closed_form` for the `attn` and `block` maps where a block's attention follows its
            formula and `hooks` elsewhere, block by block; `closed_form` insists on it, `hooks` uses autograd
            throughout. The `mlp` map costs one backward pass per node whichever is named.
        split: with a metric, what heads' outputs are split by. `source`: what moves source i, its key and its value,
            and for i = j the query, with everything else at its place on the path. `message`: how far the message
            p_ji v_i moves, whatever moves it, which is what interventions on edges replace. Both have the same sums
            over sources, so heads and totals are the same.
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
    if callable(target) and not isinstance(target, (Metric, Direction)):
        target = as_metric(target)
    per_metric = isinstance(target, Metric)
    if maps is None:
        maps = ("attn",) if per_metric else MAPS
    if attn_baseline is None:
        attn_baseline = "corrupted" if per_metric else "itb"
    settings = Settings(
        maps=tuple(dict.fromkeys([maps] if isinstance(maps, str) else maps)),
        baselines={"attn": attn_baseline, "mlp": mlp_baseline, "block": block_baseline},
        target=target,
        tol=tol,
        max_nodes=max_nodes,
        max_batch_tokens=max_batch_tokens,
        engine=engine,
        progress=progress,
        split=split,
    )
    if corrupted is not None and not any(settings.starts_from(name, "corrupted") for name in settings.maps):
        raise InputError(
            f"corrupted is given, but no baseline of the maps {', '.join(settings.maps)} is 'corrupted': set one, or "
            "leave corrupted out."
        )
    if per_metric and destinations is not None:
        raise InputError(
            f"destinations={destinations}: contributions to a metric add up over all of them: leave it out."
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
) -> Job:
    """Record the prompt's blocks, verify their nodes, and check that they have what the maps need."""
    downstream = None
    if isinstance(settings.target, Metric):
        downstream = _downstream(model, settings.target, clean, second)
    with _float32(model, settings):
        nodes, corrupted = _recorded(model, settings, clean, second, layers)
    return Job(clean, layers, destinations, nodes, corrupted, second, downstream)


def _float32(model: Any, settings: Settings) -> AbstractContextManager[None]:
    """For a metric all of a half-precision model runs in float32, so that it is one function throughout."""
    return prepared(model, model) if isinstance(settings.target, Metric) else nullcontext()


def _downstream(model: Any, metric: Metric, clean: Prompt, second: Prompt | None) -> Downstream:
    with prepared(model, model), torch.no_grad():
        rest = Rest(model, clean.ids)
        ready = metric.on(model, rest.logits)
        corrupted = None if second is None else float(ready(Rest(model, second.ids).logits))
        return Downstream(rest, ready, float(ready(rest.logits)), corrupted)


def _recorded(
    model: Any, settings: Settings, clean: Prompt, second: Prompt | None, layers: tuple[int, ...]
) -> tuple[dict[int, BlockNodes], dict[int, BlockNodes]]:
    """Nodes of the blocks on both prompts."""
    heads = [name for name in settings.maps if name in ("attn", "mlp")]
    formula = settings.engine != "hooks"
    needs_pattern = "attn" in heads and settings.starts_from("attn", "itb_map_ratio")
    messages = settings.split == "message"
    nodes = _nodes(model, clean, layers, bool(heads), formula, needs_pattern, messages)
    corrupted = _nodes(model, second, layers, bool(heads), False, False, False) if second is not None else {}
    for layer in layers:
        if heads and nodes[layer].z is None:
            raise InputError(
                f"Block {layer} has no attention with separable heads, so it has no {heads[0]!r} map: "
                + ("leave the layer out." if settings.per_metric else "use maps=('block',) or leave the layer out.")
            )
        if settings.engine == "closed_form" and nodes[layer].formula is None and set(settings.maps) - {"mlp"}:
            raise InputError(
                f"engine='closed_form' cannot work on block {layer}: {nodes[layer].boundaries.why_hooks}. Use "
                "engine='auto', which takes 'hooks' for such blocks."
            )
        if messages and engine_of(settings, nodes[layer], "attn") == "hooks" and nodes[layer].v_path is None:
            raise InputError(
                f"split='message': the pattern and values of block {layer} cannot be read, or head outputs are not "
                "their product. Use split='source', or load the model with eager attention."
            )
        if needs_pattern and nodes[layer].pattern is None:
            raise InputError(
                f"attn_baseline='itb_map_ratio' needs the attention pattern, which block {layer} does not show "
                "(attn.hook_pattern): use 'itb_zero_ratio', or load the model with eager attention."
            )
    return nodes, corrupted


def _check_shapes(settings: Settings, nodes: BlockNodes, n_pos: int, n_layers: int, has_corrupted: bool) -> None:
    """Check target and baselines against a prompt of `n_pos` tokens."""
    d_model = nodes.resid_pre.shape[-1]
    if not isinstance(settings.target, Metric):
        check_target(settings.target, n_pos, d_model)
    for name in settings.maps:
        shape = (n_pos, d_model)
        if name == "mlp" and nodes.z is not None:
            shape = (n_pos, *nodes.z.shape[1:])
        check_baseline(name, settings.baselines[name], n_layers, shape, has_corrupted)


def _nodes(
    model: Any, prompt: Prompt, layers: tuple[int, ...], heads: bool, formula: bool, pattern: bool, messages: bool
) -> dict[int, BlockNodes]:
    def visit(call: BlockCall) -> BlockNodes:
        nodes = find_nodes(model, call, heads, formula)
        if messages and nodes.z is not None and call.seen is not None:
            attention = attention_of(nodes, call.seen.values)
            nodes = replace(nodes, v_path=None if attention is None else attention.v_path)
        # Patterns of all layers of a long prompt may be larger than all else.
        return nodes if pattern else replace(nodes, pattern=None)

    return record_calls(model, prompt.ids, layers, visit)


def _run(model: Any, settings: Settings, job: Job, out: "str | os.PathLike[str] | None") -> Flow:
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


def _fill(model: Any, settings: Settings, job: Job, put: Callable[[str, int, Tensor], Any]) -> None:
    """Compute every layer and hand its tensors over, under the names that they have in a Flow file."""
    total = len(job.layers) * len(settings.maps) * len(job.destinations)
    cells: dict[str, list[dict[str, Tensor]]] = {name: [] for name in settings.maps}
    with (
        _float32(model, settings),
        tqdm(
            total=total, desc="lig_lens", unit="col", disable=not settings.progress, file=sys.stderr, leave=False
        ) as bar,
    ):
        for index, layer in enumerate(job.layers):
            with prepared(model, model.blocks[layer]):
                for name in settings.maps:
                    bar.set_postfix_str(f"layer {layer} {name}")
                    columns = columns_of(settings, job, index, name, bar)
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


def _shapes(settings: Settings, job: Job) -> dict[str, tuple[int, ...]]:
    """Shapes of a Flow's tensors, under the names that they have in a Flow file."""
    sizes = {
        "layer": len(job.layers),
        "head": job.nodes[job.layers[0]].boundaries.n_heads,
        "src": len(job.prompt),
        "dst": len(job.destinations),
    }
    per_metric = job.downstream is not None
    named, cells = tensor_axes(per_metric), cell_axes(per_metric)
    axes = {name: named[name] for name in settings.maps}
    if "mlp" in axes:
        axes |= {name: named[name] for name in _PARTS}
    if per_metric:
        axes["skip"] = named["skip"]
    axes |= {f"{group}.{name}": cells[name] for group in flow_io.CELLS for name in settings.maps}
    return {name: tuple(sizes[axis] for axis in of) for name, of in axes.items()}


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


def _labels(model: Any, settings: Settings, job: Job) -> dict[str, Any]:
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
            name: tuple(engine_of(settings, job.nodes[layer], name) for layer in job.layers) for name in settings.maps
        },
        "metric": None if job.downstream is None else job.downstream.metric.name,
    }


def _record(model: Any, settings: Settings, job: Job) -> dict[str, Any]:
    """Settings as a Flow keeps them."""
    down = job.downstream
    return {
        **(
            {}
            if down is None
            else {"metric": {"clean": down.clean, "corrupted": down.corrupted}, "split": settings.split}
        ),
        "maps": list(settings.maps),
        **{f"{name}_baseline": describe_baseline(settings.baselines[name]) for name in settings.maps},
        "target": settings.target.name if isinstance(settings.target, Metric) else describe_target(settings.target),
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
