"""The last step of every detector: the best pairs, decode, clip, NMS and the limit per image, for a whole batch at once."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dtg_core.boxes import clip, ordered_nms, rank_in_group
from dtg_core.protocol import Stage
from dtg_core.structures import Detections, Predictions, Rows


def best_pairs(
    predictions: Predictions, sizes: Tensor, limit: int, threshold: float, level_sizes: Sequence[int] | None = None
) -> tuple[Rows, Tensor]:
    """Each level's ``limit`` best (sample, class) pairs with a score above the threshold, image by image.

    Args:
        predictions: of the batch.
        sizes: [N, 2] (height, width) of the views; pairs of samples that are not usable in them are passed over.
        limit: maximum number of pairs per image and level.
        threshold: at least 0.
        level_sizes: number of samples of each level; None: all samples are one level.

    Returns:
        (the M pairs, their scores [M]).
    """
    classes = predictions.logits.shape[2]
    logits = predictions.logits.masked_fill(~predictions.samples.usable(sizes).unsqueeze(2), -torch.inf)
    chosen, pairs, start = [], [], 0
    for level in logits.split(level_sizes or (predictions.samples.num_samples,), 1):
        flat = level.flatten(1)
        best = flat.topk(min(limit, flat.shape[1]), 1)
        chosen.append(best.values)
        pairs.append(best.indices + start)
        start += flat.shape[1]
    scores, pair = torch.cat(chosen, 1).float().sigmoid(), torch.cat(pairs, 1)
    image, column = (scores > threshold).nonzero(as_tuple=True)  # sync: the number of pairs above the threshold
    pair = pair[image, column]
    return Rows(image, pair // classes, pair % classes), scores[image, column]


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
