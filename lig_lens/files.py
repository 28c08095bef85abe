"""Output files: checked before the work starts, replaced in one step when it is done."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lig_lens.errors import InputError


def check_writable(path: str | os.PathLike[str], what: str = "output") -> Path:
    """Return `path` if a file can be written there, without touching the disk.

    Args:
        path: the file to be written later; it may exist already.
        what: how to call it in the message, such as a flag's name.

    Raises:
        InputError: no such folder, not a folder, a folder where a file should go, or no permission.
    """
    file = Path(path)
    shown = repr(os.fspath(path))
    if not file.name or file.is_dir():
        raise InputError(f"{what}: {shown} is a folder: give the name of a file in it.")
    parent = file.parent
    if not parent.exists():
        raise InputError(f"{what}: cannot write {shown}: the folder {str(parent)!r} does not exist: create it.")
    if not parent.is_dir():
        raise InputError(f"{what}: cannot write {shown}: {str(parent)!r} is a file, not a folder: choose another.")
    blocked = parent if not os.access(parent, os.W_OK | os.X_OK) else None
    if blocked is None and file.exists() and not os.access(file, os.W_OK):
        blocked = file
    if blocked is not None:
        raise InputError(f"{what}: cannot write {shown}: no permission to write {str(blocked)!r}: choose another path.")
    return file


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the name of a file beside `path`, which takes its place at the end if nothing was raised.

    Raises:
        InputError: `path` cannot be written (see `check_writable`).
    """
    target = Path(os.path.realpath(check_writable(path)))  # keep a symbolic link a link
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield beside
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path` so that a reader sees the old file or the new one, never half of it.

    The data go into a file beside it, which then takes its place. A path that is no regular file
    (`/dev/stdout`, a named pipe) is written directly.

    Raises:
        InputError: `path` cannot be written (see `check_writable`).
    """
    file = check_writable(path)
    if file.exists() and not file.is_file():
        file.write_bytes(data)
        return file
    with replacing(file) as beside, open(beside, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return file
