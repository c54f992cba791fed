"""The core of semi-supervised detection with dense teacher guidance. ``load_detector`` loads what a run has trained."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtg_core.engine.predict import Predictor


def load_detector(path: str | Path, device: str | None = None, which: str = "teacher") -> Predictor:
    """A trained detector, ready for ``predict``; see ``dtg_core.engine.predict.load_detector``."""
    from dtg_core.engine import predict  # heavy, and the command line imports this package to answer --help

    return predict.load_detector(Path(path), device, which)
