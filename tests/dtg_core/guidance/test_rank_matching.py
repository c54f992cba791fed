"""Rank Matching: Eqs. 4 and 5 with a pencil, against torch's own KL, and at the edges."""
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dtg_core.config import StageRule
from dtg_core.guidance.rank_matching import rank_matching
from dtg_core.losses import dense_terms
from dtg_core.structures import Assignment, DenseGuidance, Unreduced


def test_pencil_case():
    # Two members: teacher's softmax of (ln 3, 0) is (3/4, 1/4); the student ranks both alike, (1/2, 1/2).
    teacher = torch.tensor([math.log(3.0), 0.0, 5.0])
    student = torch.tensor([1.0, 1.0, -2.0])
    loss = rank_matching(student, teacher, torch.tensor([0, 0, 1]), 2)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)  # the third candidate stands alone: KL 0
    assert loss.tolist() == pytest.approx([expected, 0], rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
def test_equals_kl_div_per_cluster(temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 50, generator=generator) * 3
    cluster = torch.randint(0, 7, (50,), generator=generator)
    expected = torch.stack([
        F.kl_div(
            F.log_softmax(student[cluster == j] / temperature, 0), F.log_softmax(teacher[cluster == j] / temperature, 0),
            log_target=True, reduction="sum",
        )
        for j in range(7)
    ])
    torch.testing.assert_close(rank_matching(student, teacher, cluster, 7, temperature), expected)


def test_same_ranks_give_zero_and_a_shift_changes_nothing():
    logits = torch.tensor([0.3, -2.0, 4.0, 1.0])
    cluster = torch.tensor([0, 0, 1, 1])
    assert rank_matching(logits, logits, cluster, 2).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert rank_matching(logits + 7, logits, cluster, 2).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_gradient_reaches_the_student_only_and_pulls_toward_the_teacher():
    student = torch.zeros(2, requires_grad=True)
    teacher = torch.tensor([2.0, 0.0], requires_grad=True)
    rank_matching(student, teacher, torch.zeros(2).long(), 1).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad[0] < 0 < student.grad[1]


def test_without_clusters_nothing_is_there():
    assert rank_matching(torch.zeros(0), torch.zeros(0), torch.zeros(0).long(), 0).tolist() == []


@pytest.mark.parametrize("removed", [False, True])
def test_the_mean_is_over_the_clusters_that_have_members(removed):
    """Eq. 5 as it trains: a cluster that has left the view does not count, and without any the term is a connected 0."""
    logits = torch.zeros(1, 5, 1, requires_grad=True)
    sample = torch.arange(0 if removed else 5)
    teacher = torch.tensor([math.log(3.0), 0.0, 1.0, 0.0, 0.0])[sample]
    cluster = torch.tensor([0, 0, 2, 2, 2])[sample]
    live = torch.tensor(0 if removed else 2)
    dense = DenseGuidance(cluster, 3, sample, teacher, torch.ones(len(sample)), live)
    zeros = torch.zeros_like(sample)
    background = torch.zeros(1, 5, dtype=torch.bool)
    assignment = Assignment(zeros, sample, zeros, torch.zeros(len(sample), 4), background, dense)
    none = torch.zeros(len(sample))
    unreduced = Unreduced(none, none, background.float(), none, torch.tensor(1.0), torch.tensor(1.0))
    term = dense_terms(unreduced, logits, assignment, StageRule())["rank"]
    shares = torch.tensor([1.0, 0, 0]).softmax(0)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5) + float((shares * (3 * shares).log()).sum())
    assert term.total.item() == pytest.approx(0 if removed else expected, rel=1e-5)
    assert term.count.item() == (0 if removed else 2)
    term.total.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_logits_stay_finite(scale):
    student = torch.tensor([scale, 0.0, -scale], requires_grad=True)
    loss = rank_matching(student, -student.detach(), torch.zeros(3).long(), 1).sum()
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("logits", [[1e4, 0.0, -1e4], [1.0, 1.0, 1.0], [3.0]])
def test_tiny_temperatures_and_equal_logits_stay_finite(logits):
    student = torch.tensor(logits, requires_grad=True)
    loss = rank_matching(student, -student.detach(), torch.zeros(len(logits)).long(), 1, 1e-6)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    if len(set(logits)) == 1:
        assert loss.item() == 0
