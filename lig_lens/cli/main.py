"""The command line: `lig-lens explain TEXT`, `lig-lens view FLOW`, `lig-lens boundaries MODEL`.

Exit status 0; 2 for input that cannot be used; 1 for anything else. Errors are one line on stderr. Nothing
heavy is imported before a command runs.
"""

import os
import sys
import traceback
import warnings
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

import lig_lens
from lig_lens.cli.circuits import register
from lig_lens.errors import FlowFileError, InputError, MissingPackageError, NonFiniteError
from lig_lens.files import check_writable
from lig_lens.names import DTYPES, ENGINES, MAPS
from lig_lens.paths import baselines_of
from lig_lens.settings import (
    MAX_BATCH_TOKENS,
    MAX_NODES,
    ExplainConfig,
    load_config,
    merge_settings,
    parse_names,
    parse_number,
    parse_numbers,
    parse_settings,
)

_BAD_INPUT = (InputError, MissingPackageError, FlowFileError, NonFiniteError)
# Newer typer carries its own copy of click, older typer uses the package: find the base of what is raised.
_USAGE_ERROR: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
_INTERRUPTED = 130  # what newer typer makes of Ctrl-C; older typer raises Abort

app = typer.Typer(
    name="lig-lens",
    help="Layer-wise Integrated Gradients between the token vectors inside transformer blocks.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"lig-lens {lig_lens.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Layer-wise Integrated Gradients between the token vectors inside transformer blocks."""


def _option(*names: str, default: str | bool = False, help: str) -> Any:
    """Declare a flag that is None unless given, so that a file can tell; --help shows `default`."""
    return typer.Option(*names, show_default=default, help=help)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _baselines(map_name: str) -> str:
    return _listed(baselines_of(map_name))


# The flags of `explain`.
_Text = Annotated[str, typer.Argument(metavar="TEXT", help="The prompt.", show_default=False)]
_Model = Annotated[
    str | None, _option("--model", default="minilm", help="minilm, smollm2, a local folder or a hub id.")
]
_Layers = Annotated[str | None, _option("--layers", default="all", help="Block numbers: 0,3 or 0-5; -1 is the last.")]
_Maps = Annotated[str | None, _option("--maps", default=",".join(MAPS), help=f"Any of {_listed(MAPS)}.")]
_Destinations = Annotated[
    str | None,
    _option("--destinations", default="all", help="Positions whose columns are computed: 4 or 2-6."),
]
_AttnBaseline = Annotated[str | None, _option("--attn-baseline", default="itb", help=f"{_baselines('attn')}.")]
_MlpBaseline = Annotated[str | None, _option("--mlp-baseline", default="att_itb_a0", help=f"{_baselines('mlp')}.")]
_BlockBaseline = Annotated[str | None, _option("--block-baseline", default="itb", help=f"{_baselines('block')}.")]
_Corrupted = Annotated[
    str | None,
    _option("--corrupted", help="Second prompt of the same length, for the corrupted baselines."),
]
_Tol = Annotated[
    str | None,
    _option("--tol", default="0.001", help="Largest completeness gap of a column, relative."),
]
_Engine = Annotated[str | None, _option("--engine", default="auto", help=f"{_listed(ENGINES)}.")]
_MaxNodes = Annotated[
    str | None,
    _option("--max-nodes", default=str(MAX_NODES), help="Integration nodes spent on one cell at most."),
]
_MaxBatchTokens = Annotated[
    str | None,
    _option(
        "--max-batch-tokens",
        default=str(MAX_BATCH_TOKENS),
        help="Tokens run through a block at once; bounds memory.",
    ),
]
_Device = Annotated[str | None, _option("--device", help="cpu, cuda, cuda:1, mps.")]
_Dtype = Annotated[str | None, _option("--dtype", default="float32", help=f"{_listed(DTYPES)}.")]
_Config = Annotated[str | None, _option("--config", help="YAML file with any of these settings; flags win over it.")]
_Out = Annotated[str | None, _option("--out", help="Write the Flow here, as safetensors.")]
_Json = Annotated[str | None, _option("--json", help="Write the Flow here, as JSON.")]
_Html = Annotated[str | None, _option("--html", help="Write a page to explore the Flow in here.")]
_Progress = Annotated[bool | None, _option("--progress/--no-progress", default="progress", help="Show a progress bar.")]


@app.command()
def explain(
    text: _Text,
    model: _Model = None,
    layers: _Layers = None,
    maps: _Maps = None,
    destinations: _Destinations = None,
    attn_baseline: _AttnBaseline = None,
    mlp_baseline: _MlpBaseline = None,
    block_baseline: _BlockBaseline = None,
    corrupted: _Corrupted = None,
    tol: _Tol = None,
    engine: _Engine = None,
    max_nodes: _MaxNodes = None,
    max_batch_tokens: _MaxBatchTokens = None,
    device: _Device = None,
    dtype: _Dtype = None,
    config: _Config = None,
    out: _Out = None,
    json: _Json = None,
    html: _Html = None,
    progress: _Progress = None,
) -> None:
    """Explain TEXT: print each layer's strongest source → destination edges, write what is asked for."""
    flags: dict[str, Any] = {
        "model": model,
        "layers": None if layers is None else parse_numbers("--layers", layers),
        "maps": None if maps is None else parse_names(maps),
        "destinations": None if destinations is None else parse_numbers("--destinations", destinations),
        "attn_baseline": attn_baseline,
        "mlp_baseline": mlp_baseline,
        "block_baseline": block_baseline,
        "corrupted": corrupted,
        "tol": None if tol is None else parse_number("--tol", tol, float),
        "engine": engine,
        "max_nodes": None if max_nodes is None else parse_number("--max-nodes", max_nodes, int),
        "max_batch_tokens": (
            None if max_batch_tokens is None else parse_number("--max-batch-tokens", max_batch_tokens, int)
        ),
        "device": device,
        "dtype": dtype,
        "out": out,
        "json": json,
        "html": html,
        "progress": progress,
    }
    given = parse_settings({key: value for key, value in flags.items() if value is not None}, "--")
    settings = merge_settings(ExplainConfig, {} if config is None else load_config(config), given)
    _check_before_work(text, settings)
    _explain(text, settings)


def _check_before_work(text: str, settings: ExplainConfig) -> None:
    """Find what would fail after a long computation, before it."""
    if not text.strip():
        raise InputError(f"TEXT is empty ({text!r}): give a prompt, such as 'The cat sat on the mat.'")
    for flag, path in (("--out", settings.out), ("--json", settings.json_path), ("--html", settings.html)):
        if path is not None:
            check_writable(path, flag)


def _explain(text: str, settings: ExplainConfig) -> None:
    from lig_lens.attribution import attribute
    from lig_lens.flow.flow import Flow
    from lig_lens.models.loading import load_model
    from lig_lens.show.summary import summarize

    if settings.device is not None:
        _check_device(settings.device)
    model = load_model(settings.model, device=settings.device, dtype=settings.dtype)
    flow = attribute(model, text, **settings.attribute_arguments())
    assert isinstance(flow, Flow)  # one text gives one Flow
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
    typer.echo(summarize(flow, _terminal_width()))
    if written:
        typer.echo(f"Wrote {', '.join(str(path) for path in written)}")
    else:
        typer.echo("No file written; --out, --json and --html write one.")
    if too_large is not None:
        raise too_large


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=torch.device(device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--device {device!r} cannot be used here ({reason}): try --device cpu.") from error


@app.command()
def boundaries(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="minilm, smollm2, a local folder or a hub id.", show_default=False),
    ],
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Build the architecture with random weights, load none.")
    ] = False,
) -> None:
    """Print where the nodes of each block are: layout, heads, norms, engine and hooks, checked on MODEL."""
    from lig_lens.blocks.find import describe_boundaries
    from lig_lens.models.loading import load_model
    from lig_lens.show.summary import boundaries_table

    if config_only:
        blocks = describe_boundaries(model, config_only=True)
    else:
        blocks = describe_boundaries(load_model(model))
    typer.echo(boundaries_table(model, blocks, _terminal_width()))


@app.command()
def view(
    flows: Annotated[
        list[str], typer.Argument(metavar="FLOW...", help="Files that explain --out wrote.", show_default=False)
    ],
    html: Annotated[str | None, _option("--html", default="beside the first file", help="Write the page here.")] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
) -> None:
    """Open saved Flows in the explorer: several prompts, or several baselines of one."""
    page = html if html is not None else str(Path(flows[0]).with_suffix(".html"))
    check_writable(page, "--html")
    from lig_lens.flow.flow import Flow
    from lig_lens.show.explorer import write_explorer

    loaded = [Flow.load(path) for path in flows]
    written = write_explorer(loaded, page)
    typer.echo(f"Wrote {written} ({written.stat().st_size / 1e6:.1f} MB)")
    if open_browser and not webbrowser.open(written.absolute().as_uri()):
        typer.echo("No browser found: open it yourself.")


register(app, _check_device)


def _terminal_width() -> int | None:
    """Columns of the terminal, or None where the output is piped."""
    if not sys.stdout.isatty():
        return None
    import shutil

    return max(60, shutil.get_terminal_size().columns)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: without the program's name; those of the process by default.

    The environment variable LIG_LENS_TRACEBACK=1 adds the traceback of an error.
    """
    try:
        with _one_line_warnings():
            status = app(args=None if arguments is None else list(arguments), standalone_mode=False)
            sys.stdout.flush()
        if status == _INTERRUPTED:
            return _fail(KeyboardInterrupt(), "Interrupted.", 1)
        return status if isinstance(status, int) else 0
    except _USAGE_ERROR as error:
        message = getattr(error, "format_message", error.__str__)()
        return _fail(error, f"{message} See lig-lens --help.", 2)
    except _BAD_INPUT as error:
        return _fail(error, str(error), 2)
    except (KeyboardInterrupt, typer.Abort) as error:
        return _fail(error, "Interrupted.", 1)
    except BrokenPipeError:
        # The reader of the output went away: files are written, and there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        hint = "" if _wants_traceback() else " (set LIG_LENS_TRACEBACK=1 for the traceback)"
        return _fail(error, f"{type(error).__name__}: {error}{hint}", 1)


def _fail(error: BaseException, message: str, status: int) -> int:
    if _wants_traceback():
        traceback.print_exception(error)
    print(f"lig-lens: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _wants_traceback() -> bool:
    return os.environ.get("LIG_LENS_TRACEBACK", "") not in ("", "0")


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Print the package's own warnings as one line, without a source line that means nothing to a user."""
    from lig_lens.errors import CancellationWarning, ConvergenceWarning

    shown = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, (CancellationWarning, ConvergenceWarning)):
            print(f"lig-lens: warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            shown(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def main() -> None:
    """Entry point of the console script `lig-lens`."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a token should show a stand-in, not end the run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run())


if __name__ == "__main__":
    main()
