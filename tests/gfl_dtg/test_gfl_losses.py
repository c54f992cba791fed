"""GFL's losses against values recorded from mmdetection, and against autograd."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gfl_helpers import load, tensor
from torch.testing import assert_close

from gfl_dtg.losses import (
    background_quality_focal_loss,
    boxes_from_distances,
    distances_from_boxes,
    distribution_focal_loss,
    integral,
    quality_focal_loss,
)

QFL_CASES = (
    "random", "all_background", "zero_targets", "one_targets", "extreme_logits", "single_class", "target_equals_prediction"
)
DFL_CASES = (
    "random", "zero_targets", "integer_targets", "last_bin_clamped_15p9", "just_below_16", "extreme_logits", "uniform_logits"
)


@pytest.mark.parametrize("case", QFL_CASES)
def test_quality_focal_loss_is_mmdetections(case: str) -> None:
    data = load("functions")
    logits, labels, scores, expected, gradient = (
        tensor(data[f"qfl/{case}/{name}"]) for name in ("logits", "labels", "scores", "loss_none", "grad_of_sum")
    )
    logits.requires_grad_()
    foreground = labels < logits.shape[1]
    targets = F.one_hot(labels, logits.shape[1] + 1)[:, :-1] * scores.unsqueeze(1)
    assigned = quality_focal_loss(logits[foreground], targets[foreground], 2.0)
    background = background_quality_focal_loss(logits[~foreground], 2.0)
    assert_close(assigned, expected[foreground], rtol=1e-5, atol=1e-7)
    assert_close(background, expected[~foreground], rtol=1e-5, atol=1e-7)
    (assigned.sum() + background.sum()).backward()
    assert_close(logits.grad, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [1.0, 1.5, 2.0])
def test_background_loss_has_the_derivative_that_autograd_finds(beta: float) -> None:
    logits = (torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)) * 4).requires_grad_()
    weight = torch.arange(10.0).view(2, 5)
    plain = (logits.sigmoid().pow(beta) * F.softplus(logits)).sum(-1)
    loss = background_quality_focal_loss(logits, beta)
    assert_close(loss, plain)
    (expected,) = torch.autograd.grad((plain * weight).sum(), logits)
    (found,) = torch.autograd.grad((loss * weight).sum(), logits)
    assert_close(found, expected)
    assigned = logits.detach().flatten(0, 1)  # towards a quality of 0
    assert_close(quality_focal_loss(assigned, torch.zeros(10, 3), beta), plain.detach().flatten())


def test_background_loss_of_half_precision_logits_is_float32() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    loss = background_quality_focal_loss(logits, 2.0)
    assert loss.dtype == torch.float32
    assert_close(loss, background_quality_focal_loss(logits.float(), 2.0))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.dtype == torch.bfloat16
    single = logits.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(background_quality_focal_loss(single, 2.0).sum(), single)
    assert torch.equal(gradient, expected.bfloat16())  # rounded once, at the end


def test_background_loss_keeps_one_copy_of_the_logits() -> None:
    logits = torch.randn(10, 6, requires_grad=True)
    kept: list[int] = []

    def pack(saved: torch.Tensor) -> torch.Tensor:
        kept.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        background_quality_focal_loss(logits, 2.0)
    assert kept == [logits.numel()]


@pytest.mark.parametrize("case", DFL_CASES)
def test_distribution_focal_loss_is_mmdetections(case: str) -> None:
    data = load("functions")
    logits, targets, expected, gradient = (
        tensor(data[f"dfl/{case}/{name}"]) for name in ("logits", "targets", "loss_none", "grad_of_sum")
    )
    logits.requires_grad_()
    loss = distribution_focal_loss(logits, targets)
    assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    assert_close(logits.grad, gradient, rtol=1e-5, atol=1e-6)


def test_distribution_focal_loss_by_hand() -> None:
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])
    loss = distribution_focal_loss(probabilities.log(), torch.tensor(1.25))
    assert_close(loss, -(0.75 * probabilities[1].log() + 0.25 * probabilities[2].log()))


def test_integral_is_mmdetections() -> None:
    data = load("functions")
    distances = integral(tensor(data["integral/logits"]).unflatten(1, (4, 17)))
    assert_close(distances, tensor(data["integral/distances"]), rtol=1e-5, atol=1e-6)


def test_distances_are_mmdetections() -> None:
    data = load("functions")
    centers = tensor(data["distance/points"])
    found = distances_from_boxes(centers, tensor(data["distance/boxes"]), 16)
    assert_close(found, tensor(data["distance/encoded_max16_eps0p1"]), rtol=1e-6, atol=1e-6)
    boxes = boxes_from_distances(centers, tensor(data["distance/distances"]))
    assert_close(boxes, tensor(data["distance/decoded"]), rtol=1e-6, atol=1e-6)


def test_distances_and_boxes_are_inverse_within_the_reach_of_the_bins() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.rand(50, 2, generator=generator) * 100
    distances = torch.rand(50, 4, generator=generator) * 15.9
    assert_close(distances_from_boxes(centers, boxes_from_distances(centers, distances), 16), distances, rtol=0, atol=1e-4)


def test_losses_of_nothing_are_connected() -> None:
    logits = torch.zeros(0, 3, requires_grad=True)
    sides = torch.zeros(0, 4, 17, requires_grad=True)
    boxes = boxes_from_distances(torch.zeros(0, 2), integral(sides))
    total = (
        quality_focal_loss(logits, torch.zeros(0, 3), 2.0).sum()
        + distribution_focal_loss(sides, torch.zeros(0, 4)).sum()
        + boxes.sum()
    )
    assert total.item() == 0
    total.backward()
    assert logits.grad is not None
    assert sides.grad is not None
