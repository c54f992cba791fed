"""Matching objects to samples by IoU and drawing a balanced subset, for a whole batch at once.

torchvision's ``Matcher`` and ``BalancedPositiveNegativeSampler`` take one image at a time, and the first fails without
objects. The rule here is mmdetection's ``MaxIoUAssigner`` and ``RandomSampler``.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtg_core.boxes import paired_iou, row_blocks
from dtg_core.stateless import sample_mask
from dtg_core.structures import AnchorGrid, Assignment, Samples, Targets


@dataclass(frozen=True)
class Matches:
    """The object of each sample. A sample that is neither positive nor negative is ignored."""

    row: Tensor  # [N, A] int64 row of the targets, where positive
    positive: Tensor  # [N, A] bool
    negative: Tensor  # [N, A] bool


@torch.no_grad()
def match(
    samples: Samples,
    targets: Targets,
    usable: Tensor,
    positive_iou: float,
    negative_iou: float,
    low_quality_iou: float | None = None,
) -> Matches:
    """Match each usable sample with the object of its image that overlaps it most.

    Args:
        samples: A samples per image.
        targets: G objects of N images, in the samples' frame.
        usable: [N, A] bool, samples that may be matched at all.
        positive_iou: a sample is positive when its best IoU is at least this.
        negative_iou: a sample is negative when its best IoU is less than this.
        low_quality_iou: if given, the samples that overlap an object most are its positives from this IoU on, even if
            another object overlaps them more. Of several such objects the last one wins, as in mmdetection. With 0, an object
            that no sample overlaps takes all of them.

    Returns:
        Matches. On equal IoU the first object wins. Memory: [N, A], and blocks of objects, see ``row_blocks``.
    """
    num_objects = targets.boxes.shape[0]
    best = targets.boxes.new_zeros(usable.shape)
    # int32, because not every device has minima and maxima of int64.
    matched = torch.full_like(usable, num_objects, dtype=torch.int32)
    lifted = torch.full_like(matched, -1)
    for rows in row_blocks(num_objects, samples.num_samples):
        image = targets.image[rows]
        boxes = samples.anchors if isinstance(samples, AnchorGrid) else samples.boxes[image]  # [A, 4] or [B, A, 4]
        iou = paired_iou(targets.boxes[rows].unsqueeze(1), boxes).masked_fill_(~usable[image], -1)  # [B, A]
        index = image.unsqueeze(1).expand_as(iou)
        row = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=image.device).unsqueeze(1)  # [B, 1]

        before, best = best, best.scatter_reduce(0, index, iou, "amax")  # [N, A]
        first = torch.where(iou == best[image], row, num_objects)
        matched = matched.masked_fill(best > before, num_objects).scatter_reduce(0, index, first, "amin")
        if low_quality_iou is not None:
            reach = iou.amax(1, keepdim=True)
            last = torch.where((iou == reach) & (reach >= low_quality_iou), row, -1)
            lifted = lifted.scatter_reduce(0, index, last, "amax")
    lifts = lifted >= 0
    positive = (usable & (best >= positive_iou)) | lifts
    negative = usable & (best < negative_iou) & ~positive
    return Matches(torch.where(lifts, lifted, matched).long(), positive, negative)


def balanced(matches: Matches, samples: int, positive_share: float, seeds: Tensor, identity: Tensor) -> Matches:
    """At most ``samples`` random matches of each image, at most ``positive_share`` of them positive.

    Missing positives are replaced by negatives. The draw is a pure function of ``seeds`` [N] and of the samples'
    ``identity`` [A], see ``dtg_core.stateless.sample_mask``.
    """
    most = max(int(samples * positive_share), 1)  # with none at all only background would be learnt
    positive = sample_mask(matches.positive, most, seeds, most, identity)
    negative = sample_mask(matches.negative, samples - positive.sum(1), seeds, samples, identity)
    return Matches(matches.row, positive, negative)


def to_assignment(matches: Matches, targets: Targets) -> Assignment:
    """The matches as an Assignment with the objects' own labels and boxes."""
    image, sample = matches.positive.nonzero().unbind(1)  # sync: the number of positives
    row = matches.row[image, sample]
    return Assignment(image, sample, targets.labels[row], targets.boxes[row], matches.negative)
