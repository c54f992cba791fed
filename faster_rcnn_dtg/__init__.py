"""Faster R-CNN for dense teacher guidance: a region proposal network and an R-CNN, both guided."""
from __future__ import annotations

from typing import TYPE_CHECKING

from faster_rcnn_dtg.config import FasterRCNNConfig

if TYPE_CHECKING:
    from dtg_core.config import BackboneConfig
    from faster_rcnn_dtg.detector import FasterRCNN

__all__ = ["FasterRCNNConfig", "build"]


def build(config: FasterRCNNConfig, backbone: BackboneConfig, num_classes: int) -> FasterRCNN:
    """The detector with a timm backbone and a feature pyramid whose levels above the backbone's are max-pools.

    Raises UserError when the backbone does not fit or its weights are missing.
    """
    # Heavy, and the command line imports this package to read settings.
    from dtg_core.models.backbone import build_pyramid
    from faster_rcnn_dtg.detector import FasterRCNN

    return FasterRCNN(build_pyramid(backbone, config.channels, config.strides, "pool"), config, num_classes)
