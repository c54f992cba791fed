"""Faster R-CNN's part of the configuration. Defaults: the paper's, and where it is silent mmdetection's."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from dtg_core.ranges import NOT_EMPTY, Count, NotNegative, Positive, PositiveShare, Share, Whole


@dataclass(frozen=True)
class RPNConfig:
    """Region proposal network."""

    loss: Literal["bce", "focal"] = "bce"  # on labelled and unlabelled images; focal is part of Eq. 2 taken literally (A10)
    positive_iou: PositiveShare = 0.7  # an anchor is positive from this IoU on
    negative_iou: Share = 0.3  # and negative below this one
    low_quality_iou: PositiveShare | None = 0.3  # an object's best anchors are positive from this IoU on; None: never
    samples: Count = 256  # anchors per image that are trained in the ordinary loss
    positive_share: PositiveShare = 0.5  # largest share of them that may be positive
    pre_nms: Count = 2000  # best anchors of a level that enter NMS
    post_nms: Count = 1000  # proposals per image (A9)
    nms_iou: PositiveShare = 0.7  # per level
    min_side: NotNegative = 0.01  # pixels; smaller proposals are dropped


@dataclass(frozen=True)
class RCNNConfig:
    """Second stage: classes and boxes of proposals."""

    focal: Literal["sigmoid", "softmax"] = "sigmoid"  # RetinaNet's, as in PseCo; or Unbiased Teacher's (A11)
    focal_weight: Positive = 10.0  # of the sigmoid focal loss in the ordinary reduction, which divides by the samples (PseCo)
    iou: PositiveShare = 0.5  # a proposal is positive from this IoU on, background below
    samples: Count = 512  # proposals per image that are trained in the ordinary loss
    positive_share: PositiveShare = 0.25  # largest share of them that may be positive
    add_truth: bool = True  # train on the true boxes of labelled images as well (A29)
    pool_size: Count = 7  # cells per side of a pooled proposal
    sampling_ratio: Whole = 0  # points per side of a cell in RoIAlign; 0: one per feature pixel
    hidden: Count = 1024  # width of the two fully connected layers
    class_agnostic: bool = False  # one box per proposal instead of one per class
    delta_stds: tuple[Positive, Positive, Positive, Positive] = (0.1, 0.1, 0.2, 0.2)
    nms_iou: PositiveShare = 0.5  # of the final boxes, per class
    pre_nms: Count = 5000  # best (proposal, class) pairs of an image that enter the final NMS; a safety limit
    detections_per_image: Count = 100


@dataclass(frozen=True)
class FasterRCNNConfig:
    """The detector on a feature pyramid."""

    channels: Annotated[int, "[2, inf)"] = 256  # of the pyramid
    strides: Annotated[tuple[Count, ...], NOT_EMPTY] = (4, 8, 16, 32, 64)
    anchor_scale: Positive = 8.0  # side of a square anchor in strides
    ratios: Annotated[tuple[Positive, ...], NOT_EMPTY] = (0.5, 1.0, 2.0)  # height / width
    rpn: RPNConfig = field(default_factory=RPNConfig)
    rcnn: RCNNConfig = field(default_factory=RCNNConfig)
