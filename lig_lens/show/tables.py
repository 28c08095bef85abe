"""Tables of plain text. Loads no torch."""

import io

from rich.console import Console
from rich.table import Table

PLAIN_WIDTH = 400  # wider than any row: piped text is never wrapped


def new_table(*columns: str) -> Table:
    """A table of plain text with these columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def rendered(table: Table, width: int | None) -> str:
    """Lay a table out; lines are as long as they need to be without a width."""
    console = Console(
        file=io.StringIO(),
        width=width or PLAIN_WIDTH,
        force_terminal=False,
        color_system=None,
        legacy_windows=False,
    )
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n"))
