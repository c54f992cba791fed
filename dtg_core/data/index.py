"""Images and boxes as arrays, without a Python object per box, and subsets of them.

n images, B boxes in all, C classes. Boxes are in pixels of the image as ``dtg_core.data.images`` turns it.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dtg_core.config import DEFAULT_RULES, DataRules
from dtg_core.data.files import real_paths
from dtg_core.data.images import Decoded, decode
from dtg_core.data.packed import packed
from dtg_core.errors import UserError


@dataclass(frozen=True)
class CocoIndex:
    """Images with their boxes. The boxes of image ``row`` are ``box_start[row]`` to ``box_start[row + 1]``."""

    root: Path  # folder of the images
    image_ids: Sequence[Any]  # n, as the user wrote them
    file_names: Sequence[str]  # n, relative to root
    sizes: np.ndarray  # [n, 2] int32, (height, width) as the JSON says; 0 if unknown
    boxes: np.ndarray  # [B, 4] float32 (x1, y1, x2, y2), clipped to the image
    labels: np.ndarray  # [B] int64
    box_start: np.ndarray  # [n + 1] int64
    crowd: np.ndarray  # [B] bool, regions of many objects: evaluation ignores them and training never targets them
    class_names: tuple[str, ...]  # C
    category_ids: list[Any]  # C, as the user wrote them
    areas: np.ndarray | None = None  # [B] float64, the JSON's own; None: those of the boxes
    as_stored: bool = False  # boxes were drawn on stored pixels, so EXIF turns no image
    scale: np.ndarray | None = None  # [n, 2] float64, (x, y) factors from the JSON's pixels to these; None: they are the same
    rules: DataRules = DEFAULT_RULES

    def __len__(self) -> int:
        return len(self.file_names)

    def path(self, row: int) -> Path:
        """Where an image is."""
        return self.root / self.file_names[row]

    @property
    def image_of_box(self) -> np.ndarray:
        """[B] int64, the row of each box's image."""
        return np.repeat(np.arange(len(self)), np.diff(self.box_start))

    def objects(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [G, 4] and labels [G] of an image without its crowds."""
        here = slice(self.box_start[row], self.box_start[row + 1])
        single = ~self.crowd[here]
        return self.boxes[here][single], self.labels[here][single]

    def objects_per_image(self) -> np.ndarray:
        """[C] float64, mean objects of each class per image, without crowds."""
        return np.bincount(self.labels[~self.crowd], minlength=len(self.class_names)) / max(len(self), 1)

    def image(self, row: int, odd: set[str] | None = None) -> Image.Image:
        """The decoded image; ``odd`` collects what is odd about it.

        Raises UserError when it cannot be read, or does not have the size that its boxes were made for.
        """
        return self.decoded(row, odd).image

    def decoded(
        self, row: int, odd: set[str] | None = None, wanted: Callable[[int, int], tuple[int, int]] | None = None
    ) -> Decoded:
        """The same with its whole size; reduced if ``wanted`` is given, see ``dtg_core.data.images.decode``."""
        height, width = self.sizes[row].tolist()
        found = decode(self.path(row), (height, width), self.rules, odd, self.as_stored, wanted)
        if height and found.size != (height, width):
            size = f"{found.size[1]} x {found.size[0]}"
            raise UserError(f"{self.path(row)}: it is {size} px but its JSON says {width} x {height} - fix one of them")
        return found


def unlabeled_index(root: Path, file_names: list[str], image_ids: list[Any], rules: DataRules) -> CocoIndex:
    """Images without boxes, classes or known sizes."""
    count = len(file_names)
    names = packed(file_names)
    return CocoIndex(
        root=root,
        image_ids=names if image_ids is file_names else packed(image_ids),
        file_names=names,
        sizes=np.zeros((count, 2), np.int32),
        boxes=np.zeros((0, 4), np.float32),
        labels=np.zeros(0, np.int64),
        box_start=np.zeros(count + 1, np.int64),
        crowd=np.zeros(0, bool),
        class_names=(),
        category_ids=[],
        rules=rules,
    )


def subset(index: CocoIndex, rows: Sequence[int] | np.ndarray) -> CocoIndex:
    """The images ``rows`` in that order, with their boxes and all classes."""
    rows = np.asarray(rows, np.int64)
    counts = np.diff(index.box_start)[rows]
    box_start = starts(counts)
    boxes = np.repeat(index.box_start[rows] - box_start[:-1], counts) + np.arange(box_start[-1])
    return replace(
        index,
        image_ids=packed([index.image_ids[row] for row in rows.tolist()]),
        file_names=packed([index.file_names[row] for row in rows.tolist()]),
        sizes=index.sizes[rows],
        scale=None if index.scale is None else index.scale[rows],
        boxes=index.boxes[boxes],
        labels=index.labels[boxes],
        box_start=box_start,
        crowd=index.crowd[boxes],
        areas=None if index.areas is None else index.areas[boxes],
    )


def without(index: CocoIndex, other: CocoIndex) -> CocoIndex:
    """The images whose files are not also in ``other``, even by links."""
    taken = set(real_paths(other.root, other.file_names))
    return subset(index, [row for row, path in enumerate(real_paths(index.root, index.file_names)) if path not in taken])


def with_classes(index: CocoIndex, class_names: Sequence[str]) -> CocoIndex:
    """The same boxes with classes in another order; ``class_names`` are the index's own in any order."""
    order = [index.class_names.index(name) for name in class_names]
    return replace(
        index,
        labels=np.argsort(order)[index.labels],
        class_names=tuple(class_names),
        category_ids=[index.category_ids[label] for label in order],
    )


def starts(counts: np.ndarray) -> np.ndarray:
    """[n + 1] int64: where each image's boxes start, and their number, from ``counts`` [n] of boxes."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)))
