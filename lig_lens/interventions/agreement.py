"""Do scores foretell what interventions find? Rank correlations, overlap of the strongest, precision and recall."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from numpy import float64
from numpy.typing import NDArray
from torch import Tensor

from lig_lens.arguments import checked
from lig_lens.errors import InputError, optional
from lig_lens.flow.effects import Effects
from lig_lens.flow.flow import Flow

if TYPE_CHECKING:
    import pandas

# Axes of what a score is on, by that and what is wanted: a position is that of the destination.
_SUMMED_OVER = {("edges", "heads_by_pos"): (2,), ("edges", "heads"): (2, 3), ("heads_by_pos", "heads"): (2,)}


@dataclass(frozen=True)
class Agreement:
    """How well a score agrees with effects, over the `n` entries that were measured.

    Correlations are of signed values; `spearman_size` is of absolute values, for scores that have no sign.
    `top_k_overlap` is the share of the k strongest effects (by absolute value) that are among the k strongest scores.
    An effect counts as present if its absolute value is at least `threshold`: `average_precision` is over the ranking
    by absolute score, `precision` at as many entries as there are such effects (recall is the same there). Entries of 0
    are neither strong nor found. NaN where a score is constant, or no effect is present.
    """

    n: int
    spearman: float
    spearman_size: float
    kendall: float
    pearson: float
    k: int
    top_k_overlap: float
    threshold: float
    n_present: int
    average_precision: float
    precision: float


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision and recall among the 1, 2, 3, ... entries with the largest absolute score, as far as it is not 0.

    NaN if no effect is present.
    """

    precision: Float[Tensor, "place"]
    recall: Float[Tensor, "place"]


def aligned(score: Flow | Effects, effects: Effects) -> Float[Tensor, "..."]:
    """A score on the axes of some effects.

    Edges add up over sources to heads at positions (dst), those over positions to heads. Of a Flow with a metric,
    `positions` are what all that leaves a residual adds up to: `attn` over heads and destinations, and `skip`.

    Raises:
        InputError: layers or tokens that differ, or axes that the score does not have.
    """
    if score.tokens != effects.tokens or not set(effects.layers) <= set(score.layers):
        raise InputError(
            f"compare: the score is for the layers {list(score.layers)} of {list(score.tokens)}, the effects for "
            f"{list(effects.layers)} of {list(effects.tokens)}: compute both for the same prompt and layers."
        )
    values = _values(score, effects)[[score.layers.index(layer) for layer in effects.layers]]
    if values.shape != effects.values.shape:
        raise InputError(
            f"compare: the score has shape {list(values.shape)}, the effects {list(effects.values.shape)} "
            f"({' '.join(effects.axes)}): compute both for one model."
        )
    return values


def _values(score: Flow | Effects, effects: Effects) -> Float[Tensor, "..."]:
    """A score on the axes of some effects, for its own layers."""
    if isinstance(score, Effects):
        return _summed(score.on, score.values, effects.on)
    if effects.on == "positions":
        return _leaving(score, effects)
    if score.attn is None or score.destinations != tuple(range(len(score.tokens))):
        raise InputError("compare: the Flow has no attn map for all destinations in order: ask attribute() for it.")
    return _summed("edges", score.attn, effects.on)


def _leaving(flow: Flow, effects: Effects) -> Float[Tensor, "layer pos"]:
    """What all that leaves a residual adds up to."""
    if effects.settings.get("at") == "resid_mid":
        raise InputError("compare: a Flow says what leaves resid_pre, nothing of resid_mid: patch at='resid_pre'.")
    if flow.metric is None or flow.attn is None or flow.skip is None:
        raise InputError("compare: only a Flow with a metric as target adds up over what leaves a position.")
    if flow.settings.get("split") == "message":
        raise InputError(
            "compare: a Flow with split='message' says what moves along edges, not because of which position: use "
            "split='source' to compare positions."
        )
    if flow.settings.get("hold") is not None:
        raise InputError(
            f"compare: with hold={flow.settings['hold']!r} what bypasses the heads stays, and patched positions take "
            "it along: ask for hold=None to compare positions."
        )
    return flow.attn.sum((1, 3)) + flow.skip


def _summed(have: str, values: Float[Tensor, "..."], wanted: str) -> Float[Tensor, "..."]:
    """Values on other axes: what is not among them is added up."""
    if have == wanted:
        return values
    over = _SUMMED_OVER.get((have, wanted))
    if over is None:
        raise InputError(f"compare: a score on {have} says nothing of effects on {wanted}.")
    return values.sum(over)


@checked
def compare(score: Flow | Effects, effects: Effects, *, k: int = 10, threshold: float | None = None) -> Agreement:
    """Agreement of a score with effects.

    Args:
        score: a Flow (best with the same metric as target), or Effects, such as `scores()` gives or another
            intervention's.
        effects: what was measured; entries that are NaN are left out.
        k: of the overlap.
        threshold: smallest absolute effect that counts as present; a tenth of the largest by default.

    Raises:
        InputError: labels that differ, nothing measured, or k below 1.
        MissingPackageError: scipy is not installed.
    """
    optional("scipy", "compare")
    from scipy import stats

    if k < 1:
        raise InputError(f"compare: k is {k}: ask for at least 1.")
    x, y = points(score, effects)
    threshold = _threshold(y, threshold)
    curve = _precision_recall(x, y, threshold)
    n_present = int(_present(y, threshold).sum())
    best, strongest = (set(_by_size(side)[:k].tolist()) for side in (x, y))
    nan = float("nan")
    at = min(n_present, len(curve.precision))
    constant = not n_present or bool((x.abs() == x[0].abs()).all())
    steps = curve.recall.diff(prepend=torch.zeros(1).double())
    return Agreement(
        n=len(x),
        spearman=_correlation(lambda a, b: stats.spearmanr(a, b).statistic, x, y),
        spearman_size=_correlation(lambda a, b: stats.spearmanr(a, b).statistic, x.abs(), y.abs()),
        kendall=_correlation(lambda a, b: stats.kendalltau(a, b).statistic, x, y),
        pearson=_correlation(lambda a, b: stats.pearsonr(a, b).statistic, x, y),
        k=k,
        top_k_overlap=len(best & strongest) / len(strongest) if strongest else nan,
        threshold=threshold,
        n_present=n_present,
        average_precision=nan if constant else float((curve.precision * steps).sum()),
        precision=nan if constant or not at else float(curve.precision[at - 1]) * at / n_present,
    )


@checked
def precision_recall(score: Flow | Effects, effects: Effects, *, threshold: float | None = None) -> PrecisionRecall:
    """How many of the effects that are present the strongest scores find; arguments as in `compare`.

    Raises:
        InputError: see `compare`.
    """
    x, y = points(score, effects)
    return _precision_recall(x, y, _threshold(y, threshold))


def _correlation(
    function: Callable[[NDArray[float64], NDArray[float64]], float],
    a: Float[Tensor, "entry"],
    b: Float[Tensor, "entry"],
) -> float:
    """A correlation; NaN where one side is constant, or a single entry."""
    if len(a) < 2 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return float("nan")
    return float(function(a.numpy(), b.numpy()))


def _by_size(values: Float[Tensor, "entry"]) -> Int[Tensor, "place"]:
    """Where the largest absolute values stand, largest first; what is 0 is left out."""
    return torch.sort(values.abs(), descending=True, stable=True).indices[: int((values != 0).sum())]


def _threshold(effects: Float[Tensor, "entry"], threshold: float | None) -> float:
    if threshold is None:
        return 0.1 * float(effects.abs().max())
    if not 0 <= threshold < float("inf"):
        raise InputError(f"compare: threshold={threshold}: give the smallest absolute effect that counts, 0 or more.")
    return threshold


def _present(effects: Float[Tensor, "entry"], threshold: float) -> Bool[Tensor, "entry"]:
    return (effects.abs() >= threshold) & (effects != 0)


def _precision_recall(x: Float[Tensor, "entry"], y: Float[Tensor, "entry"], threshold: float) -> PrecisionRecall:
    present = _present(y, threshold).double()
    hits = present[_by_size(x)].cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1)
    none = not bool(present.any())
    return PrecisionRecall(torch.full_like(precision, torch.nan) if none else precision, hits / present.sum())


def points(score: Flow | Effects, effects: Effects) -> tuple[Float[Tensor, "entry"], Float[Tensor, "entry"]]:
    """Score and effect of every entry that was measured, in float64."""
    measured = ~effects.values.isnan()
    x, y = aligned(score, effects)[measured].double(), effects.values[measured].double()
    if not len(y):
        raise InputError("compare: no entry of the effects was measured.")
    if bool(x.isnan().any()):
        raise InputError(f"compare: the score lacks {int(x.isnan().sum())} of the {len(x)} entries that were measured.")
    return x, y


@checked
def compare_table(
    scores: Mapping[str, Flow | Effects], effects: Effects, *, k: int = 10, threshold: float | None = None
) -> "pandas.DataFrame":
    """One row for each score, columns as in `Agreement`; arguments as in `compare`.

    Raises:
        InputError: see `compare`.
        MissingPackageError: pandas or scipy is not installed.
    """
    rows = {name: asdict(compare(score, effects, k=k, threshold=threshold)) for name, score in scores.items()}
    frame: pandas.DataFrame = optional("pandas", "compare_table").DataFrame.from_dict(rows, orient="index")
    return frame
