"""GFL (Generalized Focal Loss) as a detector of the core."""
from __future__ import annotations

from typing import TYPE_CHECKING

from gfl_dtg.config import GFLConfig

if TYPE_CHECKING:
    from dtg_core.config import BackboneConfig
    from gfl_dtg.detector import GFL

__all__ = ["GFLConfig", "build"]


def build(config: GFLConfig, backbone: BackboneConfig, num_classes: int) -> GFL:
    """The detector with a timm backbone and a feature pyramid whose levels above the backbone's are convolutions.

    Raises UserError when the backbone does not fit or its weights are missing.
    """
    # Heavy, and the command line imports this package to read settings.
    from dtg_core.models.backbone import build_pyramid
    from gfl_dtg.detector import GFL

    return GFL(build_pyramid(backbone, config.channels, config.strides, "conv"), config, num_classes)
