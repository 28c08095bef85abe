"""Names that users give, and the objects that they stand for. Loads nothing until an object is asked for."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lig_lens.errors import InputError, check_choice


@dataclass(frozen=True)
class Entry:
    """Where a named object is: the object itself, or `"module:name"` of it or of a class that makes it.

    Subclasses add what has to be known before the object's module, and with it torch, is loaded.
    """

    home: Any


E = TypeVar("E", bound=Entry)


class Registry(Generic[E]):
    """Entries by name, in the order in which they were added."""

    def __init__(self, what: str, **entries: E) -> None:
        self.what = what
        self._entries = dict(entries)

    def add(self, name: str, entry: E) -> None:
        """Add an entry.

        Raises:
            InputError: the name is taken, or not one that flags and files can hold.
        """
        if not isinstance(name, str) or not name.isidentifier():
            raise InputError(f"{self.what} {name!r}: a name is a word of letters, digits and _, such as 'my_own'.")
        if name in self._entries:
            raise InputError(f"There is a {self.what} {name!r} already: choose another name.")
        self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Take an entry out again."""
        del self._entries[check_choice(self.what, name, self.names())]

    def names(self, wanted: Callable[[E], bool] = lambda _: True) -> tuple[str, ...]:
        """Names of the entries that are wanted."""
        return tuple(name for name, entry in self._entries.items() if wanted(entry))

    def entry(self, name: str) -> E:
        """The entry of a name.

        Raises:
            InputError: unknown name; lists those that are known.
        """
        return self._entries[check_choice(self.what, name, self.names())]

    def __getitem__(self, name: str) -> Any:
        """The object of a name; loads its module.

        Raises:
            InputError: unknown name.
        """
        home = self.home(name)
        return home() if isinstance(home, type) else home

    def home(self, name: str) -> Any:
        """The object of a name, or the class that makes it; loads its module.

        Raises:
            InputError: unknown name.
        """
        home = self.entry(name).home
        if isinstance(home, str):
            module, _, attribute = home.partition(":")
            home = getattr(importlib.import_module(module), attribute)
        return home
