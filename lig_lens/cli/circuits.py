"""The commands `lig-lens patch` and `lig-lens compare`."""

import json
from typing import TYPE_CHECKING, Any, cast

import typer

from lig_lens.cli.configs import CircuitConfig
from lig_lens.cli.flags import with_flags
from lig_lens.cli.shared import Outputs, load, say

if TYPE_CHECKING:
    from lig_lens.flow.effects import Effects
    from lig_lens.targets.metrics import Metric


@with_flags(CircuitConfig, without=("tol", "edges"))
def patch(settings: CircuitConfig) -> None:
    """Patch CLEAN's activations into CORRUPTED's run one at a time, or knock out edges; print the strongest."""
    from lig_lens.show.summary import summarize_effects

    effects = _intervene(load(settings), settings, None)
    with Outputs(settings) as outputs:
        outputs.write(settings.json_path, effects.to_json)
        if settings.html is not None:
            from lig_lens.show.plots import effects_map, write_html

            title = f"lig_lens: {settings.clean}"
            outputs.write(settings.html, lambda path: write_html(effects_map(effects), path, title=title))
        typer.echo(summarize_effects(effects, settings.top))


@with_flags(CircuitConfig)
def compare(settings: CircuitConfig) -> None:
    """Compare LIG and other scores with what the intervention finds, in one table."""
    from lig_lens.attribution import attribute
    from lig_lens.files import write_atomic
    from lig_lens.flow.flow import Flow
    from lig_lens.interventions import patching
    from lig_lens.interventions.agreement import compare_table
    from lig_lens.interventions.scores import scores
    from lig_lens.show.summary import summarize_agreement

    model, metric = load(settings), _metric(settings)
    # Interventions on edges replace messages.
    split = "message" if settings.at.startswith("edges") else "source"
    asked = settings.attribute_arguments()
    say(settings, "1 of 3: contributions, from the last block to the first")
    flow = cast(Flow, attribute(model, settings.clean, target=metric, split=split, **asked))  # one prompt, one Flow
    found: dict[str, Any] = {"LIG by message" if split == "message" else "LIG": flow}
    say(settings, "2 of 3: other scores")
    if not settings.at.startswith("resid"):
        on = "edges" if settings.at.startswith("edges") else "heads_by_pos"
        found |= scores(model, settings.clean, settings.corrupted, metric, on=on, layers=settings.layers)
    union = None
    if settings.at.startswith("edges"):
        union = sorted({edge for score in found.values() for edge in patching.top_edges(score, settings.edges)})
    say(settings, "3 of 3: interventions, which all of these should foretell")
    effects = _intervene(model, settings, union)
    table = compare_table(found, effects, k=settings.top)

    def write_json(path: str) -> None:
        rows = {name: {k: v if v == v else None for k, v in row.items()} for name, row in table.T.to_dict().items()}
        document = {"effects": json.loads(effects.to_json()), "agreement": rows}
        write_atomic(path, (json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n").encode())

    with Outputs(settings) as outputs:
        outputs.write(settings.json_path, write_json)
        if settings.html is not None:
            from lig_lens.show.plots import agreement_scatter, effects_map, write_html

            figures = [agreement_scatter(score, effects, name=name) for name, score in found.items()]
            title = f"lig_lens: {settings.clean}"
            outputs.write(settings.html, lambda path: write_html([*figures, effects_map(effects)], path, title=title))
        typer.echo(summarize_agreement(table, effects))


def _metric(settings: CircuitConfig) -> "Metric":
    from lig_lens.targets.metrics import kl_divergence, log_probability, logit_difference

    if settings.answer is None:
        return kl_divergence()
    if settings.wrong is None:
        return log_probability(settings.answer)
    return logit_difference(settings.answer, settings.wrong)


def _intervene(model: Any, settings: CircuitConfig, edges: list[Any] | None) -> "Effects":
    from lig_lens.interventions import patching

    options: dict[str, Any] = {
        "layers": settings.layers,
        "max_batch_tokens": settings.max_batch_tokens,
        "progress": settings.progress,
    }
    metric = _metric(settings)
    if settings.at.startswith("edges"):
        other = settings.corrupted if settings.at == "edges_patched" else None
        return patching.knock_out(model, settings.clean, metric, edges=edges, corrupted=other, **options)
    each, at = settings.at != "heads", "hook_z" if settings.at == "heads" else settings.at
    options |= {"at": at, "each_position": each, "noising": settings.noising}
    return patching.patch(model, settings.clean, settings.corrupted, metric, **options)
