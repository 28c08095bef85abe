"""Typed errors and warnings. Every message gives the offending value and what to do."""

import difflib
import importlib
import operator
import sys
import warnings
from collections.abc import Sequence
from typing import Any


class LigLensError(Exception):
    """Base of all errors that lig_lens raises on purpose."""


class InputError(LigLensError, ValueError):
    """An argument, prompt, flag or config value that cannot be used."""


class BoundaryError(LigLensError, RuntimeError):
    """The nodes of a block could not be found, or fail the numerical check."""


class NonFiniteError(LigLensError, ArithmeticError):
    """A weight or an activation is NaN or infinite."""


class MissingPackageError(LigLensError, ImportError):
    """An optional package is needed; the message names the command that installs it."""


class FlowFileError(LigLensError, ValueError):
    """A saved Flow is damaged, is not a Flow, or has a newer schema than this version reads."""


class OutputError(LigLensError, OSError):
    """A file cannot be written: no room on the disk, or another failure of it."""

    def __str__(self) -> str:
        return str(self.args[1]) if len(self.args) > 1 else super().__str__()


class ConvergenceWarning(UserWarning):
    """Some cells missed the requested completeness tolerance within the node budget."""


class CancellationWarning(UserWarning):
    """Shares of a step divide by a sum whose terms nearly cancel: they are large and of both signs."""


class BridgeWarning(UserWarning):
    """A bridge computes something else than the plain model that it was made of."""


class CollapseWarning(UserWarning):
    """Shares were multiplied through layers until all destinations are made of the same tokens."""


# Wrappers that others put around functions of this package.
_NOT_THE_CALLER = ("lig_lens", "torch", "transformers", "transformer_lens", "jaxtyping", "beartype")


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn, pointing at the code that called into this package."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_THE_CALLER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def check_choice(what: str, value: object, valid: Sequence[str]) -> str:
    """Return `value` if it is one of `valid`.

    Raises:
        InputError: otherwise; the message lists the valid names and the nearest match.

    >>> check_choice("engine", "hoks", ["auto", "hooks"])
    Traceback (most recent call last):
        ...
    lig_lens.errors.InputError: Unknown engine 'hoks': use one of 'auto', 'hooks'. Did you mean 'hooks'?
    """
    if isinstance(value, str) and value in valid:
        return value
    listed = ", ".join(repr(name) for name in valid)
    near = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.5)
    near = near or [name for name in valid if str(value) and str(value) in name]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(f"Unknown {what} {value!r}: use one of {listed}.{hint}")


def check_whole(what: str, value: Any) -> int:
    """Return a whole number as int.

    Raises:
        InputError: it is none.

    >>> check_whole("paths: k", 1.5)
    Traceback (most recent call last):
        ...
    lig_lens.errors.InputError: paths: k is 1.5: give a whole number.
    """
    try:
        return operator.index(value)
    except TypeError as error:
        raise InputError(f"{what} is {value!r}: give a whole number.") from error


def missing_package(package: str, purpose: str, command: str) -> MissingPackageError:
    """Build the error for an absent optional package."""
    return MissingPackageError(
        f"{purpose} needs the package {package!r}, which is not installed. Install it with: {command}"
    )


def optional(package: str, purpose: str, distribution: str | None = None) -> Any:
    """Import a package that is not always installed.

    Args:
        package: a module's name.
        purpose: what needs it.
        distribution: what to install for it, where that is called otherwise.

    Raises:
        MissingPackageError: it is not; says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        named = distribution or package
        raise missing_package(named, purpose, f"pip install {named}") from error
