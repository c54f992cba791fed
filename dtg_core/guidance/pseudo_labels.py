"""The sparse-to-dense baseline (Sec. 3.1): the teacher's final boxes become objects for the student's own assignment."""
from __future__ import annotations

from torch import Tensor

from dtg_core.boxes import shortest_side
from dtg_core.guidance.correspondence import MIN_SIDE, to_student
from dtg_core.structures import Detections, PairBatch, Targets


def pseudo_labels(detections: Detections, score: float | Tensor, pair: PairBatch) -> Targets:
    """Detections with a score above a threshold, moved into the student's view.

    Args:
        detections: the teacher's, after NMS, in its view. score: the threshold of Sec. 3.1, or one per class, [C].
        pair: both views.
    """
    boxes = to_student(detections.boxes, detections.image, pair)
    threshold = score[detections.labels] if isinstance(score, Tensor) else score
    good = (detections.scores > threshold) & (shortest_side(boxes) >= MIN_SIDE)
    rows = good.nonzero().squeeze(1)  # sync: the number of pseudo boxes.
    return Targets(boxes[rows], detections.labels[rows], detections.image[rows])
