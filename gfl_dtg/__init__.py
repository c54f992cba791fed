"""GFL (Generalized Focal Loss) as a detector of the core."""
from __future__ import annotations

from typing import TYPE_CHECKING

from gfl_dtg.config import GFLConfig

if TYPE_CHECKING:
    from dtg_core.config import BackboneConfig
    from gfl_dtg.detector import GFL

__all__ = ["GFLConfig", "build"]


def build(config: GFLConfig, backbone: BackboneConfig, num_classes: int) -> GFL:
    """The detector; see ``gfl_dtg.detector.build``."""
    from gfl_dtg import detector  # heavy, and the command line imports this package to read settings

    return detector.build(config, backbone, num_classes)
