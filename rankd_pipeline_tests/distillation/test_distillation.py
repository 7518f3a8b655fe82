"""Distillation losses against their formulas, and the teacher's view with its count of passes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rankd_pipeline.distillation.response import hard_teacher_loss, label_loss, response_loss
from rankd_pipeline.distillation.teacher_view import TeacherView
from rankd_pipeline.errors import RankdError

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.1, 0.0], [0.0, 3.0, 0.0]])
TEACHER = torch.tensor([[4.0, 1.0, -3.0], [0.0, 2.0, 0.0], [1.0, 1.0, 5.0]])
LABELS = torch.tensor([0, -1, 2])
HAS = torch.tensor([1, 0, 1], dtype=torch.uint8)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
def test_response_loss_is_the_formula(temperature):
    p = np.exp(TEACHER.numpy() / temperature)
    p /= p.sum(1, keepdims=True)
    q = np.exp(LOGITS.numpy() / temperature)
    q /= q.sum(1, keepdims=True)
    soft = (p * np.log(p / q)).sum(1).mean()
    hard = -np.mean([math.log(torch.softmax(LOGITS[i], 0)[LABELS[i]]) for i in (0, 2)])
    expected = 0.7 * temperature**2 * soft + 0.3 * hard
    assert response_loss(LOGITS, TEACHER, LABELS, HAS, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_batch_without_labels_has_the_soft_part_only_and_a_finite_gradient():
    student = LOGITS.clone().requires_grad_()
    loss = response_loss(student, TEACHER, LABELS, torch.zeros(3), T=2.0)
    loss.backward()
    assert student.grad is not None and student.grad.isfinite().all() and student.grad.abs().sum() > 0
    assert loss.item() == pytest.approx(response_loss(LOGITS, TEACHER, LABELS, HAS, 2.0, alpha=1.0).item() * 0.7)
    assert label_loss(LOGITS, LABELS, torch.zeros(3)).item() == 0.0


def test_labels_in_unlabelled_rows_do_not_count():
    other = torch.tensor([0, 1, 2])
    assert label_loss(LOGITS, LABELS, HAS) == label_loss(LOGITS, other, HAS)


def test_soft_gradient_keeps_its_size_over_temperature():
    """T² is there for this (Hinton et al., section 2): without it the gradient at T = 8 is some 60 times smaller."""
    sizes = []
    for temperature in (4.0, 8.0):
        student = LOGITS.clone().requires_grad_()
        response_loss(student, TEACHER, LABELS, HAS, temperature, alpha=1.0).backward()
        sizes.append(student.grad.norm().item())
    assert 0.7 < sizes[1] / sizes[0] < 1.4


@given(st.floats(-30, 30), st.floats(0.5, 10))
def test_a_student_that_agrees_up_to_a_constant_has_no_soft_loss(shift, temperature):
    loss = response_loss(TEACHER + shift, TEACHER, LABELS, torch.zeros(3), temperature)
    assert abs(loss.item()) < 1e-3


def test_hard_teacher_loss_knows_only_the_first_choice():
    sharper = TEACHER * 7
    assert hard_teacher_loss(LOGITS, TEACHER) == hard_teacher_loss(LOGITS, sharper)
    assert hard_teacher_loss(TEACHER * 50, TEACHER) < 1e-6


def test_teacher_view_serves_rows_and_counts_passes():
    teacher = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    inputs = torch.randn(10, 4)
    stored = teacher(inputs).detach().numpy()
    view = TeacherView(stored, teacher)
    rows = torch.tensor([3, 3, 9])
    assert torch.equal(view.logits(rows), torch.from_numpy(stored)[rows])
    assert view.passes == 0
    assert torch.allclose(view.run(inputs[rows]), view.logits(rows), atol=1e-6)
    assert view.passes == 3
    hidden = view.hidden([inputs], ["0", "1"])
    assert torch.equal(hidden["0"].relu(), hidden["1"]) and hidden["0"].shape == (10, 6)
    assert view.passes == 13
    assert not any(p.requires_grad for p in teacher.parameters())


def test_teacher_view_says_what_it_lacks():
    with pytest.raises(RankdError, match="stored soft labels"):
        TeacherView(None, nn.Linear(2, 2)).logits(torch.tensor([0]))
    with pytest.raises(RankdError, match="needs passes"):
        TeacherView(np.zeros((2, 3))).run(torch.zeros(1, 2))
    with pytest.raises(RankdError, match="no layer 'blocks.7'"):
        TeacherView(None, nn.Linear(2, 2)).hidden([torch.zeros(1, 2)], ["blocks.7"])
