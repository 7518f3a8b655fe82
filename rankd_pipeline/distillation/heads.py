"""What follows from the kind of output a network has: its losses, its calibration, its way of being distilled.

Shapes: B or n samples, K outputs. A training batch holds the model inputs and the columns `label` [B], `has_label` [B],
`target` [B, K] where labels are soft, and, for a student, `teacher` [B, K]
(the teacher's calibrated outputs before the link function).
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rankd_pipeline.distillation.response import hard_teacher_loss, label_loss, response_loss
from rankd_pipeline.evaluation.calibration import fit_temperature

Calibration = Mapping[str, float]
ARMS = ("distilled", "scratch", "hard")
"""Ways to train the student: on the teacher's soft labels, on labels alone, on the teacher's hard labels."""


class Head(Protocol):
    """One row of the design's head table."""

    calibration_metric: str

    def supervised_loss(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Loss on the truth of labelled rows."""
        ...

    def student_loss(self, arm: str, outputs: Tensor, batch: Mapping[str, Tensor], temperature: float, alpha: float) -> Tensor:
        """Loss of one of ARMS."""
        ...

    def fit_calibration(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """What makes the outputs [n, K] honest, fitted on validation."""
        ...

    def calibrated(self, outputs: np.ndarray, calibration: Calibration) -> np.ndarray:
        """Outputs as they are stored as soft labels (logits), [n, K]."""
        ...

    def predictive(self, outputs: np.ndarray, calibration: Calibration) -> np.ndarray:
        """Outputs as a user sees them (probabilities), [n, K]."""
        ...

    def validation_loss(self, outputs: np.ndarray, labels: np.ndarray) -> float:
        """What early stopping looks at; lower is better."""
        ...

    def task_score(self, outputs: np.ndarray, labels: np.ndarray) -> float:
        """What the student's temperature and arm are chosen by, on validation; higher is better."""
        ...

    def divergence(self, outputs: np.ndarray, teacher: np.ndarray) -> float:
        """How far outputs [n, K] are from the teacher's; 0 where they agree."""
        ...


class ClassificationHead:
    """Class probabilities: cross-entropy, response distillation, temperature scaling, ECE."""

    calibration_metric = "ece"

    def supervised_loss(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        if "target" not in batch:
            return label_loss(outputs, batch["label"], batch["has_label"])
        labelled = (batch["has_label"] != 0).to(outputs.dtype)
        each = -(batch["target"].to(outputs.dtype) * torch.log_softmax(outputs, dim=-1)).sum(dim=-1)
        return (each * labelled).sum() / labelled.sum().clamp(min=1.0)

    def student_loss(self, arm: str, outputs: Tensor, batch: Mapping[str, Tensor], temperature: float, alpha: float) -> Tensor:
        if arm == "distilled":
            soft = response_loss(outputs, batch["teacher"].float(), batch["label"], batch["has_label"], temperature, alpha=1.0)
            return alpha * soft + (1 - alpha) * self.supervised_loss(outputs, batch)
        if arm == "hard":
            return hard_teacher_loss(outputs, batch["teacher"].float())
        return self.supervised_loss(outputs, batch)

    def fit_calibration(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {"temperature": fit_temperature(outputs, labels)}

    def calibrated(self, outputs: np.ndarray, calibration: Calibration) -> np.ndarray:
        return outputs / calibration["temperature"]

    def predictive(self, outputs: np.ndarray, calibration: Calibration) -> np.ndarray:
        scaled = self.calibrated(outputs.astype(np.float64), calibration)
        shifted = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)

    def validation_loss(self, outputs: np.ndarray, labels: np.ndarray) -> float:
        shifted = outputs - outputs.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(shifted).sum(axis=1))
        return float(np.mean(log_sum - shifted[np.arange(len(labels)), labels]))

    def task_score(self, outputs: np.ndarray, labels: np.ndarray) -> float:
        return float(np.mean(outputs.argmax(axis=1) == labels))

    def divergence(self, outputs: np.ndarray, teacher: np.ndarray) -> float:
        one = {"temperature": 1.0}
        p, q = self.predictive(teacher, one).astype(np.float64), self.predictive(outputs, one).astype(np.float64)
        return float(np.mean(np.sum(p * (np.log(p + 1e-12) - np.log(q + 1e-12)), axis=1)))


def parameter_count(module: nn.Module) -> int:
    """Trainable parameters of a network."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def outputs_of(module: nn.Module, inputs: Mapping[str, np.ndarray], batch: int = 2048) -> np.ndarray:
    """Raw outputs [n, K] float32 of `module` in eval mode, batch by batch, without gradients."""
    module.eval()
    count = len(next(iter(inputs.values())))
    parts: list[Any] = []
    with torch.no_grad():
        for start in range(0, count, batch):
            chunk = {name: torch.as_tensor(value[start : start + batch]) for name, value in inputs.items()}
            parts.append(module(**chunk).float().numpy())
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
