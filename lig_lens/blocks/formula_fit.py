"""Finds a block's attention formula on the model at hand, and checks it numerically.

The closed form needs to know how queries, keys and values follow from the residual stream. No weight is looked up by
name for that: what a block does to its input is read at its hooks, on the prompt and on a probe. Norms on heads, capped
scores, sinks and whatever else takes z away from the formula make `find_formula` return the reason instead.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lig_lens.blocks.call import BlockCall
from lig_lens.blocks.formula import (
    ALLOWED,
    PATTERN_PATH,
    QKV_PATHS,
    ROTARY_KINDS,
    AttentionFormula,
    AttentionReading,
    FormulaValues,
    Rotary,
    ScoreBias,
    SeenAttention,
    Tokens,
    UnreadableError,
    centred,
    mixture,
    products,
    seen_attention,
    sigma,
)

# Why there is no formula, where another prompt may show one.
UNTOLD = "the pattern is 0 where it may be masked or too small for its dtype, which look alike"
# Prompts with fewer tokens than this are probed three times.
_FEW = 4
# Destinations whose scores show whether there is a bias.
_ROWS = 16
_ALL = slice(None)
# Scores that are this far below the row's best can be 0 in a pattern without a mask.
_UNDERFLOW = -80.0


class Probe(AttentionReading):
    """What a block's attention does to mixtures of its prompt's tokens: one prompt of them, or three of few tokens."""

    def __init__(self, call: BlockCall, eps: float) -> None:
        """Lay out the mixtures (see `mixture`); `eps` is what the block's norms add to the mean square."""
        x, self.eps = call.resid_pre, eps
        self.own, self.other = mixture(x, eps, 1 if len(x) >= _FEW else 3)
        self.prompt = x
        super().__init__(call, self.own * x + self.other * x.flip(0))


def find_formula(
    call: BlockCall, values: Mapping[str, Tensor], z: Float[Tensor, "pos head d_head"], probe: Probe
) -> FormulaValues | str:
    """The formula of a block's attention with the prompt's values, or the reason why there is none.

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
    eps, d_head = probe.eps, z.shape[-1]
    with torch.no_grad():
        try:
            own, other = seen_attention(values, paths, (), d_head), probe.seen(paths, d_head)
        except UnreadableError as error:
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
            end, scale_path = Tokens(centred(norm, call.resid_pre), q, k, v), _scale_path(call, values, norm, eps)
            for kind in (*ROTARY_KINDS, None):
                rotary = None if kind is None else kind.on(call, d_head)
                if kind is not None and rotary is None:
                    continue
                fitted = _fit_scores(rotary, own, other)
                if fitted is None:
                    reason = UNTOLD
                    continue
                scale, bias = fitted
                formula = AttentionFormula(paths, norm, eps, scale_path, kind, scale, ScoreBias.of(bias), b_q, b_k, b_v)
                found = FormulaValues(formula, call, rotary, bias, end)
                if found.gives(own, z) and _holds_on_probe(found, other):
                    return found
    return reason


def _holds_on_probe(found: FormulaValues, other: SeenAttention) -> bool:
    """Whether the formula gives the probe's patterns too.

    Of a few tokens a bias can make any scores fit the prompt's own pattern, capped ones say; not two patterns at once.
    """
    scale = found.formula.scale
    for q, k, pattern in zip(other.q, other.k, other.pattern, strict=True):
        made = (scale * products(found.rotary, q, k) + found.bias).softmax(-1)
        if not float((made - pattern).abs().max()) <= ALLOWED:
            return False
    return True


def _affine(
    probe: Probe, norm: str, eps: float, own: SeenAttention, other: SeenAttention
) -> list[tuple[Tensor, Tensor]] | None:
    """Homogeneous part Y and bias b of q, k and v, if they are affine in the normalised residual.

    With `y = Y / sigma + b`, the probe's y follow from the prompt's but for (1 - sum of weights) b, which every
    token must give alike.
    """
    plain, mixed = sigma(norm, eps, probe.prompt), sigma(norm, eps, probe.resid)
    weights = (probe.own * plain / mixed)[:, None], (probe.other * plain.flip(0) / mixed)[:, None]
    rest = 1 - weights[0] - weights[1]
    result = []
    for y, seen in ((own.q, other.q), (own.k, other.k), (own.v, other.v)):
        left = seen - weights[0] * y - weights[1] * y.flip(-2)
        # Least squares: tokens whose weights add up to 1 say nothing about b.
        bias = (rest * left).sum((0, -2)).unsqueeze(-2) / rest.square().sum()
        size = float(torch.maximum(y.abs(), seen.abs()).max())
        if float((left - rest * bias).abs().max()) > ALLOWED * size:
            return None
        # Single precision whatever the dtype is: Hugging Face norms cast to it.
        if float(bias.abs().max()) <= 8 * torch.finfo(torch.float32).eps * size:
            bias = torch.zeros_like(bias)
        result.append(((y - bias) * plain, bias))
    return result


def _scale_path(call: BlockCall, values: Mapping[str, Tensor], norm: str, eps: float) -> str | None:
    """A hook outside attention that shows what the norm before it divides by, if there is one."""
    if norm == "none":
        return None
    divisor = sigma(norm, eps, call.resid_pre)
    for path, value in values.items():
        if path.endswith(".hook_scale") and not path.startswith("attn.") and value.shape == divisor.shape:
            if bool(((value - divisor).abs() <= 0.1 * ALLOWED * divisor).all()):
                return path
    return None


def _fit_scores(rotary: Rotary | None, own: SeenAttention, other: SeenAttention) -> tuple[float, Tensor] | None:
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
    rotary: Rotary | None, scale: float, own: SeenAttention, other: SeenAttention, visible: Bool[Tensor, "head dst src"]
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
    rotary: Rotary | None, scale: float, own: SeenAttention, other: SeenAttention, visible: Tensor, heads: slice
) -> Bool[Tensor, "head dst src"]:
    """Where the score is near enough to the best visible one, in one of the runs, to be seen in the pattern."""
    found = torch.zeros_like(visible[heads])
    for q, k in ((own.q, own.k), (other.q[0], other.k[0])):
        if heads != _ALL:
            q, k = q[heads], k[:1]
        scores = scale * products(rotary, q, k)
        best = torch.where(visible[heads], scores, -torch.inf).amax(-1, keepdim=True)
        found |= scores - best > _UNDERFLOW
    return found


def _fit_rows(
    rotary: Rotary | None, own: SeenAttention, other: SeenAttention, rows: Int[Tensor, "row"] | slice
) -> tuple[float, Float[Tensor, "head row src"]]:
    """Scale and bias of the scores of these destinations.

    `log pattern = scale q.k + bias - (one number per row)`. Between two runs bias drops out, which leaves the scale
    to least squares; bias is then read where the pattern is larger, so that little underflows.
    """
    dots, patterns = (
        torch.stack([products(rotary, own.q, own.k, rows), products(rotary, other.q[0], other.k[0], rows)]),
        torch.stack([own.pattern[:, rows], other.pattern[0][:, rows]]),
    )
    clear = (patterns > 1e-20).all(0)  # logarithms of what is about to underflow have few digits
    logs = patterns.log()

    def by_row(values: Tensor) -> Tensor:
        kept = torch.where(clear, values, 0.0)
        return torch.where(clear, kept - kept.sum(-1, keepdim=True) / clear.sum(-1, keepdim=True).clamp(min=1), 0.0)

    rise, run = (by_row(x[0] - x[1]).cpu().double() for x in (logs, dots))
    d_head = own.q.shape[-1]
    size = float(run.square().sum())
    scale = float((rise * run).sum()) / size if size > 1e-8 else d_head**-0.5
    # Scales are 1 / sqrt(n) in practice, and then exactly so.
    for n in (d_head, round(scale**-2) if 1 / 32 < scale <= 1 else 0):
        if n and abs(scale * n**0.5 - 1) < 1e-4:
            scale = n**-0.5
            break
    visible = (patterns > 0).any(0)
    biases = logs - scale * dots
    # One row's two versions differ by a number, which the visible entries that both know give.
    biases = biases - torch.where(clear, biases, -torch.inf).amax(-1, keepdim=True)
    bias = torch.where(patterns[1] >= patterns[0], biases[1], biases[0])
    bias = torch.where(visible, bias, -torch.inf)
    if float(torch.where(visible, bias, 0.0).abs().max()) < 1e-5:
        bias = torch.where(visible, 0.0, -torch.inf).to(bias)
    return scale, bias
