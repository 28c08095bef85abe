"""A block's attention as a formula: what of it belongs to the block, and what one prompt puts in.

Covered is

    x -> [norm] -> affine q, k, v -> [rotary] -> pattern = softmax(scale q.k + bias) -> z = pattern v

with LayerNorm, RMSNorm or no norm, any number of key-value heads, and any fixed bias (causal or sliding-window masks,
ALiBi). `formula_fit.py` finds it on the model at hand.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.call import BlockCall
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
    """Where a block's tables for rotary are, and which dimensions make a pair."""

    source: str
    adjacent: bool

    def on(self, call: BlockCall, d_head: int) -> Rotary | None:
        """The rotation of the prompt's positions, or None where the tables are not there or do not fit."""
        pair = _TABLES[self.source](call)
        if pair is None:
            return None
        n_pos = len(call.resid_pre)
        cos, sin = (table.reshape(-1, table.shape[-1])[:n_pos].detach().to(call.resid_pre) for table in pair)
        if len(cos) < n_pos or cos.shape != sin.shape or cos.shape[-1] > d_head:
            return None
        # Tables hold every angle twice: for neighbouring dimensions, or for two halves.
        twice = bool((cos[:, ::2] == cos[:, 1::2]).all())
        one = slice(None, None, 2) if twice else slice(cos.shape[-1] // 2)
        return Rotary(cos[:, one], sin[:, one], self.adjacent)


def _given(call: BlockCall) -> tuple[Tensor, Tensor] | None:
    """Tables that the model hands to the block."""
    given = call.kwargs.get("position_embeddings")
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


_TABLES = {"position_embeddings": _given, "rotary_cos": _cos_and_sin, "embed_positions": _embed_positions}
ROTARY_KINDS = tuple(RotaryKind(source, adjacent) for source in _TABLES for adjacent in (False, True))


@dataclass(frozen=True)
class ScoreBias:
    """What is added to the scores: 0 and -inf for masks, distances for ALiBi. One for all heads, or one each.

    Attributes:
        known: positions of the prompt that it was read on.
        window: of a plain mask, how many sources the last position sees, 0 where all see all; None of other biases.
        table: of other biases, what was read; of fewer positions the bias is its corner.
    """

    known: int
    window: int | None
    table: Float[Tensor, "#head dst src"] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, table: Float[Tensor, "#head dst src"]) -> "ScoreBias":
        """What a table of biases is; plain masks are kept without it."""
        n_pos, first = table.shape[-1], table[0]
        window = 0 if not bool(first.any()) else int((first[-1] == 0).sum())
        plain = len(table) == 1 and n_pos > 1 and torch.equal(first, _mask(n_pos, window, n_pos, first))
        return cls(n_pos, window) if plain else cls(n_pos, None, table)

    def at(self, n_pos: int, like: Tensor) -> Float[Tensor, "#head dst src"] | None:
        """The bias for `n_pos` positions, in the dtype of `like`, or None where it is not known."""
        if self.window is not None:
            return _mask(n_pos, self.window, self.known, like)[None]
        return None if self.table is None or n_pos > self.known else self.table[:, :n_pos, :n_pos]


def _mask(n_pos: int, window: int, known: int, like: Tensor) -> Float[Tensor, "dst src"]:
    """A causal mask of a width; a window as long as what is `known` may be longer, and 0 is no mask."""
    mask = torch.zeros(n_pos, n_pos, dtype=like.dtype, device=like.device)
    if window == 0:
        return mask
    place = torch.arange(n_pos, device=like.device)
    back = place[:, None] - place
    hidden = (back < 0) if window == known else (back < 0) | (back >= window)
    return mask.masked_fill(hidden, -torch.inf)


@dataclass(frozen=True)
class Tokens:
    """Residual vectors and what attention's linear maps make of them before the norm divides.

    `q`, `k` and `v` are homogeneous in the residual: a query is `q / sigma + b_q`, with sigma the norm's denominator
    (1 without a norm). `centred` are the vectors whose mean square is sigma^2 - eps.
    """

    centred: Float[Tensor, "pos d_model"]
    q: Float[Tensor, "head pos d_head"]
    k: Float[Tensor, "kv_head pos d_head"]
    v: Float[Tensor, "kv_head pos d_head"]


@dataclass(frozen=True)
class AttentionFormula:
    """Attention of one block: `z = softmax(scale turn(q) . turn(k) + bias) v`.

    `paths` are the hooks of q, k and v; `norm` is `layer`, `rms` or `none`, and `scale_path` the hook that shows what
    it divides by, if one does; the biases b_q, b_k, b_v hold what the norm's own bias gives too.
    """

    paths: tuple[str, str, str]
    norm: str
    eps: float
    scale_path: str | None
    rotary: RotaryKind | None
    scale: float
    bias: ScoreBias = field(repr=False)
    b_q: Float[Tensor, "head 1 d_head"] = field(repr=False)
    b_k: Float[Tensor, "kv_head 1 d_head"] = field(repr=False)
    b_v: Float[Tensor, "kv_head 1 d_head"] = field(repr=False)

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
    def reads(self) -> tuple[str, ...]:
        """Hooks that have to be read to check the formula on a prompt."""
        return (*self.paths, PATTERN_PATH, *([] if self.scale_path is None else [self.scale_path]))

    def homogeneous(self, resid: Float[Tensor, "pos d_model"], vectors: tuple[Tensor, Tensor, Tensor]) -> Tokens:
        """What the block made of residual vectors, before its norm divides; `vectors` are queries, keys, values."""
        divisor = sigma(self.norm, self.eps, resid)
        q, k, v = ((y - b) * divisor for y, b in zip(vectors, (self.b_q, self.b_k, self.b_v), strict=True))
        return Tokens(centred(self.norm, resid), q, k, v)

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

    def values(self) -> Float[Tensor, "pos head d_head"]:
        """Values of the prompt's tokens, for each query head."""
        formula = self.formula
        divisor = sigma(formula.norm, formula.eps, self.call.resid_pre)
        return per_query_head(self.end.v / divisor + formula.b_v, formula.n_heads).transpose(0, 1)

    def tokens(self, resid: Float[Tensor, "pos d_model"]) -> Tokens:
        """What the block makes of other residual vectors, from one run of its attention."""
        formula = self.formula
        q, k, v = AttentionReading(self.call, resid[None]).vectors(formula.paths, formula.d_head)
        made = formula.homogeneous(resid, (q[0], k[0], v[0]))
        # What is homogeneous in the residual is 0 where that is 0, rounding of the fitted bias or not.
        moves = made.centred.any(-1, keepdim=True)
        q, k, v = (torch.where(moves, y, 0.0) for y in (made.q, made.k, made.v))
        return Tokens(made.centred, q, k, v)

    def gives(self, seen: "SeenAttention", z: Float[Tensor, "pos head d_head"]) -> bool:
        """Whether the formula gives pattern and head outputs `z` from the queries, keys and values that were seen.

        Head outputs alone would not show a mask where little weight lies: what it hides has to be hidden, and nothing
        else that would show.
        """
        pattern = (self.formula.scale * products(self.rotary, seen.q, seen.k) + self.bias).softmax(-1)
        hidden = self.bias == -torch.inf
        if bool((hidden & (seen.pattern > 0)).any()) or bool(((seen.pattern == 0) & (pattern > _SHOWS)).any()):
            return False
        made, wanted = pattern @ per_query_head(seen.v, len(pattern)), z.transpose(0, 1)
        missed = (made - wanted).abs().amax((-2, -1)) / wanted.abs().amax((-2, -1)).clamp(min=1e-30)
        return float(missed.max()) <= ALLOWED

    def is_affine(self, seen: "SeenAttention") -> bool:
        """Whether queries, keys and values follow from other residual vectors as the formula says.

        The prompt itself cannot show it: its own were taken apart by the formula. So they are read once more, of
        mixtures of two tokens each, of which every other is small enough for eps and the biases to count.
        """
        formula, x = self.formula, self.call.resid_pre
        own, other = mixture(x, formula.eps, 1)
        mixed = own[0] * x + other[0] * x.flip(0)
        try:
            again = AttentionReading(self.call, mixed[None]).vectors(formula.paths, formula.d_head)
        except UnreadableError:
            return False
        plain, divisor = sigma(formula.norm, formula.eps, x), sigma(formula.norm, formula.eps, mixed)
        weights = own[0] * plain / divisor, other[0] * plain.flip(0) / divisor
        biases = (formula.b_q, formula.b_k, formula.b_v)
        for y, found, bias in zip((seen.q, seen.k, seen.v), again, biases, strict=True):
            made = weights[0] * y + weights[1] * y.flip(-2) + (1 - weights[0] - weights[1]) * bias
            size = float(torch.maximum(y.abs(), found[0].abs()).max())
            if not float((found[0] - made).abs().max()) <= ALLOWED * size:
                return False
        return True


def mixture(
    x: Float[Tensor, "pos d_model"], eps: float, n_runs: int
) -> tuple[Float[Tensor, "run pos 1"], Float[Tensor, "run pos 1"]]:
    """Weights of mixtures of tokens that stand at opposite places of a prompt: of the own one and of the other.

    Every other mixture is so small that eps counts as much as the vector, which shows a wrong eps; small vectors also
    give small scores, and patterns without underflow.
    """
    shrink = (eps / (3 * x.square().mean(-1, keepdim=True) + eps)).sqrt()
    # The larger of two tokens decides how much both have to shrink.
    shrink = torch.minimum(shrink, shrink.flip(0))
    run, pos = torch.arange(n_runs, device=x.device), torch.arange(len(x), device=x.device)
    size = torch.where((run[:, None, None] + pos[:, None]) % 2 == 0, shrink, 1.0)
    own, other = torch.tensor([[0.7, -0.5, 0.2], [-0.4, 0.9, 0.6]]).to(x)[:, :n_runs, None, None]
    return own * size, other * size


def products(
    rotary: Rotary | None,
    q: Float[Tensor, "head pos d_head"],
    k: Float[Tensor, "kv_head pos d_head"],
    rows: Int[Tensor, "row"] | slice = _ALL,
) -> Float[Tensor, "head row src"]:
    """`q.k` of the queries `rows` with every source, both turned."""
    q, k = (q, k) if rotary is None else (rotary.turn(q), rotary.turn(k))
    return q[:, rows] @ per_query_head(k, len(q)).transpose(-1, -2)


@dataclass(frozen=True)
class SeenAttention:
    """What the hooks of attention show in one run, or in several."""

    q: Float[Tensor, "*run head pos d_head"]
    k: Float[Tensor, "*run kv_head pos d_head"]
    v: Float[Tensor, "*run kv_head pos d_head"]
    pattern: Float[Tensor, "*run head dst src"]


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
