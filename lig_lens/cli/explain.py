"""The command `lig-lens explain`."""

from typing import Annotated, cast

import typer

from lig_lens.cli.configs import ExplainConfig
from lig_lens.cli.flags import with_flags
from lig_lens.cli.shared import Outputs, load, say, terminal_width
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
    with Outputs(settings) as outputs:
        outputs.write(settings.out, flow.save)
        outputs.write(settings.json_path, flow.to_json)
        if settings.html is not None:
            say(settings, "writing the page")
            from lig_lens.show.explorer import write_explorer

            outputs.write(settings.html, lambda path: write_explorer(flow, path, title=f"lig_lens: {text}"))
        typer.echo(summarize(flow, terminal_width()))
