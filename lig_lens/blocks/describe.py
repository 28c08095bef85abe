"""The nodes of a model's blocks, as users see them."""

from pathlib import Path
from typing import Any

from lig_lens.arguments import checked
from lig_lens.blocks.block import BlockBoundaries
from lig_lens.blocks.known import Blocks, Needs
from lig_lens.hooked import HookedModel, check_hooked
from lig_lens.inputs.kinds import kind_of
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
        tokens: a prompt to check on (a text, token ids, an image, or a pair `(source, target)`, see `attribute`); an
            arbitrary one by default.
        config_only: with a name, build the model with random weights instead of loading them.
        stream: of a model with an encoder and a decoder, whose blocks and which attention (see `attribute`).

    Raises:
        BoundaryError: a block does alone something else than in the model.
        InputError: not a hooked model, one in train mode with dropout, or tokens that cannot be read.
    """
    if isinstance(model, (str, Path)):
        model = load_model(model, load_weights=not config_only)
    hooked = check_hooked(model)
    check_evaluating(hooked)
    stack = stack_of(hooked, stream)
    kind = kind_of(hooked, stack.stream)
    if tokens is None:
        tokens = kind.arbitrary(hooked)
    with one_at_a_time(hooked):
        inputs = kind.read(hooked, tokens, what="tokens")
        found = Blocks(stack, range(len(stack))).record(inputs, Needs(heads=False, formula=False)).visited
    return [found[layer].block.boundaries for layer in range(len(stack))]
