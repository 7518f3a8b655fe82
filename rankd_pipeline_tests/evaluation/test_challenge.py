"""The challenger's rules: better only by proof, refused with a reason for everything else, and looking again has a price."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.promotion import trial, worlds
from rankd_pipeline.evaluation.challenge import ChallengeRules, Evidence, decide, level_of_look, lower_bound
from rankd_pipeline.ran_functions.contract import Metric
from rankd_pipeline.spec import load_pipeline

RULES = ChallengeRules(alpha=0.01, min_gain=0.005, max_forgetting=0.01, min_labelled=100, min_sessions=20)


def evidence(gain: float = 0.1, sessions: int = 60, rows: int = 10, seed: int = 0, **changes: object) -> Evidence:
    """Paired row gains in {-1, 0, 1} with this mean, sessions that hang together."""
    rng = np.random.default_rng(seed)
    per_session = rng.normal(0, 0.05, sessions)
    draw = rng.random((sessions, rows))
    up = 0.1 + gain / 2 + per_session[:, None] / 2
    values = np.where(draw < up, 1.0, np.where(draw > 1 - (up - gain - per_session[:, None]), -1.0, 0.0))
    known = {
        "gain": values.reshape(-1), "session": np.repeat(np.arange(sessions), rows), "general": 0.001,
        "general_ci95": (-0.004, 0.006), "label_bias_p": 0.4, "failed": 0, "late_p": 0.5, "look": 1,
    }  # fmt: skip
    return Evidence(**{**known, **changes})  # type: ignore[arg-type]


def test_a_proven_gain_is_promoted_and_says_by_how_much() -> None:
    found = decide(evidence(), RULES)
    assert found.promote and found.bound is not None and found.bound > RULES.min_gain and found.gain is not None
    assert "better" in found.reason and "general test set" in found.reason and "look 1" in found.reason


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"gain": -0.05}, "not proven better"),
        ({"gain": 0.0}, "not proven better"),
        ({"sessions": 9, "rows": 20}, "too few labels: 180 rows of 9 sessions"),
        ({"sessions": 20, "rows": 4}, "too few labels: 80 rows of 20 sessions"),
        ({"label_bias_p": 1e-5}, "no fair sample"),
        ({"general": -0.02, "general_ci95": (-0.025, -0.015)}, "may have forgotten"),
        ({"general": -0.008, "general_ci95": (-0.012, -0.004)}, "may have forgotten"),
        ({"general_ci95": None}, "could not be judged"),
        ({"failed": 1}, "1 rows of the stored telemetry got no finite answer"),
        ({"late_p": 1e-6}, "exceed the time budget"),
        ({"gain": 0.06, "sessions": 25, "look": 60}, "look 60"),
    ],
)
def test_everything_else_is_refused_with_its_reason(changes: dict, why: str) -> None:
    found = decide(evidence(**changes), RULES)
    assert not found.promote and why in found.reason


def test_no_labels_at_all_is_a_refusal() -> None:
    none = evidence(gain=0.0, sessions=2)
    found = decide(Evidence(**{**none.__dict__, "gain": np.zeros(0), "session": np.zeros(0, np.int64)}), RULES)
    assert not found.promote and "too few labels: 0 rows" in found.reason and found.bound is None


@given(st.floats(0.001, 0.2))
def test_all_looks_together_spend_no_more_than_alpha(alpha: float) -> None:
    levels = [level_of_look(alpha, look) for look in range(1, 2000)]
    assert levels[0] == alpha / 2 and all(one > two for one, two in zip(levels, levels[1:], strict=False))
    assert sum(levels) < alpha


def test_the_bound_holds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    above = sum(lower_bound(rng.normal(0.0, 1.0, 40), 0.05) > 0 for _ in range(2000))
    assert 60 < above < 145, "5 % of 2000 is 100"
    assert lower_bound(np.ones(1), 0.05) == float("-inf")


def test_equal_models_are_hardly_ever_promoted_and_better_ones_are() -> None:
    equal = sum(decide(evidence(gain=0.0, seed=seed), RULES).promote for seed in range(300))
    better = sum(decide(evidence(gain=0.1, seed=seed), RULES).promote for seed in range(100))
    assert equal <= 2 and better >= 85


@pytest.mark.parametrize("what", ["worse: noise", "worse: too few labels", "worse: biased labels", "equal"])
def test_the_trials_of_the_benchmark_promote_none_of_these_and_some_that_are_better(what: str) -> None:
    spec = load_pipeline("beam_management").at()
    for kind, promoted in ((what, range(1)), ("better by 0.1", range(5, 13))):
        found = [trial(worlds(kind, np.random.default_rng([seed, 1])), spec, seed) for seed in range(12)]
        assert sum(decision.promote for decision in found) in promoted, [decision.reason for decision in found]


def test_a_share_of_a_score_is_told_in_its_unit() -> None:
    """One per cent: a point of a rate, 1 % of the power behind decibels, a hundredth of anything else."""
    assert Metric("top1", "fraction", True, True).difference(0.01, 0.6) == 0.01
    decibels = Metric("nmse", "dB", False, False).difference(0.01, -17.0)
    assert 10 ** (decibels / 10) == pytest.approx(1.01)
    assert Metric("goodput", "bit/s/Hz", True, False).difference(0.01, 3.7) == pytest.approx(0.037)
