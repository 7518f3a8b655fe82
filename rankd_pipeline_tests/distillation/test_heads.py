"""The heads: losses with known values, calibration that keeps its promise, and arms that ask for what they say."""

import numpy as np
import pytest
import torch

from rankd_pipeline.distillation.heads import ClassificationHead, EventsHead, RegressionHead, nmse

RNG = np.random.default_rng(0)


def logits_of(p: np.ndarray) -> np.ndarray:
    return np.log(p) - np.log1p(-p)


def batch(label: np.ndarray, teacher: np.ndarray | None = None, has=None, **more: np.ndarray) -> dict[str, torch.Tensor]:
    columns = {"label": label, "has_label": np.ones(len(label), np.uint8) if has is None else np.asarray(has), **more}
    if teacher is not None:
        columns["teacher"] = teacher
    return {name: torch.as_tensor(value) for name, value in columns.items()}


@pytest.mark.parametrize("head", [ClassificationHead(), EventsHead(), RegressionHead()])
def test_a_student_that_says_what_the_teacher_says_has_no_distance_from_it(head):
    outputs = RNG.normal(0, 2, (50, 6)).astype(np.float32)
    neutral = head.neutral or {"radius": 1.0}
    assert head.divergence(outputs, head.stored(outputs, neutral)) == pytest.approx(0.0, abs=1e-4)
    assert head.divergence(outputs + RNG.normal(0, 1, outputs.shape), head.stored(outputs, neutral)) > 0.01


def test_event_loss_is_binary_cross_entropy_over_labelled_rows_and_counted_outputs():
    head = EventsHead()
    outputs = torch.tensor([[0.0, 2.0], [1.0, -1.0]])
    truth = np.array([[0.5, 1.0], [0.0, 0.0]], np.float32)
    first = np.mean([np.log(2.0), np.log1p(np.exp(-2.0))])
    assert head.supervised_loss(outputs, batch(truth, has=[1, 0])).item() == pytest.approx(first, rel=1e-6)
    weight = np.array([[1.0, 0.0], [1.0, 1.0]], np.float32)
    assert head.supervised_loss(outputs, batch(truth, has=[1, 0], weight=weight)).item() == pytest.approx(np.log(2.0), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_event_distillation_is_tempered_kl_and_keeps_the_size_of_its_gradient(temperature):
    student, teacher = RNG.normal(0, 1, (4, 3)), RNG.normal(0, 2, (4, 3)).astype(np.float32)
    p, q = (1 / (1 + np.exp(-x / temperature)) for x in (teacher, student))
    expected = temperature**2 * np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    data = batch(np.zeros((4, 3), np.float32), teacher, has=[0] * 4)
    assert EventsHead().student_loss("distilled", torch.tensor(student), data, temperature, 1.0).item() == pytest.approx(expected)


def test_event_temperature_is_found_and_makes_the_events_honest():
    p = RNG.uniform(0.02, 0.98, (4000, 5))
    happened = (RNG.random(p.shape) < p).astype(np.float32)
    overconfident = 2.5 * logits_of(p)
    head = EventsHead()
    calibration = head.fit_calibration(overconfident, happened)
    assert calibration["temperature"] == pytest.approx(2.5, rel=0.05)
    said = head.predictive(overconfident, calibration)
    near = (said > 0.7) & (said < 0.8)
    assert happened[near].mean() == pytest.approx(0.75, abs=0.03)
    # Probabilities known as such (a BLER table) give the same temperature without the noise of a draw.
    assert head.fit_calibration(overconfident, p)["temperature"] == pytest.approx(2.5, rel=1e-3)


def test_event_validation_loss_is_zero_at_the_truth():
    p = RNG.uniform(0.01, 0.99, (100, 4))
    head = EventsHead()
    assert head.validation_loss(logits_of(p), p) == pytest.approx(0.0, abs=1e-9)
    assert head.task_score(logits_of(p) + 0.5, p) < -0.001


def test_regression_loss_is_the_nmse_of_each_sample():
    head = RegressionHead()
    truth = np.stack([np.full((2, 3), 1.0), np.full((2, 3), 100.0)]).astype(np.float32)
    estimate = truth * np.array([1.1, 1.2], np.float32)[:, None, None]
    assert head.supervised_loss(torch.tensor(estimate), batch(truth)).item() == pytest.approx((0.01 + 0.04) / 2, rel=1e-4)
    assert nmse(estimate, truth) == pytest.approx(0.025, rel=1e-4)
    assert head.task_score(estimate, truth) == pytest.approx(-10 * np.log10(0.025), rel=1e-4)
    weight = np.zeros_like(truth)
    weight[:, 0] = 1
    estimate[:, 1] = 0
    assert head.supervised_loss(torch.tensor(estimate), batch(truth, weight=weight)).item() == pytest.approx(0.025, rel=1e-4)


def test_regression_distillation_weighs_teacher_and_truth():
    head = RegressionHead()
    truth, teacher = np.ones((1, 4), np.float32), np.full((1, 4), 2.0, np.float32)
    outputs = torch.full((1, 4), 1.5)
    both = head.student_loss("distilled", outputs, batch(truth, teacher), 1.0, 0.7).item()
    assert both == pytest.approx(0.7 * 0.25 / 4 + 0.3 * 0.25)
    alone = head.student_loss("distilled", outputs, batch(truth, teacher, has=[0]), 1.0, 0.7).item()
    assert alone == pytest.approx(0.7 * 0.25 / 4)
    assert head.student_loss("scratch", outputs, batch(truth, teacher), 1.0, 0.7).item() == pytest.approx(0.25)


@pytest.mark.parametrize("variance", [False, True])
def test_conformal_intervals_hold_as_often_as_they_promise(variance):
    """On fresh data, whatever the noise: also where its size differs from sample to sample."""
    size = np.exp(RNG.normal(0, 1, (3000, 1))) if variance else np.ones((3000, 1))
    truth = RNG.normal(0, 5, (3000, 8))
    estimate = truth + size * RNG.standard_t(3, truth.shape)
    outputs = np.stack([estimate, np.broadcast_to(2 * np.log(size), truth.shape)], axis=1) if variance else estimate
    head = RegressionHead(variance=variance)
    calibration = head.fit_calibration(outputs[:1500], truth[:1500])
    said = head.predictive(outputs[1500:], calibration)
    covered = np.abs(said[:, 0] - truth[1500:]) <= said[:, 1]
    assert covered.mean() == pytest.approx(0.9, abs=0.01)
    if variance:
        wide = size[1500:, 0] > np.median(size)
        assert covered[wide].mean() == pytest.approx(covered[~wide].mean(), abs=0.02)
    assert (head.neutral is not None) == variance


def test_variance_learns_the_size_of_the_error_and_leaves_the_estimate_alone():
    head = RegressionHead(variance=True)
    truth = torch.zeros(256, 16)
    truth[:, 0] = 10.0
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0)) * 0.5
    estimate = (truth + noise).requires_grad_()
    log_variance = torch.zeros(1, 16, requires_grad=True)
    data = {"label": truth, "has_label": torch.ones(256)}
    for _ in range(400):
        loss = head.supervised_loss(torch.stack([estimate.detach(), log_variance.expand(256, 16)], 1), data)
        (gradient,) = torch.autograd.grad(loss, log_variance)
        log_variance = (log_variance - 20.0 * gradient).detach().requires_grad_()
    assert torch.exp(0.5 * log_variance).mean().item() == pytest.approx(0.5, rel=0.05)
    with_variance = head.supervised_loss(torch.stack([estimate, log_variance.detach().expand(256, 16)], 1), data)
    plain = RegressionHead().supervised_loss(estimate, data)
    assert torch.allclose(*(torch.autograd.grad(loss, estimate)[0] for loss in (with_variance, plain)))


def test_what_is_stored_is_fine_enough():
    outputs = np.array([[500.0, 0.001, -3.0]], np.float32)
    stored = ClassificationHead().stored(outputs, {"temperature": 2.0}).astype(np.float32)
    assert np.isfinite(stored).all() and (stored[0, 0] - stored[0, 2]) == pytest.approx(251.5, rel=2e-3)
    assert np.abs(EventsHead().stored(outputs, {"temperature": 1.0})).max() == 30.0
