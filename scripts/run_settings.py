"""All settings of a run: the core's configuration and one section for each detector."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dtg_core.config import Config
from faster_rcnn_dtg.config import FasterRCNNConfig
from gfl_dtg.config import GFLConfig


@dataclass(frozen=True)
class RunSettings(Config):
    """What ``config.yaml`` of a run folder holds. Only the section of ``detector`` has an effect."""

    detector: Literal["gfl", "faster_rcnn"] = "gfl"
    # The paradigm of every stage that ``guidance.stages`` leaves open; supervised: no unlabelled images at all.
    paradigm: Literal["dense", "sparse", "supervised"] = "dense"
    gfl: GFLConfig = field(default_factory=GFLConfig)
    faster_rcnn: FasterRCNNConfig = field(default_factory=FasterRCNNConfig)


#: Intervals of the detectors' numbers, in the notation of ``dtg_core.config.RANGES``.
DETECTOR_RANGES = {
    "*.channels": "[2, inf)",
    "gfl.tower_depth": "[0, inf)",
    "*.strides": "[1, inf)+",
    "*.anchor_scale": "(0, inf)",
    "gfl.reg_max": "[1, inf)",
    "gfl.prior": "(0, 1)",
    "gfl.atss_topk": "[1, inf)",
    "gfl.qfl_beta": "[0, inf)",
    "gfl.*_weight": "[0, inf)",
    "*.pre_nms": "[1, inf)",
    "*.nms_iou": "(0, 1]",
    "*.detections_per_image": "[1, inf)",
    "faster_rcnn.ratios": "(0, inf)+",
    "faster_rcnn.*iou": "[0, 1]",
    "faster_rcnn.rcnn.iou": "(0, 1]",
    "faster_rcnn.rpn.positive_iou": "(0, 1]",
    "faster_rcnn.*.samples": "[1, inf)",
    "faster_rcnn.*.positive_share": "(0, 1]",
    "faster_rcnn.rpn.post_nms": "[1, inf)",
    "faster_rcnn.rpn.min_side": "[0, inf)",
    "faster_rcnn.rcnn.focal_weight": "(0, inf)",
    "faster_rcnn.rcnn.pool_size": "[1, inf)",
    "faster_rcnn.rcnn.sampling_ratio": "[0, inf)",
    "faster_rcnn.rcnn.hidden": "[1, inf)",
    "faster_rcnn.rcnn.delta_stds": "(0, inf)",
    "faster_rcnn.rcnn.max_candidates": "[1, inf)",
}
