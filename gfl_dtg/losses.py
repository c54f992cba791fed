"""Losses of GFL as pure functions of P rows; only classes are summed here.

Sources: Li et al., "Generalized Focal Loss" (NeurIPS 2020), with mmdetection's conventions (clamps, eps).
Distances of the sides left, top, right, bottom from the anchor's centre, and boxes, are in units of the level's stride.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def quality_focal_loss(logits: Tensor, targets: Tensor, beta: float) -> Tensor:
    """[P] quality focal loss (GFL, Eq. 5) of assigned samples, summed over the classes.

    Args:
        logits: [P, C] float32.
        targets: [P, C] scores in 0..1: the quality of the label's box, and 0 for every other class.
        beta: focusing power.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return ((targets - logits.sigmoid()).abs().pow(beta) * cross_entropy).sum(1)


class _BackgroundQualityFocalLoss(torch.autograd.Function):
    """sigmoid(x)^beta * softplus(x), summed over the classes, with its derivative in closed form.

    Autograd would keep four more tensors of the logits' size, the largest of the head, until the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, beta: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.beta = beta
        logits = logits.float()
        return F.softplus(logits).mul_(logits.sigmoid().pow_(beta)).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (saved,) = ctx.saved_tensors
        logits = saved.float()
        scores = logits.sigmoid()
        slope = F.softplus(logits).mul_(ctx.beta).mul_(1 - scores).add_(scores).mul_(scores.pow_(ctx.beta))
        return slope.mul_(grad.unsqueeze(-1)).to(saved.dtype), None


def background_quality_focal_loss(logits: Tensor, beta: float) -> Tensor:
    """[...] float32 quality focal loss of logits [..., C] whose targets are all 0, summed over the classes."""
    return _BackgroundQualityFocalLoss.apply(logits, beta)


def distribution_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """[...] distribution focal loss (GFL, Eq. 6): cross entropy towards the two bins around a distance.

    Args:
        logits: [..., B] of the B bins 0, 1, ..., B - 1.
        targets: [...] distances, at least 0 and below B - 1.
    """
    left = targets.long()
    share = (targets - left).unsqueeze(-1)  # of the bin to the right
    left = left.unsqueeze(-1)
    log_probabilities = logits.log_softmax(-1)
    return -(log_probabilities.gather(-1, left) * (1 - share) + log_probabilities.gather(-1, left + 1) * share).squeeze(-1)


def integral(logits: Tensor) -> Tensor:
    """[...] expected distance of logits [..., B] over the bins 0, 1, ..., B - 1."""
    bins = torch.arange(logits.shape[-1], device=logits.device, dtype=logits.dtype)
    return (logits.softmax(-1) * bins).sum(-1)


def boxes_from_distances(centers: Tensor, distances: Tensor) -> Tensor:
    """Boxes [P, 4] whose sides lie at ``distances`` [P, 4] (left, top, right, bottom) from ``centers`` [P, 2]."""
    return torch.cat((centers - distances[:, :2], centers + distances[:, 2:]), 1)


def distances_from_boxes(centers: Tensor, boxes: Tensor, reg_max: int) -> Tensor:
    """Distances [P, 4] of the sides of ``boxes`` [P, 4] from ``centers`` [P, 2], clamped to 0..reg_max - 0.1.

    The clamp keeps a bin to the right of every distance, which the distribution focal loss needs.
    """
    return torch.cat((centers - boxes[:, :2], boxes[:, 2:] - centers), 1).clamp(0, reg_max - 0.1)
