"""The command line `lig-lens`: its commands, its errors and its exit status.

Exit status 0; 2 for input that cannot be used; 1 for anything else. Errors are one line on stderr. Nothing
heavy is imported before a command runs.
"""

import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, TextIO

import typer

import lig_lens
from lig_lens.cli.circuits import compare, patch
from lig_lens.cli.classify import classify
from lig_lens.cli.explain import explain
from lig_lens.cli.league import league
from lig_lens.cli.look import boundaries, models, view
from lig_lens.errors import InputError, MissingPackageError, NonFiniteError, OutputError, ResultFileError

_BAD_INPUT = (InputError, MissingPackageError, ResultFileError, NonFiniteError)
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


for _command in (explain, classify, boundaries, models, view, patch, compare, league):
    app.command()(_command)


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
    except OutputError as error:
        return _fail(error, str(error), 1)
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
    from lig_lens.errors import BridgeWarning, CancellationWarning, CollapseWarning, ConvergenceWarning

    ours = (BridgeWarning, CancellationWarning, CollapseWarning, ConvergenceWarning)

    shown = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, ours):
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
