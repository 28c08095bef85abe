"""Cross-attention: sources are another stack's positions, and nothing of them goes past the heads."""

from lig_lens.blocks.layouts.layout import Layout, Trial


class Across(Layout):
    """z = attn(query of the decoder, keys and values of the encoder's output); known by its stack, never tried."""

    name = "cross"

    def fits(self, trial: Trial) -> bool:
        """See the base class."""
        return trial.inside.call.stack.crosses
