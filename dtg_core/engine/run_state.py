"""Where a run is, besides the tensors of ``Training``: what its loop, log, evaluations and checkpoints share."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dtg_core.config import Config
from dtg_core.engine.train_step import Window
from dtg_core.structures import StepBatch


@dataclass
class RunState:
    """A checkpoint holds it (checkpointer.py), except for the last step's batches."""

    config: Config  # on resuming, the settings that say how training began become those of the checkpoint
    stamp: dict[str, Any]  # settings, data and number of processes (resume.py)
    window: Window = field(default_factory=Window)  # since the last log line
    changed: list[dict[str, Any]] = field(default_factory=list)  # where training was continued with other settings or data
    evaluation_due: bool = False  # at the last step
    skipped_in_a_row: int = 0
    recent: Sequence[StepBatch] = ()  # the last step's micro-batches
