"""The command `lig-lens explain`."""

import os
from typing import Annotated, cast

import typer

from lig_lens.cli.configs import ExplainConfig
from lig_lens.cli.flags import with_flags
from lig_lens.cli.shared import load, say_written, terminal_width
from lig_lens.errors import InputError


@with_flags(ExplainConfig)
def explain(
    settings: ExplainConfig,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The prompt.", show_default=False)],
) -> None:
    """Explain TEXT: print each layer's strongest source → destination edges, write what is asked for."""
    if not text.strip():
        raise InputError(f"TEXT is empty ({text!r}): give a prompt, such as 'The cat sat on the mat.'")
    from lig_lens.attribution import attribute
    from lig_lens.flow.flow import Flow
    from lig_lens.show.summary import summarize

    flow = cast(Flow, attribute(load(settings), text, **settings.attribute_arguments()))  # one text gives one Flow
    # Written before anything is printed, so that a closed pipe costs no result.
    written: list[str | os.PathLike[str]] = []
    too_large: InputError | None = None
    if settings.out is not None:
        written.append(flow.save(settings.out))
    if settings.json_path is not None:
        flow.to_json(settings.json_path)
        written.append(settings.json_path)
    if settings.html is not None:
        from lig_lens.show.explorer import write_explorer

        try:
            written.append(write_explorer(flow, settings.html, title=f"lig_lens: {text}"))
        except InputError as error:
            too_large = error  # which should not cost what was computed
    typer.echo(summarize(flow, terminal_width()))
    say_written(written, settings)
    if too_large is not None:
        raise too_large
