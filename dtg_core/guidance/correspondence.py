"""Which student sample belongs to a teacher sample (Sec. 3.2, first step of the pipeline in Fig. 2).

R-CNN: the teacher's proposals, moved into the student's view, are the student's samples, so they correspond by index.
RPN and GFL: a teacher anchor is moved into the student's view, its scale gives a pyramid level, and the student anchor of
that level with the largest IoU is its partner.
"""
from __future__ import annotations

import torch
from torch import Tensor

from dtg_core.boxes import SMALLEST_SIDE, area, clip, paired_iou, project, shortest_side
from dtg_core.structures import AnchorGrid, PairBatch, Proposals, Samples


def to_student(boxes: Tensor, image: Tensor, pair: PairBatch) -> Tensor:
    """Boxes [M, 4] of the teacher's views of images [M], moved into the student's views and clipped to them."""
    return clip(project(boxes, pair.student_from_teacher[image], pair.hull), pair.student.sizes[image])


def anchor_level(boxes: Tensor, base_size: float, num_levels: int) -> Tensor:
    """Pyramid level of a box by its scale: m = log2(sqrt(area) / S) of Sec. 3.2, rounded and clamped.

    The paper writes log2(area / S); only the square root of the area maps anchors of 32 to 512 px to levels 0 to 4 (A1).

    Args:
        boxes: [T, 4]. base_size: S, side of the smallest level's anchors in pixels. num_levels: L.

    Returns:
        [T] int64 in 0..L-1.
    """
    octave = torch.log2(area(boxes).clamp(min=1e-6).sqrt() / base_size)
    return octave.round().clamp(0, num_levels - 1).long()


def best_anchor(boxes: Tensor, grid: AnchorGrid, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The anchor with the largest IoU on each box's level: s_i = argmax IoU(t_i, s_j), j in m_i, of Sec. 3.2.

    On a regular grid the IoU with an anchor of a fixed shape falls with the distance of the centres in x and in y, so for each
    of the R shapes the arg-max sits at the nearest cell, and R overlaps per box are enough. Memory is linear in T.

    Args:
        boxes: [T, 4] in the grid's frame. grid: the student's anchors.
        sizes: [T, 2] (height, width) of the view that each box is in; anchors with their centre in the padding next to it are
            passed over, so that the canvas makes no difference.

    Returns:
        (row [T] int64 in 0..A-1, iou [T]).
    """
    cells, layout, starts = grid.tables
    level = anchor_level(boxes, grid.base_size, len(grid.shapes))
    rows, columns, stride = layout[level].unbind(1)
    cell = cells[level]  # [T, R, 4]
    first = (cell[:, 0, :2] + cell[:, 0, 2:]) / 2
    center = (boxes[:, :2] + boxes[:, 2:]) / 2 - first
    # ceil(x - 1/2) rounds ties down, to the anchor that comes first.
    x, y = torch.ceil(center / stride.unsqueeze(1) - 0.5).unbind(1)
    last_x, last_y = (torch.ceil((sizes.flip(1) - first) / stride.unsqueeze(1)) - 1).unbind(1)
    x = torch.minimum(x, torch.minimum(last_x, columns - 1)).clamp(min=0)
    y = torch.minimum(y, torch.minimum(last_y, rows - 1)).clamp(min=0)
    shift = torch.stack((x, y, x, y), 1) * stride.unsqueeze(1)
    iou, shape = paired_iou(boxes.unsqueeze(1), cell + shift.unsqueeze(1)).max(1)
    row = starts[level] + (y.long() * columns + x.long()) * cell.shape[1] + shape
    return row, iou


def correspond(samples: Samples, student_grid: AnchorGrid, pair: PairBatch, min_iou: float) -> tuple[Samples, Tensor]:
    """The student's samples and the partner of each teacher sample among them.

    Args:
        samples: the teacher's samples in its own view.
        student_grid: the anchors of the student's canvas.
        pair: both views and the matrix between them.
        min_iou: pairs of anchors below this IoU are dropped, as are anchors whose centre has left the view (A5).

    Returns:
        (student samples, partner [N, A] int64 among them; -1: none).
    """
    matrix = pair.student_from_teacher[:, None]
    sizes = pair.student.sizes[:, None]
    if isinstance(samples, Proposals):
        boxes = clip(project(samples.boxes, matrix, pair.hull), sizes)
        valid = samples.valid & (shortest_side(boxes) >= SMALLEST_SIDE)
        index = torch.arange(samples.num_samples, device=boxes.device)
        return Proposals(boxes, valid), torch.where(valid, index, -1)
    boxes = project(samples.anchors, matrix, pair.hull)  # [N, A, 4]
    row, iou = best_anchor(boxes.flatten(0, 1), student_grid, sizes.expand(*boxes.shape[:2], 2).flatten(0, 1))
    row, iou = row.view(boxes.shape[:2]), iou.view(boxes.shape[:2])
    center = (boxes[..., :2] + boxes[..., 2:]) / 2
    inside = ((center >= 0) & (center < sizes.flip(2))).all(2)
    return student_grid, torch.where((iou >= min_iou) & inside, row, -1)
