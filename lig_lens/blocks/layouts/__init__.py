"""Layouts, in the order in which they are tried."""

from lig_lens.blocks.layouts.across import Across
from lig_lens.blocks.layouts.layout import Layout
from lig_lens.blocks.layouts.no_norm import NoNorm
from lig_lens.blocks.layouts.parallel import Parallel
from lig_lens.blocks.layouts.post_ln import PostLn
from lig_lens.blocks.layouts.pre_ln import PreLn
from lig_lens.blocks.layouts.pre_post_ln import PrePostLn
from lig_lens.blocks.layouts.scaled_pre_ln import ScaledPreLn

LAYOUTS: tuple[Layout, ...] = (PreLn(), PostLn(), NoNorm(), PrePostLn(), Parallel(), ScaledPreLn())
# Of heads that look at another stack.
ACROSS = Across()
# Of a block without separable heads.
BLOCK_ONLY = "block_only"
