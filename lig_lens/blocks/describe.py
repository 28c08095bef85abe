"""The nodes of a model's blocks, as users see them."""

from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from lig_lens.blocks.block import BlockBoundaries
from lig_lens.blocks.known import Blocks, Needs
from lig_lens.hooked import HookedModel, check_hooked
from lig_lens.inputs.token_ids import TokenIds
from lig_lens.models.loading import check_evaluating, load_model
from lig_lens.models.stack import stack_of


def describe_boundaries(
    model: HookedModel | str | Path | object, tokens: Int[Tensor, "1 pos"] | None = None, *, config_only: bool = False
) -> list[BlockBoundaries]:
    """Hooks, layout, norms, heads and engine of every block, checked numerically on `model`.

    Args:
        model: a hooked model, or a name for `load_model`.
        tokens: token ids to check on, [1, pos]; a few arbitrary ids by default.
        config_only: with a name, build the model with random weights instead of loading them.

    Raises:
        BoundaryError: a block's nodes do not reproduce it.
        InputError: not a hooked model, or one in train mode with dropout.
    """
    if isinstance(model, (str, Path)):
        model = load_model(model, load_weights=not config_only)
    hooked = check_hooked(model)
    check_evaluating(hooked)
    if tokens is None:
        length = min(6, hooked.cfg.n_ctx)
        tokens = torch.arange(1, length + 1, device=hooked.cfg.device)[None] * 7 % hooked.cfg.d_vocab
    stack, n_pos = stack_of(hooked), tokens.shape[1]
    inputs = TokenIds(tokens, tuple(str(i) for i in tokens[0].tolist()), (False,) * n_pos)
    found = Blocks(stack, range(len(stack))).record(inputs, Needs(formula=False)).visited
    return [found[layer].block.boundaries for layer in range(len(stack))]
