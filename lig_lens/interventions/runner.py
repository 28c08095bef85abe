"""Runs interventions, exact and batched.

Every intervention is put into one block. The blocks before it need not run, and the rest of the model is run on many
interventions at once. That works alike on a `TransformerBridge`, a `HookedTransformer` and a `HookedEncoder`, with
grouped keys and in every layout, and gives what TransformerLens' own patching gives where that supports the model.

Differences that rounding alone can cause are given as 0.
"""

from collections.abc import Sequence

import torch

from lig_lens.choose import Selection
from lig_lens.errors import InputError
from lig_lens.flow.effects import Effects
from lig_lens.inputs.pairs import check_different
from lig_lens.interventions.intervention import Intervention
from lig_lens.interventions.subject import read_subject
from lig_lens.models.running import one_at_a_time, prepared
from lig_lens.progress import progress as progress_of
from lig_lens.settings import MAX_BATCH_TOKENS
from lig_lens.targets.metrics import Function, Metric
from lig_lens.targets.metrics import metric as as_metric


@torch.inference_mode(False)  # the metric's gradient tells its rounding, whatever mode the caller is in
@torch.no_grad()
def intervene(
    model: object,
    prompts: Sequence[object],
    metric: Metric | Function,
    intervention: Intervention,
    *,
    layers: Selection = None,
    prepend_bos: bool | None = None,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    progress: bool = True,
) -> Effects:
    """Measure an intervention at one block after the other.

    Args:
        model: a hooked model.
        prompts: texts or token ids of the same number of tokens, the clean one first.
        metric: of the logits; see `metrics`. It is made ready on the first prompt.
        intervention: what is changed; says which prompt's run it is put into.
        layers: block numbers, all by default.
        prepend_bos: for texts; the tokenizer's own default with None.
        max_batch_tokens: tokens that are run at once; bounds memory, changes nothing else.
        progress: show a progress bar.

    Returns:
        Effects on the intervention's axes, positive as its `measures` says.

    Raises:
        InputError: prompts of different lengths, a metric that gives no number, or a block that lacks what the
            intervention changes.
        BoundaryError: blocks that cannot be run by themselves.
    """
    if not 1 <= max_batch_tokens <= 10**12:
        raise InputError(f"max_batch_tokens={max_batch_tokens}: give at least 1, such as {MAX_BATCH_TOKENS}.")
    subject = read_subject(model, prompts, layers, prepend_bos)
    check_different(*subject.prompts)
    with one_at_a_time(subject.model), prepared(subject.model, subject.model):
        recorder = subject.recorder(intervention.needs)
        first, *rest = subject.prompts
        into = clean = recorder.run(first)
        ready = as_metric(metric).on(subject.model, clean.forward.output)
        others = [recorder.values(one) for one in (rest[:-1] if intervention.denoises else rest)]
        if intervention.denoises:
            into, others = recorder.run(rest[-1]), [clean.values, *others]
        trials = {
            layer: intervention.trials(into.values[layer], [one[layer] for one in others]) for layer in subject.layers
        }
        before, noise = float(ready(into.forward.output)), into.noise(ready)
        rows = []
        with progress_of(intervention.doing, "run", sum(some.count for some in trials.values()), progress) as bar:
            for layer, some in trials.items():
                found = some.arranged(into.measure(ready, layer, some, max_batch_tokens, bar.update))
                effects = found - before if intervention.denoises else before - found
                # Otherwise some would be ranked by rounding alone.
                rows.append(torch.where(effects.abs() <= noise, 0.0, effects).float())
    return Effects(
        values=torch.stack(rows),
        on=intervention.on,
        name=intervention.name,
        tokens=subject.prompts[0].tokens,
        layers=subject.layers,
        metric=ready.name,
        measures=intervention.measures,
        reference=before,
        settings=intervention.settings(subject.prompts),
    )
