"""The commands `lig-lens patch` and `lig-lens compare`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lig_lens.files import check_writable
from lig_lens.names import DTYPES
from lig_lens.settings import (
    MAX_BATCH_TOKENS,
    PATCHED,
    CircuitConfig,
    load_config,
    merge_settings,
    parse_number,
    parse_numbers,
    parse_settings,
)

if TYPE_CHECKING:
    from lig_lens.flow.effects import Effects
    from lig_lens.targets.metrics import Metric


def _flag(*names: str, default: str | bool = False, help: str) -> Any:
    return typer.Option(*names, show_default=default, help=help)


_Clean = Annotated[str | None, typer.Argument(metavar="CLEAN", help="The prompt.", show_default=False)]
_Corrupted = Annotated[
    str | None, typer.Argument(metavar="CORRUPTED", help="A prompt of as many tokens.", show_default=False)
]
_Answer = Annotated[str | None, _flag("--answer", help="Right next token, such as ' Mary'; mind the space.")]
_Wrong = Annotated[str | None, _flag("--wrong", help="Other token: then the metric is the difference of logits.")]
_Model = Annotated[
    str | None, _flag("--model", default="induction", help="induction, minilm, smollm2, a folder or a hub id.")
]
_Layers = Annotated[str | None, _flag("--layers", default="all", help="Block numbers: 0,3 or 0-5; -1 is the last.")]
_At = Annotated[str | None, _flag("--at", default="hook_z", help=f"{', '.join(PATCHED)}.")]
_Top = Annotated[str | None, _flag("--top", default="10", help="Strongest effects to print; k of top-k overlap.")]
_Edges = Annotated[str | None, _flag("--edges", default="200", help="Strongest edges of each score to knock out.")]
_Tol = Annotated[str | None, _flag("--tol", default="0.001", help="Largest completeness gap, relative.")]
_Batch = Annotated[
    str | None, _flag("--max-batch-tokens", default=str(MAX_BATCH_TOKENS), help="Tokens run at once; bounds memory.")
]
_Device = Annotated[str | None, _flag("--device", help="cpu, cuda, cuda:1, mps.")]
_Dtype = Annotated[str | None, _flag("--dtype", default="float32", help=f"{', '.join(DTYPES)}.")]
_Config = Annotated[str | None, _flag("--config", help="YAML file with any of these settings; flags win over it.")]
_Json = Annotated[str | None, _flag("--json", help="Write the effects, or the table, here as JSON.")]
_Html = Annotated[str | None, _flag("--html", help="Write a page of figures here.")]
_Noising = Annotated[
    bool | None, _flag("--noising/--denoising", default="denoising", help="Patch corrupted values into the clean run.")
]
_Progress = Annotated[bool | None, _flag("--progress/--no-progress", default="progress", help="Show a progress bar.")]


def register(app: typer.Typer, check_device: Callable[[str], None]) -> None:
    """Add the commands to the command line.

    Args:
        app: the command line.
        check_device: checks a device that was named.
    """
    for name, action, help in (
        (
            "patch",
            _patch,
            "Patch CLEAN's activations into CORRUPTED's run one at a time, or knock out edges; print the strongest.",
        ),
        ("compare", _compare, "Compare LIG and other scores with what the intervention finds, in one table."),
    ):
        app.command(name, help=help)(_command(action, check_device))


def _command(action: Callable[[CircuitConfig], None], check_device: Callable[[str], None]) -> Callable[..., None]:
    """A command with the flags that both share."""

    def command(
        clean: _Clean = None,
        corrupted: _Corrupted = None,
        answer: _Answer = None,
        wrong: _Wrong = None,
        model: _Model = None,
        at: _At = None,
        noising: _Noising = None,
        edges: _Edges = None,
        layers: _Layers = None,
        top: _Top = None,
        tol: _Tol = None,
        max_batch_tokens: _Batch = None,
        device: _Device = None,
        dtype: _Dtype = None,
        config: _Config = None,
        json: _Json = None,
        html: _Html = None,
        progress: _Progress = None,
    ) -> None:
        action(_settings(locals(), check_device))

    return command


def _settings(given: dict[str, Any], check_device: Callable[[str], None]) -> CircuitConfig:
    """Flags and file, checked before any work."""
    flags = {key: given[key] for key in CircuitConfig.model_fields if key in given}
    flags |= {"json": given["json"], "layers": given["layers"] and parse_numbers("--layers", given["layers"])}
    for name, kind in (("top", int), ("edges", int), ("max_batch_tokens", int), ("tol", float)):
        if given[name] is not None:
            flags[name] = parse_number(f"--{name.replace('_', '-')}", given[name], kind)
    named = parse_settings({key: value for key, value in flags.items() if value is not None}, "--", CircuitConfig)
    config = given["config"]
    settings = merge_settings(CircuitConfig, {} if config is None else load_config(config, CircuitConfig), named)
    for flag, path in (("--json", settings.json_path), ("--html", settings.html)):
        if path is not None:
            check_writable(path, flag)
    if settings.device is not None:
        check_device(settings.device)
    return settings


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


def _load(settings: CircuitConfig) -> Any:
    from lig_lens.models.loading import load_model

    return load_model(settings.model, device=settings.device, dtype=settings.dtype)


def _patch(settings: CircuitConfig) -> None:
    from lig_lens.show.summary import summarize_effects

    effects = _intervene(_load(settings), settings, None)
    written = []
    if settings.json_path is not None:
        effects.to_json(settings.json_path)
        written.append(settings.json_path)
    if settings.html is not None:
        from lig_lens.show.plots import effects_map, write_html

        write_html(effects_map(effects), settings.html, title=f"lig_lens: {settings.clean}")
        written.append(settings.html)
    typer.echo(summarize_effects(effects, settings.top))
    _say(written)


def _compare(settings: CircuitConfig) -> None:
    import json

    from lig_lens.attribution import attribute
    from lig_lens.files import write_atomic
    from lig_lens.flow.flow import Flow
    from lig_lens.interventions import patching
    from lig_lens.interventions.agreement import compare_table
    from lig_lens.interventions.scores import scores
    from lig_lens.show.summary import summarize_agreement

    model, metric = _load(settings), _metric(settings)
    # Interventions on edges replace messages.
    split = "message" if settings.at.startswith("edges") else "source"
    flow = attribute(
        model,
        settings.clean,
        split=split,
        corrupted=settings.corrupted,
        target=metric,
        layers=settings.layers,
        tol=settings.tol,
        max_batch_tokens=settings.max_batch_tokens,
        progress=settings.progress,
    )
    assert isinstance(flow, Flow)  # one prompt gives one Flow
    found: dict[str, Any] = {"LIG by message" if split == "message" else "LIG": flow}
    if not settings.at.startswith("resid"):
        on = "edges" if settings.at.startswith("edges") else "heads_by_pos"
        found |= scores(model, settings.clean, settings.corrupted, metric, on=on, layers=settings.layers)
    union = None
    if settings.at.startswith("edges"):
        union = sorted({edge for score in found.values() for edge in patching.top_edges(score, settings.edges)})
    effects = _intervene(model, settings, union)
    table = compare_table(found, effects, k=settings.top)
    written = []
    if settings.json_path is not None:
        rows = {name: {k: v if v == v else None for k, v in row.items()} for name, row in table.T.to_dict().items()}
        document = {"effects": json.loads(effects.to_json()), "agreement": rows}
        write_atomic(settings.json_path, (json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n").encode())
        written.append(settings.json_path)
    if settings.html is not None:
        from lig_lens.show.plots import agreement_scatter, effects_map, write_html

        figures = [agreement_scatter(score, effects, name=name) for name, score in found.items()]
        write_html([*figures, effects_map(effects)], settings.html, title=f"lig_lens: {settings.clean}")
        written.append(settings.html)
    typer.echo(summarize_agreement(table, effects))
    _say(written)


def _say(written: list[str]) -> None:
    typer.echo(f"Wrote {', '.join(written)}" if written else "No file written; --json and --html write one.")
