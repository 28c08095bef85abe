"""Figures, returned and never shown."""

from lig_lens.plots.circuitsvis import to_circuitsvis
from lig_lens.plots.composition import consistency_plot, rollout_map
from lig_lens.plots.effects import agreement_scatter, effects_map
from lig_lens.plots.heads import head_grid, head_map
from lig_lens.plots.overview import gap_map, importance
from lig_lens.plots.page import write_html
from lig_lens.plots.routes import paths_graph
from lig_lens.plots.style import show_token

__all__ = [
    "agreement_scatter",
    "consistency_plot",
    "effects_map",
    "gap_map",
    "head_grid",
    "head_map",
    "importance",
    "paths_graph",
    "rollout_map",
    "show_token",
    "to_circuitsvis",
    "write_html",
]
