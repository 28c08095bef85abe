"""The commands that look at what is there: `lig-lens boundaries` at a model, `lig-lens view` at saved Flows."""

import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer

from lig_lens.cli.configs import RunConfig
from lig_lens.cli.flags import option
from lig_lens.cli.shared import terminal_width
from lig_lens.errors import InputError
from lig_lens.fields import help_of
from lig_lens.files import check_apart, check_writable
from lig_lens.models.supported import supported
from lig_lens.settings import Attribution
from lig_lens.show.families import families_table


def boundaries(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help=help_of(RunConfig.model_fields["model"]), show_default=False),
    ],
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Build the architecture with random weights, load none.")
    ] = False,
    stream: Annotated[str | None, option("--stream", help=help_of(Attribution.model_fields["stream"]))] = None,
) -> None:
    """Print where the nodes of each block are: layout, heads, norms, engine and hooks, checked on MODEL."""
    from lig_lens.blocks.describe import describe_boundaries
    from lig_lens.models.loading import load_model
    from lig_lens.show.summary import boundaries_table

    blocks = describe_boundaries(model if config_only else load_model(model), config_only=config_only, stream=stream)
    typer.echo(boundaries_table(model, blocks, terminal_width()))


def models(
    name: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]", help="A class of transformers or a model_type, or part of one; all by default."
        ),
    ] = "",
) -> None:
    """Print which families of models were held against the plain model: their layout, maps, engine and versions."""
    typer.echo(families_table(supported(name), terminal_width()))


def view(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Files that explain --out or classify --out wrote.", show_default=False),
    ],
    html: Annotated[str | None, option("--html", default="beside the first file", help="Write the page here.")] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
) -> None:
    """Open saved Flows, or Relevances, in the explorer: several prompts, or several baselines or methods of one."""
    for path in files:
        if not Path(path).is_file():
            raise InputError(f"{path!r} is no file: give one that explain --out wrote, or classify --out.")
    page = html if html is not None else str(Path(files[0]).with_suffix(".html"))
    check_writable(page, "--html")
    for path in files:
        check_apart(page, "--html", {"the file to be shown": path})
    from lig_lens.flow.flow import Flow
    from lig_lens.relevance.header import SCHEMA
    from lig_lens.relevance.relevance import Relevance
    from lig_lens.show.explorer import write_explorer
    from lig_lens.stored import schema_in

    loaded: list[Any] = [(Relevance if schema_in(path) == SCHEMA else Flow).load(path) for path in files]
    written = write_explorer(loaded, page)
    typer.echo(f"Wrote {written} ({written.stat().st_size / 1e6:.1f} MB)")
    if open_browser and not webbrowser.open(written.absolute().as_uri()):
        typer.echo("No browser found: open it yourself.")
