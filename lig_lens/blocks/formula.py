"""A block's attention as a formula, found on the model at hand and checked numerically.

The closed-form engine needs to know how queries, keys and values follow from the residual stream. No weight is
looked up by name for that: what a block does to its input is read at its hooks, on the prompt and on a probe.
Covered is

    x -> [norm] -> affine q, k, v -> [rotary] -> pattern = softmax(scale q.k + bias) -> z = pattern v

with LayerNorm, RMSNorm or no norm, any number of key-value heads, and any fixed bias (causal or sliding-window
masks, ALiBi). Norms on heads, capped scores, sinks and whatever else takes z away from that make `find_formula`
return the reason instead.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lig_lens.blocks.call import BlockCall, Hook

# Where the two generations show queries, keys and values before rotary, and the pattern.
QKV_PATHS = (
    ("attn.q.hook_out", "attn.k.hook_out", "attn.v.hook_out"),
    ("attn.hook_q", "attn.hook_k", "attn.hook_v"),
)
PATTERN_PATH = "attn.hook_pattern"
# How far the formula may be from the block, relative to the largest value.
_ALLOWED = 1e-4
# Prompts with fewer tokens than this are probed three times.
_FEW = 4
# Destinations whose scores show whether there is a bias.
_ROWS = 16
_ALL = slice(None)
# Scores that are this far below the row's best can be 0 in a pattern without a mask.
_UNDERFLOW = -80.0


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
class Formula:
    """Attention of one block on one prompt: `z = softmax(scale turn(q) . turn(k) + bias) v`.

    `norm` is `layer`, `rms` or `none`; `bias` is what is added to the scores (0 and -inf for masks, distances for
    ALiBi); `end` are the prompt's own tokens.
    """

    call: BlockCall = field(repr=False)
    paths: tuple[str, str, str]
    norm: str
    eps: float
    rotary: Rotary | None
    scale: float
    bias: Float[Tensor, "#head dst src"]
    b_q: Float[Tensor, "head 1 d_head"]
    b_k: Float[Tensor, "kv_head 1 d_head"]
    b_v: Float[Tensor, "kv_head 1 d_head"]
    end: Tokens

    def turn(self, vectors: Float[Tensor, "*batch pos d_head"]) -> Float[Tensor, "*batch pos d_head"]:
        """Rotary, where there is one."""
        return vectors if self.rotary is None else self.rotary.turn(vectors)

    def values(self) -> Float[Tensor, "pos head d_head"]:
        """Values of the prompt's tokens, for each query head."""
        sigma = _sigma(self.norm, self.eps, self.call.resid_pre)
        return _repeated(self.end.v / sigma + self.b_v, len(self.end.q)).transpose(0, 1)

    def tokens(self, resid: Float[Tensor, "pos d_model"]) -> Tokens:
        """What the block makes of other residual vectors, from one run of its attention."""
        seen = _Reading(self.call, resid[None]).seen(self.paths, self.end.q.shape[-1])
        sigma = _sigma(self.norm, self.eps, resid)
        # What is homogeneous in the residual is 0 where that is 0, rounding of the fitted bias or not.
        sigma = torch.where(_centred(self.norm, resid).any(-1, keepdim=True), sigma, 0.0)
        q, k, v = (
            (y[0] - bias) * sigma
            for y, bias in zip((seen.q, seen.k, seen.v), (self.b_q, self.b_k, self.b_v), strict=True)
        )
        return Tokens(_centred(self.norm, resid), q, k, v)


def find_formula(
    call: BlockCall, values: Mapping[str, Tensor], z: Float[Tensor, "pos head d_head"], probe: "Probe"
) -> Formula | str:
    """The formula of a block's attention, or the reason why there is none.

    The probe fits what is fixed, the prompt itself then checks it. Call it inside `prepared`.

    Args:
        call: the block on one prompt.
        values: what its hooks show on that prompt, without a batch axis.
        z: head outputs on that prompt.
        probe: of the same block; runs its attention unless a run has been read already.
    """
    paths = next((p for p in QKV_PATHS if set(p) <= set(call.modules)), None)
    if paths is None or PATTERN_PATH not in call.modules:
        return "no hooks on queries, keys, values and pattern"
    eps = probe.eps
    with torch.no_grad():
        try:
            own = _seen(values, paths, (), z.shape[-1])
            other = probe.seen(paths, z.shape[-1])
        except _UnreadableError as error:
            return str(error)
        if len(own.q) != z.shape[1] or len(own.pattern) != z.shape[1] or z.shape[1] % len(own.k):
            return f"{z.shape[1]} heads of z, but {len(own.q)} of q, {len(own.k)} of k, {len(own.pattern)} patterns"
        reason = "queries, keys or values are not affine in the normalised residual"
        for norm in ("none", "rms", "layer"):
            affine = _affine(probe, norm, eps, own, other)
            if affine is None:
                continue
            reason = "the pattern is not a softmax of scaled, possibly rotated q.k plus a fixed bias"
            (q, b_q), (k, b_k), (v, b_v) = affine
            end = Tokens(_centred(norm, call.resid_pre), q, k, v)
            for rotary in (*_rotaries(call, z.shape[-1]), None):
                fitted = _fit_scores(rotary, own, other)
                if fitted is None:
                    reason = "the pattern is 0 where it may be masked or too small for its dtype, which look alike"
                    continue
                scale, bias = fitted
                pattern = (scale * _products(rotary, own.q, own.k) + bias).softmax(-1)
                if _misses(pattern @ _repeated(own.v, len(pattern)), z.transpose(0, 1)) <= _ALLOWED:
                    return Formula(call, paths, norm, eps, rotary, scale, bias, b_q, b_k, b_v, end)
    return reason


class _Reading:
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

    def seen(self, paths: tuple[str, str, str], d_head: int) -> "_Seen":
        """Heads and pattern; runs attention if no run has been read yet."""
        if not self.values:
            # The end of attention, not of z: some bridges show their pattern only then.
            self.call.run(self.resid, self.hooks(), stop_at="attn")
        return _seen(self.values, paths, self.resid.shape[:1], d_head)


class Probe(_Reading):
    """What a block's attention does to mixtures of tokens that stand at opposite places of the prompt.

    One prompt of mixtures, or three where tokens are few. Every other mixture is so small that eps counts as much as
    the vector, which shows a wrong eps; small vectors also give small scores, and patterns without underflow.
    """

    def __init__(self, call: BlockCall, eps: float) -> None:
        """Lay out the mixtures.

        Args:
            call: the block on the prompt.
            eps: added to the mean square by the block's norms.
        """
        x, self.eps = call.resid_pre, eps
        shrink = (eps / (3 * x.square().mean(-1, keepdim=True) + eps)).sqrt()
        # The larger of two tokens decides how much both have to shrink.
        shrink = torch.minimum(shrink, shrink.flip(0))
        n_runs = 1 if len(x) >= _FEW else 3
        run, pos = torch.arange(n_runs, device=x.device), torch.arange(len(x), device=x.device)
        size = torch.where((run[:, None, None] + pos[:, None]) % 2 == 0, shrink, 1.0)
        own, other = torch.tensor([[0.7, -0.5, 0.2], [-0.4, 0.9, 0.6]]).to(x)[:, :n_runs, None, None]
        self.own, self.other = own * size, other * size
        self.prompt = x
        super().__init__(call, self.own * x + self.other * x.flip(0))


@dataclass(frozen=True)
class _Seen:
    """What the hooks show in one run, or in several."""

    q: Float[Tensor, "*run head pos d_head"]
    k: Float[Tensor, "*run kv_head pos d_head"]
    v: Float[Tensor, "*run kv_head pos d_head"]
    pattern: Float[Tensor, "*run head dst src"]


class _UnreadableError(Exception):
    """A hook does not show what its name says; becomes a reason, never reaches a user."""


def _seen(values: Mapping[str, Tensor], paths: tuple[str, str, str], runs: tuple[int, ...], d_head: int) -> _Seen:
    """Heads and pattern from hooks whose values start with the axes `runs`, then pos."""
    for path in (*paths, PATTERN_PATH):
        if path not in values:
            raise _UnreadableError(f"{path} does not fire")
    pattern, heads = values[PATTERN_PATH], []
    n_pos = pattern.shape[-1]
    for path in paths:
        value = values[path]
        if value.shape[: len(runs) + 1] != (*runs, n_pos):
            raise _UnreadableError(f"{path} has shape {list(value.shape)}, the pattern {list(pattern.shape)}")
        width = value.flatten(len(runs) + 1).shape[-1]
        if width % d_head:
            raise _UnreadableError(f"{path} does not show heads of {d_head} dimensions")
        heads.append(value.reshape(*runs, n_pos, width // d_head, d_head).transpose(-3, -2).contiguous())
    if pattern.shape != (*runs, heads[0].shape[-3], n_pos, n_pos) or heads[1].shape != heads[2].shape:
        raise _UnreadableError(f"{PATTERN_PATH} has shape {list(pattern.shape)} for {heads[0].shape[-3]} heads")
    q, k, v = heads
    return _Seen(q, k, v, pattern.to(q))


def _centred(norm: str, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    return resid - resid.mean(-1, keepdim=True) if norm == "layer" else resid


def _sigma(norm: str, eps: float, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
    """What the norm divides by."""
    if norm == "none":
        return torch.ones_like(resid[..., :1])
    return (_centred(norm, resid).square().mean(-1, keepdim=True) + eps).sqrt()


def _affine(probe: Probe, norm: str, eps: float, own: _Seen, other: _Seen) -> list[tuple[Tensor, Tensor]] | None:
    """Homogeneous part Y and bias b of q, k and v, if they are affine in the normalised residual.

    With `y = Y / sigma + b`, the probe's y follow from the prompt's but for (1 - sum of weights) b, which every
    token must give alike.
    """
    sigma, mixed = _sigma(norm, eps, probe.prompt), _sigma(norm, eps, probe.resid)
    weights = (probe.own * sigma / mixed)[:, None], (probe.other * sigma.flip(0) / mixed)[:, None]
    rest = 1 - weights[0] - weights[1]
    result = []
    for y, seen in ((own.q, other.q), (own.k, other.k), (own.v, other.v)):
        left = seen - weights[0] * y - weights[1] * y.flip(-2)
        # Least squares: tokens whose weights add up to 1 say nothing about b.
        bias = (rest * left).sum((0, -2)).unsqueeze(-2) / rest.square().sum()
        size = float(torch.maximum(y.abs(), seen.abs()).max())
        if float((left - rest * bias).abs().max()) > _ALLOWED * size:
            return None
        # Single precision whatever the dtype is: Hugging Face norms cast to it.
        if float(bias.abs().max()) <= 8 * torch.finfo(torch.float32).eps * size:
            bias = torch.zeros_like(bias)
        result.append(((y - bias) * sigma, bias))
    return result


def _rotaries(call: BlockCall, d_head: int) -> list[Rotary]:
    """Rotations that the block may use, from the tables that its call or its modules hold."""
    tables = []
    given = call.kwargs.get("position_embeddings")
    if isinstance(given, (tuple, list)) and len(given) == 2:
        tables.append((given[0], given[1]))
    buffers = {name.split(".")[-1]: b for name, b in call.block.attn.named_buffers()}  # type: ignore[union-attr]
    if {"rotary_cos", "rotary_sin"} <= set(buffers):
        tables.append((buffers["rotary_cos"], buffers["rotary_sin"]))
    if "embed_positions" in buffers:
        sin, cos = buffers["embed_positions"].chunk(2, -1)
        tables.append((torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)))
    n_pos, found = len(call.resid_pre), []
    for pair in tables:
        cos, sin = (table.reshape(-1, table.shape[-1])[:n_pos].detach().to(call.resid_pre) for table in pair)
        if len(cos) < n_pos or cos.shape != sin.shape or cos.shape[-1] > d_head:
            continue
        # Tables hold every angle twice: for neighbouring dimensions, or for two halves.
        twice = bool((cos[:, ::2] == cos[:, 1::2]).all())
        one = slice(None, None, 2) if twice else slice(cos.shape[-1] // 2)
        found += [Rotary(cos[:, one], sin[:, one], adjacent) for adjacent in (False, True)]
    return found


def _repeated(kv: Float[Tensor, "kv_head *rest"], n_heads: int) -> Float[Tensor, "head *rest"]:
    return kv.repeat_interleave(n_heads // len(kv), 0)


def _products(
    rotary: Rotary | None,
    q: Float[Tensor, "head pos d_head"],
    k: Float[Tensor, "kv_head pos d_head"],
    rows: Int[Tensor, "row"] | slice = _ALL,
) -> Float[Tensor, "head row src"]:
    q, k = (q, k) if rotary is None else (rotary.turn(q), rotary.turn(k))
    return q[:, rows] @ _repeated(k, len(q)).transpose(-1, -2)


def _fit_scores(rotary: Rotary | None, own: _Seen, other: _Seen) -> tuple[float, Tensor] | None:
    """Scale and bias of the scores, or None where the mask cannot be told.

    A few rows tell whether there is a bias beyond the mask. If not, they give the scale, and every row its mask.
    """
    n_pos = own.q.shape[-2]
    some = torch.linspace(0, n_pos - 1, min(n_pos, _ROWS), device=own.q.device).round().long()
    scale, bias = _fit_rows(rotary, own, other, some)
    visible = (own.pattern > 0) | (other.pattern[0] > 0)
    only_mask = bool(((bias == 0) | (bias == -torch.inf)).all())
    masked = _masked(rotary, scale, own, other, visible)
    if masked is None:
        return None
    if only_mask:
        bias = torch.zeros_like(own.pattern).masked_fill(masked, -torch.inf)
    elif bool((~visible & ~masked).any()):
        return None
    else:
        scale, bias = _fit_rows(rotary, own, other, _ALL)
    # A copy, since a view would keep all heads alive.
    return scale, bias[:1].clone() if bool((bias == bias[:1]).all()) else bias


def _masked(
    rotary: Rotary | None, scale: float, own: _Seen, other: _Seen, visible: Bool[Tensor, "head dst src"]
) -> Bool[Tensor, "head dst src"] | None:
    """What a mask hides, or None: a pattern that underflows is 0 too.

    It is a mask where the score would show in one of the runs. Of what no head shows, one head that would is enough.
    """
    hidden = ~visible
    in_all = hidden.all(0)
    first = _would_show(rotary, scale, own, other, visible, slice(1))[0]
    if bool((in_all & ~first).any()) or bool((hidden & ~in_all).any()):
        shows = _would_show(rotary, scale, own, other, visible, _ALL)
        if bool((in_all & ~shows.any(0)).any()):
            return None
        # What some heads show is masked in others only if they would show it.
        return hidden & (in_all | shows)
    return hidden


def _would_show(
    rotary: Rotary | None, scale: float, own: _Seen, other: _Seen, visible: Tensor, heads: slice
) -> Bool[Tensor, "head dst src"]:
    """Where the score is near enough to the best visible one, in one of the runs, to be seen in the pattern."""
    found = torch.zeros_like(visible[heads])
    for q, k in ((own.q, own.k), (other.q[0], other.k[0])):
        if heads != _ALL:
            q, k = q[heads], k[:1]
        scores = scale * _products(rotary, q, k)
        best = torch.where(visible[heads], scores, -torch.inf).amax(-1, keepdim=True)
        found |= scores - best > _UNDERFLOW
    return found


def _fit_rows(
    rotary: Rotary | None, own: _Seen, other: _Seen, rows: Int[Tensor, "row"] | slice
) -> tuple[float, Float[Tensor, "head row src"]]:
    """Scale and bias of the scores of these destinations.

    `log pattern = scale q.k + bias - (one number per row)`. Between two runs bias drops out, which leaves the scale
    to least squares; bias is then read where the pattern is larger, so that little underflows.
    """
    products, patterns = (
        torch.stack([_products(rotary, own.q, own.k, rows), _products(rotary, other.q[0], other.k[0], rows)]),
        torch.stack([own.pattern[:, rows], other.pattern[0][:, rows]]),
    )
    clear = (patterns > 1e-20).all(0)  # logarithms of what is about to underflow have few digits
    logs = patterns.log()

    def by_row(values: Tensor) -> Tensor:
        kept = torch.where(clear, values, 0.0)
        return torch.where(clear, kept - kept.sum(-1, keepdim=True) / clear.sum(-1, keepdim=True).clamp(min=1), 0.0)

    rise, run = (by_row(x[0] - x[1]).cpu().double() for x in (logs, products))
    d_head = own.q.shape[-1]
    size = float(run.square().sum())
    scale = float((rise * run).sum()) / size if size > 1e-8 else d_head**-0.5
    # Scales are 1 / sqrt(n) in practice, and then exactly so.
    for n in (d_head, round(scale**-2) if 1 / 32 < scale <= 1 else 0):
        if n and abs(scale * n**0.5 - 1) < 1e-4:
            scale = n**-0.5
            break
    visible = (patterns > 0).any(0)
    biases = logs - scale * products
    # One row's two versions differ by a number, which the visible entries that both know give.
    biases = biases - torch.where(clear, biases, -torch.inf).amax(-1, keepdim=True)
    bias = torch.where(patterns[1] >= patterns[0], biases[1], biases[0])
    bias = torch.where(visible, bias, -torch.inf)
    if float(torch.where(visible, bias, 0.0).abs().max()) < 1e-5:
        bias = torch.where(visible, 0.0, -torch.inf).to(bias)
    return scale, bias


def _misses(z: Float[Tensor, "head pos d_head"], wanted: Float[Tensor, "head pos d_head"]) -> float:
    """How far z is from what it should be, relative to each head's largest."""
    return float(((z - wanted).abs().amax((-2, -1)) / wanted.abs().amax((-2, -1)).clamp(min=1e-30)).max())
