"""Probabilities, correlations, areas and intervals of small arrays."""

import numpy as np
from jaxtyping import Float


def probability(logits: Float[np.ndarray, "*batch class"], target: int) -> Float[np.ndarray, "*batch"]:
    """Probability of a class."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(shifted[..., target] / shifted.sum(-1))


def log_odds(logits: Float[np.ndarray, "*batch class"], target: int) -> Float[np.ndarray, "*batch"]:
    """Natural logarithm of p / (1 - p), p a class's probability; from logits, so that it stays finite near 0 and 1."""
    others: Float[np.ndarray, "*batch"] = np.logaddexp.reduce(np.delete(logits, target, axis=-1), axis=-1)
    return np.asarray(logits[..., target] - others)


def pearson(a: Float[np.ndarray, "entry"], b: Float[np.ndarray, "entry"]) -> float:
    """Pearson's correlation; NaN below three entries, or where one side is constant."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    return float((a / np.linalg.norm(a)) @ (b / np.linalg.norm(b)))


def spearman(a: Float[np.ndarray, "entry"], b: Float[np.ndarray, "entry"]) -> float:
    """Spearman's correlation: Pearson's of ranks, equal entries sharing theirs."""
    return pearson(_ranks(a), _ranks(b))


CORRELATIONS = {"spearman": spearman, "pearson": pearson}


def _ranks(values: Float[np.ndarray, "entry"]) -> Float[np.ndarray, "entry"]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    ranks: Float[np.ndarray, entry] = (ends - (counts - 1) / 2)[inverse]
    return ranks


def area(x: Float[np.ndarray, "place"], y: Float[np.ndarray, "place"]) -> float:
    """Area under a curve, by trapezoids; x in order."""
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum())


def intervals(
    values: Float[np.ndarray, "row input"], seed: int, draws: int = 2000, level: float = 0.95
) -> tuple[Float[np.ndarray, "row"], Float[np.ndarray, "row"], Float[np.ndarray, "row"]]:
    """Means with bootstrap percentile intervals over inputs; NaN entries are left out.

    All rows see the same draws of inputs, so that intervals of differences between rows are paired.

    Returns:
        mean, lower end and upper end.
    """
    n = values.shape[1]
    there = ~np.isnan(values)
    filled = np.where(there, values, 0.0)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = filled.sum(1) / there.sum(1)
        means = (drawn @ filled.T) / (drawn @ there.T)
    low, high = np.full(len(values), np.nan), np.full(len(values), np.nan)
    for row, some in enumerate(means.T):
        some = some[~np.isnan(some)]  # a draw may miss the few inputs that say something
        if len(some):
            low[row], high[row] = np.quantile(some, [(1 - level) / 2, (1 + level) / 2])
    return mean, np.fmin(low, mean), np.fmax(high, mean)  # which sums in another order may miss by rounding
