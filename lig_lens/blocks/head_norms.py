"""Finds the norms on a block's queries and keys: before rotary or after it."""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.call import BlockCall
from lig_lens.blocks.divisor import Divisor, Part, Tokens
from lig_lens.blocks.head_norm import HeadNorm, fit_head_norm
from lig_lens.blocks.norms import AnyHeads, Norms, many_vectors, read_at
from lig_lens.blocks.pairing import per_query_head
from lig_lens.blocks.reading import Heads, Reader, SeenAttention
from lig_lens.blocks.rotary import Rotary

# Both generations call them so.
_PATHS = ("attn.q_norm", "attn.k_norm")
_OTHER = "norms of queries and keys are neither LayerNorm nor RMSNorm"


@dataclass(frozen=True)
class ShownNorms:
    """Queries and keys of several runs, the last one near 0, and what their norms made of them, if they have any."""

    q: Float[Tensor, "run head pos d_head"] = field(repr=False)
    k: Float[Tensor, "run kv_head pos d_head"] = field(repr=False)
    outputs: tuple[Tensor | None, Tensor | None] = field(repr=False)


@dataclass(frozen=True)
class HeadNorms(Norms):
    """Norms on queries and keys.

    Attributes:
        q: of queries.
        k: of keys.
        weight: what queries are multiplied with after rotary, where norms with weights come after it.
        added: to queries, keys and values by the linear maps.
        shown: whether hooks show what they do.
    """

    q: HeadNorm | None
    k: HeadNorm | None
    weight: Float[Tensor, "head 1 d_head"] | None
    added: tuple[Tensor, Tensor, Tensor]
    shown: bool = True

    @property
    def depth(self) -> int:
        """See the base class."""
        return int(self.q is not None or self.k is not None)

    @property
    def biases(self) -> tuple[Tensor, Tensor, Tensor]:
        """See the base class."""
        b_q, b_k, b_v = self.added
        return b_q if self.q is None else self.q.bias, b_k if self.k is None else self.k.bias, b_v

    @property
    def before(self) -> tuple[Tensor, ...]:
        """See the base class."""
        return self.added

    def normed(self, heads: AnyHeads) -> AnyHeads:
        """See the base class."""
        q = heads.q if self.q is None else self.q(heads.q)
        return replace(heads, q=q, k=heads.k if self.k is None else self.k(heads.k))

    def tokens(self, heads: Heads, plain: Divisor) -> Tokens:
        """See the base class."""
        q, k = (
            (Part(vectors, plain),) if norm is None else norm.parts(vectors, bias, plain)
            for norm, vectors, bias in zip((self.q, self.k), (heads.q, heads.k), self.added, strict=False)
        )
        return Tokens(q, k, Part(heads.v, plain))


def read_head_norms(call: BlockCall, reader: Reader, norm: str, eps: float, own: SeenAttention) -> ShownNorms | None:
    """Run attention on vectors at random and read its norms of queries and keys; None if it has none.

    Args:
        call: the block on a prompt.
        reader: of queries, keys and values.
        norm: the block's own norm.
        eps: what that adds to the mean square.
        own: attention on the prompt.
    """
    if not any(path in call.modules for path in _PATHS):
        return None
    resid = many_vectors(call.resid_pre, norm, eps, own)
    read = read_at(call, resid, (*reader.paths, *_PATHS))
    heads = reader.heads(read, resid.shape[:1], resid.shape[1])
    return ShownNorms(heads.q, heads.k, (read.get(_PATHS[0]), read.get(_PATHS[1])))


def find_head_norms(
    shown: ShownNorms | None, rotary: Rotary | None, biases: tuple[Tensor, Tensor, Tensor]
) -> HeadNorms | str:
    """The norms on queries and keys, or why they are not to be understood.

    Args:
        shown: what they were seen to do.
        rotary: which they may follow.
        biases: what the linear maps add.
    """
    if shown is None:
        return HeadNorms(None, None, None, biases)
    pairs = list(zip((shown.q, shown.k), shown.outputs, strict=True))
    before = [None if out is None else _fit(vectors, out, None) for vectors, out in pairs]
    if all(out is None or norm is not None for (_, out), norm in zip(pairs, before, strict=True)):
        return HeadNorms(before[0], before[1], None, biases)
    after = [None if out is None or rotary is None else _fit(vectors, out, rotary) for vectors, out in pairs]
    q, k = after
    if q is None or k is None or q.centred or k.centred:
        return _OTHER
    weight = q.weight * per_query_head(k.weight, len(q.weight))
    q, k = (replace(norm, weight=torch.ones_like(norm.weight)) for norm in (q, k))
    return HeadNorms(q, k, weight, biases)


def hidden_norms(eps: float, biases: tuple[Tensor, Tensor, Tensor]) -> HeadNorms:
    """RMSNorm without weights on queries and keys, which no hook shows (Llama 4); the pattern has to tell.

    Args:
        eps: what the model's norms add.
        biases: what the linear maps add, [head 1 d_head] each.
    """
    q, k = (HeadNorm.plain(bias, eps) for bias in biases[:2])
    return HeadNorms(q, k, None, biases, shown=False)


def _fit(vectors: Float[Tensor, "run head pos d_head"], out: Tensor, rotary: Rotary | None) -> HeadNorm | None:
    """The norm that makes `out` of vectors, turned first if `rotary` is given; heads may stand before positions."""
    if out.numel() != vectors.numel():
        return None
    n_runs, n_heads, n_pos, d_head = vectors.shape
    vectors = vectors if rotary is None else rotary.turn(vectors)
    for arranged in (
        out.reshape(n_runs, n_pos, n_heads, d_head).transpose(1, 2),
        out.reshape(n_runs, n_heads, n_pos, d_head),
    ):
        arranged = arranged if rotary is None else torch.cat(rotary.split(arranged), -1)
        found = fit_head_norm(vectors, arranged)
        if found is not None:
            return found
    return None
