"""The figures under their public name, `from lig_lens.plots import head_grid`; they are made in `show/plots/`."""

from lig_lens.show.plots import (
    agreement_scatter,
    consistency_plot,
    effects_map,
    gap_map,
    head_grid,
    head_map,
    importance,
    paths_graph,
    rollout_map,
    show_token,
    to_circuitsvis,
    write_html,
)

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
