"""Adaptive training sample selection (Zhang et al., CVPR 2020, Alg. 1) for all images of a batch at once.

G objects, A anchors, K candidates per object: the ``topk`` anchors of each level that are nearest to it.
"""
from __future__ import annotations

import torch
from torch import Tensor

from dtg_core.boxes import paired_iou, row_blocks
from dtg_core.structures import AnchorGrid, Targets

#: px by which an anchor's centre has to lie inside the object (mmdetection)
MARGIN = 0.01


def nearest_anchors(
    centers: Tensor, boxes: Tensor, image: Tensor, usable: Tensor, level_sizes: tuple[int, ...], topk: int
) -> Tensor:
    """[G, K] int64 the ``topk`` anchors of each level (or all, if it has fewer) whose centre is nearest to the box's.

    Args:
        centers: [A, 2] of the anchors. boxes: [G, 4]. image: [G] of the boxes.
        usable: [N, A] bool, anchors that are preferred to all others, however far away.
        level_sizes: number of anchors of each level; their sum is A.
        topk: anchors to take per level.
    """
    middles = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    blocks = []  # of objects, because all distances at once take much memory
    for rows in row_blocks(boxes.shape[0], centers.shape[0]):
        offsets = middles[rows] - centers
        distances = torch.hypot(offsets[..., 0], offsets[..., 1]).masked_fill_(~usable[image[rows]], torch.inf)
        chosen, start = [], 0
        for size, level in zip(level_sizes, distances.split(level_sizes, 1)):
            chosen.append(level.topk(min(topk, size), dim=1, largest=False).indices + start)
            start += size
        blocks.append(torch.cat(chosen, 1))
    return torch.cat(blocks)


def assign_atss(grid: AnchorGrid, targets: Targets, usable: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors that are trained towards an object.

    A candidate is positive when its IoU with the object reaches the mean plus the (unbiased) standard deviation over the
    object's candidates, and its centre lies inside the object. An anchor that several objects of an image claim goes
    to the one with the largest IoU (ties: to the first).

    Args:
        grid: A anchors. targets: objects of N images. topk: candidates per object on each level.
        usable: [N, A] bool. The others are never candidates, so that an object's anchors do not depend on the canvas.

    Returns:
        image, sample, object: [P] int64 each; object is a row of ``targets``.
    """
    boxes, num_objects = targets.boxes, targets.boxes.shape[0]
    centers = (grid.anchors[:, :2] + grid.anchors[:, 2:]) / 2
    candidates = nearest_anchors(centers, boxes, targets.image, usable, grid.level_sizes, topk)
    known = usable[targets.image.unsqueeze(1), candidates]
    iou = paired_iou(grid.anchors[candidates], boxes.unsqueeze(1))
    inside = torch.cat((centers[candidates] - boxes[:, None, :2], boxes[:, None, 2:] - centers[candidates]), -1).amin(-1)
    count = known.sum(1, keepdim=True)
    mean = (iou * known).sum(1, keepdim=True) / count.clamp(min=1)
    deviation = (((iou - mean).square() * known).sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    positive = known & (iou >= mean + deviation) & (inside > MARGIN)

    # Each (image, anchor) keeps the best of the objects that claim it: first the best IoU, then the first object. int32, because
    # not every device has minima of int64.
    cell = targets.image.unsqueeze(1) * grid.num_samples + candidates
    objects = torch.arange(num_objects, dtype=torch.int32, device=boxes.device).unsqueeze(1).expand_as(cell)
    num_cells = len(usable) * grid.num_samples
    claim = iou.masked_fill(~positive, -1)
    best = claim.new_full((num_cells,), -1).scatter_reduce(0, cell.flatten(), claim.flatten(), "amax")
    positive = positive & (iou == best[cell])
    claimant = objects.masked_fill(~positive, num_objects)
    owner = claimant.new_full((num_cells,), num_objects).scatter_reduce(0, cell.flatten(), claimant.flatten(), "amin")
    # sync: the number of positives.
    row, column = (positive & (owner[cell] == objects)).nonzero(as_tuple=True)
    return targets.image[row], candidates[row, column], row
