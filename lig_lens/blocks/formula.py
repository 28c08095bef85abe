"""A block's attention as a formula: what of it belongs to the block, and what one prompt puts in.

Covered is

    x -> [norm] -> affine q, k, v -> [norm of q, k] -> [rotary]
    pattern = softmax(cap(scale q.k) + bias),  z = pattern v

with LayerNorm, RMSNorm or no norm, any number of key-value heads, and any fixed bias (causal or sliding-window masks,
ALiBi, relative positions); norms of queries and keys may follow rotary, scores may be capped, and rows of the pattern
may lose to a sink. `formula_fit.py` finds it on the model at hand.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.call import BlockCall
from lig_lens.blocks.divisor import Divisor
from lig_lens.blocks.head_norm import HeadNorm
from lig_lens.blocks.rotary import Rotary, RotaryKind
from lig_lens.blocks.score import Score, ScoreBias
from lig_lens.models.running import Hook, Stop

# Where the two generations show queries, keys and values before rotary, and the pattern.
QKV_PATHS = (
    ("attn.q.hook_out", "attn.k.hook_out", "attn.v.hook_out"),
    ("attn.hook_q", "attn.hook_k", "attn.hook_v"),
)
PATTERN_PATH = "attn.hook_pattern"
# Whichever of them a block has show its messages, pattern times values.
MESSAGE_PATHS = (PATTERN_PATH, *(paths[2] for paths in QKV_PATHS))
# How far the formula may be from the block, relative to the largest value.
ALLOWED = 1e-4
_ALL = slice(None)
# An entry of a pattern that a mask does not hide is at least this large, or of no account.
_SHOWS = 1e-20


def per_query_head(kv: Float[Tensor, "*batch kv_head rest dim"], n_heads: int) -> Float[Tensor, "*batch head rest dim"]:
    """What key-value heads have, once for each of the query heads that share them."""
    return kv.repeat_interleave(n_heads // kv.shape[-3], -3)


def centred(norm: str, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """The vectors whose mean square the norm takes."""
    return resid - resid.mean(-1, keepdim=True) if norm == "layer" else resid


def sigma(norm: str, eps: float, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
    """What the norm divides by."""
    if norm == "none":
        return torch.ones_like(resid[..., :1])
    return (centred(norm, resid).square().mean(-1, keepdim=True) + eps).sqrt()


@dataclass(frozen=True)
class Tokens:
    """Residual vectors and what attention's linear maps make of them before norms divide.

    `q`, `k` and `v` are homogeneous in the residual: a query is `q / sigma + b_q`, with sigma what `of_q` says (1
    without a norm). Without norms of queries and keys, the three divisors are one object.
    """

    q: Float[Tensor, "head pos d_head"]
    k: Float[Tensor, "kv_head pos d_head"]
    v: Float[Tensor, "kv_head pos d_head"]
    of_q: Divisor
    of_k: Divisor
    of_v: Divisor


@dataclass(frozen=True)
class AttentionFormula:
    """Attention of one block: `z = softmax(cap(scale turn(q) . turn(k)) + bias) v`.

    `paths` are the hooks of q, k and v; `norm` is `layer`, `rms` or `none`, and `scale_path` the hook that shows what
    it divides by, if one does; the biases b_q, b_k, b_v hold what norms' own biases give too. Where queries or keys
    have a norm (`q_norm`, `k_norm`), what enters it is homogeneous in the residual, and the bias is that norm's.
    """

    paths: tuple[str, str, str]
    norm: str
    eps: float
    scale_path: str | None
    rotary: RotaryKind | None
    score: Score
    bias: ScoreBias = field(repr=False)
    b_q: Float[Tensor, "head 1 d_head"] = field(repr=False)
    b_k: Float[Tensor, "kv_head 1 d_head"] = field(repr=False)
    b_v: Float[Tensor, "kv_head 1 d_head"] = field(repr=False)
    q_norm: HeadNorm | None = None
    k_norm: HeadNorm | None = None

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return len(self.b_q)

    @property
    def n_kv_heads(self) -> int:
        """Number of key-value heads."""
        return len(self.b_k)

    @property
    def d_head(self) -> int:
        """Dimensions of a head."""
        return self.b_q.shape[-1]

    @property
    def depth(self) -> int:
        """How many norms queries or keys pass one after the other."""
        return int(self.norm != "none") + int(self.q_norm is not None or self.k_norm is not None)

    @property
    def reads(self) -> tuple[str, ...]:
        """Hooks that have to be read to check the formula on a prompt."""
        return (*self.paths, PATTERN_PATH, *([] if self.scale_path is None else [self.scale_path]))

    def homogeneous(self, resid: Float[Tensor, "pos d_model"], vectors: tuple[Tensor, Tensor, Tensor]) -> Tokens:
        """What the block made of residual vectors, before norms divide; `vectors` are queries, keys, values."""
        divided = sigma(self.norm, self.eps, resid)
        # What is homogeneous in the residual is 0 where that is 0, rounding of the fitted bias or not.
        moves = centred(self.norm, resid).any(-1, keepdim=True)
        q, k, v = (torch.where(moves, (y - b) * divided, 0.0) for y, b in zip(vectors, self.affine_biases, strict=True))
        plain = of_q = of_k = Divisor.of_norm(self.norm, self.eps, centred(self.norm, resid))
        if self.q_norm is not None:
            q, of_q = self.q_norm.homogeneous(q), self.q_norm.divisor(q, plain)
        if self.k_norm is not None:
            k, of_k = self.k_norm.homogeneous(k), self.k_norm.divisor(k, plain)
        return Tokens(q, k, v, of_q, of_k, plain)

    @property
    def affine_biases(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the linear maps of queries, keys and values add to what the block's norm divides."""
        b_q = self.b_q if self.q_norm is None else torch.zeros_like(self.b_q)
        b_k = self.b_k if self.k_norm is None else torch.zeros_like(self.b_k)
        return b_q, b_k, self.b_v

    def products(
        self, rotary: Rotary | None, q: Float[Tensor, "head pos d_head"], k: Float[Tensor, "kv_head pos d_head"]
    ) -> Float[Tensor, "head dst src"]:
        """`q.k` of queries and keys as the linear maps make them, normed and turned."""
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        return products(rotary, q, k, weight=self.score.weight)

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
        rotary = None if self.rotary is None else self.rotary.on(call, self.d_head)
        if bias is None or (rotary is None) != (self.rotary is None):
            return None
        if self.scale_path is not None:
            shown = values.get(self.scale_path)
            divisor = sigma(self.norm, self.eps, call.resid_pre)
            if shown is None or shown.shape != divisor.shape or not bool(_close(shown, divisor)):
                return None
        try:
            seen = seen_attention(values, self.paths, (), self.d_head)
        except UnreadableError:
            return None
        here = FormulaValues(self, call, rotary, bias, self.homogeneous(call.resid_pre, (seen.q, seen.k, seen.v)))
        return here if here.gives(seen, z) and here.is_affine(seen) else None


def _close(shown: Tensor, expected: Tensor) -> Tensor:
    return ((shown - expected).abs() <= ALLOWED * expected).all()


@dataclass(frozen=True)
class FormulaValues:
    """An attention formula with what one prompt puts in: rotations and bias of its positions, and its tokens."""

    formula: AttentionFormula
    call: BlockCall = field(repr=False)
    rotary: Rotary | None = field(repr=False)
    bias: Float[Tensor, "#head dst src"] = field(repr=False)
    end: Tokens = field(repr=False)

    def turn(self, vectors: Float[Tensor, "*batch pos d_head"]) -> Float[Tensor, "*batch pos d_head"]:
        """Rotary, where there is one."""
        return vectors if self.rotary is None else self.rotary.turn(vectors)

    def turn_queries(self, q: Float[Tensor, "head pos d_head"]) -> Float[Tensor, "head pos d_head"]:
        """Rotary, scale, and the weights of norms that come after rotary: times turned keys, scores."""
        turned, score = self.turn(q), self.formula.score
        return score.scale * (turned if score.weight is None else turned * score.weight)

    def values(self) -> Float[Tensor, "pos head d_head"]:
        """Values of the prompt's tokens, for each query head."""
        formula = self.formula
        divisor = sigma(formula.norm, formula.eps, self.call.resid_pre)
        return per_query_head(self.end.v / divisor + formula.b_v, formula.n_heads).transpose(0, 1)

    def tokens(self, resid: Float[Tensor, "pos d_model"]) -> Tokens:
        """What the block makes of other residual vectors, from one run of its attention."""
        formula = self.formula
        q, k, v = AttentionReading(self.call, resid[None]).vectors(formula.paths, formula.d_head)
        return formula.homogeneous(resid, (q[0], k[0], v[0]))

    def gives(self, seen: "SeenAttention", z: Float[Tensor, "pos head d_head"]) -> bool:
        """Whether the formula gives pattern and head outputs `z` from the queries, keys and values that were seen.

        Head outputs alone would not show a mask where little weight lies: what it hides has to be hidden, and nothing
        else that would show.
        """
        pattern = self.pattern(seen.q, seen.k)
        hidden = self.bias == -torch.inf
        if bool((hidden & (seen.pattern > 0)).any()) or bool(((seen.pattern == 0) & (pattern > _SHOWS)).any()):
            return False
        made, wanted = pattern @ per_query_head(seen.v, len(pattern)), z.transpose(0, 1)
        missed = (made - wanted).abs().amax((-2, -1)) / wanted.abs().amax((-2, -1)).clamp(min=1e-30)
        return float(missed.max()) <= ALLOWED

    def pattern(
        self, q: Float[Tensor, "head pos d_head"], k: Float[Tensor, "kv_head pos d_head"]
    ) -> Float[Tensor, "head dst src"]:
        """What attention makes of queries and keys as the linear maps make them."""
        score = self.formula.score
        scaled = score.scale * self.formula.products(self.rotary, q, k)
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
            again = AttentionReading(self.call, mixed[None]).vectors(formula.paths, formula.d_head)
        except UnreadableError:
            return False
        plain, divisor = sigma(formula.norm, formula.eps, x), sigma(formula.norm, formula.eps, mixed)
        weights = own[0] * plain / divisor, other[0] * plain.flip(0) / divisor
        for y, found, bias in zip((seen.q, seen.k, seen.v), again, formula.affine_biases, strict=True):
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
class SeenAttention:
    """What the hooks of attention show in one run, or in several."""

    q: Float[Tensor, "*run head pos d_head"]
    k: Float[Tensor, "*run kv_head pos d_head"]
    v: Float[Tensor, "*run kv_head pos d_head"]
    pattern: Float[Tensor, "*run head dst src"]

    def runs(self, some: slice) -> "SeenAttention":
        """Some of several runs."""
        return SeenAttention(self.q[some], self.k[some], self.v[some], self.pattern[some])


class UnreadableError(Exception):
    """A hook does not show what its name says; becomes a reason, never reaches a user."""


def seen_attention(
    values: Mapping[str, Tensor], paths: tuple[str, str, str], runs: tuple[int, ...], d_head: int
) -> SeenAttention:
    """Heads and pattern from hooks whose values start with the axes `runs`, then pos.

    Raises:
        UnreadableError: they are not there, or have other shapes.
    """
    if PATTERN_PATH not in values:
        raise UnreadableError(f"{PATTERN_PATH} does not fire")
    pattern = values[PATTERN_PATH]
    q, k, v = _heads(values, paths, runs, d_head, pattern.shape[-1])
    n_pos = q.shape[-2]
    if pattern.shape != (*runs, q.shape[-3], n_pos, n_pos):
        raise UnreadableError(f"{PATTERN_PATH} has shape {list(pattern.shape)} for {q.shape[-3]} heads")
    return SeenAttention(q, k, v, pattern.to(q))


def _heads(
    values: Mapping[str, Tensor], paths: tuple[str, str, str], runs: tuple[int, ...], d_head: int, n_pos: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [*runs head pos d_head] each."""
    heads = []
    for path in paths:
        if path not in values:
            raise UnreadableError(f"{path} does not fire")
        value = values[path]
        if value.shape[: len(runs) + 1] != (*runs, n_pos):
            raise UnreadableError(f"{path} has shape {list(value.shape)}, the pattern is of {n_pos} positions")
        width = value.flatten(len(runs) + 1).shape[-1]
        if width % d_head:
            raise UnreadableError(f"{path} does not show heads of {d_head} dimensions")
        heads.append(value.reshape(*runs, n_pos, width // d_head, d_head).transpose(-3, -2).contiguous())
    q, k, v = heads
    if k.shape != v.shape:
        raise UnreadableError(f"{paths[1]} shows {k.shape[-3]} heads, {paths[2]} {v.shape[-3]}")
    return q, k, v


class AttentionReading:
    """One run of a block on other residual vectors, in which its attention is read."""

    def __init__(self, call: BlockCall, resid: Float[Tensor, "run pos d_model"]) -> None:
        self.call, self.resid = call, resid
        self.values: dict[str, Tensor] = {}

    def hooks(self) -> dict[str, Hook]:
        """Hooks that read attention in a run of the block on `resid`."""
        paths = {path for paths in QKV_PATHS for path in paths} | {PATTERN_PATH}
        return {path: functools.partial(self._read, path) for path in paths if path in self.call.modules}

    def _read(self, path: str, tensor: Tensor) -> None:
        self.values.setdefault(path, tensor.detach().clone())

    def seen(self, paths: tuple[str, str, str], d_head: int) -> SeenAttention:
        """Heads and pattern of all runs; runs attention if no run has been read yet."""
        if not self.values:
            # The end of attention, not of z: some bridges show their pattern only then.
            self.call.read(self.resid, self.hooks(), stop_at="attn")
        return seen_attention(self.values, paths, self.resid.shape[:1], d_head)

    def vectors(self, paths: tuple[str, str, str], d_head: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all runs, [run head pos d_head]; the block runs no further than to the last."""

        def read(path: str, tensor: Tensor) -> None:
            self._read(path, tensor)
            if set(paths) <= set(self.values):
                raise Stop

        self.call.read(self.resid, {path: functools.partial(read, path) for path in paths}, stop_at="attn")
        return _heads(self.values, paths, self.resid.shape[:1], d_head, self.resid.shape[1])
