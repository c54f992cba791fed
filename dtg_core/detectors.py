"""The detectors that command lines and weights files know by name.

The core imports no detector. Packages are imported when they are needed, so that this table costs nothing.
"""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """Where a detector is, and how it is guided."""

    package: str  # its function ``build`` makes the detector
    config: str  # the name of its class of settings, in the package
    stages: tuple[str, ...]  # the keys of ``guidance.stages`` that matter to it


KNOWN = {
    "gfl": Known("gfl_dtg", "GFLConfig", ("head",)),
    "faster_rcnn": Known("faster_rcnn_dtg", "FasterRCNNConfig", ("rpn", "rcnn")),
}
