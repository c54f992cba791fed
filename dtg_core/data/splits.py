"""Splits of a labelled set into few labelled and many unlabelled images, by the protocols that papers use.

    softteacher   n images without replacement (Soft Teacher, PseCo: tools/dataset/semi_coco.py with offset 0)
    stac          n draws with replacement, so fewer images (STAC, mmdetection, LabelMatch)
    ubteacher     indices from the file that Unbiased Teacher ships (dataseed/COCO_supervision.txt)

The first two index the JSON's list of images as it is stored, with NumPy's legacy generator seeded by the fold's number.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dtg_core.data.strict_json import read_json
from dtg_core.errors import UserError, counted

Protocol = Literal["softteacher", "stac", "ubteacher"]


def draw(protocol: Protocol, images: int, wanted: int, fold: int) -> np.ndarray:
    """[<= wanted] int64, positions of the labelled images in the order in which they were drawn, each once.

    Args:
        protocol: "softteacher" or "stac". images: number of images. wanted: number of draws. fold: from 0.
    """
    drawn = np.random.RandomState(fold).choice(images, wanted, replace=protocol == "stac")
    _, first = np.unique(drawn, return_index=True)
    return drawn[np.sort(first)]


def draw_from_file(path: Path, percent: float, fold: int, usable: np.ndarray) -> np.ndarray:
    """[n] int64, positions by Unbiased Teacher's file.

    Args:
        path: JSON {percent: {fold: [indices]}}. percent: e.g. 1, which the file may write as "1.0". fold: from 0.
        usable: positions of the images that have a non-crowd box, sorted by image id; the indices count these.
    """
    folds = read_json(path)
    keys = [key for key in folds if _is_number(key) and float(key) == percent] if isinstance(folds, dict) else []
    if not keys or str(fold) not in folds[keys[0]]:
        have = ", ".join(folds) if isinstance(folds, dict) else "another format"
        raise UserError(f"{path}: no fold {fold} of {percent:g} percent (found {have}) - choose among those")
    indices = np.asarray(folds[keys[0]][str(fold)])
    if indices.dtype.kind not in "iu" or indices.size == 0 or indices.min() < 0 or indices.max() >= len(usable):
        raise UserError(f"{path}: indices do not lie in 0 to {len(usable) - 1}, so the file belongs to another data set")
    return usable[np.unique(indices)]


def draw_groups(groups: np.ndarray, wanted: int, fold: int) -> np.ndarray:
    """[>= wanted] int64, positions of whole groups, drawn without replacement until there are enough images.

    Args:
        groups: [images] int64, the group of each image, 0 to G - 1.
    """
    order = np.random.RandomState(fold).permutation(int(groups.max()) + 1)
    sizes = np.bincount(groups)[order]
    taken = order[: int(np.searchsorted(np.cumsum(sizes), wanted)) + 1]
    return np.nonzero(np.isin(groups, taken))[0]


def fill_classes(
    positions: np.ndarray, groups: np.ndarray, boxes_of: np.ndarray, class_names: Sequence[str], least: int, fold: int
) -> np.ndarray:
    """Add whole groups until each class has ``least`` boxes.

    Args:
        positions: [n] of the drawn images. groups: [images] int64. boxes_of: [images, C] counts. class_names: C.
        least: boxes per class.

    Raises:
        UserError: a class has fewer boxes in total.
    """
    total = boxes_of.sum(0)
    if (total < least).any():
        rare = int(total.argmin())
        remedy = "ask for at most that many" if total[rare] else "take it out of the JSON's categories"
        found = counted(int(total[rare]), "box", "boxes")
        raise UserError(f"--min-per-class: {class_names[rare]!r} has only {found} in all - {remedy}")
    taken = np.isin(groups, groups[positions])
    have = boxes_of[taken].sum(0)
    for image in np.random.RandomState(fold).permutation(len(groups)):
        short = have < least
        if not short.any():
            break
        if not taken[image] and boxes_of[image][short].any():
            added = groups == groups[image]  # none of them is taken yet
            taken |= added
            have += boxes_of[added].sum(0)
    drawn = np.zeros(len(groups), bool)
    drawn[positions] = True
    return np.concatenate((positions, np.nonzero(taken & ~drawn)[0]))


def group_images(records: Sequence[dict[str, Any]], by: str | None) -> np.ndarray:
    """[images] int64, the group of each image.

    Args:
        records: the JSON's images.
        by: one of their keys, otherwise a pattern, whose first group (or whole match) in the file name is the group's name.
            None: each image on its own. Images without the key or a match are on their own.
    """
    if by is None:
        return np.arange(len(records))
    names: list[Any]
    if any(by in record for record in records):
        names = [str(record[by]) if record.get(by) is not None else None for record in records]
    else:
        try:
            pattern = re.compile(by)
        except re.error as error:
            raise UserError(f"--group-by {by!r}: neither a key of the images nor a pattern ({error})") from error
        matches = [pattern.search(record["file_name"]) for record in records]
        if not any(matches):
            raise UserError(f"--group-by {by!r}: no image has this key, and no file name matches it as a pattern")
        names = [match.group(1 if pattern.groups else 0) if match else None for match in matches]
    number: dict[Any, int] = {}
    keys = [(row, None) if name is None else name for row, name in enumerate(names)]
    return np.array([number.setdefault(key, len(number)) for key in keys])


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d+(\.\d+)?", text) is not None
