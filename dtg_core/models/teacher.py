"""The mean teacher (Tarvainen & Valpola, 2017): an exponential moving average of the student's detector."""
from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def keep_rate(step: int, rate: float) -> float:
    """min(rate, 1 - 1 / (step + 1)), Soft Teacher's ramp: a full copy at step 0, ``rate`` from step 1 / (1 - rate) on."""
    return min(rate, 1 - 1 / (step + 1))


def make_teacher(detector: Module) -> Module:
    """A copy of the student's detector that never trains: evaluation mode, no gradients, float32."""
    return copy.deepcopy(detector).eval().requires_grad_(False)


@torch.no_grad()
def copy_frozen(teacher: nn.Module, student: nn.Module) -> None:
    """Copy the student's frozen parameters, which may have been trained before: ``update_teacher`` assumes that they are equal."""
    for averaged, own in zip(teacher.parameters(), student.parameters(), strict=True):
        if not own.requires_grad:
            averaged.copy_(own)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, step: int, rate: float) -> None:
    """Move the teacher towards the student after the optimizer's step, by one fused update.

    Parameters and float buffers (batch norm statistics) are averaged, integer buffers are copied. ``step`` counts from 0.
    """
    pairs: list[tuple[Tensor, Tensor]] = [
        (averaged, own.detach()) for averaged, own in zip(teacher.parameters(), student.parameters(), strict=True)
        if own.requires_grad  # frozen parameters are equal already
    ]
    for averaged, own in zip(teacher.buffers(), student.buffers(), strict=True):
        if averaged.is_floating_point():
            pairs.append((averaged, own))
        else:
            averaged.copy_(own)
    torch._foreach_lerp_([averaged for averaged, _ in pairs], [own for _, own in pairs], 1 - keep_rate(step, rate))
