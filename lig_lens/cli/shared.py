"""What several commands do: load the model, say what was written, fit a table into the terminal."""

import shutil
import sys
from collections.abc import Callable
from typing import Any

import typer

from lig_lens.cli.configs import RunConfig
from lig_lens.errors import InputError


def load(settings: RunConfig) -> Any:
    """Load the model that was asked for.

    Raises:
        InputError: no such model, or a device that cannot be used here.
    """
    say(settings, f"loading {settings.model}")
    from lig_lens.models.loading import load_model

    return load_model(settings.model, device=settings.device, dtype=settings.dtype)


def say(settings: RunConfig, doing: str) -> None:
    """Say on stderr what is being done, unless progress is not to be shown."""
    if settings.progress:
        typer.echo(f"lig-lens: {doing}", err=True)


class Outputs:
    """The files that a command writes. Each may fail for itself, which costs neither the others nor what is printed.

    As a context manager it names, when all else is printed, the files that were written, or the flags that write one.

    Raises:
        InputError: at the end, a result that a file cannot hold.
        OutputError: at the end, a file that could not be written.
    """

    def __init__(self, settings: RunConfig) -> None:
        self._settings = settings
        self._written: list[str] = []
        self._failed: list[InputError | OSError] = []

    def __enter__(self) -> "Outputs":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Where nothing can be printed any more, what failed is said all the same.
        raised = self._failed.pop() if error is None and self._failed else None
        for failed in self._failed:
            typer.echo(f"lig-lens: error: {failed}", err=True)
        try:
            if error is None and self._written:
                typer.echo(f"Wrote {', '.join(self._written)}")
            elif error is None and raised is None:
                *first, last = self._settings.files()
                typer.echo(f"No file written; {', '.join(first)} and {last} write one.")
        finally:
            if raised is not None:
                raise raised

    def write(self, path: str | None, how: Callable[[str], object]) -> None:
        """Write a file, if it was asked for."""
        if path is None:
            return
        try:
            how(path)
        except (InputError, OSError) as error:
            self._failed.append(error)
        else:
            self._written.append(path)


def terminal_width() -> int | None:
    """Columns of the terminal, or None where the output is piped."""
    return max(60, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None


def opened(flag: str, path: str) -> Any:
    """An image that a flag names.

    Raises:
        InputError: a file that cannot be read.
    """
    from lig_lens.inputs.image_files import open_image

    return open_image(path, flag)
