"""Figures, returned and never shown."""

from lig_lens.show.plots.circuitsvis import to_circuitsvis
from lig_lens.show.plots.composition import consistency_plot, rollout_map
from lig_lens.show.plots.effects import agreement_scatter, effects_map
from lig_lens.show.plots.heads import head_grid, head_map
from lig_lens.show.plots.overview import gap_map, importance
from lig_lens.show.plots.page import write_html
from lig_lens.show.plots.routes import paths_graph
from lig_lens.show.plots.style import show_token

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
