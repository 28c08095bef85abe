"""Norms of latent vectors from which queries, or keys and values, are made (DeepSeek).

A key `U w C / rho` with C linear in the residual and `rho^2 = mean(C^2) + eps sigma^2` is what a norm on keys makes,
but for the vectors whose mean square is taken. A part of each key comes from no latent and keeps the block's divisor.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.call import BlockCall
from lig_lens.blocks.divisor import Divisor, Part, Tokens
from lig_lens.blocks.head_norm import HeadNorm, fit_head_norm
from lig_lens.blocks.norms import AnyHeads, Norms, many_vectors, read_at
from lig_lens.blocks.reading import LATENT_PATHS, LATENT_QUERY_PATHS, FromLatents, Heads, SeenAttention


@dataclass(frozen=True)
class LatentNorms(Norms):
    """Norms of the latents of queries, if they have any, and of keys and values.

    Attributes:
        q: of those of queries.
        kv: of those of keys and values.
        n_turning: how many dimensions of keys, the first, come from no latent.
        added: b_q, b_k, b_v.
    """

    q: HeadNorm | None
    kv: HeadNorm
    n_turning: int
    added: tuple[Tensor, Tensor, Tensor]
    weight: Float[Tensor, "head 1 d_head"] | None = None
    shown: bool = True

    @property
    def depth(self) -> int:
        """See the base class."""
        return 1

    @property
    def before(self) -> tuple[Tensor, ...]:
        """See the base class."""
        return *self.added, *[torch.zeros(()).to(self.added[0]) for _ in range(1 if self.q is None else 2)]

    @property
    def biases(self) -> tuple[Tensor, Tensor, Tensor]:
        """See the base class."""
        return self.added

    def normed(self, heads: AnyHeads) -> AnyHeads:
        """See the base class."""
        by = self.kv.divides_by(heads.latents[-1])
        q = heads.q if self.q is None else heads.q / self.q.divides_by(heads.latents[0])
        k = torch.cat([heads.k[..., : self.n_turning], heads.k[..., self.n_turning :] / by], -1)
        return replace(heads, q=q, k=k, v=heads.v / by)

    def tokens(self, heads: Heads, plain: Divisor) -> Tokens:
        """See the base class."""
        of_kv = self.kv.divisor(heads.latents[-1], plain)
        of_q = plain if self.q is None else self.q.divisor(heads.latents[0], plain)
        turning = torch.arange(heads.k.shape[-1], device=heads.k.device) < self.n_turning
        k = Part(heads.k * turning, plain), Part(heads.k * ~turning, of_kv)
        return Tokens((Part(heads.q, of_q),), k, Part(heads.v, of_kv))


def fit_latents(call: BlockCall, reader: FromLatents, norm: str, eps: float, own: SeenAttention) -> FromLatents | None:
    """The reader with the norms of latents, or None where they are neither LayerNorm nor RMSNorm, or have biases.

    Args:
        call: the block on a prompt.
        reader: of queries, keys and values.
        norm: the block's own norm.
        eps: what that adds to the mean square.
        own: what the reader shows there without them.
    """
    resid = many_vectors(call.resid_pre, norm, eps, own)
    shown = (*(LATENT_QUERY_PATHS[1:] if reader.latent_queries else ()), LATENT_PATHS[1])
    read = read_at(call, resid, (*reader.paths, *shown))
    latents = reader.heads(read, resid.shape[:1], resid.shape[1]).latents
    found = [fit_head_norm(one, read[path][:, None]) for one, path in zip(latents, shown, strict=True)]
    norms = [one for one in found if one is not None and not bool(one.bias.any())]
    return replace(reader, norms=tuple(norms)) if len(norms) == len(found) else None


def latent_norms(reader: FromLatents, biases: tuple[Tensor, ...]) -> LatentNorms | str:
    """The norms of a reader's latents, or why they do not do: `biases` are what linear maps add to `Heads.all`."""
    b_q, b_k, b_v, *of_latents = biases
    biased = [b_v, b_k[..., reader.n_turning :], *of_latents, *([b_q] if reader.latent_queries else [])]
    if any(bool(one.any()) for one in biased):
        return "latent vectors are biased before they are normed"
    q = reader.norms[0] if reader.latent_queries else None
    return LatentNorms(q, reader.norms[-1], reader.n_turning, (b_q, b_k, b_v))
