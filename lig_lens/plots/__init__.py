"""Figures, returned and never shown."""

from lig_lens.plots.effects import agreement_scatter, effects_map
from lig_lens.plots.heads import head_grid, show_token, write_html

__all__ = ["agreement_scatter", "effects_map", "head_grid", "show_token", "write_html"]
