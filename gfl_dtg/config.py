"""Settings of the GFL detector; the defaults are GFL's (implus/GFocal, mmdetection ``gfl_r50_fpn_1x_coco``)."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GFLConfig:
    """Generalized Focal Loss detector (Li et al., NeurIPS 2020)."""

    channels: int = 256  # of the pyramid and the head
    tower_depth: int = 4  # 3x3 convolutions before each of the two outputs
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    anchor_scale: float = 8.0  # side of a level's square anchor in units of its stride
    reg_max: int = 16  # a box side lies 0 to reg_max strides from the anchor's centre, in reg_max + 1 bins
    prior: float = 0.01  # score of every class before training
    atss_topk: int = 9  # anchors of each level that are candidates for an object
    qfl_beta: float = 2.0  # focusing power of the quality focal loss
    quality_weight: float = 1.0  # of the quality focal loss
    giou_weight: float = 2.0  # of the GIoU loss
    dfl_weight: float = 0.25  # of the distribution focal loss
    pre_nms: int = 1000  # best (anchor, class) pairs of a level that enter NMS
    nms_iou: float = 0.6
    detections_per_image: int = 100
