"""The last step of every detector: decode, clip, NMS and the limit per image, for a whole batch at once."""
from __future__ import annotations

from torch import Tensor

from dtg_core.boxes import clip, ordered_nms, rank_in_group
from dtg_core.protocol import Stage
from dtg_core.structures import Detections, Predictions, Rows


def final_boxes(
    stage: Stage, predictions: Predictions, rows: Rows, scores: Tensor, sizes: Tensor, nms_iou: float, limit: int
) -> Detections:
    """NMS over scored predictions.

    Args:
        stage, predictions: of the batch.
        rows: the M predictions to consider, image by image. scores: [M] theirs.
        sizes: [N, 2] (height, width) of the views, to which boxes are clipped.
        nms_iou: IoU above which a box is suppressed by a better one of its image and group.
        limit: maximum number of boxes per image.

    Returns:
        Detections in the views' pixels, image by image, best score first.
    """
    image = rows.image
    boxes = clip(stage.decode(predictions, rows), sizes[image])
    groups = stage.groups(predictions.samples, rows)
    keep = ordered_nms(boxes, scores, groups, image, len(sizes), nms_iou)
    keep = keep[image[keep].argsort(stable=True)]
    within = rank_in_group(image[keep], len(sizes)) < limit
    keep = keep[within.nonzero().squeeze(1)]  # sync: the number of boxes within the limit
    return Detections(boxes[keep], scores[keep], rows.label[keep], image[keep])
