"""Finds from patterns what makes them of q.k: scale, bias, and what a sink takes."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lig_lens.blocks.pairing import Pairing
from lig_lens.blocks.reading import SeenAttention
from lig_lens.blocks.score import Score

# Destinations whose scores show whether there is a bias.
_ROWS = 16
_ALL = slice(None)
# Scores that are this far below the row's best can be 0 in a pattern without a mask.
_UNDERFLOW = -80.0
# Rows of a pattern add up to 1 but for rounding; what is missing beyond that, a sink took.
_LOST = 1e-4
_GAUSS_NEWTON_STEPS = 20


def fit_scores(
    start: Score, pairing: Pairing, own: SeenAttention, other: SeenAttention
) -> tuple[Score, Float[Tensor, "#head dst src"]] | None:
    """The score and the bias of each pair, or None where the mask cannot be told.

    A few rows tell whether there is a bias beyond the mask. If not, they give the scale, and every row its mask.

    Args:
        start: cap and weight, and a scale to begin with.
        pairing: of the prompt.
        own: attention on the prompt, queries and keys normed.
        other: the same on the probe.
    """
    n_pos = own.q.shape[-2]
    some = torch.linspace(0, n_pos - 1, min(n_pos, _ROWS), device=own.q.device).round().long()
    score, bias = _fit_rows(start, pairing, own, other, some)
    visible = (own.pattern > 0) | (other.pattern[0] > 0)
    only_mask = bool(((bias == 0) | (bias == -torch.inf)).all())
    masked = _masked(score, pairing, own, other, visible)
    if masked is None:
        return None
    if only_mask:
        bias = torch.zeros_like(own.pattern).masked_fill(masked, -torch.inf)
    elif bool((~visible & ~masked).any()):
        return None
    else:
        score, bias = _fit_rows(start, pairing, own, other, _ALL)
    score = replace(score, sink=_sink(score, pairing, own, bias))
    # A copy, since a view would keep all heads alive.
    return score, bias[:1].clone() if bool((bias == bias[:1]).all()) else bias


def fit_scale(
    start: Score, dots: Float[Tensor, "2 head dst src"], patterns: Float[Tensor, "2 head dst src"]
) -> tuple[Score, Bool[Tensor, "head dst src"]]:
    """The scale, from how products of queries and keys and patterns change between two runs; rows may shift.

    Returns:
        the score with its scale; and where both patterns are large enough to tell.
    """
    clear = (patterns > 1e-20).all(0)  # logarithms of what is about to underflow have few digits

    def between(values: Tensor) -> Tensor:
        kept = torch.where(clear, values[0] - values[1], 0.0)
        mean = kept.sum(-1, keepdim=True) / clear.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(clear, kept - mean, 0.0).cpu().double()

    score, rise = start, between(patterns.log())
    for _ in range(1 if start.cap is None else _GAUSS_NEWTON_STEPS):
        capped = score.capped(score.scale * dots)
        steepness = score.steepness(capped)
        run = between(dots if steepness is None else dots * steepness)
        size = float(run.square().sum())
        if size > 1e-8:
            missing = rise - between(capped)
            score = replace(score, scale=score.scale + float((missing * run).sum()) / size)
    # Scales are 1 / sqrt(n) in practice, and then exactly so.
    scale, usual = score.scale, round(start.scale**-2)
    for n in (usual, round(scale**-2) if 1 / 32 < scale <= 1.01 else 0):
        if n and abs(scale * n**0.5 - 1) < 1e-4:
            return replace(score, scale=n**-0.5), clear
    return score, clear


def _sink(score: Score, pairing: Pairing, own: SeenAttention, bias: Tensor) -> Float[Tensor, "head"] | None:
    """What the rows of a pattern lose, as the score of a source that is not there; the same in all rows of a head."""
    lost = 1 - own.pattern.double().sum(-1)
    if float(lost.max()) <= _LOST:
        return None
    scores = score.capped(score.scale * pairing.products(own.q, own.k, weight=score.weight)) + bias
    sinks = torch.logsumexp(scores.double(), -1) + torch.logit(lost.clamp(1e-9, 1 - 1e-9))
    # Rounding of the rows' sums weighs least where both sides are large.
    certain = (lost * (1 - lost)).clamp(min=0)
    return ((sinks * certain).sum(-1) / certain.sum(-1).clamp(min=1e-30)).to(own.pattern)


def _masked(
    score: Score, pairing: Pairing, own: SeenAttention, other: SeenAttention, visible: Bool[Tensor, "head dst src"]
) -> Bool[Tensor, "head dst src"] | None:
    """What a mask hides, or None: a pattern that underflows is 0 too.

    It is a mask where the score would show in one of the runs. Of what no head shows, one head that would is enough.
    """
    hidden = ~visible
    in_all = hidden.all(0)
    first = _would_show(score, pairing, own, other, visible, slice(1))[0]
    if bool((in_all & ~first).any()) or bool((hidden & ~in_all).any()):
        shows = _would_show(score, pairing, own, other, visible, _ALL)
        if bool((in_all & ~shows.any(0)).any()):
            return None
        # What some heads show is masked in others only if they would show it.
        return hidden & (in_all | shows)
    return hidden


def _would_show(
    score: Score, pairing: Pairing, own: SeenAttention, other: SeenAttention, visible: Tensor, heads: slice
) -> Bool[Tensor, "head dst src"]:
    """Where the score is near enough to the best visible one, in one of the runs, to be seen in the pattern."""
    found = torch.zeros_like(visible[heads])
    for q, k in ((own.q, own.k), (other.q[0], other.k[0])):
        if heads != _ALL:
            q, k = q[heads], k[:1]
        weight = None if score.weight is None else score.weight[heads]
        scores = score.capped(score.scale * pairing.of_heads(heads).products(q, k, weight=weight))
        best = torch.where(visible[heads], scores, -torch.inf).amax(-1, keepdim=True)
        found |= scores - best > _UNDERFLOW
    return found


def _fit_rows(
    start: Score, pairing: Pairing, own: SeenAttention, other: SeenAttention, rows: Int[Tensor, "row"] | slice
) -> tuple[Score, Float[Tensor, "head row src"]]:
    """Scale and bias of the scores of these destinations.

    `log pattern = cap(scale q.k) + bias - (one number per row)`. Between two runs bias drops out, which leaves the
    scale to least squares; bias is then read where the pattern is larger, so that little underflows.
    """
    dots, patterns = (
        torch.stack(
            [
                pairing.products(own.q, own.k, rows, start.weight),
                pairing.products(other.q[0], other.k[0], rows, start.weight),
            ]
        ),
        torch.stack([own.pattern[:, rows], other.pattern[0][:, rows]]),
    )
    score, clear = fit_scale(start, dots, patterns)
    visible = (patterns > 0).any(0)
    biases = patterns.log() - score.capped(score.scale * dots)
    # One row's two versions differ by a number, which the visible entries that both know give.
    biases = biases - torch.where(clear, biases, -torch.inf).amax(-1, keepdim=True)
    bias = torch.where(patterns[1] >= patterns[0], biases[1], biases[0])
    bias = torch.where(visible, bias, -torch.inf)
    if float(torch.where(visible, bias, 0.0).abs().max()) < 1e-5:
        bias = torch.where(visible, 0.0, -torch.inf).to(bias)
    return score, bias
