"""Response distillation: the student learns the teacher's probabilities (Hinton, Vinyals, Dean, arXiv:1503.02531).

Shapes: B samples, K classes.
"""

import torch
from torch import Tensor
from torch.nn import functional


def response_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    has_label: Tensor,
    T: float,
    alpha: float = 0.7,
) -> Tensor:
    """Return alpha · T² · KL(teacher ‖ student at temperature T) + (1 − alpha) · cross-entropy on labelled rows.

    T² keeps the size of the soft gradient, which falls as 1/T², level with the cross-entropy's. Where labels may be
    RSRP-derived probabilities, see `label_loss`.

    Args:
        student_logits, teacher_logits: [B, K].
        labels: [B] class indices; what stands in rows without a label is ignored.
        has_label: [B], non-zero where `labels` holds one. A batch without any label has the soft part only.
        T: temperature, above zero.
        alpha: weight of the soft part, 0 to 1.
    """
    soft = functional.kl_div(
        functional.log_softmax(student_logits / T, dim=-1),
        functional.log_softmax(teacher_logits / T, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return alpha * T**2 * soft + (1 - alpha) * label_loss(student_logits, labels, has_label)


def label_loss(student_logits: Tensor, labels: Tensor, has_label: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled rows of a batch, 0 where there is none: the from-scratch control.

    Args: as in `response_loss`.
    """
    weight = (has_label != 0).to(student_logits.dtype)
    safe = torch.where(has_label != 0, labels, torch.zeros_like(labels))
    each = functional.cross_entropy(student_logits, safe, reduction="none")
    return (each * weight).sum() / weight.sum().clamp(min=1.0)


def event_response_loss(student_logits: Tensor, teacher_logits: Tensor, T: float) -> Tensor:
    """T² · KL(teacher ‖ student) of each independent event [B, ...], both as Bernoulli variables at temperature T."""
    soft_teacher = torch.sigmoid(teacher_logits / T)
    cross = functional.binary_cross_entropy_with_logits(student_logits / T, soft_teacher, reduction="none")
    entropy = functional.binary_cross_entropy_with_logits(teacher_logits / T, soft_teacher, reduction="none")
    return T**2 * (cross - entropy)


def hard_teacher_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy to the teacher's first choice: the control that shows what its dark knowledge adds."""
    return functional.cross_entropy(student_logits, teacher_logits.argmax(dim=-1))
