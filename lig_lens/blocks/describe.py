"""The nodes of a model's blocks, as users see them."""

from pathlib import Path
from typing import Any

import torch

from lig_lens.arguments import checked
from lig_lens.blocks.block import BlockBoundaries
from lig_lens.blocks.known import Blocks, Needs
from lig_lens.hooked import HookedModel, check_hooked
from lig_lens.inputs.pairs import reader_of
from lig_lens.models.loading import check_evaluating, load_model
from lig_lens.models.running import one_at_a_time
from lig_lens.models.stack import stack_of


@checked
def describe_boundaries(
    model: HookedModel | str | Path | object,
    tokens: Any = None,
    *,
    config_only: bool = False,
    stream: str | None = None,
) -> list[BlockBoundaries]:
    """Hooks, layout, norms, heads and engine of every block, checked numerically on `model`.

    Args:
        model: a hooked model, or a name for `load_model`.
        tokens: a text or token ids to check on, or a pair `(source, target)` of them (see `attribute`); a few
            arbitrary ids by default.
        config_only: with a name, build the model with random weights instead of loading them.
        stream: of a model with an encoder and a decoder, whose blocks and which attention (see `attribute`).

    Raises:
        BoundaryError: a block's nodes do not reproduce it.
        InputError: not a hooked model, one in train mode with dropout, or tokens that cannot be read.
    """
    if isinstance(model, (str, Path)):
        model = load_model(model, load_weights=not config_only)
    hooked = check_hooked(model)
    check_evaluating(hooked)
    stack = stack_of(hooked, stream)
    if tokens is None:
        length = min(6, hooked.cfg.n_ctx)
        tokens = torch.arange(1, length + 1, device=hooked.cfg.device)[None] * 7 % hooked.cfg.d_vocab
        if stack.stream is not None:
            tokens = (tokens, tokens[:, : max(1, length - 1)])
    with one_at_a_time(hooked):
        inputs = reader_of(stack.stream)(hooked, tokens, what="tokens")
        found = Blocks(stack, range(len(stack))).record(inputs, Needs(formula=False)).visited
    return [found[layer].block.boundaries for layer in range(len(stack))]
