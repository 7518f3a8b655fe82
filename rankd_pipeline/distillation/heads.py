"""What follows from the kind of output a network has: its losses, its calibration, its way of being distilled.

Shapes: B or n samples, K outputs; `...` is whatever a head's function outputs (K classes, events, a channel grid).
A training batch holds the model inputs and the columns `label` [B] (classes) or [B, ...], `has_label` [B], `target`
[B, K] where class labels are soft, `weight` [B, ...] where a function counts only some outputs, and, for a student,
`teacher` [B, ...] (the teacher's outputs as `soft_labels` stores them).
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rankd_pipeline.distillation.response import event_response_loss, hard_teacher_loss, label_loss, response_loss
from rankd_pipeline.evaluation.calibration import conformal_radius, fit_event_temperature, fit_temperature
from rankd_pipeline.training.fit import as_tensor

Calibration = Mapping[str, float]
GAUSSIAN_90 = 1.6449
"""Half width of a Gaussian's central 90 %, in standard deviations."""


class Head(Protocol):
    """One row of the design's head table.

    arms: ways to train the student that are compared. tempered: whether distillation knows a temperature.
    calibration_metric is its name in reports; calibration_rows and calibration_aggregate say how the evaluation table
    yields it. neutral: the calibration of an uncalibrated network, None where it says nothing of its own certainty.
    """

    kind: Literal["classification", "events", "regression"]
    arms: tuple[str, ...]
    tempered: bool
    calibration_metric: str
    calibration_rows: str
    calibration_aggregate: str
    neutral: Calibration | None

    def supervised_loss(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Loss on the truth of labelled rows."""
        ...

    def student_loss(self, arm: str, outputs: Tensor, batch: Mapping[str, Tensor], temperature: float, alpha: float) -> Tensor:
        """Loss of one of the arms."""
        ...

    def fit_calibration(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """What makes the outputs [n, ...] honest, fitted on validation."""
        ...

    def stored(self, outputs: np.ndarray, calibration: Calibration) -> np.ndarray:
        """Outputs as soft labels are stored: float16 [n, ...], which is far finer than any label is right."""
        ...

    def predictive(self, outputs: np.ndarray, calibration: Calibration) -> np.ndarray:
        """Outputs as a user sees them."""
        ...

    def validation_loss(self, outputs: np.ndarray, labels: np.ndarray) -> float:
        """What early stopping looks at; lower is better."""
        ...

    def task_score(self, outputs: np.ndarray, labels: np.ndarray) -> float:
        """What the student's temperature and arm are chosen by, on validation; higher is better."""
        ...

    def confidence(self, delivered: np.ndarray) -> np.ndarray:
        """How sure a deployed model is of each sample [n], 0 to 1, from what it delivers; NaN where it does not say."""
        ...

    def row_scores(self, delivered: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """What each delivered decision [n, ...] was worth by its label [n] or [n, ...]; higher is better."""
        ...

    def expected_scores(self, delivered: np.ndarray) -> np.ndarray:
        """The row scores [n] that the model's own certainty promises; NaN where it does not say how certain it is."""
        ...

    def divergence(self, outputs: np.ndarray, teacher: np.ndarray) -> float:
        """How far outputs [n, ...] are from the teacher's stored ones; 0 where they agree."""
        ...


class ClassificationHead:
    """Class probabilities: cross-entropy, response distillation, temperature scaling, ECE."""

    kind: Literal["classification", "events", "regression"] = "classification"
    arms: tuple[str, ...] = ("distilled", "scratch", "hard")
    tempered = True
    calibration_metric = calibration_rows = calibration_aggregate = "ece"
    neutral: Calibration | None = {"temperature": 1.0}

    def supervised_loss(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        if "target" not in batch:
            return label_loss(outputs, batch["label"], batch["has_label"])
        each = -(batch["target"].to(outputs.dtype) * torch.log_softmax(outputs, dim=-1)).sum(dim=-1)
        return _over_labelled(each, batch)

    def student_loss(self, arm: str, outputs: Tensor, batch: Mapping[str, Tensor], temperature: float, alpha: float) -> Tensor:
        if arm == "distilled":
            soft = response_loss(outputs, batch["teacher"].float(), batch["label"], batch["has_label"], temperature, alpha=1.0)
            return alpha * soft + (1 - alpha) * self.supervised_loss(outputs, batch)
        if arm == "hard":
            return hard_teacher_loss(outputs, batch["teacher"].float())
        return self.supervised_loss(outputs, batch)

    def fit_calibration(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {"temperature": fit_temperature(outputs, labels)}

    def stored(self, outputs: np.ndarray, calibration: Calibration) -> np.ndarray:
        # Centred, so that the largest magnitudes stay well inside float16; a softmax does not see the shift.
        centred = outputs - outputs.mean(axis=1, keepdims=True)
        return (centred / calibration["temperature"]).astype(np.float16)

    def predictive(self, outputs: np.ndarray, calibration: Calibration) -> np.ndarray:
        scaled = outputs.astype(np.float64) / calibration["temperature"]
        shifted = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)

    def validation_loss(self, outputs: np.ndarray, labels: np.ndarray) -> float:
        shifted = outputs - outputs.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(shifted).sum(axis=1))
        return float(np.mean(log_sum - shifted[np.arange(len(labels)), labels]))

    def task_score(self, outputs: np.ndarray, labels: np.ndarray) -> float:
        return float(np.mean(outputs.argmax(axis=1) == labels))

    def confidence(self, delivered: np.ndarray) -> np.ndarray:
        return delivered.max(axis=1)

    def row_scores(self, delivered: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """1 where the chosen class is the label, else 0."""
        return (delivered.argmax(axis=1) == labels).astype(np.float64)

    def expected_scores(self, delivered: np.ndarray) -> np.ndarray:
        return delivered.max(axis=1).astype(np.float64)

    def divergence(self, outputs: np.ndarray, teacher: np.ndarray) -> float:
        one = {"temperature": 1.0}
        p, q = self.predictive(teacher, one).astype(np.float64), self.predictive(outputs, one).astype(np.float64)
        return float(np.mean(np.sum(p * (np.log(p + 1e-12) - np.log(q + 1e-12)), axis=1)))


class EventsHead:
    """Independent event probabilities, as logits [n, ...]: the BLER of each MCS, say, known as a probability or as 0 and 1.

    Binary cross-entropy to truth and to the teacher (tempered as in Hinton et al., one event a Bernoulli), one
    temperature for all events, ECE over the events.
    """

    kind: Literal["classification", "events", "regression"] = "events"
    arms: tuple[str, ...] = ("distilled", "scratch", "hard")
    tempered = True
    calibration_metric = calibration_rows = calibration_aggregate = "ece"
    neutral: Calibration | None = {"temperature": 1.0}

    def supervised_loss(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        each = functional.binary_cross_entropy_with_logits(outputs, batch["label"].to(outputs.dtype), reduction="none")
        return _over_labelled(_per_sample(each, batch), batch)

    def student_loss(self, arm: str, outputs: Tensor, batch: Mapping[str, Tensor], temperature: float, alpha: float) -> Tensor:
        if arm == "scratch":
            return self.supervised_loss(outputs, batch)
        teacher = batch["teacher"].to(outputs.dtype)
        if arm == "hard":
            each = functional.binary_cross_entropy_with_logits(outputs, (teacher > 0).to(outputs.dtype), reduction="none")
            return _per_sample(each, batch).mean()
        soft = _per_sample(event_response_loss(outputs, teacher, temperature), batch).mean()
        return alpha * soft + (1 - alpha) * self.supervised_loss(outputs, batch)

    def fit_calibration(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {"temperature": fit_event_temperature(outputs, labels)}

    def stored(self, outputs: np.ndarray, calibration: Calibration) -> np.ndarray:
        # Beyond +-30 a logit is certain (1e-13) and would only strain float16.
        return np.clip(outputs / calibration["temperature"], -30.0, 30.0).astype(np.float16)

    def predictive(self, outputs: np.ndarray, calibration: Calibration) -> np.ndarray:
        return _sigmoid(outputs / calibration["temperature"]).astype(np.float32)

    def validation_loss(self, outputs: np.ndarray, labels: np.ndarray) -> float:
        return _bernoulli_nll(outputs, labels) - _bernoulli_entropy(labels)

    def task_score(self, outputs: np.ndarray, labels: np.ndarray) -> float:
        return -self.validation_loss(outputs, labels)

    def confidence(self, delivered: np.ndarray) -> np.ndarray:
        return np.maximum(delivered, 1.0 - delivered).reshape(len(delivered), -1).mean(axis=1)

    def row_scores(self, delivered: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """1 minus the mean squared error of the probabilities (Brier)."""
        return 1.0 - ((delivered.astype(np.float64) - labels) ** 2).reshape(len(delivered), -1).mean(axis=1)

    def expected_scores(self, delivered: np.ndarray) -> np.ndarray:
        """As labels of 0 and 1 would bear out, were the probabilities right."""
        p = delivered.astype(np.float64)
        return 1.0 - (p * (1.0 - p)).reshape(len(p), -1).mean(axis=1)

    def divergence(self, outputs: np.ndarray, teacher: np.ndarray) -> float:
        wanted = _sigmoid(teacher.astype(np.float64))
        return _bernoulli_nll(outputs, wanted) - _bernoulli_entropy(wanted)


class RegressionHead:
    """Point estimates [n, ...] of a real quantity, with an interval that holds the truth as often as promised.

    Loss: NMSE of each sample, so that a weak channel counts as much as a strong one, to truth and to the teacher. No
    scores are standardised: the scale is what is learned (NF-KD). Interval: split conformal on validation (Lei et al. 2018); the
    network itself stays as it is.

    Args:
        variance: the network outputs [n, 2, ...], estimate and log-variance; the interval then follows the variance.
            It is learned from the residual as it stands, so that it never draws the estimate away from the truth.
        coverage: share of outputs that the interval promises to hold.
        likelihood: the estimate, too, is learned by the Gaussian likelihood, which weighs every error by the variance that the
            network predicts for it, and validation counts decibels. For quantities whose error spans orders of
            magnitude (a channel at -5 and at 25 dB SNR): in an NMSE the worst conditions drown all others.
    """

    kind: Literal["classification", "events", "regression"] = "regression"
    arms: tuple[str, ...] = ("distilled", "scratch")
    tempered = False
    calibration_metric, calibration_rows = "coverage_error", "covered"

    def __init__(self, variance: bool = False, coverage: float = 0.9, likelihood: bool = False) -> None:
        self.variance, self.coverage, self.likelihood = variance or likelihood, coverage, likelihood
        self.calibration_aggregate = f"off_by({coverage:g})"
        self.neutral: Calibration | None = {"radius": GAUSSIAN_90} if self.variance else None

    def estimate(self, outputs: Any) -> Any:
        """The point estimates [n, ...] in outputs, an array or a tensor."""
        return outputs[:, 0] if self.variance else outputs

    def supervised_loss(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        label = batch["label"].to(outputs.dtype)
        if self.likelihood:
            return _over_labelled(self._misfit(outputs, label, batch), batch)
        loss = _over_labelled(_nmse(self.estimate(outputs), label, batch), batch)
        if not self.variance:
            return loss
        return loss + 0.1 * _over_labelled(self._misfit(outputs, label, batch, estimate=False), batch)

    def student_loss(self, arm: str, outputs: Tensor, batch: Mapping[str, Tensor], temperature: float, alpha: float) -> Tensor:
        supervised = self.supervised_loss(outputs, batch)
        if arm == "scratch":
            return supervised
        teacher = batch["teacher"].to(outputs.dtype)
        if self.likelihood:
            # Weighed as the errors to the truth are; how large these are, the variance learns from the truth alone.
            each = 0.5 * (self.estimate(outputs) - teacher) ** 2 * torch.exp(-outputs[:, 1].detach())
            variance = _over_labelled(self._misfit(outputs, batch["label"].to(outputs.dtype), batch, estimate=False), batch)
            return alpha * (_per_sample(each, batch).mean() + variance) + (1 - alpha) * supervised
        return alpha * _nmse(self.estimate(outputs), teacher, batch).mean() + (1 - alpha) * supervised

    def _misfit(self, outputs: Tensor, label: Tensor, batch: Mapping[str, Tensor], estimate: bool = True) -> Tensor:
        """Negative Gaussian log-likelihood [B] of the label; without `estimate` only the variance is moved by it."""
        found = self.estimate(outputs)
        square = ((found if estimate else found.detach()) - label) ** 2
        log_variance = outputs[:, 1]
        return _per_sample(0.5 * (log_variance + square * torch.exp(-log_variance)), batch)

    def fit_calibration(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        residual = (self.estimate(outputs) - labels) / self._sigma(outputs)
        return {"radius": conformal_radius(residual.reshape(-1), self.coverage)}

    def stored(self, outputs: np.ndarray, calibration: Calibration) -> np.ndarray:
        return self.estimate(outputs).astype(np.float16)

    def predictive(self, outputs: np.ndarray, calibration: Calibration) -> np.ndarray:
        """[n, 2, ...]: estimate and half width of its interval."""
        estimate = self.estimate(outputs)
        half = np.broadcast_to(calibration["radius"] * self._sigma(outputs), estimate.shape)
        return np.stack([estimate, half], axis=1).astype(np.float32)

    def validation_loss(self, outputs: np.ndarray, labels: np.ndarray) -> float:
        """NMSE; with `likelihood` the mean over samples of their NMSE in dB."""
        error = nmse_of_samples(self.estimate(outputs), labels)
        return float(np.mean(10.0 * np.log10(np.maximum(error, 1e-12)))) if self.likelihood else float(np.mean(error))

    def task_score(self, outputs: np.ndarray, labels: np.ndarray) -> float:
        loss = self.validation_loss(outputs, labels)
        return -loss if self.likelihood else -10.0 * float(np.log10(max(loss, 1e-12)))

    def confidence(self, delivered: np.ndarray) -> np.ndarray:
        """1 / (1 + expected NMSE)."""
        return 1.0 / (1.0 + 10.0 ** (-self.expected_scores(delivered) / 10.0))

    def row_scores(self, delivered: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Minus the NMSE in dB."""
        estimate = delivered[:, 0] if delivered.ndim > labels.ndim else delivered
        return -_ratio_db((estimate.astype(np.float64) - labels) ** 2, labels.astype(np.float64) ** 2)

    def expected_scores(self, delivered: np.ndarray) -> np.ndarray:
        """From delivered intervals [n, 2, ...] (estimate, half width), taken as Gaussian; a bare estimate says nothing."""
        if not self.variance:
            return np.full(len(delivered), np.nan)
        sigma = delivered[:, 1].astype(np.float64) / GAUSSIAN_90
        return -_ratio_db(sigma**2, delivered[:, 0].astype(np.float64) ** 2)

    def divergence(self, outputs: np.ndarray, teacher: np.ndarray) -> float:
        return nmse(self.estimate(outputs), teacher)

    def _sigma(self, outputs: np.ndarray) -> Any:
        return np.exp(0.5 * outputs[:, 1]) if self.variance else 1.0


def nmse_of_samples(estimate: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """|estimate - truth|^2 / |truth|^2 of each sample [n], linear; both [n, ...]."""
    error = ((estimate.astype(np.float64) - truth) ** 2).reshape(len(truth), -1).sum(axis=1)
    power = (truth.astype(np.float64) ** 2).reshape(len(truth), -1).sum(axis=1)
    return error / np.maximum(power, 1e-12)


def nmse(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Mean over samples of |estimate - truth|^2 / |truth|^2, linear; both [n, ...]."""
    return float(np.mean(nmse_of_samples(estimate, truth)))


def _ratio_db(error: np.ndarray, power: np.ndarray) -> np.ndarray:
    """Sum of error over sum of power of each sample [n], dB."""
    ratio = error.reshape(len(error), -1).sum(axis=1) / np.maximum(power.reshape(len(power), -1).sum(axis=1), 1e-12)
    return 10.0 * np.log10(np.maximum(ratio, 1e-12))


def _nmse(estimate: Tensor, truth: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """NMSE of each sample [B] over the outputs that count."""
    weight = batch["weight"].to(estimate.dtype) if "weight" in batch else torch.ones_like(truth)
    error = (weight * (estimate - truth) ** 2).flatten(1).sum(dim=1)
    return error / (weight * truth**2).flatten(1).sum(dim=1).clamp(min=1e-12)


def _per_sample(each: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean [B] of a loss [B, ...] over the outputs that count."""
    if "weight" not in batch:
        return each.flatten(1).mean(dim=1)
    weight = batch["weight"].to(each.dtype).expand_as(each)
    return (each * weight).flatten(1).sum(dim=1) / weight.flatten(1).sum(dim=1).clamp(min=1e-12)


def _over_labelled(each: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean of a loss [B] over the rows that carry a label; 0 where none does."""
    labelled = (batch["has_label"] != 0).to(each.dtype)
    return (each * labelled).sum() / labelled.sum().clamp(min=1.0)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x.astype(np.float64)))


def _bernoulli_nll(logits: np.ndarray, probability: np.ndarray) -> float:
    x = logits.astype(np.float64)
    return float(np.mean(np.logaddexp(0.0, x) - probability * x))


def _bernoulli_entropy(probability: np.ndarray) -> float:
    p = np.clip(probability.astype(np.float64), 1e-12, 1 - 1e-12)
    return float(np.mean(-p * np.log(p) - (1 - p) * np.log1p(-p)))


def parameter_count(module: nn.Module) -> int:
    """Trainable parameters of a network."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def outputs_of(module: nn.Module, inputs: Mapping[str, np.ndarray], batch: int = 2048) -> np.ndarray:
    """Raw outputs [n, ...] float32 of `module` in eval mode, batch by batch, without gradients."""
    module.eval()
    count, device = len(next(iter(inputs.values()))), next((p.device for p in module.parameters()), torch.device("cpu"))
    parts: list[Any] = []
    with torch.no_grad():
        for start in range(0, count, batch):
            chunk = {name: as_tensor(value[start : start + batch]).to(device) for name, value in inputs.items()}
            parts.append(module(**chunk).float().cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
