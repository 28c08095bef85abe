"""Products of queries and keys."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.relative import Relative
from lig_lens.blocks.rotary import Rotary

_ALL = slice(None)


def per_query_head(kv: Float[Tensor, "*batch kv_head rest dim"], n_heads: int) -> Float[Tensor, "*batch head rest dim"]:
    """What key-value heads have, once for each of the query heads that share them."""
    return kv.repeat_interleave(n_heads // kv.shape[-3], -3)


def products(
    rotary: Rotary | None,
    q: Float[Tensor, "head dst d_head"],
    k: Float[Tensor, "kv_head src d_head"],
    rows: Int[Tensor, "row"] | slice = _ALL,
    weight: Float[Tensor, "head 1 d_head"] | None = None,
) -> Float[Tensor, "head row src"]:
    """`q.k` of the queries `rows` with every source, both turned, and `weight` on the queries then."""
    q, k = (q, k) if rotary is None else (rotary.turn(q), rotary.turn(k))
    q = q if weight is None else q * weight
    return q[:, rows] @ per_query_head(k, len(q)).transpose(-1, -2)


@dataclass(frozen=True)
class Pairing:
    """Products of queries and keys at the positions of a prompt, which turn both, or add something, or do nothing."""

    positions: Rotary | Relative | None = None

    @property
    def rotary(self) -> Rotary | None:
        """What turns queries and keys."""
        return self.positions if isinstance(self.positions, Rotary) else None

    @property
    def relative(self) -> Relative | None:
        """What is added that is linear in queries, or in keys."""
        return self.positions if isinstance(self.positions, Relative) else None

    def products(
        self,
        q: Float[Tensor, "head dst d_head"],
        k: Float[Tensor, "kv_head src d_head"],
        rows: Int[Tensor, "row"] | slice = _ALL,
        weight: Float[Tensor, "head 1 d_head"] | None = None,
    ) -> Float[Tensor, "head row src"]:
        """Of the queries `rows` with every source; `weight` is on the queries once they are turned."""
        made, relative = products(self.rotary, q, k, rows, weight), self.relative
        if relative is None:
            return made
        return made + relative.of_queries(q[:, rows], rows) + relative.of_keys(per_query_head(k, len(q)), rows)

    def of_heads(self, some: slice) -> "Pairing":
        """Of some heads."""
        return self if self.relative is None else Pairing(self.relative.of_heads(some))
