"""A COCO JSON or a plain folder becomes a ``CocoIndex``.

n images, B boxes in all, C classes. Boxes are in pixels of the image as ``read_image`` turns it. Faults of a file that leave
its meaning in doubt are UserErrors; others are fixed or left out, and counted in a ``Report``.
"""
from __future__ import annotations

import contextlib
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dtg_core.config import DEFAULT_RULES, DataRules
from dtg_core.data.files import (
    instead_of,
    is_own,
    list_images,
    missing_files,
    nearest_name,
    no_folder,
    passed_over,
    require_plain_names,
)
from dtg_core.data.findings import Report
from dtg_core.data.images import image_size
from dtg_core.data.index import CocoIndex, starts, subset, unlabeled_index
from dtg_core.data.strict_json import read_json
from dtg_core.errors import UserError

#: Labelling tools list every image of a job, also those that nobody has come to yet.
EMPTY = "images have no annotation and are used as background - if not labelled yet, take them out of the file"
LEFT_OUT = "are left out"
OF_NO_IMAGE = f"annotations of images that it does not list {LEFT_OUT}"
OF_NO_CATEGORY = f"annotations of categories that it does not list {LEFT_OUT}"
SAMPLE = 100  # images of a file whose real sizes are checked; checking all may take minutes
NEARLY_ALL = 0.95  # of a file's boxes, for a guess at their format
LARGEST = 1e9  # px; larger numbers are not coordinates
GIVE_IMAGES = ("give the images' folder by --images (data.images), that of --val by --val-images (data.val_images), that of an "
               "unlabelled list by --set data.unlabeled_images=DIR")
FROM_POLYGON, FROM_MASK = "box from polygon", "box from mask"  # marks of annotations without a bbox


def load_coco(
    json_path: Path, images: Path | None = None, need_labels: bool = True, rules: DataRules = DEFAULT_RULES,
    report: Report | None = None,
) -> CocoIndex:
    """Read and check a COCO detection JSON.

    Args:
        json_path: the file.
        images: folder that its file names are relative to. If the first images are not in it, or for None, it is the
            JSON's own folder, or ``images`` next to the JSON or next to its folder.
        need_labels: False reads the list of images only, as for unlabelled data, and needs no other key.
        rules: what is tolerated.
        report: collects what was fixed or left out; None: it is logged as warnings.

    Returns:
        CocoIndex with classes in ascending order of the category ids.

    Raises:
        UserError: the file, a key or too many images are missing, ids clash, names lead out of the folder, too many
            annotations cannot be used, or boxes look like another format's.
    """
    notes = Report() if report is None else report
    content, ids, names = _listed(json_path, rules, notes)
    root = _image_folder(json_path, names, images, notes)
    missing = missing_files(root, names, json_path, rules)
    notes.add(json_path, "images are not in their folder and left out", (names[row] for row in missing))
    if len(missing) > rules.max_bad_images * len(names) or len(missing) == len(names):
        remedy = "restore them, take them out of the JSON, or raise data.rules.max_bad_images"
        raise UserError(f"{json_path}: the image {names[missing[0]]!r} is not in {root}{nearest_name(root, names[missing[0]])} "
                        f"({len(missing)} of {len(names)} are missing) - {GIVE_IMAGES if len(missing) == len(names) else remedy}")
    index = unlabeled_index(root, names, ids, rules)
    if need_labels:
        index = _with_objects(index, content, np.isin(np.arange(len(names)), missing), json_path, notes)
    if missing:
        index = subset(index, np.delete(np.arange(len(names)), missing))
    if report is None:
        notes.log()
    return index


def parse_coco(json_path: Path, rules: DataRules, report: Report) -> tuple[dict[str, Any], np.ndarray]:
    """The records of a COCO JSON, checked by ``rules`` as in ``load_coco`` but without looking at the image files; ``report``
    collects what is odd.

    Returns:
        The file's content without polygons and without annotations of unknown images and categories; and [images, C] int64,
        the numbers of usable boxes that are not crowds, with classes in the order of "categories".
    """
    content, ids, names = _listed(json_path, rules, report)
    bare = unlabeled_index(json_path.parent, names, ids, rules)
    index = _with_objects(bare, content, np.ones(len(names), bool), json_path, report)
    rows = _matched(content["annotations"], "image_id", ids, json_path)
    labels = _matched(content["annotations"], "category_id", index.category_ids, json_path)
    known = [
        {key: value for key, value in annotation.items() if key not in (FROM_POLYGON, FROM_MASK)}
        for annotation, row, label in zip(content["annotations"], rows.tolist(), labels.tolist()) if row >= 0 and label >= 0
    ]
    counts = np.zeros((len(index), len(index.class_names)), np.int64)
    np.add.at(counts, (index.image_of_box[~index.crowd], index.labels[~index.crowd]), 1)
    return content | {"annotations": known}, counts[:, [index.class_names.index(c["name"]) for c in content["categories"]]]


def _listed(path: Path, rules: DataRules, report: Report) -> tuple[dict[str, Any], list[Any], list[str]]:
    """Content, image ids and file names of a JSON whose list of images is sound."""
    content = read_json(path, _slim)
    if not isinstance(content, dict):
        kind = "list, as in a file of results" if isinstance(content, list) else type(content).__name__
        raise UserError(f"{path}: not a COCO file, which is an object with the key 'images' (found a {kind}) - convert it")
    records = _list_of(content, "images", path)
    if not records:
        raise UserError(f"{path}: it lists no images - give a file with at least one image")
    ids = _unique_ids(records, "images", path, report)
    names = _file_names(records, path, report)
    require_plain_names(names, path, rules)
    return content, ids, names


# Boxes -----------------------------------------------------------------------------------------------------------------


def _with_objects(index: CocoIndex, content: dict[str, Any], missing: np.ndarray, path: Path, report: Report) -> CocoIndex:
    """Sizes, boxes and classes from a JSON's content; ``missing`` [n] bool are images without a file."""
    annotations = _list_of(content, "annotations", path)
    class_names, category_ids = _classes(_list_of(content, "categories", path), path, report)
    frame = _frame(index, content["images"], missing, path, report)
    rows = _matched(annotations, "image_id", index.image_ids, path)
    labels = _matched(annotations, "category_id", category_ids, path)
    crowd = np.array([1 in _flags(annotation) for annotation in annotations], bool)
    judged = _judged(annotations, rows, labels, frame, index.rules, path)
    kept, copies, contested = _without_copies(np.nonzero(judged.good)[0], rows, labels, crowd, judged.boxes)
    _tell(annotations, judged, copies, contested, path, report)
    _require_usable(judged, index.rules, path)

    order = kept[np.argsort(rows[kept], kind="stable")]
    classes = np.bincount(labels[order][~crowd[order]], minlength=len(class_names))
    report.add(path, "classes have no box", (class_names[label] for label in np.nonzero(classes == 0)[0]))
    empty = np.bincount(rows[rows >= 0], minlength=len(index)) == 0
    report.add(path, EMPTY, (index.file_names[int(row)] for row in np.nonzero(empty)[0]))
    return replace(
        index,
        sizes=frame.sizes,
        as_stored=frame.as_stored,
        scale=frame.scale[:, :2] if (frame.scale != 1).any() else None,
        boxes=judged.boxes[order].astype(np.float32),
        labels=labels[order],
        box_start=starts(np.bincount(rows[order], minlength=len(index))),
        crowd=crowd[order],
        class_names=class_names,
        category_ids=category_ids,
        areas=_areas(annotations, judged.boxes, frame.scale[rows, :2].prod(1))[order] if index.rules.use_json_area else None,
    )


@dataclass(frozen=True)
class _Judged:
    """What becomes of each annotation of a file; masks are [B] bool."""

    boxes: np.ndarray  # [B, 4] float64, corners within the image
    good: np.ndarray  # mask of those to use, copies among them
    faults: dict[str, np.ndarray]  # masks of those that cannot be used, by kind; each ends in LEFT_OUT
    repairs: dict[str, np.ndarray]  # masks of what is too small, and of what is changed, by kind


def _judged(
    annotations: list[dict[str, Any]], rows: np.ndarray, labels: np.ndarray, frame: _Frame, rules: DataRules, path: Path
) -> _Judged:
    """Judge annotations by their images ``rows`` and classes ``labels``, both [B] int64 with -1 for unknown ones."""
    boxes, sizes = _written(annotations, path), frame.sizes[rows]
    unknown, broken = (rows < 0) | (labels < 0), np.isnan(boxes[:, 0])
    usable = ~unknown & ~broken
    # Also for unknown images, so that what an annotation is counted as does not depend on the order of the checks.
    boxes = _corners(boxes * frame.scale[rows], sizes, usable & (sizes > 0).all(1), rules, path)
    clipped = np.clip(boxes, 0, np.where(sizes > 0, sizes, np.inf)[:, [1, 0, 1, 0]])
    sides = clipped[:, 2:] - clipped[:, :2]
    thin = usable & ~(boxes[:, 2:] > boxes[:, :2]).all(1)
    outside = usable & ~thin & ~(sides > 0).all(1)
    tiny = usable & ~thin & ~outside & ~(sides >= 1).all(1)
    good = usable & ~thin & ~outside & ~tiny
    faults = {
        OF_NO_IMAGE: rows < 0,
        OF_NO_CATEGORY: (labels < 0) & (rows >= 0),
        f"annotations whose bbox is not 4 numbers of pixels {LEFT_OUT}": broken & ~unknown,
        f"boxes without a positive width and height {LEFT_OUT}": thin,
        f"boxes wholly outside their image {LEFT_OUT}": outside,
    }
    repairs = {
        f"boxes without a side of 1 px in their image {LEFT_OUT}": tiny,
        "boxes partly outside their image are clipped": good & (np.abs(clipped - boxes) > 1).any(1),  # up to 1 px is rounding
    }
    return _Judged(clipped, good, faults, repairs)


def _written(annotations: list[dict[str, Any]], path: Path) -> np.ndarray:
    """[B, 4] float64, boxes as the file has them, NaN for what is not 4 numbers of pixels."""
    masks = [number for number, annotation in enumerate(annotations) if FROM_MASK in annotation]
    if masks:
        raise UserError(f"{path}: annotations[{masks[0]}] has a mask (RLE) but no bbox - write its box, e.g. by pycocotools' "
                        "toBbox")
    boxes = np.array([_numbers(annotation.get("bbox")) for annotation in annotations], np.float64).reshape(-1, 4)
    boxes[~(np.abs(boxes) < LARGEST).all(1)] = math.nan  # also where some are NaN
    return boxes


def _tell(
    annotations: list[dict[str, Any]], judged: _Judged, copies: np.ndarray, contested: np.ndarray, path: Path, report: Report
) -> None:
    """Report all oddities of annotations, in the order in which they are looked for."""
    for kind, which in (judged.faults | judged.repairs).items():
        _note(report, path, kind, np.nonzero(which)[0])
    _note(report, path, "boxes stand there twice with one class and are kept once", copies)
    _note(report, path, "boxes stand there with two classes and are kept in both", contested)
    for key, kind in ((FROM_POLYGON, "annotations have no bbox and get it from their polygon"),
                      ("ignore", "annotations are marked 'ignore' and treated as crowds")):
        _note(report, path, kind, [number for number, annotation in enumerate(annotations) if annotation.get(key)])
    _note(report, path, "annotations have no id of their own and are numbered anew", _odd_ids(annotations))


def _require_usable(judged: _Judged, rules: DataRules, path: Path) -> None:
    """UserError if more annotations cannot be used than the rules allow."""
    bad = sum(int(which.sum()) for which in judged.faults.values())  # no annotation has two faults
    if bad > rules.max_bad_annotations * len(judged.good):
        worst, which = max(judged.faults.items(), key=lambda entry: int(entry[1].sum()))
        raise UserError(f"{path}: {bad} of {len(judged.good)} annotations cannot be used ({worst.removesuffix(LEFT_OUT).strip()}: "
                        f"{int(which.sum())}, first annotations[{int(which.argmax())}]) - fix them, or raise "
                        "data.rules.max_bad_annotations")


def _note(report: Report, path: Path, kind: str, numbers: Sequence[int] | np.ndarray) -> None:
    report.add(path, kind, (f"annotations[{number}]" for number in numbers))


def _matched(annotations: list[dict[str, Any]], key: str, known: Sequence[Any], path: Path) -> np.ndarray:
    """[B] int64, place of each annotation's id in ``known``, -1 for unknown ones. UserError if all are unknown."""
    place = {value: number for number, value in enumerate(known)}
    found = []
    for annotation in annotations:
        value = annotation.get(key)
        found.append(place.get(value, -1) if type(value) in (int, float, str) else -1)
    if found and max(found) < 0:
        kind, other = type(known[0]).__name__, type(annotations[0].get(key)).__name__
        raise UserError(f"{path}: no {key} of the annotations is among the ids that the file lists (e.g. "
                        f"{_short(annotations[0].get(key))}, {other}, and {_short(known[0])}, {kind}) - write the same ids in both")
    return np.array(found, np.int64)


def _flags(annotation: dict[str, Any]) -> list[int]:
    """The marks that make a region a crowd, 1 where they are set."""
    return [int(annotation.get(key) in (1, "1")) for key in ("iscrowd", "ignore")]


def _numbers(bbox: Any) -> tuple[float, float, float, float]:
    """Four numbers; NaN for anything else."""
    if isinstance(bbox, list) and len(bbox) == 4 and all(type(value) in (int, float) for value in bbox):
        try:
            return float(bbox[0]), float(bbox[1]), float(bbox[2]), float(bbox[3])
        except OverflowError:
            pass
    return math.nan, math.nan, math.nan, math.nan


def _corners(boxes: np.ndarray, sizes: np.ndarray, sure: np.ndarray, rules: DataRules, path: Path) -> np.ndarray:
    """(x1, y1, x2, y2) of boxes as written [B, 4]; ``sure`` [B] bool are those from which the format is guessed."""
    as_xywh = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), 1)
    if rules.box_format == "xyxy":
        return boxes
    seen, width_height = boxes[sure], sizes[sure][:, ::-1]
    if rules.box_format == "auto" and len(seen):
        # Nearly all of them, since a single wrong box should not hide what the others are.
        if ((seen <= 1) & (seen >= 0)).all(1).mean() > NEARLY_ALL and (width_height > 4).all():
            raise UserError(f"{path}: all boxes lie within 0 to 1, as shares of the image (found {seen[0].tolist()}) - "
                            "write pixels, or set data.rules.box_format=xywh if they are")
        over = (as_xywh[sure][:, 2:] > width_height * 1.05 + 1).any(1)
        ordered = ((seen[:, 2:] > seen[:, :2]) & (seen[:, 2:] <= width_height + 1)).all(1)
        if ordered.mean() > NEARLY_ALL and over.mean() > 0.25:
            raise UserError(f"{path}: boxes look like corners x1, y1, x2, y2 (found {seen[over][0].tolist()}), COCO's are "
                            "x, y, width, height - set data.rules.box_format=xyxy, or =xywh if they are right")
    return as_xywh


def _without_copies(
    numbers: np.ndarray, rows: np.ndarray, labels: np.ndarray, crowd: np.ndarray, boxes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``numbers`` of annotations without copies; the copies; and the second ones of equal boxes with different classes.

    A crowd and an object are never copies of each other.
    """
    key = np.column_stack((labels[numbers], crowd[numbers], boxes[numbers], rows[numbers]))
    order = np.lexsort(key.T)  # by image, box, crowd, class; stable
    same = key[order][1:] == key[order][:-1]
    same_box = np.concatenate((np.zeros(1, bool), same[:, 1:].all(1)))[: len(order)]
    same_class = np.concatenate((np.zeros(1, bool), same[:, 0]))[: len(order)]
    copies, contested = (np.sort(numbers[order[which]]) for which in (same_box & same_class, same_box & ~same_class))
    return np.setdiff1d(numbers, copies), copies, contested


def _areas(annotations: list[dict[str, Any]], boxes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """[B] float64, the JSON's areas times ``scale`` [B]; where they are unusable, those of the clipped ``boxes`` [B, 4]."""
    given = [annotation.get("area") for annotation in annotations]
    areas = np.array([value if isinstance(value, (int, float)) and 0 < value < 1e15 else 0 for value in given], np.float64) * scale
    whole = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return np.where((areas > 0) & (areas <= whole * 1.1 + 1), areas, whole)


def _odd_ids(annotations: list[dict[str, Any]]) -> list[int]:
    """Annotations whose id is missing, 0 or not unique."""
    ids = [annotation.get("id") for annotation in annotations]
    ids = [value if type(value) in (int, float, str) else None for value in ids]
    counts = Counter(ids)
    return [number for number, value in enumerate(ids) if value is None or value == 0 or counts[value] > 1]


# Images and classes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """The pixels in which the boxes of a file's images are given."""

    sizes: np.ndarray  # [n, 2] int32, (height, width)
    scale: np.ndarray  # [n, 4] float64, factors that bring a box (x, y, width, height) into these pixels
    as_stored: bool  # EXIF turns no image


def _frame(index: CocoIndex, records: list[dict[str, Any]], missing: np.ndarray, path: Path, report: Report) -> _Frame:
    """Sizes are the JSON's where it has any, otherwise the files'.

    If one of a sample of the files differs from the JSON, all files are read, and their sizes used. If the images of that sample
    that EXIF would turn by 90 degrees have their stored sizes in the JSON, EXIF turns no image of the JSON, not even by 180
    degrees, which no size shows.

    Raises:
        UserError: most images have another scale than in the JSON, and the rules do not say what to do with their boxes.
    """
    told = np.array([[_pixels(record.get(key), key, number, path) for key in ("height", "width")]
                     for number, record in enumerate(records)], np.int64)  # fmt: skip
    told[(told == 0).any(1)] = 0
    present = np.nonzero(~missing)[0]
    said = told[present, 0] > 0
    unknown, known = present[~said], present[said]
    sample = known[np.linspace(0, max(len(known) - 1, 0), min(SAMPLE, len(known))).astype(np.int64)]
    seen = _real_sizes(index, sample)
    names = index.file_names
    lying = {row: tuple(told[row].tolist()) == stored for row, (stored, upright) in seen.items() if stored != upright}
    report.add(path, f"images in a sample of {len(seen)} are not turned by their EXIF orientation, as their size in the JSON is "
                     "the stored one, while EXIF does turn unlabelled images - save the files turned, or write upright sizes and "
                     "boxes",
               (names[row] for row, as_stored in lying.items() if as_stored))
    if any(tuple(told[row].tolist()) not in sizes for row, sizes in seen.items()):
        seen = _real_sizes(index, known)
    as_stored = bool(lying) and all(lying.values())
    differ = {row: sizes[not as_stored] for row, sizes in seen.items() if tuple(told[row].tolist()) not in sizes}
    scale = _rescaled(told, differ, len(seen), index.rules, path)
    for row, size in (differ | {row: sizes[not as_stored] for row, sizes in _real_sizes(index, unknown).items()}).items():
        told[row] = size
    report.add(path, "images have no usable width and height in the JSON; the file's are taken",
               (names[row] for row in unknown))
    report.add(path, "images have another size than the JSON says; the file's is taken, so check that their boxes fit",
               (names[row] for row in differ if (scale[row] == 1).all()))
    report.add(path, "images have another size than the JSON says; boxes will be scaled with them",
               (names[row] for row in differ if (scale[row] != 1).any()))
    return _Frame(told.astype(np.int32), scale, as_stored)


def _rescaled(told: np.ndarray, differ: dict[int, tuple[int, int]], looked: int, rules: DataRules, path: Path) -> np.ndarray:
    """[n, 4] factors of boxes, from the JSON's sizes ``told`` [n, 2] and the files' that ``differ``, of ``looked`` files read."""
    scale = np.ones((len(told), 4))
    alike = {}  # files with the JSON's sides times one factor, up to a pixel of the smaller size
    for row, size in differ.items():
        factor = np.array(size) / told[row]
        if abs(told[row] * factor.mean() - size).max() <= max(factor.mean(), 1):
            alike[row] = factor
    if 2 * len(alike) <= looked or rules.resized == "keep":
        return scale
    row, factor = next(iter(alike.items()))
    if rules.resized == "error":
        height, width = told[row].tolist()
        raise UserError(f"{path}: images are not of the size that it says but {factor.mean():.3g} times as large ({len(alike)} of "
                        f"{looked} looked at, images[{row}]: {width} x {height} px in the JSON), so their boxes may be at the "
                        "wrong scale - set data.rules.resized=scale to scale the boxes too, or =keep if they fit the files")
    for row, factor in alike.items():
        scale[row] = factor[[1, 0, 1, 0]]
    return scale


def _real_sizes(index: CocoIndex, rows: np.ndarray) -> dict[int, tuple[tuple[int, int], tuple[int, int]]]:
    """{row: (height, width) as stored and as turned by EXIF}, from the files' headers."""
    sizes = {}
    for row in rows.tolist():
        with contextlib.suppress(UserError):  # reported when it is decoded
            sizes[row] = image_size(index.path(row), index.rules)
    return sizes


def _pixels(value: Any, key: str, number: int, path: Path) -> int:
    """A side in pixels, 0 if it is not one."""
    if type(value) is float and not math.isfinite(value):
        raise UserError(f"{path}: images[{number}].{key} is {value} - write its number of pixels")
    return int(value) if type(value) in (int, float) and 1 <= value < 2**31 else 0


def _classes(categories: list[dict[str, Any]], path: Path, report: Report) -> tuple[tuple[str, ...], list[Any]]:
    """Names and ids of the classes, in ascending order of the ids."""
    if not categories:
        raise UserError(f"{path}: it has no categories - add the list of class names under 'categories'")
    ids = _unique_ids(categories, "categories", path, report)
    names = _column(categories, "name", "categories", path)
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{path}: categories[{number}].name is {_short(name)} - give the class a name")
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):  # control characters, lone surrogates
            raise UserError(f"{path}: categories[{number}].name has characters that cannot be shown ({_short(name)}) - rename it")
        if name in names[:number]:
            raise UserError(f"{path}: two categories are called {name!r} - join them, or rename one")
    alike = Counter(" ".join(name.split()).casefold() for name in names)
    report.add(path, "classes are like another one but for case or spaces, and are kept apart",
               (repr(name) for name in names if alike[" ".join(name.split()).casefold()] > 1))
    name_of = dict(zip(ids, names))
    ids = sorted(ids)
    return tuple(name_of[value] for value in ids), ids


def _file_names(records: list[dict[str, Any]], path: Path, report: Report) -> list[str]:
    names = _column(records, "file_name", "images", path)
    for number, name in enumerate(names):
        if not isinstance(name, str):
            raise UserError(f"{path}: images[{number}].file_name is {_short(name)} - write it as text")
    if len(set(names)) < len(names):
        twice = (name for name, count in Counter(names).items() if count > 1)
        report.add(path, "image files stand there more than once", twice)
    return names


def _unique_ids(rows: list[dict[str, Any]], where: str, path: Path, report: Report) -> list[Any]:
    """The ids of images or categories: all whole numbers, or all text."""
    ids = _column(rows, "id", where, path)
    seen: set[Any] = set()
    for number, value in enumerate(ids):
        whole = type(value) is int or (type(value) is float and value.is_integer())
        if not whole and type(value) is not str:
            raise UserError(f"{path}: {where}[{number}].id is {_short(value)} - ids have to be whole numbers or text")
        if isinstance(value, str) != isinstance(ids[0], str):
            raise UserError(f"{path}: {where} have ids of both kinds, numbers and text ({_short(ids[0])} and "
                            f"{_short(value)}) - use one")
        if value in seen:
            raise UserError(f"{path}: {where} have the id {_short(value)} twice - ids have to be unique")
        seen.add(value)
    unusual = (float, str) if where == "categories" else (float,)
    report.add(path, f"{where} have an id that is text or a decimal, which is kept",
               (value for value in ids if type(value) in unusual))
    return ids


# The file --------------------------------------------------------------------------------------------------------------


def _slim(record: dict[str, Any]) -> dict[str, Any]:
    """Polygons take most of a large file's memory, so they are dropped on reading; a box that only they define is kept."""
    shape = record.pop("segmentation", None)
    if shape and record.get("bbox") is None:
        if isinstance(shape, dict):
            record[FROM_MASK] = True
        elif box := _polygon_box(shape):
            record |= {"bbox": box, FROM_POLYGON: True}
    return record


def _polygon_box(shape: Any) -> list[float] | None:
    """[x, y, width, height] around polygons [[x, y, x, y, ...], ...]; None for anything else."""
    parts = shape if isinstance(shape, list) else []
    values = [value for part in parts if isinstance(part, list) for value in part]
    if len(values) < 6 or len(values) % 2 or not all(type(value) in (int, float) and abs(value) < LARGEST for value in values):
        return None
    xs, ys = values[::2], values[1::2]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _list_of(content: dict[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    if key not in content:
        found = ", ".join(list(content)[:8])
        raise UserError(f"{path}: the key {key!r} is missing (found {found or 'none'}) - give a COCO detection file")
    rows = content[key]
    if not isinstance(rows, list):
        raise UserError(f"{path}: {key!r} is {_short(rows)} - it has to be a list of objects")
    odd = next((number for number, row in enumerate(rows) if not isinstance(row, dict)), None)
    if odd is not None:
        raise UserError(f"{path}: {key}[{odd}] is {_short(rows[odd])} - it has to be an object")
    return rows


def _column(rows: list[dict[str, Any]], key: str, where: str, path: Path) -> list[Any]:
    try:
        return [row[key] for row in rows]
    except KeyError:
        number = next(number for number, row in enumerate(rows) if key not in row)
        raise UserError(f"{path}: {where}[{number}] has no {key!r} - add it") from None


def _short(value: Any) -> str:
    """A JSON value in a message."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__}"
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _image_folder(json_path: Path, names: Sequence[str], images: Path | None, report: Report) -> Path:
    """The first folder that has the first image that is anywhere: the given one, the JSON's own, or ``images`` next to the JSON
    or its folder.

    So one ``data.images`` serves a run whose sets are in different folders. If several have an image of that name, only the
    user knows which is meant.
    """
    if images is not None and not images.is_dir():
        raise UserError(f"{images}: {no_folder(images)} - {GIVE_IMAGES}")
    own = json_path.parent
    folders = ([images] if images is not None else []) + [own, own / "images", own.parent / "images"]
    first = next((name for name in names[:SAMPLE] if any(os.path.isfile(folder / name) for folder in folders)), names[0])
    found = [folder for folder in folders if os.path.isfile(folder / first)]
    if any(not os.path.samefile(found[0] / first, folder / first) for folder in found[1:]):
        report.add(json_path, f"folders have different images called {first!r}, and {found[0]} is used - if that is wrong, leave "
                              "--images out, or write the folder into the JSON's file names", found)
    elif images is not None and found and found[0] != images:
        report.add(json_path, f"images are not in {images}, and {found[0]} is used instead - if that is wrong, correct --images",
                   [first])
    return (found or folders)[0]


# Folders ---------------------------------------------------------------------------------------------------------------


def list_folder(folder: Path, rules: DataRules = DEFAULT_RULES, report: Report | None = None) -> CocoIndex:
    """All images under a folder, sorted by path, without boxes, classes or known sizes; hidden files are skipped.

    Raises:
        UserError: it is not a folder, or has no images; names the kinds of files that it has instead.
    """
    notes = Report() if report is None else report
    if not folder.is_dir():
        kinds = {folder.suffix.lower()} if folder.exists() else set[str]()
        raise UserError(f"{folder}: {no_folder(folder)} - {instead_of(kinds, 'give a folder of images')}")
    if is_own(folder.absolute()):
        raise UserError(f"{folder}: boxes of a run or a prediction are drawn on its images - give the folder of the photos")
    names = list_images(folder, notes)
    if not names:
        kinds, told = passed_over(notes, folder)
        remedy = instead_of(kinds, "give a folder of images, or use --paradigm supervised")
        raise UserError(f"{folder}: it has no images{told} - {remedy}")
    return unlabeled_index(folder, names, names, rules)
