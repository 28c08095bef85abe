"""The page that holds figures."""

import html
import os
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
import plotly.io

from lig_lens.errors import InputError
from lig_lens.files import write_atomic
from lig_lens.show.plots.style import FONT, INK

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 0; padding: 12px 16px 32px; background: white; color: {ink}; font-family: {font}; }}
.figure {{ overflow-x: auto; margin-bottom: 24px; }}
</style>
</head>
<body>
{figures}
</body>
</html>
"""


def write_html(figures: go.Figure | Sequence[go.Figure], path: str | os.PathLike[str], title: str = "lig_lens") -> Path:
    """Write one page with the figures below each other, everything inlined: it opens without network.

    Args:
        figures: one figure or several.
        path: replaced in one step; plotly's script makes the page about 5 MB.
        title: of the page, as text.

    Raises:
        InputError: no figure, or `path` cannot be written.
    """
    listed = [figures] if isinstance(figures, go.Figure) else list(figures)
    if not listed:
        raise InputError(f"write_html: no figure for {os.fspath(path)!r}: give at least one.")
    parts = [
        plotly.io.to_html(
            figure,
            full_html=False,
            include_plotlyjs=number == 0,
            include_mathjax=False,
            div_id=f"figure-{number}",
            config={"displaylogo": False, "responsive": False},
        )
        for number, figure in enumerate(listed)
    ]
    body = "\n".join(f'<div class="figure">{part}</div>' for part in parts)
    page = _PAGE.format(title=html.escape(title), ink=INK, font=FONT, figures=body)
    return write_atomic(path, page.encode("utf-8"))
