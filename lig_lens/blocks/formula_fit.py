"""Finds a block's attention formula on the model at hand, and checks it numerically.

The closed form needs to know how queries, keys and values follow from the residual stream. What a block does to its
input is read at its hooks, on the prompt and on a probe; weights are looked up by name for relative positions alone
(`relative.py`), and the pattern decides about them. Whatever takes z away from the formula makes `find_formula` return
the reason instead.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.call import BlockCall
from lig_lens.blocks.divisor import sigma
from lig_lens.blocks.formula import ALLOWED, AttentionFormula, FormulaValues, mixture
from lig_lens.blocks.head_norms import find_head_norms, hidden_norms, read_head_norms
from lig_lens.blocks.latent import fit_latents, latent_norms
from lig_lens.blocks.norms import Norms, near_zero
from lig_lens.blocks.pairing import Pairing
from lig_lens.blocks.reading import (
    AttentionReading,
    FromLatents,
    Reader,
    SeenAttention,
    UnreadableError,
    reader_of,
)
from lig_lens.blocks.relative import RELATIVE_KINDS, RelativeKind
from lig_lens.blocks.rotary import ROTARY_KINDS, RotaryKind
from lig_lens.blocks.score import Score, ScoreBias
from lig_lens.blocks.score_fit import fit_scores

# Why there is no formula, where another prompt may show one.
UNTOLD = "the pattern is 0 where it may be masked or too small for its dtype, which look alike"
# Prompts with fewer tokens than this are probed three times.
_FEW = 4
# Where a model's settings name the cap of its scores.
_CAP_NAMES = ("attn_scores_soft_cap", "attn_logit_softcapping")


class Probe(AttentionReading):
    """What a block's attention does to vectors at random, and to mixtures of them with the prompt's tokens.

    Run 0 has the vectors at random, which no tokens resemble; the mixtures are one run, or three of few tokens.
    """

    def __init__(self, call: BlockCall, eps: float) -> None:
        """Lay out the runs (see `mixture`); `eps` is what the block's norms add to the mean square."""
        x, self.eps = call.resid_pre, eps
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        self.partner = noise * x.square().mean(-1, keepdim=True).sqrt()
        self.own, self.other = mixture(x, self.partner, eps, 1 if len(x) >= _FEW else 3)
        self.prompt, self.mixed = x, self.own * x + self.other * self.partner
        super().__init__(call, torch.cat([self.partner[None], self.mixed]))


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
    reader = reader_of(call, values, z)
    if reader is None:
        return "no hooks on queries, keys, values and pattern"
    try:
        with torch.no_grad():
            return _find(call, values, z, probe, reader)
    except UnreadableError as error:
        return str(error)


def _find(
    call: BlockCall, values: Mapping[str, Tensor], z: Float[Tensor, "pos head d_head"], probe: Probe, reader: Reader
) -> FormulaValues | str:
    """See `find_formula`; with what queries, keys, values and the pattern are read by.

    Raises:
        UnreadableError: in some run they are not what that takes them for.
    """
    shown, _, eps = reader.seen(values, ()), probe.seen(reader), probe.eps
    n_heads = len(shown.q), len(shown.k), len(shown.pattern)
    if n_heads[0] != z.shape[1] or n_heads[2] != z.shape[1] or z.shape[1] % n_heads[1]:
        return f"{z.shape[1]} heads of z, but {n_heads[0]} of q, {n_heads[1]} of k, {n_heads[2]} patterns"
    reason = "queries, keys or values are not affine in the normalised residual"
    for norm in ("none", "rms", "layer"):
        fitted: Reader | None = reader
        if isinstance(reader, FromLatents):
            fitted = fit_latents(call, reader, norm, eps, shown)
        if fitted is None:
            reason = "norms of latent vectors are neither LayerNorm nor RMSNorm, or have biases"
            continue
        own, other = fitted.seen(values, ()), probe.seen(fitted)
        biases = _affine(probe, norm, eps, own, other)
        if biases is None:
            continue
        reason = "the pattern is not a softmax of scaled, possibly normed, rotated or capped q.k plus a fixed bias"
        scale_path = _scale_path(call, values, norm, eps)
        part = _Part(call, fitted, norm, eps, scale_path, own, other.runs(slice(1, None)), z)
        for kind, pairing, norms in _between(part, biases):
            found = norms if isinstance(norms, str) else _with_scores(part, kind, pairing, norms)
            if isinstance(found, FormulaValues):
                return found
            reason = found or reason
    return reason


@dataclass(frozen=True)
class _Part:
    """What is known of a block's attention once its linear maps are found: on the prompt, and on the probe."""

    call: BlockCall
    reader: Reader
    norm: str
    eps: float
    scale_path: str | None
    own: SeenAttention
    other: SeenAttention
    z: Float[Tensor, "pos head d_head"]


_Kind = RotaryKind | RelativeKind | None


def _between(part: _Part, biases: tuple[Tensor, ...]) -> Iterator[tuple[_Kind, Pairing, Norms | str]]:
    """Everything that may lie between the linear maps and scores: what positions do, and norms that hooks show, or not.

    Where norms cannot be understood, the reason stands in their place.
    """
    call, d_head, reader = part.call, part.own.q.shape[-1], part.reader
    kinds: tuple[_Kind, ...] = (*ROTARY_KINDS, None, *RELATIVE_KINDS)
    found = ((kind, None if kind is None else kind.on(call, d_head)) for kind in kinds)
    pairings = [(kind, Pairing(at)) for kind, at in found if kind is None or at is not None]
    if isinstance(reader, FromLatents):
        latent = latent_norms(reader, biases)
        yield from ((kind, pairing, latent) for kind, pairing in pairings)
        return
    q, k, v = biases
    shown = read_head_norms(call, reader, part.norm, part.eps, part.own)
    for kind, pairing in pairings:
        yield kind, pairing, find_head_norms(shown, pairing.rotary, (q, k, v))
    if shown is None:
        yield from ((kind, pairing, hidden_norms(part.eps, (q, k, v))) for kind, pairing in pairings)


def _with_scores(part: _Part, kind: _Kind, pairing: Pairing, norms: Norms) -> FormulaValues | str | None:
    """The formula, if scores follow from such queries and keys; a reason, if there is a better one than that."""
    call, own, other = part.call, part.own, part.other
    reason = None
    for cap in (None, *_caps(call)):
        usual = Score(own.q.shape[-1] ** -0.5, cap, weight=norms.weight)
        fitted = fit_scores(usual, pairing, norms.normed(own), norms.normed(other))
        if fitted is None:
            reason = UNTOLD
            continue
        score, bias = fitted
        formula = AttentionFormula(
            part.reader, part.norm, part.eps, part.scale_path, kind, score, ScoreBias.of(bias), norms
        )
        found = FormulaValues(formula, call, pairing, bias, formula.homogeneous(call.resid_pre, own))
        if not found.gives(own, part.z) or not _holds_on(found, other):
            continue
        if norms.shown or _holds_on(found, _near_zero(part)):
            return found
    return reason


def _near_zero(part: _Part) -> SeenAttention:
    """Attention on vectors that show what norms of queries and keys add to the mean square."""
    small = near_zero(part.call.resid_pre, part.norm, part.eps, part.own)
    return AttentionReading(part.call, small[None]).seen(part.reader)


def _holds_on(found: FormulaValues, other: SeenAttention) -> bool:
    """Whether the formula gives the patterns of other runs too.

    Of a few tokens a bias can make any scores fit the prompt's own pattern, capped ones say; not two patterns at once.
    """
    for run, pattern in enumerate(other.pattern):
        if not float((found.pattern(other.run(run)) - pattern).abs().max()) <= ALLOWED:
            return False
    return True


def _caps(call: BlockCall) -> tuple[float, ...]:
    """What the model's settings may mean by a cap of attention scores; the pattern shows whether it is one."""
    model = call.stack.model
    settings = (model.cfg, getattr(getattr(model, "original_model", None), "config", None))
    found = (getattr(one, name, None) for one in settings for name in _CAP_NAMES)
    return tuple({float(value) for value in found if value and float(value) > 0})


def _affine(probe: Probe, norm: str, eps: float, own: SeenAttention, seen: SeenAttention) -> tuple[Tensor, ...] | None:
    """Bias b of `Heads.all`, if they are affine in the normalised residual.

    With `y = Y / sigma + b`, the mixtures' y follow from those of what is mixed but for (1 - sum of weights) b, which
    every token must give alike.
    """
    plain, partner, mixed = (sigma(norm, eps, x) for x in (probe.prompt, probe.partner, probe.mixed))
    weights = (probe.own * plain / mixed)[:, None], (probe.other * partner / mixed)[:, None]
    rest = 1 - weights[0] - weights[1]
    result = []
    for y, of_runs in zip(own.all, seen.all, strict=True):
        left = of_runs[1:] - weights[0] * y - weights[1] * of_runs[0]
        # Least squares: tokens whose weights add up to 1 say nothing about b.
        bias = (rest * left).sum((0, -2)).unsqueeze(-2) / rest.square().sum()
        size = float(torch.maximum(y.abs(), of_runs.abs()).max())
        if not float((left - rest * bias).abs().max()) <= ALLOWED * size:
            return None
        # Single precision whatever the dtype is: Hugging Face norms cast to it.
        if float(bias.abs().max()) <= 8 * torch.finfo(torch.float32).eps * size:
            bias = torch.zeros_like(bias)
        result.append(bias)
    return tuple(result)


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
