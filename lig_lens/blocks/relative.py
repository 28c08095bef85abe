"""Relative positions in scores (DeBERTa): products of queries, and of keys, with vectors that belong to distances."""

from dataclasses import dataclass, field, replace

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from lig_lens.blocks.call import BlockCall

_ALL = slice(None)
# What makes the vectors of distances that stand with queries, and with keys, in both versions.
_NAMES = (("pos_key_proj", "pos_proj"), ("pos_query_proj", "pos_q_proj"))


@dataclass(frozen=True)
class Relative:
    """`q_j.P_ji + k_i.R_ji`, where P_ji and R_ji depend on nothing but how far j is from i.

    Attributes:
        with_queries: P, one for each distance; None for none.
        with_keys: R; None for none.
        of_query: which distance P is taken of.
        of_key: and R.
    """

    with_queries: Float[Tensor, "head distance d_head"] | None = field(repr=False)
    with_keys: Float[Tensor, "head distance d_head"] | None = field(repr=False)
    of_query: Int[Tensor, "dst src"] = field(repr=False)
    of_key: Int[Tensor, "dst src"] = field(repr=False)

    def of_queries(
        self, q: Float[Tensor, "head row d_head"], rows: Int[Tensor, "row"] | slice = _ALL
    ) -> Float[Tensor, "head row src"]:
        """`q_j.P_ji` of the queries of the destinations `rows`."""
        return self._at(self.with_queries, q, self.of_query[rows])

    def of_keys(
        self, k: Float[Tensor, "head src d_head"], rows: Int[Tensor, "row"] | slice = _ALL
    ) -> Float[Tensor, "head row src"]:
        """`k_i.R_ji` of the keys of all sources, for the destinations `rows`."""
        return self._at(self.with_keys, k, self.of_key[rows].T).mT

    def of_own_keys(
        self, k: Float[Tensor, "head row d_head"], rows: Int[Tensor, "row"] | slice = _ALL
    ) -> Float[Tensor, "head row src"]:
        """`k_j.R_ji` of the keys of the destinations themselves, where every source has the destination's key."""
        return self._at(self.with_keys, k, self.of_key[rows])

    def _at(
        self, vectors: Tensor | None, these: Float[Tensor, "head row d_head"], distances: Int[Tensor, "row other"]
    ) -> Float[Tensor, "head row other"]:
        if vectors is None:
            return these.new_zeros(len(these), *distances.shape)
        return (these @ vectors.mT).gather(-1, distances.expand(len(these), -1, -1))

    def beside(self, scale: float) -> "Relative":
        """What stands beside queries that hold the scale already: R with it."""
        return self if self.with_keys is None else replace(self, with_keys=scale * self.with_keys)

    def of_heads(self, some: slice) -> "Relative":
        """Of some heads."""
        of_heads = [None if one is None else one[some] for one in (self.with_queries, self.with_keys)]
        return replace(self, with_queries=of_heads[0], with_keys=of_heads[1])


@dataclass(frozen=True)
class RelativeKind:
    """Which of the two a block's scores have; the weights are asked on every prompt."""

    with_queries: bool
    with_keys: bool

    def on(self, call: BlockCall, d_head: int) -> Relative | None:
        """They at the prompt's distances, or None where the block does not show them."""
        distances, embedded = call.kwargs.get("relative_pos"), call.kwargs.get("rel_embeddings")
        if not isinstance(distances, Tensor) or not isinstance(embedded, Tensor):
            return None
        n_pos = len(call.resid_pre)
        if distances.numel() != n_pos**2 or embedded.ndim != 2:
            return None
        made: list[Tensor | None] = []
        for wanted, names in zip((self.with_queries, self.with_keys), _NAMES, strict=True):
            named = call.modules["attn"].named_modules()
            maps = [one for name, one in named if name.split(".")[-1] in names and isinstance(one, nn.Linear)]
            if wanted and not maps:
                return None
            made.append(_made(maps[0], embedded.detach().to(call.resid_pre), d_head) if wanted else None)
        # Row n / 2 is that of distance 0; what is further away than the table goes takes its end.
        distances, half = distances.reshape(n_pos, n_pos).long().to(call.resid_pre.device), len(embedded) // 2
        last = len(embedded) - 1
        return Relative(made[0], made[1], (half + distances).clamp(0, last), (half - distances.T).clamp(0, last))


def _made(by: nn.Linear, embedded: Float[Tensor, "distance _"], d_head: int) -> Float[Tensor, "head distance d_head"]:
    # Weights in half precision are raised while their block runs, and not now.
    bias = None if by.bias is None else by.bias.detach().to(embedded)
    table = functional.linear(embedded, by.weight.detach().to(embedded), bias)
    return table.reshape(len(table), -1, d_head).transpose(0, 1).contiguous()


RELATIVE_KINDS = tuple(RelativeKind(*which) for which in ((True, True), (True, False), (False, True)))
