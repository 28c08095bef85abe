"""Rotary position embedding: what it does to queries and keys, and where a block has its tables."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.call import BlockCall


@dataclass(frozen=True)
class Rotary:
    """Rotation of queries and keys: pair p of position i turns by the angle whose cos and sin are given."""

    cos: Float[Tensor, "pos pair"]
    sin: Float[Tensor, "pos pair"]
    adjacent: bool
    """Pairs are neighbours (GPT-J); else dimension p is paired with p + n_pairs (GPT-NeoX)."""

    def split(self, vectors: Float[Tensor, "*batch d_head"]) -> tuple[Tensor, Tensor, Tensor]:
        """First and second dimensions of the pairs, and the dimensions that do not turn."""
        n = 2 * self.cos.shape[-1]
        turning, rest = vectors[..., :n], vectors[..., n:]
        if self.adjacent:
            return turning[..., ::2], turning[..., 1::2], rest
        return turning[..., : n // 2], turning[..., n // 2 :], rest

    def turn(self, vectors: Float[Tensor, "*batch pos d_head"]) -> Float[Tensor, "*batch pos d_head"]:
        """Rotate every position. Dimensions come out in another order, the same for queries and keys."""
        first, second, rest = self.split(vectors)
        return torch.cat([first * self.cos - second * self.sin, second * self.cos + first * self.sin, rest], -1)


@dataclass(frozen=True)
class RotaryKind:
    """Where a block's tables for rotary are, which dimensions make a pair, and which way it turns (NanoChat: back)."""

    source: str
    adjacent: bool
    backwards: bool = False

    def on(self, call: BlockCall, d_head: int) -> Rotary | None:
        """The rotation of the prompt's positions, or None where the tables are not there or do not fit."""
        pair = _TABLES[self.source](call)
        if pair is None:
            return None
        n_pos = len(call.resid_pre)
        cos, sin = (table.reshape(-1, table.shape[-1])[:n_pos].detach().to(call.resid_pre) for table in pair)
        sin = -sin if self.backwards else sin
        if len(cos) < n_pos or cos.shape != sin.shape or cos.shape[-1] > d_head:
            return None
        # Tables hold every angle twice, for neighbouring dimensions or for two halves, or once.
        half, odd = cos.shape[-1] // 2, cos.shape[-1] % 2
        if not odd and torch.equal(cos[:, ::2], cos[:, 1::2]):
            return Rotary(cos[:, ::2], sin[:, ::2], self.adjacent)
        if not odd and torch.equal(cos[:, :half], cos[:, half:]):
            return Rotary(cos[:, :half], sin[:, :half], self.adjacent)
        return Rotary(cos, sin, self.adjacent) if 2 * cos.shape[-1] <= d_head else None


def _given(call: BlockCall) -> tuple[Tensor, Tensor] | None:
    """Tables that the model hands to the block, as one of complex numbers in Llama 4."""
    given = call.kwargs.get("position_embeddings")
    if isinstance(given, Tensor) and given.is_complex():
        return given.real, given.imag
    return (given[0], given[1]) if isinstance(given, (tuple, list)) and len(given) == 2 else None


def _buffers(call: BlockCall) -> dict[str, Tensor]:
    attn = call.modules["attn"]
    return {name.split(".")[-1]: buffer for name, buffer in attn.named_buffers()}


def _cos_and_sin(call: BlockCall) -> tuple[Tensor, Tensor] | None:
    """Tables of a HookedTransformer."""
    held = _buffers(call)
    return (held["rotary_cos"], held["rotary_sin"]) if {"rotary_cos", "rotary_sin"} <= set(held) else None


def _embed_positions(call: BlockCall) -> tuple[Tensor, Tensor] | None:
    """Tables of GPT-J, one behind the other and each angle once."""
    held = _buffers(call)
    if "embed_positions" not in held:
        return None
    sin, cos = held["embed_positions"].chunk(2, -1)
    return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)


def _own_module(call: BlockCall) -> tuple[Tensor, Tensor] | None:
    """Tables that attention has made for the positions that it is given (RecurrentGemma)."""
    make = getattr(getattr(call.modules["attn"], "original_component", None), "rotary_emb", None)
    given = (call.kwargs.get("position_ids"), *call.args)
    positions = next((one for one in given if isinstance(one, Tensor) and one.dtype is torch.long), None)
    made = None if make is None or positions is None else make(call.resid_pre, positions)
    return (made[0], made[1]) if isinstance(made, tuple) and len(made) == 2 else None


_TABLES = {
    "position_embeddings": _given,
    "rotary_cos": _cos_and_sin,
    "embed_positions": _embed_positions,
    "rotary_emb": _own_module,
}
ROTARY_KINDS = (
    *(RotaryKind(source, adjacent) for source in _TABLES for adjacent in (False, True)),
    *(RotaryKind("position_embeddings", adjacent, backwards=True) for adjacent in (False, True)),
)
