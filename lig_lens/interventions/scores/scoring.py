"""What else foretells an intervention: scores from attention patterns and gradients, on the same axes as effects.

| name | of an edge, source i to destination j through head h | of a head's output at j |
|---|---|---|
| `attention` | p_ji | what j pays to other tokens, 1 - p_jj |
| `attention_value_norm` | p_ji times the length of v_i W_O (Kobayashi et al. 2020) | their sum over i |
| `gradient_pattern` | p_ji df/dp_ji = p_ji <g_j, v_i> on the clean run | their sum, <g_j, z_j> |
| `attribution_patching` | <g_j, (p_ji v_i) of the clean run - of the corrupted> | their sum, <g_j, z_j - z'_j> |

with g_j = df/dz_j, at the clean run for `gradient_pattern` and at the corrupted one for `attribution_patching` (Nanda
2023; TransformerLens' `tools.analysis.attribution_patch` gives the same numbers for heads).
"""

from collections.abc import Sequence

import torch

from lig_lens.arguments import checked
from lig_lens.blocks.known import Needs
from lig_lens.choose import Selection
from lig_lens.errors import InputError, check_choice
from lig_lens.flow.effects import Effects
from lig_lens.inputs.pairs import check_different
from lig_lens.interventions import SCORED_BY
from lig_lens.interventions.scores.score import Score, ScoredRun, sides
from lig_lens.interventions.subject import read_subject
from lig_lens.models.running import one_at_a_time, prepared
from lig_lens.targets.metrics import Function, Metric
from lig_lens.targets.metrics import metric as as_metric

SCORES = SCORED_BY.names()


@checked
@torch.inference_mode(False)  # gradients are needed, whatever mode the caller is in
def scores(
    model: object,
    clean: object,
    corrupted: object,
    metric: Metric | Function,
    *,
    on: str = "edges",
    which: Sequence[str] = SCORES,
    layers: Selection = None,
    prepend_bos: bool | None = None,
) -> dict[str, Effects]:
    """Scores of every edge, or of every head's output at every position.

    Args:
        model: a hooked model.
        clean: a text or token ids.
        corrupted: the same, of the same number of tokens.
        metric: of the logits.
        on: `edges` [layer, head, src, dst] or `heads_by_pos` [layer, head, pos].
        which: names of scores; all by default.
        layers: block numbers, all by default.
        prepend_bos: for texts; the tokenizer's own default with None.

    Raises:
        InputError: an unknown name, prompts of different lengths, a metric that gives no number, or a block whose
            pattern and values cannot be read.
    """
    check_choice("axes of a score", on, ("edges", "heads_by_pos"))
    chosen: dict[str, Score] = {name: SCORED_BY[name] for name in which}
    if corrupted is None:
        raise InputError("corrupted is None: attribution patching needs a second prompt of as many tokens.")
    subject = read_subject(model, [clean, corrupted], layers, prepend_bos)
    check_different(*subject.prompts)
    with one_at_a_time(subject.model), prepared(subject.model, subject.model), torch.no_grad():
        recorder = subject.recorder(Needs(formula=False, messages=True))
        runs = [recorder.run(inputs) for inputs in subject.prompts]
        ready = as_metric(metric).on(subject.model, runs[0].forward.output)
        prompts = [ScoredRun(run, ready) for run in runs]
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in chosen}
        for layer in subject.layers:
            at = sides(prompts, layer)
            for name, score in chosen.items():
                rows[name].append(score.edges(*at) if on == "edges" else score.heads(*at))
        reference = float(ready(runs[0].forward.output))
    return {
        name: Effects(
            values=torch.stack(found),
            on=on,
            name=name,
            tokens=subject.prompts[0].tokens,
            layers=subject.layers,
            metric=ready.name,
            reference=reference,
        )
        for name, found in rows.items()
    }
