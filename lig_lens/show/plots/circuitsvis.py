"""Export to CircuitsVis, for those who read attention patterns there."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from lig_lens.arguments import checked
from lig_lens.choose import find_places, of_flow
from lig_lens.errors import InputError, optional
from lig_lens.flow.flow import Flow
from lig_lens.names import head_name
from lig_lens.show.plots.style import DIVERGING
from lig_lens.show.text import show_token


@checked
def to_circuitsvis(flow: Flow, layer: int, heads: Sequence[int] | None = None) -> Any:
    """Shares of the attn map of one layer as CircuitsVis' `attention_heads`, in its order [head, dst, src].

    The colours of both signs end at the largest share, at most 1. In a notebook the result shows itself; CircuitsVis
    then asks the network whether it is there and loads its script from unpkg.com if so (`result.local_src` never does).

    Args:
        flow: with an attn map of all destinations.
        layer: block number.
        heads: head numbers, in the order to show; all by default.

    Returns:
        CircuitsVis' `RenderedHTML`.

    Raises:
        InputError: a map, layer or head that the Flow does not have, or destinations that are missing.
        MissingPackageError: circuitsvis is not installed (`pip install circuitsvis`).
    """
    flow.check_square("to_circuitsvis")
    shares = flow.shares("attn")
    (place,) = find_places([layer], flow.layers, of_flow("layer"))
    rows = find_places(heads, range(shares.shape[1]), of_flow("head"))
    if not flow.has_all_destinations:
        raise InputError(
            f"to_circuitsvis: CircuitsVis draws square patterns, and this Flow has {len(flow.destinations)} "
            f"destinations of {len(flow.tokens)}: ask attribute() for all."
        )
    patterns = shares[place, rows].mT
    largest = min(1.0, float(patterns.abs().max())) or 1.0
    return optional("circuitsvis", "to_circuitsvis").attention.attention_heads(
        attention=patterns,
        tokens=[_unbroken(token) for token in flow.tokens],
        attention_head_names=[head_name(layer, head) for head in rows],
        max_value=largest,
        min_value=-largest,
        positive_color=DIVERGING[-1],
        negative_color=DIVERGING[0],
        mask_upper_tri=not bool(torch.triu(patterns, diagonal=1).any()),
    )


def _unbroken(token: str) -> str:
    """A token that cannot end the script which CircuitsVis writes it into: an invisible word joiner follows `<`."""
    return re.sub(r"<(?=[/!]|script)", "<\u2060", show_token(token), flags=re.IGNORECASE)
