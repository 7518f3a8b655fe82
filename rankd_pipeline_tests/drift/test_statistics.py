"""Drift statistics against known answers, and the false-alarm rate of tests on rows that hang together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd_pipeline.drift.statistics import (
    above_budget,
    alike,
    classifier_two_sample,
    exact_bounds,
    holm,
    ks,
    lower_mean,
    mean_interval,
    psi,
    session_means,
)


def test_session_means_leave_out_what_is_missing() -> None:
    values = np.array([1.0, 3.0, np.nan, 5.0, np.nan])
    np.testing.assert_allclose(session_means(values, np.array([7, 7, 7, 2, 9])), [5.0, 2.0])
    assert len(session_means(np.full(3, np.nan), np.arange(3))) == 0


def test_psi_of_a_known_shift() -> None:
    reference = np.arange(1000) / 1000
    assert psi(reference, reference) == pytest.approx(0.0, abs=1e-9)
    # everything in the upper half: five bins of 0.1 become 0.2, five become empty (1e-4)
    upper = 0.5 + np.arange(1000) / 2000
    expected = 5 * (0.1 * np.log(2)) + 5 * ((1e-4 - 0.1) * np.log(1e-4 / 0.1))
    assert psi(reference, upper) == pytest.approx(expected, rel=0.02)
    half_missing = np.where(np.arange(1000) % 2, reference, np.nan)
    assert psi(reference, half_missing) > 1.0, "missing values are a bin of their own"
    assert psi(np.full(100, np.nan), np.full(50, np.nan)) == pytest.approx(0.0)
    assert psi(np.zeros(0), reference) == 0.0


@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), max_size=50), st.lists(st.floats(-1e6, 1e6), max_size=50))
def test_psi_is_finite_and_not_negative(one: list[float], other: list[float]) -> None:
    value = psi(np.array(one, float), np.array(other, float))
    assert np.isfinite(value) and value >= 0.0


def test_ks_knows_apart_from_alike() -> None:
    rng = np.random.default_rng(0)
    distance, p = ks(rng.normal(0, 1, 400), rng.normal(1, 1, 100))
    assert distance > 0.25 and p < 1e-5
    assert ks(rng.normal(0, 1, 400), rng.normal(0, 1, 100))[1] > 0.01
    assert ks(np.zeros(1), np.zeros(50)) == (0.0, 1.0)


def test_sessions_keep_the_false_alarm_rate_where_rows_would_not() -> None:
    """Rows of one session share most of their value: tested as rows, ordinary windows would look like drift."""
    rng = np.random.default_rng(1)

    def sample(sessions: int) -> tuple[np.ndarray, np.ndarray]:
        session = np.repeat(np.arange(sessions), 10)
        return rng.normal(0, 1, sessions)[session] + rng.normal(0, 0.3, len(session)), session

    reference, of_reference = sample(500)
    by_session = by_row = 0
    for _ in range(200):
        window, of_window = sample(100)
        by_session += ks(session_means(reference, of_reference), session_means(window, of_window))[1] < 0.05
        by_row += ks(reference, window)[1] < 0.05
    assert by_session <= 20, "5 % of 200 is 10"
    assert by_row > 60


def test_a_lower_mean_is_seen_and_a_higher_one_is_not() -> None:
    rng = np.random.default_rng(2)
    reference = rng.normal(0.6, 0.1, 200)
    assert lower_mean(reference, rng.normal(0.4, 0.1, 40)) < 1e-6
    assert lower_mean(reference, rng.normal(0.8, 0.1, 40)) > 0.99
    assert lower_mean(reference, reference[:1]) == 1.0 and lower_mean(np.ones(9), np.ones(9)) == 1.0


def test_the_classifier_tells_apart_by_all_features_together() -> None:
    rng = np.random.default_rng(3)
    reference, same = rng.normal(0, 1, (300, 20)), rng.normal(0, 1, (100, 20))
    moved = rng.normal(0.5, 1, (100, 20))
    assert classifier_two_sample(reference, same, 0)[1] > 0.001
    accuracy, p = classifier_two_sample(reference, moved, 0)
    assert accuracy > 0.7 and p < 1e-6
    holes = moved.copy()
    holes[:, 3] = np.nan
    assert classifier_two_sample(reference, holes, 0)[1] < 1e-5
    assert classifier_two_sample(reference[:5], same, 0) == (0.5, 1.0), "too few to say"
    assert classifier_two_sample(np.ones((50, 2)), np.ones((50, 2)), 0) == (0.5, 1.0)


def test_what_is_alike_and_what_differs_in_one_feature_or_only_in_all() -> None:
    rng = np.random.default_rng(6)
    same = [alike(rng.normal(size=(150, 8)), rng.normal(size=(100, 8)), seed) for seed in range(60)]
    assert min(same) > 0.001 and sum(p < 0.05 for p in same) <= 6
    moved = rng.normal(size=(100, 8))
    moved[:, 3] += 0.9
    moved[:20, 5] = np.nan
    assert alike(rng.normal(size=(150, 8)), moved, 0) < 0.001
    assert alike(rng.normal(size=(400, 8)), rng.normal(0.25, 1, size=(400, 8)), 0) < 0.001, "no feature alone would show it"
    assert alike(np.zeros((3, 2)), np.ones((1, 2)), 0) == 1.0


def test_the_latency_test_is_the_exact_binomial() -> None:
    calls = np.full(1000, 50.0)
    calls[:1] = 200.0
    assert above_budget(calls, 100.0) == pytest.approx(1 - 0.999**1000)
    calls[:20] = 200.0
    assert above_budget(calls, 100.0) < 1e-15
    assert above_budget(np.zeros(0), 100.0) == 1.0


def test_holm_is_holm() -> None:
    p = {"a": 0.01, "b": 0.02, "c": 0.03, "d": 0.9}
    assert holm(p, 0.05) == {"a"}  # 0.01 <= 0.0125, 0.02 > 0.0167: stop
    assert holm({"a": 0.01, "b": 0.015, "c": 0.024, "d": 0.9}, 0.05) == {"a", "b", "c"}
    assert holm({}, 0.05) == frozenset()


@given(st.dictionaries(st.text(min_size=1), st.floats(0, 1), max_size=30), st.floats(1e-6, 0.5))
def test_holm_rejects_at_least_what_bonferroni_does(p: dict[str, float], alpha: float) -> None:
    rejected = holm(p, alpha)
    assert {name for name, value in p.items() if value <= alpha / max(len(p), 1)} <= rejected
    assert all(p[name] <= alpha for name in rejected)


def test_exact_bounds_are_clopper_pearson() -> None:
    low, high = exact_bounds(0, 300)
    assert low == 0.0 and high == pytest.approx(1 - 0.025 ** (1 / 300), rel=1e-6)
    assert exact_bounds(40, 40)[0] == pytest.approx(0.025 ** (1 / 40), rel=1e-6)


def test_the_interval_of_a_mean_holds_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    inside = 0
    for _ in range(400):
        interval = mean_interval(rng.normal(3.0, 1.0, 12))
        assert interval is not None
        inside += interval[0] <= 3.0 <= interval[1]
    assert 365 <= inside <= 395
    assert mean_interval(np.ones(1)) is None
