"""May a challenger take the champion's place? Paired evidence, intervals, and a price for looking again.

A challenger is promoted only if all of this holds:

- *it runs*: over all stored telemetry it delivered a finite answer for every row, within the time budget;
- *enough labels*: rows and sessions that were held back from its training, as the YAML asks;
- *fair labels*: sessions with a label look like sessions without one, as far as tests can tell. Where only some kind of
  user is swept, being better on the swept ones says nothing of the others;
- *better*: the one-sided lower bound of the mean paired gain over sessions is above `min_gain`. At look k since the
  champion took over, the bound is at level alpha / (k (k + 1)), which sums to alpha however often one looks;
- *nothing forgotten*: on the general test set, the 95 % interval of what it loses ends at or below `max_forgetting`.

Everything else is a refusal, with its reason: the champion stays unless it is proven that it should not.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class ChallengeRules:
    """As spec.ShadowStep has them, but max_forgetting in the unit of the score."""

    alpha: float
    min_gain: float
    max_forgetting: float
    min_labelled: int
    min_sessions: int


@dataclass(frozen=True)
class Evidence:
    """What is known of challenger and champion.

    gain: challenger minus champion, row scores [n] of the labelled rows that were held back; session [n]. general and
    general_ci95: what the challenger gains on the general test set (negative: has forgotten), None if it was not judged.
    label_bias_p: that labelled sessions differ from the others by chance. failed: rows without a finite answer.
    late_p: that no more calls than allowed exceed the budget. look: 1 for the first challenger of this champion.
    """

    gain: np.ndarray
    session: np.ndarray
    general: float | None
    general_ci95: tuple[float, float] | None
    label_bias_p: float
    failed: int
    late_p: float
    look: int


@dataclass(frozen=True)
class Decision:
    """promote, why in a sentence, and the figures: gain is the mean over sessions, bound its lower bound at `level`."""

    promote: bool
    reason: str
    gain: float | None = None
    bound: float | None = None
    level: float | None = None
    labelled: int = 0
    sessions: int = 0


LABEL_BIAS_P = 0.001
LATE_P = 0.001


def level_of_look(alpha: float, look: int) -> float:
    """Share of alpha that look k (from 1) may spend: alpha / (k (k + 1)); the shares of all looks add up to alpha."""
    return alpha / (look * (look + 1))


def lower_bound(gains: np.ndarray, level: float) -> float:
    """One-sided lower bound of the mean of independent session gains, at 1 - level (Student's t)."""
    if len(gains) < 2:
        return float("-inf")
    spread = float(gains.std(ddof=1)) / len(gains) ** 0.5
    return float(gains.mean()) - float(stats.t.ppf(1.0 - level, len(gains) - 1)) * spread


def decide(evidence: Evidence, rules: ChallengeRules) -> Decision:
    """The decision, by the rules in this module's text."""
    sessions, at = np.unique(evidence.session, return_inverse=True)
    gains = (
        np.bincount(at, evidence.gain, len(sessions)) / np.bincount(at, minlength=len(sessions)) if len(sessions) else np.zeros(0)
    )
    level = level_of_look(rules.alpha, evidence.look)
    bound = lower_bound(gains, level)
    known = len(gains) > 1
    figures = {
        "gain": float(gains.mean()) if len(gains) else None, "bound": bound if known else None, "level": level,
        "labelled": len(evidence.gain), "sessions": len(sessions),
    }  # fmt: skip

    def refused(reason: str) -> Decision:
        return Decision(False, reason, **figures)

    if evidence.failed:
        return refused(f"{evidence.failed} rows of the stored telemetry got no finite answer in the shadow run")
    if evidence.late_p < LATE_P:
        return refused("its calls exceed the time budget in the shadow run")
    if len(evidence.gain) < rules.min_labelled or len(sessions) < rules.min_sessions:
        return refused(
            f"too few labels: {len(evidence.gain)} rows of {len(sessions)} sessions were held back, "
            f"needed are {rules.min_labelled} of {rules.min_sessions}"
        )
    if evidence.label_bias_p < LABEL_BIAS_P:
        return refused(
            f"labelled sessions are unlike the others (p {evidence.label_bias_p:.1g}): they are no fair sample of the window"
        )
    recent = f"{figures['gain']:+.4f} on {len(evidence.gain)} held-back rows ({1 - level:.2%} lower bound {bound:+.4f})"
    if bound <= rules.min_gain:
        return refused(f"not proven better: {recent}, must exceed {rules.min_gain:+.4f} (look {evidence.look})")
    if evidence.general_ci95 is None or evidence.general is None:
        return refused("the general test set could not be judged, so nothing is known of what it has forgotten")
    low, high = evidence.general_ci95
    general = f"{evidence.general:+.4f} [{low:+.4f}, {high:+.4f}] on the general test set"
    if low < -rules.max_forgetting:
        return refused(f"it may have forgotten: {general}, must stay above {-rules.max_forgetting:+.4f}; recent: {recent}")
    return Decision(True, f"better: {recent}; {general} (look {evidence.look})", **figures)
