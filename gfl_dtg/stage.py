"""GFL's head as a stage of the core: decoding, ATSS assignment and losses (mmdetection's ``GFLHead``)."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtg_core.boxes import giou_loss, paired_iou
from dtg_core.structures import AnchorGrid, Assignment, Predictions, Rows, Samples, Targets, Unreduced
from gfl_dtg.atss import assign_atss
from gfl_dtg.config import GFLConfig
from gfl_dtg.losses import (
    background_quality_focal_loss,
    boxes_from_distances,
    distances_from_boxes,
    distribution_focal_loss,
    integral,
    quality_focal_loss,
)


def centers_and_strides(samples: Samples, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Centres [M, 2] in pixels and strides [M, 1] of the anchors in the rows ``sample`` [M]."""
    assert isinstance(samples, AnchorGrid)
    anchors, strides = samples.anchors[sample], samples.tables[1][:, 2]
    return (anchors[:, :2] + anchors[:, 2:]) / 2, strides[samples.level[sample]].unsqueeze(1)


def side_logits(predictions: Predictions, rows: Rows) -> Tensor:
    """[M, 4, reg_max + 1] float32 bin logits of the four sides, for M rows."""
    raw = predictions.raw[rows.image, rows.sample].float()
    return raw.unflatten(1, (4, raw.shape[1] // 4))


@dataclass
class GFLStage:
    """Implements ``dtg_core.protocol.Stage``, whose docstrings apply; samples are always an AnchorGrid."""

    config: GFLConfig
    num_classes: int

    def groups(self, samples: Samples, rows: Rows) -> Tensor:
        """NMS is class-wise."""
        return rows.image * self.num_classes + rows.label

    def decode(self, predictions: Predictions, rows: Rows) -> Tensor:
        """[M, 4] boxes: expected distances from the anchor's centre, in strides. All classes share a sample's box."""
        centers, strides = centers_and_strides(predictions.samples, rows.sample)
        return boxes_from_distances(centers, integral(side_logits(predictions, rows)) * strides)

    def assign(self, samples: Samples, targets: Targets, sizes: Tensor, seeds: Tensor) -> Assignment:
        """ATSS. What is not assigned is background, unless its centre lies in the padding; nothing is sampled."""
        assert isinstance(samples, AnchorGrid)
        usable = samples.usable(sizes)
        image, sample, row = assign_atss(samples, targets, usable, self.config.atss_topk)
        background = usable.index_put((image, sample), usable.new_zeros(()))
        return Assignment(image, sample, targets.labels[row], targets.boxes[row], background)

    def losses(self, predictions: Predictions, assignment: Assignment) -> Unreduced:
        """Quality focal loss, and GIoU with distribution focal loss, the boxes in units of the stride.

        The class target is the IoU of the predicted box with the target box, unless dense guidance provides its own. In
        the ordinary reduction a box is weighted by its best score, and an image counts as at least 1 positive.
        """
        config, (image, sample, _) = self.config, assignment.rows
        logits = predictions.logits[image, sample].float()
        sides = side_logits(predictions, assignment.rows)
        centers, strides = centers_and_strides(predictions.samples, sample)
        centers, targets = centers / strides, assignment.box / strides
        boxes = boxes_from_distances(centers, integral(sides))

        quality = assignment.quality
        if quality is None:
            quality = paired_iou(boxes.detach(), targets)
        classification = quality_focal_loss(logits, assignment.class_targets(quality, self.num_classes), config.qfl_beta)
        background = background_quality_focal_loss(predictions.logits, config.qfl_beta)
        background = torch.where(assignment.background, background, 0.0)
        distances = distances_from_boxes(centers, targets, config.reg_max)
        box = config.giou_weight * giou_loss(boxes, targets)
        box = box + config.dfl_weight * distribution_focal_loss(sides, distances).mean(1)

        box_weight = logits.detach().sigmoid().amax(1)
        positives = logits.new_zeros(predictions.logits.shape[0]).index_add(0, image, torch.ones_like(box_weight))
        return Unreduced(
            classification=config.quality_weight * classification,
            box=box,
            background=config.quality_weight * background,
            box_weight=box_weight,
            classification_count=positives.clamp(min=1).sum(),
            box_count=box_weight.sum(),
        )
