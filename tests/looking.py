"""Tiny weights files with all that a run writes into them, and photos, for tests of what looks at a trained detector."""
from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT
from PIL import Image

from dtg_core.config import StageRule
from dtg_core.engine.checkpoint import save_weights
from dtg_core.settings_text import to_yaml

sys.path[:0] = [str(ROOT / "scripts")]
import read_settings  # noqa: E402
from read_settings import RunSettings  # noqa: E402

CLASSES, IDS = ["ellipse", "rectangle", "triangle", "star", "cross", "ring", "heart"], [1, 2, 3, 4, 5, 6, 7]


def tiny_settings(detector: str, side: int = 64) -> RunSettings:
    """A detector of two levels on an untrained backbone, with thresholds that its scores pass; eight built-in images."""
    settings = RunSettings(detector=detector)
    rule = StageRule(tau=0.0105, pseudo_score=0.0105)
    stages = {"head": rule, "rpn": replace(rule, tau=0.5, pseudo_score=0.4), "rcnn": replace(rule, tau=0.01, pseudo_score=0.01)}
    frcnn = settings.faster_rcnn
    return replace(
        settings,
        backbone=replace(settings.backbone, name="test_resnet", pretrained=False),
        data=replace(settings.data, shapes_labeled=3, shapes_unlabeled=4, shapes_val=1, workers=0),
        views=replace(settings.views, short_edge=(side, side), long_edge=2 * side, test_short_edge=side),
        guidance=replace(settings.guidance, stages=stages), run=replace(settings.run, score_threshold=0.005),
        gfl=replace(settings.gfl, channels=16, tower_depth=1, strides=(8, 16), anchor_scale=4.0),
        faster_rcnn=replace(frcnn, channels=16, strides=(8, 16), anchor_scale=4.0, rcnn=replace(frcnn.rcnn, hidden=16),
                            rpn=replace(frcnn.rpn, pre_nms=60, post_nms=30)),
    )  # fmt: skip


def write_weights(folder: Path, detector: str = "gfl", settings: RunSettings | None = None) -> Path:
    """A run folder with teacher and student."""
    settings = settings or tiny_settings(detector)
    for seed, which in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        model = read_settings.build_detector(settings, len(CLASSES))
        with torch.no_grad():  # scores of an untrained head hardly differ
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        told = {"detector": detector, "class_names": CLASSES, "category_ids": IDS, "config": to_yaml(settings), "which": which}
        save_weights(folder / "weights" / f"{which}.safetensors", model, told)
    return folder


def write_photos(folder: Path) -> Path:
    """Three images of noise, 64 x 48 px, in folders of three depths."""
    for seed, name in enumerate(("a.png", "trip/b.jpg", "trip/day 2/c.tif")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    return folder
