"""Figures from a Flow. They are returned, never shown."""

from lig_lens.plots.heads import head_grid, show_token, write_html

__all__ = ["head_grid", "show_token", "write_html"]
