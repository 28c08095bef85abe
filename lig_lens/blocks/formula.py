"""A block's attention as a formula: what of it belongs to the block, and what one prompt puts in.

Covered is

    x -> [norm] -> affine q, k, v, or latents that are normed and become these -> [norm of q, k] -> [rotary]
    pattern = softmax(cap(scale (q.k + products with vectors of relative positions)) + bias),  z = pattern v

with LayerNorm, RMSNorm or no norm, any number of key-value heads, and any fixed bias (causal or sliding-window masks,
ALiBi, relative positions that are numbers); norms of queries and keys may follow rotary, scores may be capped, and rows
of the pattern may lose to a sink. `formula_fit.py` finds it on the model at hand.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.call import BlockCall
from lig_lens.blocks.divisor import Divisor, Tokens, centred, sigma
from lig_lens.blocks.norms import Norms
from lig_lens.blocks.pairing import Pairing, per_query_head
from lig_lens.blocks.reading import PATTERN_PATH, AttentionReading, Heads, Reader, SeenAttention, UnreadableError
from lig_lens.blocks.relative import Relative, RelativeKind
from lig_lens.blocks.rotary import RotaryKind
from lig_lens.blocks.score import Score, ScoreBias

# How far the formula may be from the block, relative to the largest value.
ALLOWED = 1e-4
# An entry of a pattern that a mask does not hide is at least this large, or of no account.
_SHOWS = 1e-20


@dataclass(frozen=True)
class AttentionFormula:
    """Attention of one block: `z = softmax(cap(scale turn(q) . turn(k)) + bias) v`.

    `reader` tells where q, k and v are read; `norm` is `layer`, `rms` or `none`, and `scale_path` the hook that shows
    what it divides by, if one does. `norms` are those inside attention and have the biases b_q, b_k, b_v, which hold
    what norms' own biases give too. `positions` tells what turns queries and keys, or which products with vectors of
    relative positions are added.
    """

    reader: Reader
    norm: str
    eps: float
    scale_path: str | None
    positions: RotaryKind | RelativeKind | None
    score: Score
    bias: ScoreBias = field(repr=False)
    norms: Norms = field(repr=False)

    @property
    def b_q(self) -> Float[Tensor, "head 1 d_head"]:
        """What is added to queries."""
        return self.norms.biases[0]

    @property
    def b_k(self) -> Float[Tensor, "kv_head 1 d_head"]:
        """What is added to keys."""
        return self.norms.biases[1]

    @property
    def b_v(self) -> Float[Tensor, "kv_head 1 d_value"]:
        """What is added to values."""
        return self.norms.biases[2]

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return len(self.b_q)

    @property
    def n_kv_heads(self) -> int:
        """Number of key-value heads."""
        return len(self.b_k)

    @property
    def depth(self) -> int:
        """How many norms queries, keys or values pass one after the other."""
        return int(self.norm != "none") + self.norms.depth

    @property
    def reads(self) -> tuple[str, ...]:
        """Hooks that have to be read to check the formula on a prompt."""
        return (*self.reader.paths, PATTERN_PATH, *([] if self.scale_path is None else [self.scale_path]))

    def homogeneous(self, resid: Float[Tensor, "pos d_model"], heads: Heads) -> Tokens:
        """What the block made of residual vectors, before norms divide."""
        divided = sigma(self.norm, self.eps, resid)
        # What is homogeneous in the residual is 0 where that is 0, rounding of the fitted bias or not.
        moves = centred(self.norm, resid).any(-1, keepdim=True)
        q, k, v, *latents = (
            torch.where(moves, (y - b) * divided, 0.0) for y, b in zip(heads.all, self.norms.before, strict=True)
        )
        plain = Divisor.of_norm(self.norm, self.eps, centred(self.norm, resid))
        return self.norms.tokens(Heads(q, k, v, tuple(latents)), plain)

    def pairing(self, call: BlockCall) -> Pairing | None:
        """Products of queries and keys at the positions of a prompt, or None where the block does not show these."""
        if self.positions is None:
            return Pairing()
        positions = self.positions.on(call, self.b_q.shape[-1])
        return None if positions is None else Pairing(positions)

    def on(
        self, call: BlockCall, values: Mapping[str, Tensor], z: Float[Tensor, "pos head d_head"]
    ) -> "FormulaValues | None":
        """The formula with a prompt's values, or None where it does not give what the block does there.

        Args:
            call: the block on the prompt.
            values: what its hooks showed, without a batch axis.
            z: head outputs.
        """
        bias = self.bias.at(len(call.resid_pre), call.resid_pre)
        pairing = self.pairing(call)
        if bias is None or pairing is None:
            return None
        if self.scale_path is not None:
            shown = values.get(self.scale_path)
            divisor = sigma(self.norm, self.eps, call.resid_pre)
            if shown is None or shown.shape != divisor.shape or not bool(_close(shown, divisor)):
                return None
        try:
            seen = self.reader.seen(values, ())
        except UnreadableError:
            return None
        here = FormulaValues(self, call, pairing, bias, self.homogeneous(call.resid_pre, seen))
        return here if here.gives(seen, z) and here.is_affine(seen) else None


def _close(shown: Tensor, expected: Tensor) -> Tensor:
    return ((shown - expected).abs() <= ALLOWED * expected).all()


@dataclass(frozen=True)
class FormulaValues:
    """An attention formula with what one prompt puts in: what its positions do, and its tokens."""

    formula: AttentionFormula
    call: BlockCall = field(repr=False)
    pairing: Pairing = field(repr=False)
    bias: Float[Tensor, "#head dst src"] = field(repr=False)
    end: Tokens = field(repr=False)

    def turn(self, vectors: Float[Tensor, "*batch pos d_head"]) -> Float[Tensor, "*batch pos d_head"]:
        """Rotary, where there is one."""
        return vectors if self.pairing.rotary is None else self.pairing.rotary.turn(vectors)

    def turn_queries(self, q: Float[Tensor, "head pos d_head"]) -> Float[Tensor, "head pos d_head"]:
        """Rotary, scale, and the weights of norms that come after rotary: times turned keys, scores."""
        turned, score = self.turn(q), self.formula.score
        return score.scale * (turned if score.weight is None else turned * score.weight)

    @property
    def relative(self) -> Relative | None:
        """What relative positions add to products of `turn_queries` with keys."""
        relative = self.pairing.relative
        return None if relative is None else relative.beside(self.formula.score.scale)

    def values(self) -> Float[Tensor, "pos head d_head"]:
        """Values of the prompt's tokens, for each query head."""
        formula = self.formula
        return per_query_head(self.end.v.divided + formula.b_v, formula.n_heads).transpose(0, 1)

    def tokens(self, resid: Float[Tensor, "pos d_model"]) -> Tokens:
        """What the block makes of other residual vectors, from one run of its attention."""
        heads = AttentionReading(self.call, resid[None]).heads(self.formula.reader)
        q, k, v, *latents = (one[0] for one in heads.all)
        return self.formula.homogeneous(resid, Heads(q, k, v, tuple(latents)))

    def gives(self, seen: "SeenAttention", z: Float[Tensor, "pos head d_head"]) -> bool:
        """Whether the formula gives pattern and head outputs `z` from the queries, keys and values that were seen.

        Head outputs alone would not show a mask where little weight lies: what it hides has to be hidden, and nothing
        else that would show.
        """
        pattern, values = self.pattern(seen), self.formula.norms.normed(seen).v
        hidden = self.bias == -torch.inf
        if bool((hidden & (seen.pattern > 0)).any()) or bool(((seen.pattern == 0) & (pattern > _SHOWS)).any()):
            return False
        made, wanted = pattern @ per_query_head(values, len(pattern)), z.transpose(0, 1)
        missed = (made - wanted).abs().amax((-2, -1)) / wanted.abs().amax((-2, -1)).clamp(min=1e-30)
        return float(missed.max()) <= ALLOWED

    def pattern(self, heads: Heads) -> Float[Tensor, "head dst src"]:
        """What attention makes of queries and keys as the linear maps make them."""
        score, heads = self.formula.score, self.formula.norms.normed(heads)
        scaled = score.scale * self.pairing.products(heads.q, heads.k, weight=score.weight)
        return score.softmax(score.capped(scaled) + self.bias)

    def is_affine(self, seen: "SeenAttention") -> bool:
        """Whether queries, keys and values follow from other residual vectors as the formula says.

        The prompt itself cannot show it: its own were taken apart by the formula. So they are read once more, of
        mixtures of two tokens each, of which every other is small enough for eps and the biases to count.
        """
        formula, x = self.formula, self.call.resid_pre
        own, other = mixture(x, x.flip(0), formula.eps, 1)
        mixed = own[0] * x + other[0] * x.flip(0)
        try:
            again = AttentionReading(self.call, mixed[None]).heads(formula.reader)
        except UnreadableError:
            return False
        plain, divisor = sigma(formula.norm, formula.eps, x), sigma(formula.norm, formula.eps, mixed)
        weights = own[0] * plain / divisor, other[0] * plain.flip(0) / divisor
        for y, found, bias in zip(seen.all, again.all, formula.norms.before, strict=True):
            made = weights[0] * y + weights[1] * y.flip(-2) + (1 - weights[0] - weights[1]) * bias
            size = float(torch.maximum(y.abs(), found[0].abs()).max())
            if not float((found[0] - made).abs().max()) <= ALLOWED * size:
                return False
        return True


def mixture(
    x: Float[Tensor, "pos d_model"], partner: Float[Tensor, "pos d_model"], eps: float, n_runs: int
) -> tuple[Float[Tensor, "run pos 1"], Float[Tensor, "run pos 1"]]:
    """Weights of mixtures of a prompt's tokens with other vectors: of the own one and of the other.

    Every other mixture is so small that eps counts as much as the vector, which shows a wrong eps; small vectors also
    give small scores, and patterns without underflow.
    """
    # The larger of two decides how much both have to shrink.
    size = torch.maximum(*(vectors.square().mean(-1, keepdim=True) for vectors in (x, partner)))
    shrink = (eps / (3 * size + eps)).sqrt()
    run, pos = torch.arange(n_runs, device=x.device), torch.arange(len(x), device=x.device)
    size = torch.where((run[:, None, None] + pos[:, None]) % 2 == 0, shrink, 1.0)
    own, other = torch.tensor([[0.7, -0.5, 0.2], [-0.4, 0.9, 0.6]]).to(x)[:, :n_runs, None, None]
    return own * size, other * size
