"""GFL (Generalized Focal Loss) as a detector of the core."""
from __future__ import annotations

from gfl_dtg.config import GFLConfig
from gfl_dtg.detector import GFL, build

__all__ = ["GFL", "GFLConfig", "build"]
