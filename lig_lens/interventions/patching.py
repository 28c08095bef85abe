"""Interventions, exact and batched: activation patching, knock-outs of attention edges, ablation of heads.

Every intervention is put into one block: other residual vectors enter it, or its heads put out something else. The
blocks before it need not run, and the rest of the model is run on many interventions at once. That works alike on a
`TransformerBridge`, a `HookedTransformer` and a `HookedEncoder`, with grouped keys and in every layout, and gives what
TransformerLens' own patching gives where that supports the model.

Differences that rounding alone can cause are given as 0.

Signs: an effect is positive where what is put back, or left in, raises the metric. So patching clean activations into
the corrupted run (denoising) counts f(patched) - f(corrupted), and taking something out of the clean run counts
f(clean) - f(without): as contributions of a Flow with the same metric do.
"""

import operator
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from lig_lens.blocks.call import prepared
from lig_lens.errors import InputError, check_choice
from lig_lens.flow.effects import Effects
from lig_lens.inputs.prompts import Prompt, is_batch
from lig_lens.inputs.request import Selection, chosen_numbers
from lig_lens.interventions.run import CircuitRun, read_pair
from lig_lens.models.loading import check_evaluating, check_hooked
from lig_lens.names import head_name
from lig_lens.settings import MAX_BATCH_TOKENS, PATCHED_NODES
from lig_lens.targets.metrics import BatchMetric, Metric
from lig_lens.targets.metrics import metric as as_metric

ABLATIONS = ("mean", "resample")
Index = tuple[int, int, int, int]


@torch.inference_mode(False)  # the metric's gradient tells its rounding, whatever mode the caller is in
@torch.no_grad()
def patch(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Tensor], Any],
    *,
    at: str = "hook_z",
    each_position: bool = True,
    layers: Selection = None,
    noising: bool = False,
    prepend_bos: bool | None = None,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    progress: bool = True,
) -> Effects:
    """Activation patching: one node at a time gets its value from the other run.

    Args:
        model: a hooked model.
        clean: a text or token ids.
        corrupted: the same, of the same number of tokens.
        metric: of the logits; see `metrics`.
        at: `hook_z` (one head's output at one position, [layer, head, pos]), `resid_pre` or `resid_mid` (the residual
            stream at one position, [layer, pos]).
        each_position: False patches a head at all positions at once, [layer, head].
        layers: block numbers, all by default.
        noising: patch corrupted values into the clean run instead, and count f(clean) - f(patched).
        prepend_bos: for texts; the tokenizer's own default with None.
        max_batch_tokens: tokens that are run at once; bounds memory, changes nothing else.
        progress: show a progress bar.

    Returns:
        f(patched) - f(corrupted), or with `noising` f(clean) - f(patched).

    Raises:
        InputError: prompts of different lengths, an unknown node, a metric that gives no number, or `resid_mid` in a
            layout without one.
        BoundaryError: blocks that cannot be run by themselves.
    """
    check_choice("node", at, PATCHED_NODES)
    if not each_position and at != "hook_z":
        raise InputError(f"each_position=False goes with at='hook_z': {at} at all positions is all of the other run.")
    model = _checked(model, max_batch_tokens)
    if corrupted is None:
        raise InputError("corrupted is None: patching needs a second prompt of as many tokens.")
    first, second = read_pair(model, clean, corrupted, prepend_bos)
    assert second is not None
    chosen = chosen_numbers("layer", layers, int(model.cfg.n_layers))
    with prepared(model, model):
        runs = [CircuitRun(model, prompt, chosen) for prompt in (first, second)]
        ready = _ready(model, metric, runs[0])
        into, source = runs if noising else reversed(runs)
        if at == "resid_mid":
            _check_middles(into)
        before, noise = float(ready(into.rest.logits)), into.noise(ready)
        n_heads = len(_z(into, chosen[0])[0])
        per_layer = (len(first) if each_position else 1) * (n_heads if at == "hook_z" else 1)
        with _bar(len(chosen) * per_layer, progress, f"patching {at}") as bar:
            rows = []
            for layer in chosen:
                make = _patches(into, source, layer, at if each_position else "heads")
                rows.append(into.measure(ready, layer, per_layer, make, max_batch_tokens, bar.update))
    values = torch.stack(rows)
    values = _effects(before - values if noising else values - before, noise)
    on = "positions"
    if not each_position:
        on = "heads"
    elif at == "hook_z":
        on, values = "heads_by_pos", values.reshape(len(chosen), n_heads, len(first))
    return Effects(
        values=values,
        on=on,
        name=f"activation patching of {'head outputs (hook_z)' if at == 'hook_z' else at}"
        + (", noising" if noising else ""),
        tokens=first.tokens,
        layers=chosen,
        metric=ready.name,
        measures="metric lost: clean - patched" if noising else "metric gained: patched - corrupted",
        reference=before,
        settings={"clean": _ids(first), "corrupted": _ids(second), "at": at, "noising": noising},
    )


def _patches(into: CircuitRun, source: CircuitRun, layer: int, at: str) -> Callable[[Tensor], tuple[Any, Any]]:
    """What enters block `layer` of a run when one node is replaced; `heads` is hook_z at all positions."""
    here, there = into.blocks[layer].nodes, source.blocks[layer].nodes
    z, other = _z(into, layer), _z(source, layer)
    n_pos = len(z)

    def hook_z(numbers: Tensor) -> tuple[Any, Any]:
        patched, item = _copies(z, numbers)
        head, pos = numbers // n_pos, numbers % n_pos
        patched[item, pos, head] = other[pos, head]
        return None, patched

    def heads(numbers: Tensor) -> tuple[Any, Any]:
        patched, item = _copies(z, numbers)
        patched[item, :, numbers] = other[:, numbers].transpose(0, 1)
        return None, patched

    def resid_pre(numbers: Tensor) -> tuple[Any, Any]:
        patched, item = _copies(here.resid_pre, numbers)
        patched[item, numbers] = there.resid_pre[numbers]
        return patched, None

    def resid_mid(numbers: Tensor) -> tuple[Any, Any]:
        # The rest of the block sees only the sum: what is added to one of its terms is added to it.
        assert here.resid_mid is not None and there.resid_mid is not None
        patched, item = _copies(here.resid_pre, numbers)
        patched[item, numbers] += (there.resid_mid - here.resid_mid)[numbers]
        return patched, z.expand(len(numbers), -1, -1, -1)

    return {"hook_z": hook_z, "heads": heads, "resid_pre": resid_pre, "resid_mid": resid_mid}[at]


def _copies(value: Float[Tensor, "pos *rest"], numbers: Tensor) -> tuple[Float[Tensor, "run pos *rest"], Tensor]:
    """A node's value once for each run, and which run each copy is for."""
    return value.repeat(len(numbers), *[1] * value.ndim), torch.arange(len(numbers), device=value.device)


@torch.inference_mode(False)  # the metric's gradient tells its rounding, whatever mode the caller is in
@torch.no_grad()
def knock_out(
    model: Any,
    prompt: Any,
    metric: Metric | Callable[[Tensor], Any],
    *,
    edges: Iterable[Any] | None = None,
    layers: Selection = None,
    corrupted: Any = None,
    renormalise: bool = False,
    prepend_bos: bool | None = None,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    progress: bool = True,
) -> Effects:
    """Take single edges out of the attention pattern, one at a time: exact, nothing is linearised.

    The effect is how much worse off the prompt is without the edge. What an edge carries whatever the prompt (to a
    position that every prompt needs) counts as well; with `corrupted` only what it carries of the difference does,
    which is what contributions to a metric from that corrupted run are about.

    Args:
        model: a hooked model.
        prompt: a text or token ids.
        metric: of the logits.
        edges: `(layer, head, src, dst)`, such as `top_edges(flow, 200)`; all that attention can see by default.
        layers: block numbers, all by default, or those of `edges`.
        corrupted: a second prompt of the same number of tokens: the edge carries what it carries in that run (pattern
            entry times value), instead of nothing.
        renormalise: scale what is left of the pattern's row to add up to 1.
        prepend_bos: see `patch`.
        max_batch_tokens: see `patch`.
        progress: see `patch`.

    Returns:
        f(prompt) - f(without the edge), [layer, head, src, dst]; NaN for edges that were not asked for. A row's only
        edge cannot be renormalised away, and counts as 0 then.

    Raises:
        InputError: edges that do not exist (out of range, or a later source in a causal model), a metric that gives no
            number, or a block whose pattern and values cannot be read.
    """
    model = _checked(model, max_batch_tokens)
    if corrupted is not None and renormalise:
        raise InputError("renormalise=True goes with knock-outs: an edge from another run leaves its row whole.")
    read, second = read_pair(model, prompt, corrupted, prepend_bos)
    n_layers = int(model.cfg.n_layers)
    wanted = None if edges is None else sorted({_whole(edge, n_layers) for edge in edges})
    if wanted is not None:
        if not wanted:
            raise InputError("edges is empty: name at least one as (layer, head, src, dst), or leave it out for all.")
        named = sorted({edge[0] for edge in wanted})
        layers = named if layers is None else layers
    chosen = chosen_numbers("layer", layers, n_layers)
    if wanted is not None and not set(named) <= set(chosen):
        raise InputError(f"edges are in the layers {named}, and layers={list(chosen)}: name all of them, or none.")
    with prepared(model, model):
        run = CircuitRun(model, read, chosen)
        other = None if second is None else CircuitRun(model, second, chosen)
        ready = _ready(model, metric, run)
        asked = {layer: _asked(run, other, layer, wanted) for layer in chosen}
        before, noise = float(ready(run.rest.logits)), run.noise(ready)
        shape = (len(chosen), _z(run, chosen[0]).shape[1], len(read), len(read))
        values = torch.full(shape, torch.nan)
        with _bar(sum(len(places) for places in asked.values()), progress, "edge knock-outs") as bar:
            for row, layer in enumerate(chosen):
                places = asked[layer]
                make = _without_edges(run, other, layer, places, renormalise)
                found = run.measure(ready, layer, len(places), make, max_batch_tokens, bar.update)
                values[row][tuple(places.T.cpu())] = _effects(before - found, noise).float()
    return Effects(
        values=values,
        on="edges",
        name=("edge knock-out" if second is None else "edge patching") + (", renormalised" if renormalise else ""),
        tokens=read.tokens,
        layers=chosen,
        metric=ready.name,
        measures=f"metric lost: clean - {'knocked out' if second is None else 'patched'}",
        reference=before,
        settings={
            "prompt": _ids(read),
            "corrupted": None if second is None else _ids(second),
            "renormalise": renormalise,
        },
    )


def _without_edges(
    run: CircuitRun, other: CircuitRun | None, layer: int, places: Tensor, renormalise: bool
) -> Callable[[Tensor], tuple[Any, Any]]:
    z, attention = _z(run, layer), run.blocks[layer].attention
    assert attention is not None  # checked in _asked
    instead = None if other is None else other.blocks[layer].attention

    def make(numbers: Tensor) -> tuple[Any, Any]:
        head, src, dst = places[numbers].T
        changed, item = _copies(z, numbers)
        # From what is left, not as differences: a row may look at one token nearly alone.
        row = attention.pattern[head, dst].scatter(1, src[:, None], 0.0)
        left = torch.einsum("es,seh->eh", row, attention.values[:, head])
        if renormalise:
            rest = row.sum(-1, keepdim=True)
            left = torch.where(rest > 0, left / rest.clamp(min=1e-30), z[dst, head])
        if instead is not None:
            left = left + instead.pattern[head, dst, src][:, None] * instead.values[src, head]
        changed[item, dst, head] = left
        return None, changed

    return make


def _asked(run: CircuitRun, other: CircuitRun | None, layer: int, wanted: list[Index] | None) -> Tensor:
    """Edges `(head, src, dst)` of a block to knock out, [edge, 3]."""
    attention = run.blocks[layer].attention
    if attention is None or (other is not None and other.blocks[layer].attention is None):
        raise InputError(
            f"The pattern and values of block {layer} cannot be read, or head outputs are not their product: its edges "
            "cannot be knocked out. Heads and residual stream can still be patched (patch, ablate)."
        )
    visible = attention.pattern.transpose(1, 2) > 0  # head src dst
    if wanted is None:
        return visible.nonzero()
    places = []
    for _, head, src, dst in (edge for edge in wanted if edge[0] == layer):
        n_heads, n_pos = visible.shape[:2]
        if not (0 <= head < n_heads and 0 <= src < n_pos and 0 <= dst < n_pos):
            raise InputError(
                f"Edge {(layer, head, src, dst)} does not exist: block {layer} has heads 0 to {n_heads - 1}, and the "
                f"prompt positions 0 to {n_pos - 1}."
            )
        if not bool(visible[head, src, dst]):
            raise InputError(
                f"Edge {(layer, head, src, dst)} does not exist: {head_name(layer, head)} cannot see source {src} from "
                f"destination {dst}" + (" (attention is causal)." if src > dst else " (its pattern is 0 there).")
            )
        places.append((head, src, dst))
    return torch.tensor(places, dtype=torch.long, device=visible.device).reshape(-1, 3)


@torch.inference_mode(False)  # the metric's gradient tells its rounding, whatever mode the caller is in
@torch.no_grad()
def ablate(
    model: Any,
    prompt: Any,
    metric: Metric | Callable[[Tensor], Any],
    others: Any,
    *,
    by: str = "mean",
    layers: Selection = None,
    prepend_bos: bool | None = None,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    progress: bool = True,
) -> Effects:
    """Replace all outputs of one head at a time by what it puts out on other prompts.

    Args:
        model: a hooked model.
        prompt: a text or token ids.
        metric: of the logits.
        others: prompts (texts or ids) of the same length: a list, or one prompt.
        by: `mean` puts in the mean over `others`, position by position; `resample` each of them in turn, and averages
            the metric.
        layers: block numbers, all by default.
        prepend_bos: see `patch`.
        max_batch_tokens: see `patch`.
        progress: see `patch`.

    Returns:
        f(prompt) - f(ablated), [layer, head].

    Raises:
        InputError: as `patch`.
    """
    check_choice("ablation", by, ABLATIONS)
    model = _checked(model, max_batch_tokens)
    listed = others if is_batch(others) else [others]
    pairs = [read_pair(model, prompt, one, prepend_bos) for one in listed]
    read, other = pairs[0][0], [second for _, second in pairs if second is not None]
    if not other:
        raise InputError("others is empty: give prompts whose head outputs are put in.")
    chosen = chosen_numbers("layer", layers, int(model.cfg.n_layers))
    with prepared(model, model):
        run = CircuitRun(model, read, chosen)
        ready = _ready(model, metric, run)
        before, noise = float(ready(run.rest.logits)), run.noise(ready)
        sources = [CircuitRun(model, one, chosen) for one in other]
        rows = []
        n_heads = _z(run, chosen[0]).shape[1]
        repeats = 1 if by == "mean" else len(sources)
        with _bar(len(chosen) * n_heads * repeats, progress, f"{by} ablation") as bar:
            for layer in chosen:
                z = torch.stack([_z(source, layer) for source in sources])
                if by == "mean":
                    z = z.mean(0, keepdim=True)
                make = _ablations(run, layer, z)
                found = run.measure(ready, layer, n_heads * repeats, make, max_batch_tokens, bar.update)
                rows.append(found.reshape(n_heads, repeats).mean(1))
    return Effects(
        values=_effects(before - torch.stack(rows), noise),
        on="heads",
        name=f"{by} ablation",
        tokens=read.tokens,
        layers=chosen,
        metric=ready.name,
        measures="metric lost: clean - ablated",
        reference=before,
        settings={"prompt": _ids(read), "others": [_ids(one) for one in other], "by": by},
    )


def _ablations(
    run: CircuitRun, layer: int, others: Float[Tensor, "other pos head d_head"]
) -> Callable[[Tensor], tuple[Any, Any]]:
    z = _z(run, layer)

    def make(numbers: Tensor) -> tuple[Any, Any]:
        changed, item = _copies(z, numbers)
        head, other = numbers // len(others), numbers % len(others)
        changed[item, :, head] = others[other, :, head]
        return None, changed

    return make


def top_edges(flow: Any, k: int) -> list[Index]:
    """The k strongest edges of a Flow's attn map, or of Effects on edges, as `knock_out` takes them.

    Args:
        flow: a Flow or Effects.
        k: how many; fewer come back where others are 0.

    Raises:
        InputError: Effects on something else, or a Flow without attn map.
    """
    if isinstance(flow, Effects):
        if flow.on != "edges":
            raise InputError(f"top_edges: these Effects are on {flow.on}, not on edges.")
        return [(layer, head, src, dst) for (layer, head, src, dst), value in flow.top(k) if value != 0]
    return [(edge.layer, edge.head, edge.src, edge.dst) for edge in flow.top(k, "attn") if edge.contribution != 0]


def _checked(model: Any, max_batch_tokens: int) -> Any:
    model = check_hooked(model)
    check_evaluating(model)
    if max_batch_tokens < 1:
        raise InputError(f"max_batch_tokens={max_batch_tokens} is too few: give at least 1.")
    return model


def _effects(differences: Tensor, noise: float) -> Tensor:
    """Differences of the metric; what rounding alone can do is 0, so that nothing is ranked by it."""
    return torch.where(differences.abs() <= noise, 0.0, differences)


def _ready(model: Any, metric: Metric | Callable[[Tensor], Any], clean: CircuitRun) -> BatchMetric:
    return as_metric(metric).on(model, clean.rest.logits)


def _z(run: CircuitRun, layer: int) -> Float[Tensor, "pos head d_head"]:
    z = run.blocks[layer].nodes.z
    assert z is not None
    return z


def _check_middles(run: CircuitRun) -> None:
    for layer, block in run.blocks.items():
        if block.nodes.resid_mid is None:
            raise InputError(
                f"Block {layer} ({block.nodes.boundaries.layout}) has no resid_mid to patch: use at='resid_pre' or "
                "'hook_z'."
            )


def _whole(edge: Any, n_layers: int) -> Index:
    try:
        layer, head, src, dst = (operator.index(number) for number in edge)
    except (TypeError, ValueError) as error:
        raise InputError(f"Edge {edge!r} is not (layer, head, src, dst), four whole numbers.") from error
    (layer,) = chosen_numbers("layer", layer, n_layers)
    return layer, head, src, dst


def _ids(prompt: Prompt) -> list[int]:
    ids: list[int] = prompt.ids[0].tolist()
    return ids


def _bar(total: int, progress: bool, what: str) -> Any:
    return tqdm(total=total, desc=what, unit="run", disable=not progress, file=sys.stderr, leave=False)
