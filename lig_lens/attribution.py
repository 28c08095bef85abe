"""The one entry: prompts in, Flows out."""

import importlib.metadata
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lig_lens import __version__
from lig_lens.blocks.call import BlockCall
from lig_lens.blocks.known import Blocks, Needs
from lig_lens.blocks.values import Values
from lig_lens.choose import Selection, chosen_numbers
from lig_lens.errors import ConvergenceWarning, InputError, warn_caller
from lig_lens.files import check_writable
from lig_lens.flow import file as flow_io
from lig_lens.flow.flow import Flow
from lig_lens.flow.labels import axes_of
from lig_lens.hooked import HookedModel, check_hooked
from lig_lens.inputs.inputs import Inputs
from lig_lens.inputs.pairs import is_batch, read_pairs
from lig_lens.integrate.held import Hold
from lig_lens.integrate.integrand import Budget
from lig_lens.integrate.onward import Downstream
from lig_lens.maps import MAPS, METRIC_MAPS
from lig_lens.maps.job import Job
from lig_lens.maps.map import Map
from lig_lens.models.experts import has_experts
from lig_lens.models.loading import check_evaluating, describe_processing, model_name
from lig_lens.models.running import one_at_a_time, prepared
from lig_lens.models.stack import Forward, Stack, check_stream, stack_of
from lig_lens.paths.baseline import Baseline, chosen_baseline, describe_baseline
from lig_lens.paths.columns import Columns
from lig_lens.progress import progress
from lig_lens.settings import DEFAULTS, Settings
from lig_lens.targets.metrics import Metric
from lig_lens.targets.resolve import as_target
from lig_lens.targets.target import DestinationTarget, Target

_CELLS = ("converged", "gap", "error", "nodes", "jumped")


@torch.inference_mode(False)  # gradients are needed, whatever mode the caller is in
def attribute(
    model: HookedModel | object,
    prompt: Any,
    *,
    maps: str | Sequence[str] | None = DEFAULTS.maps,
    layers: Selection = DEFAULTS.layers,
    destinations: Selection = DEFAULTS.destinations,
    attn_baseline: str | Tensor | None = DEFAULTS.attn_baseline,
    mlp_baseline: str | Tensor = DEFAULTS.mlp_baseline,
    block_baseline: str | Tensor = DEFAULTS.block_baseline,
    target: "str | Target | Callable[[Tensor], Any]" = DEFAULTS.target,
    corrupted: Any = DEFAULTS.corrupted,
    tol: float = DEFAULTS.tol,
    max_nodes: int = DEFAULTS.max_nodes,
    max_batch_tokens: int = DEFAULTS.max_batch_tokens,
    engine: str = DEFAULTS.engine,
    split: str = DEFAULTS.split,
    hold: str | None = DEFAULTS.hold,
    noising: bool = DEFAULTS.noising,
    stream: str | None = DEFAULTS.stream,
    experts: str = DEFAULTS.experts,
    prepend_bos: bool | None = DEFAULTS.prepend_bos,
    attention_mask: Any = DEFAULTS.attention_mask,
    out: "str | os.PathLike[str] | None" = DEFAULTS.out,
    progress: bool = DEFAULTS.progress,
) -> Flow | list[Flow]:
    """Layer-wise Integrated Gradients of one prompt or of several (LIG, arXiv 2606.21564).

    Args:
        model: a `TransformerBridge`, `HookedTransformer` or `HookedEncoder`; see `load_model`.
        prompt: a text, or token ids [pos] or [1, pos]; for a model of images an image of Pillow, or pixel values
            [channel, height, width] as the model takes them. A list of such prompts gives a list of Flows, each equal
            to that of its own single run. Of a model with an encoder and a decoder a pair `(source, target)`, the
            target being what the decoder has written so far: ids as they stand, or a text, which gets the token that
            targets start with; for `stream="encoder"` a source alone will do.
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
        corrupted: second prompt of the same length, or image of the same shape, for the `corrupted` baseline.
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
        hold: with a metric, what stays while a path runs. None, the default: nothing, so that a layer's contributions
            add up with `skip` to f(prompt) - f(corrupted). `skip`: what bypasses the heads, so that they add up to the
            effect of patching all heads of the block. `others`: the other heads as well, so that each head's add up to
            the effect of patching it alone, in a cell for each head, at the cost of as many runs as there are heads.
        noising: what is held stays as in the clean run, so that contributions add up to f(clean) - f(patched); by
            default as in the run that the path starts from: f(patched) - f(corrupted). As in `interventions.patching`.
        stream: of a model with an encoder and a decoder, whose attention is explained. `decoder`, the default: its
            self-attention, with the encoder's output held. `encoder`: its self-attention. `cross`: what each vector
            of the encoder's output contributes to the heads of each block's cross-attention, `[layer, head, src,
            dst]` with sources in the source and destinations in the target, along a path of that output (`zero` by
            default; `corrupted` is another source), the decoder's residual stream held.
        experts: for blocks whose router chooses some of its experts. `free` lets it choose anew along the path, where
            the target jumps: that belongs to no contribution, and stays as a gap. `held` keeps the experts that the
            prompt chose at each position, with weights that follow the path: then contributions are to a block of those
            experts.
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
        BoundaryError: the nodes of a block could not be verified on this model. Of several prompts each is verified
            when it has its turn.
        NonFiniteError: NaN or infinite values in weights or activations.
        OSError: no room for `out`.

    Warns:
        ConvergenceWarning: once per prompt, with the number of cells that missed `tol`.
    """
    given = dict(locals())
    hooked = check_hooked(model)
    asked = {name: given[name] for name in Settings.model_fields}
    settings = Settings.of(**asked | {"target": as_target(target)})
    if out is not None:
        if not isinstance(out, (str, os.PathLike)):
            raise InputError(f"out={out!r} is no path: give the name of a file.")
        if is_batch(prompt, check_stream(hooked, stream)):
            raise InputError("out is one file, for one prompt: call attribute() for each prompt, or save the Flows.")
        check_writable(out, "out")
    with one_at_a_time(hooked):
        check_evaluating(hooked)
        stack = stack_of(hooked, settings.stream)
        pairs = read_pairs(hooked, prompt, corrupted, attention_mask, prepend_bos, stream=stack.stream)
        chosen = chosen_numbers("layer", layers, len(stack))
        wanted = [chosen_numbers("destination", destinations, len(clean.dst_tokens)) for clean, _ in pairs]
        run = _Run(stack, settings, chosen)
        first = run.prepare(*pairs[0], wanted[0])
        for clean, second in pairs[1:]:
            run.check_prompt(first.values[chosen[0]], clean, second)
        rest = (run.prepare(*pair, dst) for pair, dst in zip(pairs[1:], wanted[1:], strict=True))
        flows = []
        for number, job in enumerate(itertools.chain([first], rest), 1):
            doing = "lig_lens" if len(pairs) == 1 else f"lig_lens, prompt {number} of {len(pairs)}"
            flows.append(run.flow(job, out, doing))
        return flows if is_batch(prompt, stack.stream) else flows[0]


def flow_of(stack: Stack, inputs: Inputs, settings: Settings) -> Flow:
    """What `attribute` gives for a prompt that was read before, at all blocks and destinations."""
    run = _Run(stack, settings, tuple(range(len(stack))))
    return run.flow(run.prepare(inputs, None, tuple(range(len(inputs.dst_tokens)))), None, "lig_lens")


class _Run:
    """One call of `attribute`: a model, what is asked of it, and its blocks."""

    def __init__(self, stack: Stack, settings: Settings, layers: tuple[int, ...]) -> None:
        self.model, self.settings, self.layers = stack.model, settings, layers
        registry = METRIC_MAPS if settings.target.per_metric else MAPS
        self.maps: list[Map] = [registry[name] for name in settings.maps]
        self.budget = Budget(settings.tol, settings.max_nodes, settings.max_batch_tokens)
        with self._float32():
            self.blocks = Blocks(stack, layers)

    def prepare(self, clean: Inputs, second: Inputs | None, destinations: tuple[int, ...]) -> Job:
        """Record the prompt's blocks, and check that they have what the maps need."""
        settings, metric = self.settings, self.settings.target
        with_heads, by_message = [one for one in self.maps if one.needs_heads], settings.split == "message"
        heads, without_heads = bool(with_heads), "; ".join(dict.fromkeys(one.without_heads for one in with_heads))
        needs = Needs(
            heads=heads,
            formula=settings.engine != "hooks",
            pattern=any(settings.baseline_fact(name, "pattern") for name in settings.maps),
            v_path=by_message,
            routes=settings.experts == "held",
            without_heads=without_heads,
        )
        downstream = corrupted = None
        with self._float32():
            recording = self.blocks.record(clean, needs, whole=metric.per_metric)
            if second is not None:
                corrupted = self.blocks.record(
                    second, Needs(heads, formula=False, without_heads=without_heads), whole=metric.per_metric
                )
            if isinstance(metric, Metric):
                first = recording.visited[min(self.layers)].call
                other = None if corrupted is None else corrupted.whole
                downstream = self._downstream(metric, recording.whole, other, first)
        values = recording.visited
        for at in values.values():
            for one in self.maps:
                one.check_block(at, settings.engine, by_message)
        chosen = self.check_prompt(values[self.layers[0]], clean, second)
        for at in values.values():
            for baseline in chosen.values():
                baseline.check_block(at)
        return Job(
            inputs=clean,
            second=second,
            layers=self.layers,
            destinations=destinations,
            values=values,
            corrupted={} if corrupted is None else corrupted.visited,
            baselines={name: settings.baseline_of(name) for name in settings.maps},
            chosen=chosen,
            target=metric,
            downstream=downstream,
            budget=self.budget,
            engine=settings.engine,
            by_message=by_message,
            hold=None if settings.hold is None else Hold(settings.hold == "others", settings.noising),
        )

    def check_prompt(self, values: Values, clean: Inputs, second: Inputs | None) -> dict[str, Baseline]:
        """Check target and baselines against a prompt, and give the baselines."""
        target = self.settings.target
        if isinstance(target, DestinationTarget):
            target.check(len(clean.dst_tokens), values.resid_pre.shape[-1])
        elif second is not None:
            clean.check_held(second)
        return {
            one.name: chosen_baseline(
                one.name,
                self.settings.baseline_of(one.name),
                len(self.layers),
                one.node_shape(values, len(clean)),
                second is not None,
            )
            for one in self.maps
        }

    def flow(self, job: Job, out: "str | os.PathLike[str] | None", doing: str) -> Flow:
        """Compute every layer.

        Args:
            job: the prompt.
            out: file for it, if there is one.
            doing: what the progress bar says.
        """
        labels, shapes = self._labels(job), self._shapes(job)
        if out is None or (Path(out).exists() and not Path(out).is_file()):  # a pipe cannot be written in pieces
            tensors = {
                name: torch.empty(shape, dtype=torch.bool if name.startswith("converged") else torch.float32)
                for name, shape in shapes.items()
            }
            self._fill(job, doing, lambda name, index, value: tensors[name][index].copy_(value))
            grouped: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if "." not in name}
            for group in flow_io.CELLS:
                grouped[group] = {one.name: tensors[f"{group}.{one.name}"] for one in self.maps}
            flow = Flow(**labels, **grouped)
            if out is not None:
                flow.save(out)
            return flow
        with flow_io.growing(out, labels, shapes) as put:
            self._fill(job, doing, put)
        return Flow.load(out)

    def _float32(self) -> AbstractContextManager[None]:
        """For a metric all of a half-precision model runs in float32, so that it is one function throughout."""
        return prepared(self.model, self.model) if self.settings.target.per_metric else nullcontext()

    def _downstream(self, metric: Metric, clean: Forward, second: Forward | None, first: BlockCall) -> Downstream:
        with torch.no_grad():
            ready = metric.on(self.model, clean.output)
            corrupted = None if second is None else float(ready(second.output))
            return Downstream(clean, ready, float(ready(clean.output)), corrupted, first)

    def _fill(self, job: Job, doing: str, put: Callable[[str, int, Tensor], Any]) -> None:
        """Compute every layer and hand its tensors over, under the names that they have in a Flow file."""
        # From the last layer on: with a metric that takes least, and soon tells how long the others will take.
        order = range(len(job.layers))[::-1]
        total = sum(one.work(job, index) for one in self.maps for index in order)
        done: dict[str, list[Columns]] = {one.name: [] for one in self.maps}
        unit = "block" if self.settings.target.per_metric else "col"
        with self._float32(), progress(doing, unit, total, self.settings.progress) as bar:
            for index in order:
                layer = job.layers[index]
                with prepared(self.model, self.blocks.stack.blocks[layer]):
                    for one in self.maps:
                        bar.set_postfix_str(f"layer {layer} {one.name}", refresh=False)
                        columns = one.columns(job, index, bar.update)
                        put(one.name, index, columns.contributions)
                        for part in one.parts:
                            put(part, index, getattr(columns, part))
                        for cell in flow_io.CELLS:
                            put(f"{cell}.{one.name}", index, getattr(columns, cell))
                        done[one.name].append(columns.cells_only())
        routed = any(has_experts(values.call.block) for values in job.values.values())
        _warn(self.settings, done, routed and self.settings.experts == "free", _rounds_below_its_weights(job))

    def _shapes(self, job: Job) -> dict[str, tuple[int, ...]]:
        """Shapes of a Flow's tensors, under the names that they have in a Flow file."""
        heads = {values.block.boundaries.n_heads: layer for layer, values in job.values.items()}
        if len(heads) > 1 and any(one.needs_heads for one in self.maps):
            raise InputError(
                f"Blocks have different numbers of heads ({', '.join(f'{n} in block {b}' for n, b in heads.items())}), "
                "and one tensor holds them all: choose layers with the same number."
            )
        sizes = {
            "layer": len(job.layers),
            "head": next(iter(heads)),
            "src": len(job.inputs),
            "dst": len(job.destinations),
        }
        named = axes_of(job.target.per_metric, job.each_head)
        axes = {name: named.tensors[name] for one in self.maps for name in (one.name, *one.parts)}
        axes |= {f"{group}.{one.name}": named.cells[one.name] for group in flow_io.CELLS for one in self.maps}
        return {name: tuple(sizes[axis] for axis in of) for name, of in axes.items()}

    def _labels(self, job: Job) -> dict[str, Any]:
        """What a Flow holds beside its tensors."""
        values = [job.values[layer] for layer in job.layers]
        return {
            "tokens": job.inputs.tokens,
            "special": job.inputs.special,
            "stream": self.blocks.stack.stream,
            "dst_tokens": job.inputs.dst_tokens,
            "dst_special": job.inputs.dst_special,
            "layers": job.layers,
            "destinations": job.destinations,
            "model_name": model_name(self.model),
            "settings": self._record(job),
            "layouts": tuple(one.block.boundaries.layout for one in values),
            "engines": {one.name: tuple(one.engine(job.engine, v).name for v in values) for one in self.maps},
            "metric": None if job.downstream is None else job.downstream.metric.name,
        }

    def _record(self, job: Job) -> dict[str, Any]:
        """Settings as a Flow keeps them."""
        settings, down, stream, metric = self.settings, job.downstream, self.blocks.stack.stream, {}
        if down is not None:
            metric = {"metric": {"clean": down.clean, "corrupted": down.corrupted}}
            metric |= {name: getattr(settings, name) for name in ("split", "hold", "noising")}
        return {
            **metric,
            "maps": list(settings.maps),
            **{f"{name}_baseline": describe_baseline(settings.baseline_of(name)) for name in settings.maps},
            "target": settings.target.name,
            **({} if stream is None else {"stream": stream}),
            "tol": settings.tol,
            "max_nodes": settings.max_nodes,
            "engine": settings.engine,
            job.inputs.kept_as: job.inputs.record(),
            f"corrupted_{job.inputs.kept_as}": None if job.second is None else job.second.record(),
            **({} if settings.experts == "free" else {"experts": settings.experts}),
            "model": describe_processing(self.model),
            "versions": {
                "lig_lens": __version__,
                **{name: importlib.metadata.version(name) for name in ("transformer_lens", "torch")},
            },
        }


def _rounds_below_its_weights(job: Job) -> bool:
    """Whether a float64 model computes some steps in float32, as norms and softmax of transformers do."""
    return any(
        one.resid_pre.dtype is torch.float64 and one.block.rounding >= torch.finfo(torch.float32).eps
        for one in job.values.values()
    )


def _warn(settings: Settings, done: Mapping[str, Sequence[Columns]], routed: bool, single: bool) -> None:
    """Say how many cells missed the tolerance, pointing at the code that called into this package.

    Args:
        settings: what was asked.
        done: by map, the columns of each layer.
        routed: whether routers chose experts anew along the paths.
        single: whether the model's weights are float64 and some of its steps are not.
    """
    flat = {
        name: {key: torch.cat([getattr(one, key).flatten() for one in layers]) for key in _CELLS}
        for name, layers in done.items()
    }
    missed = {name: cells for name, cells in flat.items() if not bool(cells["converged"].all())}
    if not missed:
        return
    listed = ", ".join(
        f"{name} {int((~cells['converged']).sum())} (worst gap {float(cells['gap'].max()):.1e}, worst estimated error "
        f"of a contribution {float(cells['error'].max()):.1e})"
        for name, cells in missed.items()
    )
    # Refining all panels of a cell costs at most twice what was spent on it: one that could have paid for that has
    # only gaps that rounding can explain.
    jumping = {name: cells["jumped"] > settings.tol for name, cells in missed.items()}
    rounded = sum(
        int((~cells["converged"] & ~jumping[name] & (3 * cells["nodes"] <= settings.max_nodes)).sum())
        for name, cells in missed.items()
    )
    limited = (
        f" {rounded} of them are limited by rounding, which no max_nodes cures: use a larger tol, or a float64 model "
        "(a Flow itself keeps float32, which rounds to about 1e-7)."
        if rounded
        else ""
    )
    if single:
        limited = (
            " The model's weights are float64, but some of its steps round to float32 (norms, softmax): what is near "
            "that rounding, which paths through norms enlarge, a larger tol alone cures."
        )
    n_jumping = sum(int(cells.sum()) for cells in jumping.values())
    if n_jumping:
        worst = max(float(cells["jumped"].max()) for cells in missed.values())
        limited += (
            f" {n_jumping} of them miss what the target itself jumps by along the path (up to {worst:.1e} of its "
            "change), which belongs to no contribution, and which no max_nodes cures."
        )
    if routed and not settings.per_metric:
        limited += " The routers' choice changes along the path: experts='held' keeps the prompt's."
    warn_caller(
        f"{sum(int((~cells['converged']).sum()) for cells in missed.values())} of "
        f"{sum(len(cells['converged']) for cells in flat.values())} cells missed tol={settings.tol:g} within "
        f"max_nodes={settings.max_nodes}: {listed}. See flow.gap and flow.converged; raise max_nodes or tol.{limited}",
        ConvergenceWarning,
    )
