"""Interventions: activation patching, knock-outs of attention edges, ablation of heads.

Exact and batched (`runner`), on every model that `attribute` takes. Differences that rounding alone can cause are given
as 0.

Signs: an effect is positive where what is put back, or left in, raises the metric. So patching clean activations into
the corrupted run (denoising) counts f(patched) - f(corrupted), and taking something out of the clean run counts
f(clean) - f(without): as contributions of a Flow with the same metric do.
"""

from collections.abc import Sequence
from dataclasses import replace

from lig_lens.arguments import checked
from lig_lens.choose import Selection
from lig_lens.errors import InputError
from lig_lens.flow.effects import Effects
from lig_lens.flow.flow import Flow
from lig_lens.hooked import check_hooked
from lig_lens.inputs.pairs import is_batch
from lig_lens.interventions import ABLATED_BY, NODES
from lig_lens.interventions.ablations import Ablation
from lig_lens.interventions.knockouts import EdgeIndex, EdgePatch, KnockOut, RenormalisedKnockOut, chosen_edges
from lig_lens.interventions.patches import Patch
from lig_lens.interventions.runner import intervene
from lig_lens.settings import MAX_BATCH_TOKENS
from lig_lens.targets.metrics import Function, Metric

ABLATIONS = ABLATED_BY.names()


@checked
def patch(
    model: object,
    clean: object,
    corrupted: object,
    metric: Metric | Function,
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
    intervention: Patch = NODES[at]
    if not each_position:
        intervention = intervention.everywhere()
    if corrupted is None:
        raise InputError("corrupted is None: patching needs a second prompt of as many tokens.")
    return intervene(
        model,
        [clean, corrupted],
        metric,
        replace(intervention, noising=noising),
        layers=layers,
        prepend_bos=prepend_bos,
        max_batch_tokens=max_batch_tokens,
        progress=progress,
    )


@checked
def knock_out(
    model: object,
    prompt: object,
    metric: Metric | Function,
    *,
    edges: object = None,
    layers: Selection = None,
    corrupted: object = None,
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
    if corrupted is not None and renormalise:
        raise InputError("renormalise=True goes with knock-outs: an edge from another run leaves its row whole.")
    wanted, chosen = chosen_edges(edges, layers, int(check_hooked(model).cfg.n_layers))
    kind = KnockOut if corrupted is None else EdgePatch
    return intervene(
        model,
        [prompt] if corrupted is None else [prompt, corrupted],
        metric,
        RenormalisedKnockOut(wanted) if renormalise else kind(wanted),
        layers=chosen,
        prepend_bos=prepend_bos,
        max_batch_tokens=max_batch_tokens,
        progress=progress,
    )


@checked
def ablate(
    model: object,
    prompt: object,
    metric: Metric | Function,
    others: object,
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
    intervention: Ablation = ABLATED_BY[by]
    listed = others if isinstance(others, Sequence) and is_batch(others) else [others]
    put_in = [other for other in listed if other is not None]
    if not put_in:
        raise InputError("others is empty: give prompts whose head outputs are put in.")
    return intervene(
        model,
        [prompt, *put_in],
        metric,
        intervention,
        layers=layers,
        prepend_bos=prepend_bos,
        max_batch_tokens=max_batch_tokens,
        progress=progress,
    )


@checked
def top_edges(flow: Flow | Effects, k: int) -> list[EdgeIndex]:
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
    found = flow.top(k, "attn")
    return [(e.layer, e.head, e.src, e.dst) for e in found if e.head is not None and e.contribution != 0]
