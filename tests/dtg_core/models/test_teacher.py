"""The mean teacher against timm's average and with a pencil."""
from __future__ import annotations

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from dtg_core.models.teacher import copy_frozen, keep_rate, make_teacher, update_teacher


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def shaken(module: nn.Module) -> None:
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.add_(torch.ones_like(tensor))


def test_keep_rate_is_soft_teachers_ramp():
    assert [keep_rate(step, 0.999) for step in (0, 1, 3, 999, 5000)] == [0, 0.5, 0.75, 0.999, 0.999]


def test_first_update_copies_and_later_ones_average():
    student = network()
    teacher = make_teacher(student)
    shaken(student)
    update_teacher(teacher, student, 0, 0.9)
    torch.testing.assert_close(teacher.state_dict(), student.state_dict())
    before = copy.deepcopy(teacher.state_dict())
    shaken(student)
    update_teacher(teacher, student, 100, 0.9)
    for name, tensor in teacher.state_dict().items():
        step = 0.1 if tensor.is_floating_point() else 1
        torch.testing.assert_close(tensor, before[name] + step, rtol=1e-5, atol=1e-6)


def test_equals_timms_average():
    student = network()
    teacher = make_teacher(student)
    oracle = ModelEmaV3(student, decay=0.97)
    for _ in range(5):
        shaken(student)
        update_teacher(teacher, student, 1000, 0.97)
        oracle.update(student)
    torch.testing.assert_close(teacher.state_dict(), oracle.module.state_dict(), rtol=1e-5, atol=1e-6)


def test_only_frozen_parameters_are_copied():
    student = network()
    teacher = make_teacher(student)
    student[0].requires_grad_(False)
    shaken(student)
    before = copy.deepcopy(teacher.state_dict())
    copy_frozen(teacher, student)
    assert torch.equal(teacher[0].weight, student[0].weight)
    assert torch.equal(teacher[0].bias, student[0].bias)
    for name, tensor in teacher.state_dict().items():
        assert name.startswith("0.") or torch.equal(tensor, before[name])


def test_teacher_never_trains_and_shares_nothing():
    student = network().train()
    teacher = make_teacher(student)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    shaken(student)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(teacher.state_dict(), student.state_dict())
