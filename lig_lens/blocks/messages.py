"""Messages `p_ji v_i`: what a source sends to a destination through a head, as far as a block's hooks show it."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.inside import by_position
from lig_lens.blocks.pairing import per_query_head
from lig_lens.blocks.reading import QKV_PATHS
from lig_lens.blocks.values import Messages

# How far rounding may take a row of a pattern from 1, in half precision too.
ROWS_MISS = 1e-3


def by_head(values: Tensor, *shape: int) -> Float[Tensor, "..."]:
    """Values of key-value heads, as a hook shows them, repeated for the heads that share them.

    Args:
        values: positions before heads, in any shape.
        shape: of the result, [*batch, src, head, d_head].
    """
    shared = values.reshape(*shape[:-2], -1, shape[-1])
    return per_query_head(shared.transpose(-3, -2), shape[-2]).transpose(-3, -2)


def messages_of(
    z: Float[Tensor, "pos head d_head"], pattern: Float[Tensor, "head dst src"] | None, values: Mapping[str, Tensor]
) -> Messages | None:
    """Pattern and values, if the hooks show them and z is their product.

    Args:
        z: head outputs on a prompt.
        pattern: of attention there.
        values: what the block's hooks showed.
    """
    path = next((paths[2] for paths in QKV_PATHS if paths[2] in values), None)
    if pattern is None or path is None:
        return None
    n_pos, n_heads, d_head = z.shape
    n_values = values[path].numel() // (n_pos * d_head)
    if values[path].numel() != n_pos * n_values * d_head or n_values == 0 or n_heads % n_values:
        return None
    shown = by_head(values[path], *z.shape).to(z)
    missed = torch.einsum("hjs,she->jhe", pattern, shown) - z
    return Messages(pattern, shown, path) if by_position(missed.flatten(1), z.flatten(1)) <= 1e-4 else None
