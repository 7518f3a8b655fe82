"""Is one way of training better than another? A paired test over seeds.

Both ways see the same seeds, samples and noise, so the difference within a seed cancels what the seed brings. The
p-value is the exact one-sided sign-flip permutation test (under "no difference" each difference is as likely to have
the other sign): it assumes no distribution, and its smallest value is 2^-n, so fewer than 5 seeds never show p < 0.05.
The interval is Student's t on the differences.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats

from rankd_pipeline.errors import RankdError

EXACT_SEEDS = 16  # 2^16 sign patterns are still enumerated; beyond that a fixed sample of patterns is drawn
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class PairedGain:
    """Mean of a − b over ``n`` seeds, in the metric's unit, with its 95 % interval and one-sided p (H1: a > b)."""

    mean: float
    ci95: tuple[float, float]
    p_one_sided: float
    n: int

    @property
    def useful(self) -> bool:
        """The gain is real: positive and p < 0.05. Otherwise the run says so ("KD not useful")."""
        return self.mean > 0 and self.p_one_sided < SIGNIFICANCE

    def as_dict(self) -> dict[str, object]:
        """Plain numbers for JSON."""
        return {**asdict(self), "ci95": list(self.ci95), "useful": self.useful}


def paired_gain(a: Sequence[float], b: Sequence[float]) -> PairedGain:
    """Gain of ``a`` over ``b``, scores (higher is better; negate losses) of the same seeds in the same order, n ≥ 2."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise RankdError(f"Paired gain: {x.shape} against {y.shape} scores; expected one of each for 2 or more seeds.")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise RankdError("Paired gain: a score is NaN or infinite; the training of that seed diverged.")
    d = x - y
    n, mean = len(d), float(d.mean())
    half = float(stats.t.ppf(0.975, n - 1)) * float(d.std(ddof=1)) / np.sqrt(n)
    if n <= EXACT_SEEDS:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(2**EXACT_SEEDS, n))
        signs[0] = 1.0  # what was seen is one of the patterns, so p is never 0
    flipped = signs @ d
    p = float(np.mean(flipped >= d.sum() - 1e-12 * np.abs(d).sum()))
    return PairedGain(mean, (mean - half, mean + half), p, n)
