"""Settings of the GFL detector; the defaults are GFL's (implus/GFocal, mmdetection ``gfl_r50_fpn_1x_coco``)."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dtg_core.ranges import NOT_EMPTY, Count, NotNegative, OpenShare, Positive, PositiveShare, Whole


@dataclass(frozen=True)
class GFLConfig:
    """Generalized Focal Loss detector (Li et al., NeurIPS 2020)."""

    channels: Annotated[int, "[2, inf)"] = 256  # of the pyramid and the head
    tower_depth: Whole = 4  # 3x3 convolutions before each of the two outputs
    strides: Annotated[tuple[Count, ...], NOT_EMPTY] = (8, 16, 32, 64, 128)
    anchor_scale: Positive = 8.0  # side of a level's square anchor in units of its stride
    reg_max: Count = 16  # a box side lies 0 to reg_max strides from the anchor's centre, in reg_max + 1 bins
    prior: OpenShare = 0.01  # score of every class before training
    atss_topk: Count = 9  # anchors of each level that are candidates for an object
    qfl_beta: Annotated[float, "[1, inf)"] = 2.0  # focusing power of the quality focal loss; below 1 its slope is infinite at 0
    quality_weight: NotNegative = 1.0  # of the quality focal loss
    giou_weight: NotNegative = 2.0  # of the GIoU loss
    dfl_weight: NotNegative = 0.25  # of the distribution focal loss
    pre_nms: Count = 1000  # best (anchor, class) pairs of a level that enter NMS
    nms_iou: PositiveShare = 0.6
    detections_per_image: Count = 100
