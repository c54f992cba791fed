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
