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
    from lig_lens.models.loading import load_model

    return load_model(settings.model, device=settings.device, dtype=settings.dtype)


class Outputs:
    """The files that a command writes. Each may fail for itself, which costs neither the others nor what is printed."""

    def __init__(self) -> None:
        self._written: list[str] = []
        self._failed: list[InputError | OSError] = []

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

    def tell(self, settings: RunConfig) -> None:
        """Name the files that were written, or the flags that write one; call it when all else is printed.

        Raises:
            InputError: a result that a file cannot hold.
            OSError: a file that could not be written.
        """
        if self._written:
            typer.echo(f"Wrote {', '.join(self._written)}")
        elif not self._failed:
            *first, last = settings.files()
            typer.echo(f"No file written; {', '.join(first)} and {last} write one.")
        for error in self._failed[:-1]:
            typer.echo(f"lig-lens: error: {error}", err=True)
        if self._failed:
            raise self._failed[-1]


def terminal_width() -> int | None:
    """Columns of the terminal, or None where the output is piped."""
    return max(60, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None
