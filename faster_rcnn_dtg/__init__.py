"""Faster R-CNN for dense teacher guidance: a region proposal network and an R-CNN, both guided."""
from faster_rcnn_dtg.config import FasterRCNNConfig
from faster_rcnn_dtg.detector import FasterRCNN, build

__all__ = ["FasterRCNN", "FasterRCNNConfig", "build"]
