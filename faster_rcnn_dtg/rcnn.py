"""Second stage: proposals are sampled, pooled from the pyramid, classified and refined."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, logsigmoid
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from dtg_core.boxes import area, rank_in_group
from dtg_core.deltas import decode, encode
from dtg_core.focal import sigmoid_focal
from dtg_core.matching import balanced, match, to_assignment
from dtg_core.structures import Assignment, Predictions, Proposals, Rows, Samples, Targets, Unreduced
from faster_rcnn_dtg.config import RCNNConfig
from faster_rcnn_dtg.losses import log_odds, softmax_focal
from faster_rcnn_dtg.roi_align import roi_align

PRIOR = 0.01  # score of every class at the start of training
PADDING_LOGIT = -20.0  # padding is surely background


def sample_proposals(proposals: Proposals, targets: Targets, config: RCNNConfig, seeds: Tensor, add_truth: bool) -> Proposals:
    """The proposals of each image that are trained on: a random subset with a limited share of positives.

    Args:
        proposals: A proposals for each of N images.
        targets: G objects, in the proposals' frame.
        config: the R-CNN's settings.
        seeds: [N] int64 that decide the draw.
        add_truth: whether the objects' own boxes are proposals as well.

    Returns:
        Proposals [N, ``config.samples``], padded, detached.
    """
    images, device = proposals.boxes.shape[0], proposals.boxes.device
    identity = proposals.identity
    if add_truth:
        # A column for each object of the batch, valid in its own image only: so no per-image count has to reach the host.
        boxes = torch.cat((proposals.boxes, targets.boxes.expand(images, -1, -1)), 1)
        valid = torch.cat((proposals.valid, targets.image == torch.arange(images, device=device).unsqueeze(1)), 1)
        identity = torch.cat((identity, len(identity) + rank_in_group(targets.image, images)))
        proposals = Proposals(boxes, valid)
    matches = match(proposals, targets, proposals.valid, config.iou, config.iou)
    matches = balanced(matches, config.samples, config.positive_share, seeds, identity)
    chosen = matches.positive | matches.negative
    spare = max(0, config.samples - proposals.num_samples)
    chosen = nn.functional.pad(chosen, (0, spare))
    boxes = nn.functional.pad(proposals.boxes.detach(), (0, 0, 0, spare))
    order = chosen.byte().argsort(dim=1, descending=True, stable=True)[:, : config.samples]
    valid = chosen.gather(1, order)
    return Proposals(boxes.gather(1, order.unsqueeze(-1).expand(-1, -1, 4)) * valid.unsqueeze(-1), valid)


def pool_levels(boxes: Tensor, finest_stride: int, num_levels: int) -> Tensor:
    """[M] level to pool boxes [M, 4] from: 0 below a side of 112 px at stride 4, then one more per octave (FPN, Eq. 1)."""
    side = area(boxes).clamp(min=0).sqrt()
    return (side / (14 * finest_stride) + 1e-6).log2().floor().clamp(0, num_levels - 1).long()


class RCNN(nn.Module):
    """RoIAlign, two fully connected layers, class logits and box deltas."""

    def __init__(self, config: RCNNConfig, channels: int, strides: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes
        self.strides = tuple(stride for stride in strides if stride <= 32)  # coarser maps serve the RPN only
        softmax = config.focal == "softmax"
        self.layers = TwoMLPHead(channels * config.pool_size**2, config.hidden)
        self.classes = nn.Linear(config.hidden, num_classes + softmax)  # the background's column is the last one
        self.boxes = nn.Linear(config.hidden, 4 if config.class_agnostic else 4 * num_classes)
        for layer in (self.layers.fc6, self.layers.fc7):  # as in mmdetection
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.constant_(self.classes.bias, 0.0 if softmax else -math.log((1 - PRIOR) / PRIOR))
        nn.init.normal_(self.boxes.weight, std=0.001)
        nn.init.zeros_(self.boxes.bias)

    def pool(self, pyramid: list[Tensor], proposals: Proposals) -> tuple[Tensor, Tensor]:
        """Pooled features [V, channels, size, size] of the valid proposals, and their rows [V] in the flat [N * A]."""
        samples, levels = proposals.num_samples, len(self.strides)
        boxes = proposals.boxes.detach().flatten(0, 1)
        level = pool_levels(boxes, self.strides[0], levels).masked_fill(~proposals.valid.flatten(), levels)
        rows = level.argsort(stable=True)
        image = rows.div(samples, rounding_mode="floor").unsqueeze(1)
        rois = torch.cat((image.to(boxes), boxes[rows]), 1)
        each = torch.arange(levels + 1, device=boxes.device).unsqueeze(1)
        # sync: the number of proposals of each level, in one transfer; padding comes last.
        counts = (level == each).sum(1).cpu().tolist()
        parts = rois.split(counts)
        pooled = [
            roi_align(features.float(), part, self.config.pool_size, 1 / stride, self.config.sampling_ratio)
            for features, part, stride in zip(pyramid, parts, self.strides)
        ]
        return torch.cat(pooled), rows[: sum(counts[:-1])]

    def forward(self, pyramid: list[Tensor], proposals: Proposals) -> Predictions:
        """From maps L x [N, channels, h, w] and proposals [N, A] to Predictions, float32.

        ``logits`` [N, A, C]: a logit's sigmoid is the class's probability in both focal forms. ``raw`` [N, A, B * 4]: deltas
        of B = C classes (1 if class-agnostic); with softmax one more column, the background's log-probability, which cannot
        be computed from the classes' logits without cancellation.
        """
        pooled, rows = self.pool(pyramid, proposals)
        hidden = self.layers(pooled)
        logits, raw = self.classes(hidden).float(), self.boxes(hidden).float()
        if self.config.focal == "softmax":
            log_probability = logits.log_softmax(-1)
            logits = log_odds(log_probability[:, :-1])
            raw = torch.cat((raw, log_probability[:, -1:]), 1)
        images, samples = proposals.valid.shape
        all_logits = logits.new_full((images * samples, logits.shape[1]), PADDING_LOGIT).index_copy(0, rows, logits)
        all_raw = raw.new_zeros(images * samples, raw.shape[1]).index_copy(0, rows, raw)
        return Predictions(proposals, all_logits.view(images, samples, -1), all_raw.view(images, samples, -1))


class RCNNStage:
    """Classifying stage on proposals (see ``dtg_core.protocol.Stage``)."""

    def __init__(self, config: RCNNConfig, num_classes: int) -> None:
        self.config, self.num_classes = config, num_classes

    def groups(self, samples: Samples, rows: Rows) -> Tensor:
        """NMS is class-wise."""
        return rows.image * self.num_classes + rows.label

    def _deltas(self, predictions: Predictions, rows: Rows) -> Tensor:
        """[M, 4] deltas of the rows' class."""
        boxes = 1 if self.config.class_agnostic else self.num_classes
        deltas = predictions.raw[..., : 4 * boxes].unflatten(-1, (boxes, 4))
        label = torch.zeros_like(rows.label) if self.config.class_agnostic else rows.label
        return deltas[rows.image, rows.sample, label]

    def decode(self, predictions: Predictions, rows: Rows) -> Tensor:
        """[M, 4] float32 boxes of the rows' class, not clipped."""
        samples = predictions.samples.take(rows.image, rows.sample)
        return decode(samples, self._deltas(predictions, rows), self.config.delta_stds)

    def assign(self, samples: Samples, targets: Targets, sizes: Tensor, seeds: Tensor) -> Assignment:
        """Match the proposals as they are (``sample_proposals`` has drawn them); padding is ignored."""
        matches = match(samples, targets, samples.usable(sizes), self.config.iou, self.config.iou)
        return to_assignment(matches, targets)

    def losses(self, predictions: Predictions, assignment: Assignment) -> Unreduced:
        """Focal loss summed over the classes and L1 of the assigned class's deltas, both divided by the sampled proposals.

        The losses carry no weight; ``config.focal_weight`` of the ordinary reduction is their ``classification_weight``.
        """
        rows = assignment.rows
        quality = torch.ones_like(rows.label, dtype=torch.float32) if assignment.quality is None else assignment.quality
        target = assignment.class_targets(quality, self.num_classes)
        classification, background = (
            self._softmax_losses(predictions, rows, target)
            if self.config.focal == "softmax"
            else self._sigmoid_losses(predictions, rows, target)
        )
        deltas = encode(predictions.samples.take(rows.image, rows.sample), assignment.box, self.config.delta_stds)
        box = l1_loss(self._deltas(predictions, rows), deltas, reduction="none").sum(-1)
        count = (assignment.background.sum() + len(rows.image)).float()
        weight = 1.0 if self.config.focal == "softmax" else self.config.focal_weight
        background = torch.where(assignment.background, background, 0.0)
        return Unreduced(classification, box, background, torch.ones_like(box), count, count, weight)

    def _sigmoid_losses(self, predictions: Predictions, rows: Rows, target: Tensor) -> tuple[Tensor, Tensor]:
        """[P] of the rows, whose target scores are [P, C], and [N, A] of every sample as background."""
        logits = predictions.logits
        own = logits[rows.image, rows.sample]
        return sigmoid_focal(own, target).sum(-1), sigmoid_focal(logits, torch.zeros_like(logits)).sum(-1)

    def _softmax_losses(self, predictions: Predictions, rows: Rows, target: Tensor) -> tuple[Tensor, Tensor]:
        """[P] of the rows, whose target scores are [P, C], and [N, A] of every sample as background."""
        background = softmax_focal(predictions.raw[..., -1])
        foreground = softmax_focal(logsigmoid(predictions.logits[rows.image, rows.sample]))
        rest = 1 - target.sum(1)
        return (target * foreground).sum(1) + rest * background[rows.image, rows.sample], background
