"""The command `lig-lens explain`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from lig_lens.cli.configs import ExplainConfig
from lig_lens.cli.flags import with_flags
from lig_lens.cli.shared import Outputs, load, opened, say, terminal_width
from lig_lens.errors import InputError

if TYPE_CHECKING:
    from lig_lens.flow.flow import Flow


@with_flags(ExplainConfig)
def explain(settings: ExplainConfig) -> None:
    """Explain TEXT: print each layer's strongest source → destination edges, write what is asked for."""
    settings.check_prompt()
    # Before the model is loaded, since a file may be unreadable.
    prompt, corrupted = _prompt(settings), _corrupted(settings)
    from lig_lens.attribution import attribute
    from lig_lens.flow.flow import Flow
    from lig_lens.show.summary import summarize

    model = load(settings)
    _check_stacks(model, settings)
    asked = {**settings.attribute_arguments(), "corrupted": corrupted}
    flow = cast(Flow, attribute(model, prompt, **asked))  # one prompt gives one Flow
    # Written before anything is printed, so that a closed pipe costs no result.
    with Outputs(settings) as outputs:
        outputs.write(settings.out, flow.save)
        outputs.write(settings.json_path, flow.to_json)
        if settings.html is not None:
            say(settings, "writing the page")
            outputs.write(settings.html, lambda path: _write_page(flow, path, f"lig_lens: {settings.title}"))
        typer.echo(summarize(flow, terminal_width()))


def _prompt(settings: ExplainConfig) -> Any:
    """What `attribute` takes: a text, an image, or a source and a target."""
    if settings.image is not None:
        return opened("--image", settings.image)
    return settings.text if settings.target_text is None else (settings.text, settings.target_text)


def _corrupted(settings: ExplainConfig) -> Any:
    """The same of the second prompt: what differs is what a path of the stream passes."""
    if settings.corrupted is None:
        return None
    if settings.image is not None:
        return opened("--corrupted", settings.corrupted)
    of_target = settings.target_text is not None and settings.stream in (None, "decoder")
    return (settings.text, settings.corrupted) if of_target else settings.corrupted


def _check_stacks(model: Any, settings: ExplainConfig) -> None:
    """Refuse a target without a decoder beside an encoder, and the reverse, in words of the command line."""
    from lig_lens.hooked import has_two_stacks

    if has_two_stacks(model):
        if settings.image is None and settings.target_text is None and settings.stream != "encoder":
            raise InputError(
                f"{settings.model} has an encoder and a decoder: add --target-text TEXT, what the decoder has written "
                "so far ('' for nothing yet), or explain the encoder alone with --stream encoder."
            )
    elif settings.target_text is not None:
        raise InputError(
            f"--target-text {settings.target_text!r} goes with an encoder and a decoder, and {settings.model} has one "
            "stack of blocks: leave it out."
        )


def _write_page(flow: "Flow", path: str, title: str) -> Path:
    """The explorer; of contributions from one text to another, which have no flow through layers, figures."""
    if flow.is_square:
        from lig_lens.show.explorer import write_explorer

        return write_explorer(flow, path, title=title)
    from lig_lens.show.plots import head_grid, write_html

    return write_html([head_grid(flow, [layer]) for layer in flow.layers], path, title=title)
