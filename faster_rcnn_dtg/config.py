"""Faster R-CNN's part of the configuration. Defaults: the paper's, and where it is silent mmdetection's."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RPNConfig:
    """Region proposal network."""

    loss: Literal["bce", "focal"] = "bce"  # on labelled and unlabelled images; focal is part of Eq. 2 taken literally (A10)
    positive_iou: float = 0.7  # an anchor is positive from this IoU on
    negative_iou: float = 0.3  # and negative below this one
    low_quality_iou: float | None = 0.3  # an object's best anchors are positive from this IoU on; None: never
    samples: int = 256  # anchors per image that are trained in the ordinary loss
    positive_share: float = 0.5  # largest share of them that may be positive
    pre_nms: int = 2000  # best anchors of a level that enter NMS
    post_nms: int = 1000  # proposals per image (A9)
    nms_iou: float = 0.7  # per level
    min_side: float = 0.01  # pixels; smaller proposals are dropped


@dataclass(frozen=True)
class RCNNConfig:
    """Second stage: classes and boxes of proposals."""

    focal: Literal["sigmoid", "softmax"] = "sigmoid"  # RetinaNet's, as in PseCo; or Unbiased Teacher's (A11)
    focal_weight: float = 10.0  # of the sigmoid focal loss in the ordinary reduction, which divides by the samples (PseCo)
    iou: float = 0.5  # a proposal is positive from this IoU on, background below
    samples: int = 512  # proposals per image that are trained in the ordinary loss
    positive_share: float = 0.25  # largest share of them that may be positive
    add_truth: bool = True  # train on the true boxes of labelled images as well (A29)
    pool_size: int = 7  # cells per side of a pooled proposal
    sampling_ratio: int = 0  # points per side of a cell in RoIAlign; 0: one per feature pixel
    hidden: int = 1024  # width of the two fully connected layers
    class_agnostic: bool = False  # one box per proposal instead of one per class
    delta_stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
    nms_iou: float = 0.5  # of the final boxes, per class
    max_candidates: int = 5000  # best (proposal, class) pairs of an image that enter the final NMS; a safety limit
    detections_per_image: int = 100


@dataclass(frozen=True)
class FasterRCNNConfig:
    """The detector on a feature pyramid."""

    channels: int = 256  # of the pyramid
    strides: tuple[int, ...] = (4, 8, 16, 32, 64)
    anchor_scale: float = 8.0  # side of a square anchor in strides
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width
    rpn: RPNConfig = field(default_factory=RPNConfig)
    rcnn: RCNNConfig = field(default_factory=RCNNConfig)
