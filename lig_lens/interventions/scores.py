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

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lig_lens.blocks.call import prepared
from lig_lens.errors import InputError, check_choice
from lig_lens.flow.effects import Effects
from lig_lens.inputs.request import Selection, chosen_numbers
from lig_lens.interventions.run import CircuitRun, read_pair
from lig_lens.models.loading import check_evaluating, check_hooked
from lig_lens.targets.metrics import Metric
from lig_lens.targets.metrics import metric as as_metric

SCORES = ("attention", "attention_value_norm", "gradient_pattern", "attribution_patching")


@torch.inference_mode(False)  # gradients are needed, whatever mode the caller is in
def scores(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Tensor], Any],
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
    for name in which:
        check_choice("score", name, SCORES)
    model = check_hooked(model)
    check_evaluating(model)
    if corrupted is None:
        raise InputError("corrupted is None: attribution patching needs a second prompt of as many tokens.")
    first, second = read_pair(model, clean, corrupted, prepend_bos)
    assert second is not None
    chosen = chosen_numbers("layer", layers, int(model.cfg.n_layers))
    with prepared(model, model), torch.no_grad():
        runs = [CircuitRun(model, prompt, chosen) for prompt in (first, second)]
        ready = as_metric(metric).on(model, runs[0].rest.logits)
        gradients = [run.gradients(ready) for run in runs]
        found: dict[str, list[Tensor]] = {name: [] for name in which}
        for layer in chosen:
            by_name = _edge_scores(runs, gradients, layer)
            for name in which:
                edges = by_name[name]
                heads = edges.sum(1) if name != "attention" else 1 - edges.diagonal(dim1=1, dim2=2)
                found[name].append(edges if on == "edges" else heads)
        reference = float(ready(runs[0].rest.logits))
    return {
        name: Effects(
            values=torch.stack(found[name]),
            on=on,
            name=name,
            tokens=first.tokens,
            layers=chosen,
            metric=ready.name,
            reference=reference,
        )
        for name in which
    }


def _edge_scores(runs: list[CircuitRun], gradients: list[dict[int, Tensor]], layer: int) -> dict[str, Tensor]:
    """All scores of one block's edges, [head, src, dst]."""
    clean, corrupted = (run.blocks[layer].attention for run in runs)
    W_O = runs[0].blocks[layer].nodes.W_O
    if clean is None or corrupted is None:
        raise InputError(
            f"The pattern and values of block {layer} cannot be read, or head outputs are not their product: leave the "
            "layer out."
        )
    assert W_O is not None
    at_clean, at_corrupted = (gradient[layer] for gradient in gradients)

    def weighted(attention: Any, gradient: Tensor) -> Tensor:
        result: Tensor = attention.pattern.mT * torch.einsum("jhe,ihe->hij", gradient, attention.values)
        return result

    length = torch.linalg.vector_norm(torch.einsum("ihe,hem->him", clean.values, W_O), dim=-1)
    return {
        "attention": clean.pattern.mT,
        "attention_value_norm": clean.pattern.mT * length[..., None],
        "gradient_pattern": weighted(clean, at_clean),
        "attribution_patching": weighted(clean, at_corrupted) - weighted(corrupted, at_corrupted),
    }
