"""The explorer: one self-contained page that shows where flow comes from and goes to, through which heads."""

from lig_lens.show.explorer.page import Explorer, explore, write_explorer

__all__ = ["Explorer", "explore", "write_explorer"]
