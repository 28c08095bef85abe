"""The table of families. Loads no torch."""

from collections.abc import Sequence

from rich.text import Text

from lig_lens.models.supported import SupportedFamily
from lig_lens.show.tables import new_table, rendered


def families_table(families: Sequence[SupportedFamily], width: int | None = None) -> str:
    """Lay `supported` out: one row per family."""
    table = new_table("family", "takes", "layout", "maps", "engine", "gap", "difference", "TransformerLens")
    for one in families:
        numbers = (f"{one.gap:.0e}", f"{one.difference:.0e}")
        cells = (one.family, one.takes, one.layout, ", ".join(one.maps), one.engine, *numbers, ", ".join(one.tested))
        table.add_row(*[Text(cell) for cell in cells])
    return rendered(table, width)
