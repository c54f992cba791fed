"""The unlabelled images of a run and their hidden labels, for the scripts that look at what a teacher teaches."""
from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shared_flags import require_own_files

from dtg_core.errors import UserError

if TYPE_CHECKING:
    from dtg_core.config import DataConfig
    from dtg_core.data.index import CocoIndex
    from dtg_core.data.plan import StepData
    from dtg_core.structures import PairBatch


def unlabeled_data(config: DataConfig, other: str | None, run: Path) -> DataConfig:
    """The data of ``run`` without its validation set, or with other unlabelled images."""
    from dtg_core.data.sources import built_in

    require_own_files(config, {"labeled": "", "images": ""} | ({} if other else {"unlabeled": "--unlabeled"}), run)
    if other:
        labeled = config.labeled or str(built_in(config).labeled)
        same = config.val is not None and os.path.realpath(other) == os.path.realpath(config.val)
        images = config.val_images if same else config.unlabeled_images
        config = replace(config, labeled=labeled, unlabeled=other, unlabeled_images=images, unlisted="ignore")
    if config.labeled is not None and config.unlabeled is None and config.unlisted == "ignore":
        raise UserError("--unlabeled: missing, and the run had no unlabelled images - give a folder of images")
    return replace(config, val=None)


def unlabeled(data: StepData, step: int) -> PairBatch:
    """The unlabelled images of a step: weak views for the teacher, strong ones for the student."""
    pair = data[step].unlabeled
    assert pair is not None
    return pair


def read_images(
    path: Path | None, data: DataConfig, class_names: tuple[str, ...]
) -> tuple[CocoIndex, CocoIndex, CocoIndex | None]:
    """Labelled images, unlabelled ones, and the truth of these, of ``unlabeled_data``; arguments as in ``hidden_labels``."""
    from dtg_core.data.sources import open_sources

    sources = open_sources(data, False)
    assert sources.unlabeled is not None
    images = replace(sources.unlabeled, image_ids=sources.unlabeled.file_names)  # by which the truth is found
    return sources.labeled, images, hidden_labels(path, data, images, class_names)


def hidden_labels(path: Path | None, data: DataConfig, images: CocoIndex, class_names: tuple[str, ...]) -> CocoIndex | None:
    """The truth of the unlabelled images of ``unlabeled_data``: from a file, of the built-in data set, or None."""
    from dtg_core.data.coco import load_coco
    from dtg_core.data.index import with_classes
    from dtg_core.data.sources import built_in

    if path is None:
        if data.labeled is not None or len(images) != data.shapes_unlabeled:
            return None
        path = built_in(data).unlabeled_truth
    truth = load_coco(path, images.root, rules=data.rules)
    if set(truth.class_names) != set(class_names):
        raise UserError(f"{path}: its classes are not the detector's - use the same categories")
    absent = set(images.file_names) - set(truth.file_names)
    if absent:
        raise UserError(f"{path}: {len(absent)} of {len(images)} unlabelled images are not in it (e.g. {min(absent)!r}) - "
                        "give the labels of all of them")
    return with_classes(truth, class_names)
