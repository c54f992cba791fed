"""Rank Matching: Eqs. 4 and 5 with a pencil, against torch's own KL, and at the edges."""
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dtg_core.guidance import rank_matching


def test_pencil_case():
    # Two members: teacher's softmax of (ln 3, 0) is (3/4, 1/4); the student ranks both alike, (1/2, 1/2).
    teacher = torch.tensor([math.log(3.0), 0.0, 5.0])
    student = torch.tensor([1.0, 1.0, -2.0])
    loss = rank_matching(student, teacher, torch.tensor([0, 0, 1]), 2)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)  # the third candidate stands alone: KL 0
    assert loss.item() == pytest.approx(expected / 2, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
def test_equals_kl_div_per_cluster(temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 50, generator=generator) * 3
    cluster = torch.randint(0, 7, (50,), generator=generator)
    expected = sum(
        F.kl_div(
            F.log_softmax(student[cluster == j] / temperature, 0), F.log_softmax(teacher[cluster == j] / temperature, 0),
            log_target=True, reduction="sum",
        )
        for j in range(7)
    ) / 7
    torch.testing.assert_close(rank_matching(student, teacher, cluster, 7, temperature), expected)


def test_same_ranks_give_zero_and_a_shift_changes_nothing():
    logits = torch.tensor([0.3, -2.0, 4.0, 1.0])
    cluster = torch.tensor([0, 0, 1, 1])
    assert rank_matching(logits, logits, cluster, 2).item() == pytest.approx(0, abs=1e-6)
    assert rank_matching(logits + 7, logits, cluster, 2).item() == pytest.approx(0, abs=1e-6)


def test_gradient_reaches_the_student_only_and_pulls_toward_the_teacher():
    student = torch.zeros(2, requires_grad=True)
    teacher = torch.tensor([2.0, 0.0], requires_grad=True)
    rank_matching(student, teacher, torch.zeros(2).long(), 1).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad[0] < 0 < student.grad[1]


def test_without_clusters_it_is_a_connected_zero():
    parameter = torch.ones(3, requires_grad=True)
    loss = rank_matching(parameter[:0], torch.zeros(0), torch.zeros(0).long(), 0)
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(parameter.grad, torch.zeros(3))


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_logits_stay_finite(scale):
    student = torch.tensor([scale, 0.0, -scale], requires_grad=True)
    loss = rank_matching(student, -student.detach(), torch.zeros(3).long(), 1)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
