"""Two-sample statistics for telemetry, whose rows hang together in sessions: a session, not a row, is one observation.

Users of one session share a snapshot of the channel. A test that took rows for independent would call an ordinary hour
a drift; so every p-value here is computed on session means (one number a session), and only effect sizes look at rows.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

BINS = 10
FLOOR = 1e-4
"""Share that stands for an empty bin in the PSI."""


def session_means(values: np.ndarray, session: np.ndarray) -> np.ndarray:
    """Mean of `values` [n] over each session, in order of session id; NaN values are left out, empty sessions too."""
    present = np.isfinite(values)
    ids, at = np.unique(session[present], return_inverse=True)
    if not len(ids):
        return np.zeros(0)
    return np.bincount(at, values[present]) / np.bincount(at)


def session_table(series: Sequence[np.ndarray], session: np.ndarray) -> np.ndarray:
    """Session means [sessions, series] of several series; NaN where a session has no value of one."""
    ids, at = np.unique(session, return_inverse=True)
    columns = []
    for values in series:
        present = np.isfinite(values)
        count = np.bincount(at[present], minlength=len(ids))
        total = np.bincount(at[present], values[present], minlength=len(ids))
        columns.append(np.divide(total, count, out=np.full(len(ids), np.nan), where=count > 0))
    return np.stack(columns, axis=1)


def psi(reference: np.ndarray, window: np.ndarray, bins: int = BINS) -> float:
    """Population stability index over the reference's quantiles; missing (NaN) values are a bin of their own.

    sum (w - r) ln(w / r) over bins. 0.1 is commonly called small, above 0.25 large.
    """
    if not len(reference) or not len(window):
        return 0.0
    known = reference[np.isfinite(reference)]
    edges = np.unique(np.quantile(known, np.linspace(0, 1, bins + 1)[1:-1])) if len(known) else np.zeros(0)

    def shares(values: np.ndarray) -> np.ndarray:
        finite = np.isfinite(values)
        counts = np.bincount(np.searchsorted(edges, values[finite], side="left"), minlength=len(edges) + 1)
        return np.maximum(np.append(counts, (~finite).sum()) / len(values), FLOOR)

    r, w = shares(reference), shares(window)
    return float(np.sum((w - r) * np.log(w / r)))


def ks(reference: np.ndarray, window: np.ndarray) -> tuple[float, float]:
    """(D, p) of the two-sample Kolmogorov-Smirnov test on independent observations; (0, 1) where either side is empty.

    p is the asymptotic one, which is conservative for the sizes and ties met here.
    """
    if len(reference) < 2 or len(window) < 2:
        return 0.0, 1.0
    found = stats.ks_2samp(reference, window, method="asymp")
    return float(found.statistic), float(found.pvalue)  # type: ignore[attr-defined]


def lower_mean(reference: np.ndarray, window: np.ndarray) -> float:
    """p that the window's mean is not below the reference's: Welch's one-sided t on independent observations."""
    if len(reference) < 2 or len(window) < 2 or (np.ptp(reference) == 0 and np.ptp(window) == 0):
        return 1.0
    return float(stats.ttest_ind(window, reference, equal_var=False, alternative="less").pvalue)  # type: ignore[attr-defined]


def classifier_two_sample(reference: np.ndarray, window: np.ndarray, seed: int) -> tuple[float, float]:
    """(held-out accuracy, p) of a classifier that tells window from reference; both [observations, features].

    Lopez-Paz and Oquab (arXiv:1610.06545): half of the observations, equally many of each side, train a linear discriminant
    with shrinkage, the other half counts; under "no difference" the hits are Binomial(n, 1/2), so p is exact.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    rng = np.random.default_rng(seed)
    count = min(len(reference), len(window))
    if count < 20:
        return 0.5, 1.0
    sides = [side[rng.permutation(len(side))[:count]] for side in (reference, window)]
    sides = [side[:, np.isfinite(sides[0]).sum(axis=0) > 1] for side in sides]
    centre, scale = np.nanmean(sides[0], axis=0), np.nanstd(sides[0], axis=0)
    sides = [np.clip(np.nan_to_num((side - centre) / np.where(scale > 0, scale, 1.0)), -10, 10) for side in sides]
    half = count // 2
    train, test = (np.concatenate([side[part] for side in sides]) for part in (slice(None, half), slice(half, None)))
    label = [np.repeat([0, 1], [n, n]) for n in (half, count - half)]
    moving = np.ptp(train, axis=0) > 0
    if not moving.any():
        return 0.5, 1.0
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(train[:, moving], label[0])
    hits = int(np.sum(model.predict(test[:, moving]) == label[1]))
    return hits / len(label[1]), float(stats.binomtest(hits, len(label[1]), 0.5, alternative="greater").pvalue)


def alike(reference: np.ndarray, window: np.ndarray, seed: int) -> float:
    """p that two sets of observations [observations, features] differ by chance alone.

    Every feature by Kolmogorov-Smirnov and all of them by the classifier, each half of the error; within the first, Bonferroni's.
    """
    by_feature = [ks(*(column[np.isfinite(column)] for column in pair))[1] for pair in zip(reference.T, window.T, strict=True)]
    together = classifier_two_sample(reference, window, seed)[1]
    return min(1.0, 2 * together, 2 * len(by_feature) * min(by_feature, default=1.0))


def above_budget(latency_us: np.ndarray, budget_us: float, allowed: float = 0.001) -> float:
    """p that no more than `allowed` of the calls exceed the budget (exact binomial): p99.9 above budget, beyond chance."""
    late = int((latency_us > budget_us).sum())
    return float(stats.binomtest(late, len(latency_us), allowed, alternative="greater").pvalue) if len(latency_us) else 1.0


def holm(p_values: Mapping[str, float], alpha: float) -> frozenset[str]:
    """Names of the tests that are rejected with a family-wise error of at most `alpha` (Holm 1979), dependent or not."""
    rejected = []
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if p > alpha / (len(p_values) - rank):
            break
        rejected.append(name)
    return frozenset(rejected)


def exact_bounds(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided Clopper-Pearson bounds of a share."""
    interval = stats.binomtest(hits, trials).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


def mean_interval(values: np.ndarray) -> tuple[float, float] | None:
    """95 % interval (Student's t) of the mean of independent observations; None for fewer than two."""
    if len(values) < 2:
        return None
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)
