"""What several commands do: load the model, say what was written, fit a table into the terminal."""

import os
import shutil
import sys
from collections.abc import Sequence
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

    if settings.device is not None:
        _check_device(settings.device)
    return load_model(settings.model, device=settings.device, dtype=settings.dtype)


def say_written(written: Sequence[str | os.PathLike[str]], settings: RunConfig) -> None:
    """Name the files that were written, or the flags that write one."""
    if written:
        typer.echo(f"Wrote {', '.join(str(path) for path in written)}")
        return
    *first, last = settings.files()
    typer.echo(f"No file written; {', '.join(first)} and {last} write one.")


def terminal_width() -> int | None:
    """Columns of the terminal, or None where the output is piped."""
    return max(60, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=torch.device(device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--device {device!r} cannot be used here ({reason}): try --device cpu.") from error
