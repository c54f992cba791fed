"""The sparse-to-dense baseline (Sec. 3.1): the teacher's final boxes become objects for the student's own assignment."""
from __future__ import annotations

import torch
from torch import Tensor

from dtg_core.boxes import SMALLEST_SIDE, shortest_side
from dtg_core.config import StageRule
from dtg_core.guidance.correspondence import correspond, to_student
from dtg_core.guidance.thresholds import count_classes
from dtg_core.structures import AnchorGrid, Detections, Figures, PairBatch, Proposals, Samples, Supervision, Targets


@torch.no_grad()
def sparse_supervision(
    detections: Detections, samples: Samples, grid: AnchorGrid, pair: PairBatch, rule: StageRule, threshold: Tensor | None = None
) -> tuple[Supervision, Figures]:
    """Sparse guidance of one stage, and figures of it by name.

    Args:
        detections, samples: the teacher's final boxes, and the stage's samples, in its view. grid: the student's anchors.
        pair: both views. rule: how the stage is guided. threshold: [C] a score for each class instead of ``rule.pseudo_score``.
    """
    targets = pseudo_labels(detections, rule.pseudo_score if threshold is None else threshold, pair)
    found = None
    if threshold is not None:
        over = detections.scores > threshold[detections.labels]
        found = count_classes(detections.labels, len(threshold), over)
    proposals = _shared_proposals(samples, grid, pair, rule)
    supervision = Supervision(targets, proposals=proposals, add_truth=False, found=found)
    return supervision, {"pseudo_boxes": targets.boxes.shape[0] / len(pair.student.sizes)}


def pseudo_labels(detections: Detections, score: float | Tensor, pair: PairBatch) -> Targets:
    """Detections with a score above a threshold, moved into the student's view.

    Args:
        detections: the teacher's, after NMS, in its view. score: the threshold of Sec. 3.1, or one per class, [C].
        pair: both views.
    """
    boxes = to_student(detections.boxes, detections.image, pair)
    threshold = score[detections.labels] if isinstance(score, Tensor) else score
    good = (detections.scores > threshold) & (shortest_side(boxes) >= SMALLEST_SIDE)
    rows = good.nonzero().squeeze(1)  # sync: the number of pseudo boxes.
    return Targets(boxes[rows], detections.labels[rows], detections.image[rows])


def _shared_proposals(samples: Samples, grid: AnchorGrid, pair: PairBatch, rule: StageRule) -> Proposals | None:
    """The teacher's proposals in the student's view, for a sparse R-CNN that uses them (A30)."""
    if not isinstance(samples, Proposals) or rule.proposals == "student":
        return None
    moved, _ = correspond(samples, grid, pair, rule.min_iou)
    assert isinstance(moved, Proposals)
    return moved
