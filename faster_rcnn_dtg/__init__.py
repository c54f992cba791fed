"""Faster R-CNN for dense teacher guidance: a region proposal network and an R-CNN, both guided."""
from __future__ import annotations

from typing import TYPE_CHECKING

from faster_rcnn_dtg.config import FasterRCNNConfig

if TYPE_CHECKING:
    from dtg_core.config import BackboneConfig
    from faster_rcnn_dtg.detector import FasterRCNN

__all__ = ["FasterRCNNConfig", "build"]


def build(config: FasterRCNNConfig, backbone: BackboneConfig, num_classes: int) -> FasterRCNN:
    """The detector; see ``faster_rcnn_dtg.detector.build``."""
    from faster_rcnn_dtg import detector  # heavy, and the command line imports this package to read settings

    return detector.build(config, backbone, num_classes)
