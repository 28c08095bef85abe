"""The figures under their public name, `from lig_lens.plots import head_grid`; they are made in `show/plots/`."""

from lig_lens.show.plots import *  # noqa: F403 - whatever stands there is public
from lig_lens.show.plots import __all__ as __all__
