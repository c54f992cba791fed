"""References for tests: slow, obvious loops, one per sentence of the definition; recorded values; a watch on the size of tensors."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorded:
    """What mmdetection gave (``fixtures/README.md``): the arrays of a file as tensors."""

    def __init__(self, name: str) -> None:
        self.arrays = np.load(Path(__file__).parent / "fixtures" / f"{name}.npz")

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *(leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in leaves), 0)
        return result


def iou(a: Tensor, b: Tensor) -> float:
    """IoU of two boxes, in Python floats."""
    ax1, ay1, ax2, ay2 = a.tolist()
    bx1, by1, bx2, by2 = b.tolist()
    overlap = max(0.0, min(ax2, bx2) - max(ax1, bx1)) * max(0.0, min(ay2, by2) - max(ay1, by1))
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - overlap
    return overlap / union if union > 0 else 0.0


def greedy_nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> tuple[list[int], list[int]]:
    """(cluster of each box, index of each kept box): the textbook loop, with bookkeeping of who suppressed whom."""
    order = sorted(range(len(boxes)), key=lambda i: (-float(scores[i]), i))
    cluster, keep = [-1] * len(boxes), []
    for i in order:
        if cluster[i] >= 0:
            continue
        cluster[i] = len(keep)
        for j in order:
            if cluster[j] < 0 and groups[j] == groups[i] and iou(boxes[i], boxes[j]) > threshold:
                cluster[j] = len(keep)
        keep.append(i)
    return cluster, keep


def best_anchor_by_force(boxes: Tensor, grid, base_size: float) -> Tensor:
    """[T] largest IoU of each box with any anchor of its level, the level by the rule of Sec. 3.2."""
    from torchvision.ops import box_iou

    best = []
    starts = [sum(grid.level_sizes[:level]) for level in range(len(grid.level_sizes))]
    for box in boxes:
        side = math.sqrt(max(float((box[2] - box[0]) * (box[3] - box[1])), 1e-6))
        level = min(max(round(math.log2(side / base_size)), 0), len(starts) - 1)
        anchors = grid.anchors[starts[level] : starts[level] + grid.level_sizes[level]]
        best.append(box_iou(box[None].double(), anchors.double()).max().item())
    return torch.tensor(best)


def cluster_losses(
    classification: list[float], box: list[float], student_logits: list[float], teacher_logits: list[float],
    clusters: list[list[int]], temperature: float,
) -> tuple[float, float, float]:
    """Eqs. 2, 3 and 5 averaged over clusters; ``clusters`` lists the members of each."""
    cls = reg = rank = 0.0
    for members in clusters:
        cls += sum(classification[i] for i in members) / len(members)
        reg += sum(box[i] for i in members) / len(members)
        teacher_sum = sum(math.exp(teacher_logits[i] / temperature) for i in members)
        student_sum = sum(math.exp(student_logits[i] / temperature) for i in members)
        for i in members:
            d_teacher = math.exp(teacher_logits[i] / temperature) / teacher_sum
            d_student = math.exp(student_logits[i] / temperature) / student_sum
            rank -= d_teacher * math.log(d_student / d_teacher)
    count = max(len(clusters), 1)
    return cls / count, reg / count, rank / count
