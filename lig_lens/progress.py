"""How far a run is and how long it will take, on stderr."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm


@contextmanager
def progress(doing: str, unit: str, total: int, shown: bool) -> Iterator[Any]:
    """A tqdm bar, to be told what was done by `update`.

    Args:
        doing: what it says in front.
        unit: what is counted.
        total: how many of them there are.
        shown: whether it is shown at all.
    """
    # A log gets a line now and then, not ten each second.
    in_notebook = any("notebook" in one.__module__ for one in tqdm.__mro__)
    is_log = not in_notebook and not getattr(sys.stderr, "isatty", lambda: False)()
    pause = 10.0 if is_log else 0.1
    with tqdm(
        total=total, desc=doing, unit=unit, disable=not shown, file=sys.stderr, leave=False, mininterval=pause
    ) as bar:
        yield bar
