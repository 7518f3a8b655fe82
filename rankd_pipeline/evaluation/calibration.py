"""Calibration of what a head says: ECE and temperature scaling for probabilities, conformal radius for regression."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.table import select

BINS = 15  # equal-width bins of the top-1 confidence, as in Guo et al. 2017


@dataclass(frozen=True)
class Reliability:
    """Per non-empty confidence bin: index, mean confidence, accuracy (each [b]) and count [b]."""

    bin: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray

    @property
    def ece(self) -> float:
        """Expected calibration error, a fraction: count-weighted mean of |confidence − accuracy|."""
        return float(np.abs(self.confidence - self.accuracy) @ self.count / self.count.sum())


def confidence_bin(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Index [n] of the equal-width bin of each confidence: bin i holds (i/bins, (i+1)/bins], bin 0 also 0."""
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)


def reliability(prob: np.ndarray, label: np.ndarray, bins: int = BINS) -> Reliability:
    """Reliability diagram of the top-1 class.

    Args:
        prob: class probabilities [n, c], rows summing to one.
        label: true class [n].
    """
    prob, label = np.asarray(prob, np.float64), np.asarray(label)
    if prob.ndim != 2 or len(prob) == 0 or label.shape != (len(prob),):
        raise RankdError(f"Reliability: probabilities {prob.shape}, labels {label.shape}; expected [n, c], [n], n > 0.")
    if not np.allclose(prob.sum(1), 1.0, atol=1e-3) or prob.min() < -1e-6:
        raise RankdError("Reliability: the rows are not probabilities (they do not sum to one); pass softmax outputs.")
    confidence = prob.max(1)
    correct = prob.argmax(1) == label
    index = confidence_bin(confidence, bins)
    count = np.bincount(index, minlength=bins)
    full = np.flatnonzero(count)
    return Reliability(
        bin=full,
        confidence=np.bincount(index, confidence, bins)[full] / count[full],
        accuracy=np.bincount(index, correct, bins)[full] / count[full],
        count=count[full],
    )


def reliability_of(table: pd.DataFrame, model: str, split: str) -> Reliability | None:
    """The reliability diagram from the long table's rows ``ece_bin_XX`` and ``confidence_bin_XX``; None without them."""
    sums: dict[str, dict[int, tuple[float, int]]] = {}
    for prefix in ("confidence_bin_", "ece_bin_"):
        rows = select(table, model=model, split=split, metric=f"{prefix}*")
        bins = rows["metric"].astype(str).str.removeprefix(prefix).to_numpy(int)
        weighted = (rows["value"] * rows["n"]).to_numpy(float)
        n = rows["n"].to_numpy(int)
        sums[prefix] = {int(b): (weighted[bins == b].sum(), int(n[bins == b].sum())) for b in np.unique(bins)}
    confidence, gap = sums.values()
    if not gap or gap.keys() != confidence.keys():
        return None
    full = sorted(gap)
    count = np.array([gap[b][1] for b in full])
    mean_confidence = np.array([confidence[b][0] for b in full]) / count
    mean_gap = np.array([gap[b][0] for b in full]) / count
    return Reliability(np.array(full), mean_confidence, mean_confidence - mean_gap, count)


def ece(prob: np.ndarray, label: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error of the top-1 class, 0..1 (Naeini et al. 2015). ``prob`` [n, c], ``label`` [n]."""
    return reliability(prob, label, bins).ece


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T > 0 that minimises the negative log-likelihood of softmax(logits / T); fit it on validation.

    Temperature scaling, Guo et al. 2017, section 4.2. The loss is convex in 1/T, so a bounded scalar search over
    log T in [log 0.05, log 20] finds the minimum. ``logits`` [n, c], ``labels`` [n].
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or len(logits) == 0 or labels.shape != (len(logits),):
        raise RankdError(f"Temperature: logits {logits.shape}, labels {labels.shape}; expected [n, c], [n], n > 0.")
    if not np.isfinite(logits).all():
        raise RankdError("Temperature: the logits hold NaN or infinity; the model diverged, train it again.")
    true = logits[np.arange(len(logits)), labels]

    def nll(log_t: float) -> float:
        beta = np.exp(-log_t)
        return float(np.mean(logsumexp(beta * logits, axis=1) - beta * true))

    found = minimize_scalar(nll, bounds=(np.log(0.05), np.log(20.0)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def fit_event_temperature(logits: np.ndarray, probability: np.ndarray) -> float:
    """The T > 0 that minimises the binary cross-entropy of sigmoid(logits / T) to event probabilities; fit it on validation.

    One temperature for all events, as in temperature scaling (Guo et al. 2017). ``logits``, ``probability`` (0 to 1) [n, ...].
    """
    x, p = np.asarray(logits, np.float64).ravel(), np.asarray(probability, np.float64).ravel()
    if x.shape != p.shape or not len(x):
        raise RankdError(
            f"Temperature: logits {np.shape(logits)}, probabilities {np.shape(probability)}; expected the same, n > 0."
        )
    if not np.isfinite(x).all():
        raise RankdError("Temperature: the logits hold NaN or infinity; the model diverged, train it again.")

    def nll(log_t: float) -> float:
        scaled = np.exp(-log_t) * x
        return float(np.mean(np.logaddexp(0.0, scaled) - p * scaled))

    found = minimize_scalar(nll, bounds=(np.log(0.05), np.log(20.0)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def conformal_radius(residual: np.ndarray, coverage: float = 0.9) -> float:
    """Half width of a split-conformal interval: prediction ± radius holds y with at least ``coverage``.

    Lei et al. 2018, for exchangeable data: the ceil((n+1)·coverage)-th smallest |residual| of a validation set that the
    model was not fit on.
    ``residual`` [n], in the target's unit, as is the result; infinite where n is too small for the coverage asked.
    """
    ordered = np.sort(np.abs(np.asarray(residual, np.float64)))
    rank = int(np.ceil((len(ordered) + 1) * coverage))
    return float(ordered[rank - 1]) if rank <= len(ordered) else float("inf")
