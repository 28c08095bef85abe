"""Output files: checked before the work starts, replaced in one step when it is done; folders of the user's cache."""

import contextlib
import hashlib
import os
import platform
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lig_lens.errors import InputError, OutputError


def check_writable(path: str | os.PathLike[str], what: str = "output") -> Path:
    """Return `path` if a file can be written there; a file beside it is made, and removed again, to find out.

    Args:
        path: the file to be written later; it may exist already.
        what: how to call it in the message, such as a flag's name.

    Raises:
        InputError: no such folder, not a folder, a folder where a file should go, no permission, or a place or name
            that the file system does not take.
    """
    file, shown = Path(path), repr(os.fspath(path))
    if not os.fspath(path):
        raise InputError(f"{what}: the path is empty: give the name of a file.")
    shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
    try:
        there = os.stat(file).st_mode
    except (FileNotFoundError, NotADirectoryError):
        there = None
    except (OSError, ValueError) as error:  # a name that is too long, or holds a null character
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{what}: cannot write {shown}: {reason}: choose another path.") from error
    if not file.name or (there is not None and stat.S_ISDIR(there)):
        raise InputError(f"{what}: {shown} is a folder: give the name of a file in it.")
    parent = file.parent
    if not parent.exists():
        raise InputError(f"{what}: cannot write {shown}: the folder {str(parent)!r} does not exist: create it.")
    if not parent.is_dir():
        raise InputError(f"{what}: cannot write {shown}: {str(parent)!r} is a file, not a folder: choose another.")
    if there is not None and not stat.S_ISREG(there):
        return file  # a pipe or a device
    target = Path(os.path.realpath(file))
    tried = _beside(target)
    try:
        tried.touch(exist_ok=False)
        tried.unlink()
    except OSError as error:
        raise InputError(
            f"{what}: cannot write {shown}: {os.strerror(error.errno or 0)} in {str(target.parent)!r}: choose another "
            "path."
        ) from error
    if there is not None and not os.access(file, os.W_OK):
        raise InputError(f"{what}: cannot write {shown}: no permission to replace it: choose another path.")
    return file


def check_apart(output: str | os.PathLike[str], what: str, inputs: Mapping[str, str | os.PathLike[str] | None]) -> None:
    """Raise InputError if an output would take the place of something that is read.

    Args:
        output: path of the file to be written.
        what: how to call it in the message.
        inputs: paths of files that are read, by what they are called; None for what is not given.
    """
    for name, path in inputs.items():
        if path is not None and real(path) == real(output):
            raise InputError(
                f"{what} {os.fspath(output)!r} is {name} itself, and would take its place: give another path."
            )


def real(path: str | os.PathLike[str]) -> str:
    """The path without symbolic links; as it stands where no file can have that name, which is told later."""
    try:
        return os.path.realpath(path)
    except ValueError:
        return os.fspath(path)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the name of a file beside `path`, which takes its place at the end if nothing was raised.

    What a process that was killed left of an earlier try is removed first.

    Raises:
        InputError: `path` cannot be written (see `check_writable`).
        OutputError: it cannot take its place.
    """
    target = Path(os.path.realpath(check_writable(path)))  # keep a symbolic link a link
    _remove_left_over(target)
    beside = _beside(target)
    try:
        yield beside
        with writing(path):
            os.replace(beside, target)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the file that is written, where the disk fails. Nothing else belongs inside: what fails is called its fault.

    Raises:
        OutputError: no room, or another failure of the disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, OutputError):
            raise
        raise OutputError(
            error.errno,
            f"Cannot write {os.fspath(path)!r}: {os.strerror(error.errno)}. Nothing of it was kept: make room, or give "
            "another path",
        ) from error


def _beside(target: Path) -> Path:
    """A new name beside a file, which tells whose it is."""
    return target.with_name(f"{_stem(target)}{os.getpid()}.{secrets.token_hex(4)}.tmp")  # threads write too


def _stem(target: Path) -> str:
    """How names beside a file begin on this machine: not with its own name, which may be as long as names can be."""
    of_file, of_machine = (hashlib.sha256(x).hexdigest() for x in (os.fsencode(target.name), platform.node().encode()))
    return f".lig_lens.{of_file[:12]}.{of_machine[:8]}."


def _remove_left_over(target: Path) -> None:
    """Remove what processes of this machine that run no more left of a file."""
    if os.name != "posix":  # elsewhere, asking whether a process runs may end it
        return
    stem = _stem(target)
    for left in target.parent.glob(f"{stem}*.tmp"):
        number = left.name[len(stem) :].partition(".")[0]
        if number.isdigit() and not _runs(int(number)):
            with contextlib.suppress(OSError):
                left.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


def write_atomic(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path` so that a reader sees the old file or the new one, never half of it.

    The data go into a file beside it, which then takes its place. A path that is no regular file
    (`/dev/stdout`, a named pipe) is written directly.

    Raises:
        InputError: `path` cannot be written (see `check_writable`).
        OutputError: see `writing`.
    """
    file = Path(path)
    if os.path.exists(path) and not os.path.isfile(path):
        with writing(path):
            check_writable(path).write_bytes(data)
        return file
    with replacing(path) as beside, writing(path), open(beside, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return file


def cached_folder(name: str, holds: Sequence[str], fill: Callable[[Path], None]) -> Path:
    """Folder of the user's cache, filled when it is first asked for.

    Args:
        name: of the folder; what its contents depend on belongs into it, so that none is ever out of date.
        holds: names of the files in it that are read.
        fill: writes them into the empty folder that it is given, which takes the name when all is written.

    Raises:
        InputError: the cache cannot be written, or a folder of that name lacks a file.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lig_lens"
    folder = cache / name
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(dir=cache, prefix=f".{name}-"))
        except OSError as error:
            raise InputError(
                f"Cannot write into the cache {str(cache)!r}: {os.strerror(error.errno or 0)}: set XDG_CACHE_HOME to a "
                "folder that can be written."
            ) from error
        try:
            fill(beside)
            # Renamed last, so that a half-written copy is never taken for a whole one. Another process may be first.
            with contextlib.suppress(OSError):
                os.replace(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    missing = [file for file in holds if not (folder / file).is_file()]
    if missing:
        raise InputError(f"The copy at {str(folder)!r} lacks {', '.join(missing)}: delete that folder and try again.")
    return folder
