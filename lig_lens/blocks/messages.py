"""Messages `p_ji v_i`: what a source sends to a destination through a head, as far as a block's hooks show it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.find import BlockNodes
from lig_lens.blocks.formula import QKV_PATHS
from lig_lens.blocks.layout import by_position


@dataclass(frozen=True)
class Attention:
    """Pattern and values of one block, `z = pattern @ values` head by head; the values are read at `v_path`."""

    pattern: Float[Tensor, "head dst src"]
    values: Float[Tensor, "src head d_head"]
    v_path: str


def by_head(values: Tensor, *shape: int) -> Float[Tensor, "..."]:
    """Values of key-value heads, as a hook shows them, repeated for the heads that share them.

    Args:
        values: positions before heads, in any shape.
        shape: of the result, [*batch, src, head, d_head].
    """
    shared = values.reshape(*shape[:-2], -1, shape[-1])
    return shared.repeat_interleave(shape[-2] // shared.shape[-2], -2)


def attention_of(nodes: BlockNodes, values: Mapping[str, Tensor]) -> Attention | None:
    """Pattern and values, if the hooks show them and z is their product.

    Args:
        nodes: of the block, with its pattern.
        values: what its hooks showed on the prompt.
    """
    z, pattern = nodes.z, nodes.pattern
    assert z is not None
    path = next((paths[2] for paths in QKV_PATHS if paths[2] in values), None)
    if pattern is None or path is None:
        return None
    n_pos, n_heads, d_head = z.shape
    n_values = values[path].numel() // (n_pos * d_head)
    if values[path].numel() != n_pos * n_values * d_head or n_values == 0 or n_heads % n_values:
        return None
    shown = by_head(values[path], *z.shape).to(z)
    missed = torch.einsum("hjs,she->jhe", pattern, shown) - z
    return Attention(pattern, shown, path) if by_position(missed.flatten(1), z.flatten(1)) <= 1e-4 else None
