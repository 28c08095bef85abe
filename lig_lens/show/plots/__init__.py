"""Figures, returned and never shown. A figure is a file here, and a line below."""

import inspect

from lig_lens.show.plots.circuitsvis import to_circuitsvis as to_circuitsvis
from lig_lens.show.plots.coloured import relevance_html as relevance_html
from lig_lens.show.plots.composition import consistency_plot as consistency_plot
from lig_lens.show.plots.composition import rollout_map as rollout_map
from lig_lens.show.plots.curves import deletion_curves as deletion_curves
from lig_lens.show.plots.curves import league as league
from lig_lens.show.plots.effects import agreement_scatter as agreement_scatter
from lig_lens.show.plots.effects import effects_map as effects_map
from lig_lens.show.plots.heads import head_grid as head_grid
from lig_lens.show.plots.heads import head_map as head_map
from lig_lens.show.plots.images import image_map as image_map
from lig_lens.show.plots.overview import gap_map as gap_map
from lig_lens.show.plots.overview import importance as importance
from lig_lens.show.plots.page import write_html as write_html
from lig_lens.show.plots.relevance import compare_relevance as compare_relevance
from lig_lens.show.plots.relevance import relevance_image as relevance_image
from lig_lens.show.plots.relevance import relevance_layers as relevance_layers
from lig_lens.show.plots.relevance import relevance_text as relevance_text
from lig_lens.show.plots.routes import paths_graph as paths_graph
from lig_lens.show.text import show_token as show_token

# All functions above, and none of the modules that loading them leaves here.
__all__ = sorted(name for name, value in globals().items() if inspect.isfunction(value))
