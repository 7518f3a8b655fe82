"""Calibration: against sklearn, against a planted temperature, and the coverage that conformal intervals promise."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.calibration import calibration_curve

from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.calibration import conformal_radius, ece, fit_temperature, reliability


def planted(n=20_000, classes=16, temperature=1.0, seed=0):
    """Logits, and labels drawn from softmax(logits / temperature): calibrated exactly at that temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2.0, (n, classes))
    cumulative = softmax(logits / temperature, axis=1).cumsum(1)
    return logits, (rng.random(n)[:, None] > cumulative).sum(1).clip(max=classes - 1)


def test_reliability_agrees_with_sklearn():
    logits, labels = planted(temperature=2.0)
    prob = softmax(logits, axis=1)
    ours = reliability(prob, labels)
    accuracy, confidence = calibration_curve(prob.argmax(1) == labels, prob.max(1), n_bins=15, strategy="uniform")
    assert ours.accuracy == pytest.approx(accuracy) and ours.confidence == pytest.approx(confidence)
    assert ours.count.sum() == len(labels)
    assert ece(prob, labels) == pytest.approx(np.abs(accuracy - confidence) @ ours.count / ours.count.sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_found_and_calibrates(temperature):
    logits, labels = planted(temperature=temperature)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.05)
    after = ece(softmax(logits / found, axis=1), labels)
    assert after < 0.015
    if temperature != 1.0:
        assert ece(softmax(logits, axis=1), labels) > 5 * after


def test_temperature_is_the_minimum_of_the_likelihood():
    logits, labels = planted(n=500, temperature=1.7)
    found = fit_temperature(logits, labels)

    def nll(t):
        return -np.log(softmax(logits / t, axis=1)[np.arange(len(labels)), labels]).mean()

    assert nll(found) <= min(nll(found * 0.99), nll(found * 1.01))


def test_what_is_no_probability_is_refused():
    logits, labels = planted(n=10)
    with pytest.raises(RankdError, match="not probabilities"):
        ece(logits, labels)
    with pytest.raises(RankdError, match="expected"):
        ece(softmax(logits, axis=1), labels[:-1])
    with pytest.raises(RankdError, match="diverged"):
        fit_temperature(np.full((4, 3), np.nan), np.zeros(4, int))


def test_conformal_interval_keeps_its_promise():
    rng = np.random.default_rng(0)
    covered = [np.abs(rng.standard_t(3, 500)).__le__(conformal_radius(rng.standard_t(3, 200), 0.9)).mean() for _ in range(200)]
    assert 0.89 <= np.mean(covered) <= 0.92
    assert conformal_radius(np.array([1.0, 2.0]), 0.9) == float("inf")
