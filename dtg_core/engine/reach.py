"""Which boxes and classes are out of reach, found before training begins: of the views, and of a detector.

An object without any sample is background to the detector, and a class most of whose objects are background is never learnt,
whatever the losses say. Objects of hardly a cell of the finest level get samples, but are seen badly.
"""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from dtg_core.boxes import SMALLEST_SIDE
from dtg_core.config import ViewsConfig
from dtg_core.data.findings import Report
from dtg_core.data.geometry import fitted
from dtg_core.data.index import CocoIndex
from dtg_core.data.views import canvas
from dtg_core.errors import counted
from dtg_core.protocol import Detector
from dtg_core.structures import Targets

TRIED, LEAST = 200, 3  # objects that are tried in total, and at least per class; of many classes only the most frequent are tried
MOST = 0.5  # share of them without a sample above which a class is reported
CELLS = 2  # of the finest level; a class whose median side is below is reported (platelets of 1.6 gain much by half of the stride)
FINEST = 4  # stride of the finest maps that backbones have with some meaning
HARD_SIDE = 8.0  # px of the view: a cell of the finest feature map of usual detectors
HARD_SHARE = 0.2  # of all boxes, above which those below HARD_SIDE are reported
HARD_CLASS = 0.5  # of a class' boxes, above which it is reported


def largest_sides(index: CocoIndex, config: ViewsConfig) -> np.ndarray:
    """[B] float64, shorter sides of the boxes in the largest training view, in px; infinite for crowds and where an image's size
    is not known."""
    sizes = np.maximum(index.sizes, 1).astype(np.float64)
    factor = np.minimum(config.short_edge[1] / sizes.min(1), config.long_edge / sizes.max(1))
    sides = (index.boxes[:, 2:] - index.boxes[:, :2]).min(1) * factor[index.image_of_box]
    return np.where(index.crowd | (index.sizes.min(1) == 0)[index.image_of_box], np.inf, sides)


def note_small_boxes(index: CocoIndex, file: str, config: ViewsConfig, report: Report) -> None:
    """Report boxes that the training views lose, and those that they make hard to find, if there are many."""
    sides = largest_sides(index, config)
    lost, hard = sides < SMALLEST_SIDE, sides < HARD_SIDE
    report.add(file, f"boxes are under {SMALLEST_SIDE:g} px in every training view and left out there (views.short_edge, "
                     "views.long_edge)", _places(index, lost))  # fmt: skip
    if hard.sum() > HARD_SHARE * len(hard):
        report.add(file, f"boxes, of {len(hard)} in all, are under {HARD_SIDE:g} px in every training view and hard to find - "
                         "larger views.short_edge, views.long_edge and views.test_short_edge may help",
                   _places(index, hard))  # fmt: skip
    total, small = (np.bincount(index.labels[rows], minlength=len(index.class_names)) for rows in (~index.crowd, hard))
    report.add(file, f"classes have most of their boxes under {HARD_SIDE:g} px in every training view - larger views.short_edge, "
                     "views.long_edge and views.test_short_edge may help",
               (index.class_names[label] for label in np.flatnonzero(small > HARD_CLASS * total)))  # fmt: skip


def _places(index: CocoIndex, boxes: np.ndarray) -> Iterator[str]:
    """Where the boxes of a mask [B] are."""
    return (f"in {index.file_names[row]}" for row in index.image_of_box[boxes])


@torch.no_grad()
def classes_out_of_reach(detector: Detector, index: CocoIndex, config: ViewsConfig) -> Iterator[str]:
    """A line for each class most of whose boxes get no sample in the detector's first stage, and one for all that are small for it.

    Boxes are tried one by one, in a view of the middle training size, so that they do not compete.

    Args:
        detector: on the CPU; only its first stage's assignment is used. index: labelled images.
    """
    short = sum(config.short_edge) // 2
    grid = detector.grid(canvas([(short, short)]), torch.device("cpu"))
    finest = grid.strides[0]
    small: list[str] = []
    finer = f"put {finest // 2} in front of strides, or " if finest > FINEST else ""
    tries = max(TRIED // len(index.class_names), LEAST)
    largest, image = largest_sides(index, config), index.image_of_box
    usable = np.isfinite(largest) & (largest >= SMALLEST_SIDE)  # others are reported by ``note_small_boxes``
    frequent = np.argsort(-np.bincount(index.labels, minlength=len(index.class_names)), kind="stable")[: TRIED // LEAST]
    for label in sorted(frequent):
        name = index.class_names[label]
        rows = np.flatnonzero(usable & (index.labels == label))
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), tries)).astype(int)]
        sides, missed = [], 0
        for row in rows:
            height, width = (int(side) for side in index.sizes[image[row]])
            size = fitted(height, width, short, config.long_edge)
            box = torch.from_numpy(index.boxes[row] * np.tile((size[1] / width, size[0] / height), 2)).float()
            sides.append(float((box[2:] - box[:2]).prod().sqrt()))
            missed += not _has_sample(detector, box, size)
        if missed > MOST * len(sides):
            yield (f"class {name!r}: {missed} of {len(sides)} boxes fit no anchor in a view of {short} px, so it is hardly learnt "
                   f"(their side is {np.median(sides):.0f} px, the smallest anchor's {grid.base_size:.0f}) - change anchor_scale, "
                   "or views.short_edge, views.test_short_edge and views.long_edge")  # fmt: skip
        elif sides and np.median(sides) < CELLS * finest:
            small.append(f"{name!r} ({np.median(sides):.0f} px)")
    if small:
        yield (f"{counted(len(small), 'class has', 'classes have')} boxes of less than {CELLS} cells of the finest level, "
               f"{CELLS * finest} px, in a view of {short} px: {', '.join(small[:3])}{', ...' * (len(small) > 3)} - {finer}enlarge "
               "views.short_edge, views.test_short_edge and views.long_edge")  # fmt: skip


def _has_sample(detector: Detector, box: torch.Tensor, size: tuple[int, int]) -> bool:
    """Whether the first stage trains any sample towards ``box`` [4], alone in a view of (height, width)."""
    stage, zero = next(iter(detector.stages.values())), torch.zeros(1, dtype=torch.int64)
    grid = detector.grid(canvas([size]), box.device)
    found = stage.assign(grid, Targets(box.unsqueeze(0), zero, zero), torch.tensor([size], dtype=torch.float32), zero)
    return len(found.image) > 0
