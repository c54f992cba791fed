"""First stage: objectness and box deltas of every anchor, and the proposals made from them."""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss
from torchvision.models.detection.rpn import RPNHead, concat_box_prediction_layers

from dtg_core.boxes import clip, image_nms, rank_in_group, shortest_side
from dtg_core.deltas import decode, encode
from dtg_core.focal import sigmoid_focal
from dtg_core.matching import balanced, match, to_assignment
from dtg_core.structures import AnchorGrid, Assignment, Predictions, Proposals, Rows, Samples, Targets, Unreduced
from faster_rcnn_dtg.config import RPNConfig


class RPN(nn.Module):
    """torchvision's RPN head, its maps flattened into the order of an AnchorGrid."""

    def __init__(self, channels: int, num_ratios: int) -> None:
        super().__init__()
        self.head = RPNHead(channels, num_ratios)

    def forward(self, pyramid: list[Tensor], grid: AnchorGrid) -> Predictions:
        """From maps L x [N, channels, h, w] to logits [N, A, 1] and deltas [N, A, 4] of the grid's anchors, float32."""
        return flatten(grid, *self.head(pyramid))


def flatten(grid: AnchorGrid, logits: list[Tensor], deltas: list[Tensor]) -> Predictions:
    """Maps L x [N, R, h, w] and L x [N, R * 4, h, w] as Predictions, ordered as the grid's anchors: by level, y, x and ratio."""
    images = logits[0].shape[0]
    flat_logits, flat_deltas = concat_box_prediction_layers(logits, deltas)
    return Predictions(grid, flat_logits.float().view(images, -1, 1), flat_deltas.float().view(images, -1, 4))


class RPNStage:
    """Class-agnostic stage on anchors (see ``dtg_core.protocol.Stage``). All labels are 0."""

    num_classes: int = 1

    def __init__(self, config: RPNConfig) -> None:
        self.config = config

    def groups(self, samples: Samples, rows: Rows) -> Tensor:
        """Boxes of different pyramid levels do not suppress each other (A14, A15)."""
        assert isinstance(samples, AnchorGrid)
        return rows.image * len(samples.shapes) + samples.level[rows.sample]

    def decode(self, predictions: Predictions, rows: Rows) -> Tensor:
        """[M, 4] float32 boxes of the rows, not clipped."""
        return decode(predictions.samples.take(rows.image, rows.sample), predictions.raw[rows.image, rows.sample])

    def assign(self, samples: Samples, targets: Targets, sizes: Tensor, seeds: Tensor) -> Assignment:
        """Match by IoU and draw ``config.samples`` anchors of each image; anchors centred in the padding are ignored."""
        config = self.config
        usable = samples.usable(sizes)
        matches = match(samples, targets, usable, config.positive_iou, config.negative_iou, config.low_quality_iou)
        matches = balanced(matches, config.samples, config.positive_share, seeds, samples.identity)
        return to_assignment(matches, replace(targets, labels=torch.zeros_like(targets.labels)))

    def losses(self, predictions: Predictions, assignment: Assignment) -> Unreduced:
        """Binary cross entropy (or focal loss) of the logits and L1 of the deltas, both divided by the sampled anchors.

        mmdetection's divisor counts an image without positives as having one; here it is the plain number.
        """
        image, sample = assignment.image, assignment.sample
        loss = sigmoid_focal if self.config.loss == "focal" else _cross_entropy
        logits = predictions.logits.squeeze(-1)
        rows = logits[image, sample]
        classification = loss(rows, torch.ones_like(rows) if assignment.quality is None else assignment.quality)
        background = torch.where(assignment.background, loss(logits, torch.zeros_like(logits)), 0.0)
        target = encode(predictions.samples.take(image, sample), assignment.box)
        box = l1_loss(predictions.raw[image, sample], target, reduction="none").sum(-1)
        count = (assignment.background.sum() + image.shape[0]).float()
        return Unreduced(classification, box, background, torch.ones_like(box), count, count)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(logits, target, reduction="none")


@torch.no_grad()
def propose(predictions: Predictions, sizes: Tensor, config: RPNConfig) -> Proposals:
    """Proposals of each image, detached: the best anchors of each level, decoded, clipped, NMS per level, the best overall.

    Args:
        predictions: the RPN's, of A anchors.
        sizes: [N, 2] (height, width) of the unpadded views.
        config: the RPN's settings.

    Returns:
        Proposals [N, ``config.post_nms``], best first, padded with zero boxes.
    """
    grid, logits = predictions.samples, predictions.logits.squeeze(-1)  # [N, A]
    assert isinstance(grid, AnchorGrid)
    parts, start = [], 0
    for size in grid.level_sizes:
        top = logits[:, start : start + size].topk(min(size, config.pre_nms), dim=1).indices
        parts.append(top + start)
        start += size
    sample = torch.cat(parts, 1)  # [N, K]
    images = torch.arange(sample.shape[0], device=sample.device)
    image = images.unsqueeze(1).expand_as(sample)

    boxes = clip(decode(grid.anchors[sample], predictions.raw[image, sample]), sizes.unsqueeze(1))
    large = shortest_side(boxes) > config.min_side
    scores = logits.gather(1, sample).masked_fill(~large, -torch.inf)  # so that small boxes suppress nothing
    groups = image * len(grid.shapes) + grid.level[sample]
    keep = image_nms(boxes, scores, groups, config.nms_iou)

    image = image.flatten()[keep]
    order = image.argsort(stable=True)  # image by image, best first
    keep, image = keep[order], image[order]
    slot = rank_in_group(image, sample.shape[0]).clamp(max=config.post_nms)  # what does not fit shares one spare slot
    filled = boxes.new_zeros(sample.shape[0], config.post_nms + 1, 4)
    filled[image, slot] = boxes.flatten(0, 1)[keep]
    valid = large.new_zeros(sample.shape[0], config.post_nms + 1)
    valid[image, slot] = large.flatten()[keep]
    filled, valid = filled[:, :-1], valid[:, :-1]
    return Proposals(filled * valid.unsqueeze(-1), valid)
