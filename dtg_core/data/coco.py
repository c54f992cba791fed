"""Images and boxes as arrays: a COCO JSON or a plain folder becomes a ``CocoIndex``, which holds no object per box.

n images, B boxes in all, C classes. Boxes are in pixels of the image as ``read_image`` turns it.
"""
from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dtg_core.errors import UserError

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"))
SKIPPED_FOLDERS = frozenset(("__MACOSX",))  # hidden folders such as .ipynb_checkpoints are skipped by their dot
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class CocoIndex:
    """Images with their boxes. The boxes of image ``row`` are ``box_start[row]`` to ``box_start[row + 1]``."""

    root: Path  # folder of the images
    image_ids: list[Any]  # n, as the user wrote them
    file_names: list[str]  # n, relative to root
    sizes: np.ndarray  # [n, 2] int32, (height, width) as the JSON says; 0 where nobody has said
    boxes: np.ndarray  # [B, 4] float32 (x1, y1, x2, y2), clipped to the image
    labels: np.ndarray  # [B] int64
    box_start: np.ndarray  # [n + 1] int64
    crowd: np.ndarray  # [B] bool, regions of many objects: evaluation ignores them and training never targets them
    class_names: tuple[str, ...]  # C
    category_ids: list[Any]  # C, as the user wrote them

    def __len__(self) -> int:
        return len(self.file_names)

    def path(self, row: int) -> Path:
        """Where an image is."""
        return self.root / self.file_names[row]

    def objects(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [G, 4] and labels [G] of an image without its crowds."""
        here = slice(self.box_start[row], self.box_start[row + 1])
        single = ~self.crowd[here]
        return self.boxes[here][single], self.labels[here][single]

    def image(self, row: int) -> Image.Image:
        """The decoded image. Raises UserError when it cannot be read, or has not the size that its boxes were made for."""
        height, width = self.sizes[row].tolist()
        image = read_image(self.path(row), (height, width))
        if height and image.size != (width, height):
            found = f"{image.width} x {image.height}"
            raise UserError(f"{self.path(row)}: it is {found} px but its JSON says {width} x {height} - mend one of them")
        return image


def load_coco(json_path: Path, images: Path | None = None, need_labels: bool = True) -> CocoIndex:
    """Read a COCO detection JSON.

    Args:
        json_path: the file.
        images: folder that its file names are relative to; None: the JSON's own folder if the first image is there, else
            the folder ``images`` beside it.
        need_labels: False reads the list of images only, as of unlabeled data.

    Returns:
        CocoIndex with classes in ascending order of the category ids (file order where ids cannot be compared). Boxes under
        1 px or outside their image are left out, and so are annotations of images that the file does not list; both are
        counted in a warning.

    Raises:
        UserError: the file, a key or an image is missing, or ids clash.
    """
    json_path = Path(json_path)
    content = _read_json(json_path)
    records = _list_of(content, "images", json_path)
    if not records:
        raise UserError(f"{json_path}: it lists no images - give a file with at least one image")
    file_names = [str(name) for name in _column(records, "file_name", "images", json_path)]
    root = _image_folder(json_path, file_names[0], images)
    _require_files(root, file_names, json_path)
    index = _unlabeled_index(root, file_names, _unique_ids(records, "images", json_path))
    return _with_objects(index, content, json_path) if need_labels else index


def _with_objects(index: CocoIndex, content: dict[str, Any], path: Path) -> CocoIndex:
    """Sizes, boxes and classes from a JSON's content."""
    records, annotations, categories = (_list_of(content, key, path) for key in ("images", "annotations", "categories"))
    if not categories:
        raise UserError(f"{path}: it has no categories - add the list of class names under 'categories'")
    sizes = np.stack([_pixels(_column(records, key, "images", path), key, path) for key in ("height", "width")], 1)
    category_ids = _unique_ids(categories, "categories", path)
    names = dict(zip(category_ids, _column(categories, "name", "categories", path)))
    try:
        category_ids = sorted(category_ids)
    except TypeError:
        log.warning("%s: category ids of mixed types keep the file's order", path)

    row_of = {image_id: row for row, image_id in enumerate(index.image_ids)}
    label_of = {category_id: label for label, category_id in enumerate(category_ids)}
    known = [annotation for annotation in annotations if annotation.get("image_id") in row_of]
    if len(known) < len(annotations):
        strangers = len(annotations) - len(known)
        log.warning("%s: %d annotations of images that it does not list are left out", path, strangers)
    wanted = _column(known, "category_id", "annotations", path)
    odd = next((category for category in wanted if category not in label_of), None)
    if odd is not None:
        raise UserError(f"{path}: annotations use category_id {odd!r}, which 'categories' does not list - add it there")
    rows = np.array([row_of[annotation["image_id"]] for annotation in known], np.int64)
    labels = np.array([label_of[category] for category in wanted], np.int64)
    crowd = np.array([bool(annotation.get("iscrowd")) for annotation in known], bool)
    boxes = np.array([_corners(annotation.get("bbox")) for annotation in known], np.float64).reshape(-1, 4)

    boxes = np.clip(boxes, 0, sizes[rows][:, [1, 0, 1, 0]])
    good = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)  # False for NaN
    if not good.all():
        log.warning("%s: %d boxes without a side of 1 px in their image are left out", path, int((~good).sum()))
    order = np.nonzero(good)[0]
    order = order[np.argsort(rows[order], kind="stable")]
    return replace(
        index,
        sizes=sizes,
        boxes=boxes[order].astype(np.float32),
        labels=labels[order],
        box_start=_starts(np.bincount(rows[order], minlength=len(index))),
        crowd=crowd[order],
        class_names=tuple(str(names[category_id]) for category_id in category_ids),
        category_ids=category_ids,
    )


def list_folder(folder: Path) -> CocoIndex:
    """All images under a folder, sorted by path, without boxes, classes and known sizes; hidden files are skipped.

    Raises:
        UserError: it is not a folder, or has no images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder - give a folder of images")
    names = []
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in SKIPPED_FOLDERS]
        relative = os.path.relpath(where, folder)
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                names.append(os.path.normpath(os.path.join(relative, name)))
    if not names:
        raise UserError(f"{folder}: it has no images ({', '.join(sorted(IMAGE_SUFFIXES))}) - give a folder of images")
    names.sort()
    return _unlabeled_index(folder, names, list(names))


def _unlabeled_index(root: Path, file_names: list[str], image_ids: list[Any]) -> CocoIndex:
    count = len(file_names)
    return CocoIndex(
        root=root,
        image_ids=image_ids,
        file_names=file_names,
        sizes=np.zeros((count, 2), np.int32),
        boxes=np.zeros((0, 4), np.float32),
        labels=np.zeros(0, np.int64),
        box_start=np.zeros(count + 1, np.int64),
        crowd=np.zeros(0, bool),
        class_names=(),
        category_ids=[],
    )


def subset(index: CocoIndex, rows: Sequence[int] | np.ndarray) -> CocoIndex:
    """The images ``rows`` in that order, with their boxes and all classes."""
    rows = np.asarray(rows, np.int64)
    counts = np.diff(index.box_start)[rows]
    box_start = _starts(counts)
    boxes = np.repeat(index.box_start[rows] - box_start[:-1], counts) + np.arange(box_start[-1])
    return replace(
        index,
        image_ids=[index.image_ids[row] for row in rows],
        file_names=[index.file_names[row] for row in rows],
        sizes=index.sizes[rows],
        boxes=index.boxes[boxes],
        labels=index.labels[boxes],
        box_start=box_start,
        crowd=index.crowd[boxes],
    )


def without(index: CocoIndex, other: CocoIndex) -> CocoIndex:
    """The images whose files are not also in ``other``."""
    taken = set(_real_paths(other))
    return subset(index, [row for row, path in enumerate(_real_paths(index)) if path not in taken])


def read_image(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """Decode any image to 8-bit RGB: transparency over white, 16 bits divided by 257, EXIF orientation applied.

    ``size`` (height, width), 0 where unknown, is what annotations were made for: where the file has that size only without
    the EXIF orientation, it is not turned, because then the boxes were drawn on the stored pixels.

    Raises:
        UserError: the file is missing or no readable image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            stored = image.height, image.width
            sideways = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
            if not (sideways and size == stored and size != stored[::-1]):
                ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such image - restore it, or take it out of the data set") from None
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: it cannot be read as an image ({error}) - replace it, or take it out") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")  # a copy if it is RGB already, free of the file


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            content = json.load(file, object_hook=_without_polygons)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file - check the path") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: it is not JSON ({error.msg} at {place}) - export it again") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: it cannot be read ({error}) - give a COCO JSON file") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{path}: not a COCO file, which is an object with the key 'images' (found a {kind}) - convert it")
    return content


def _without_polygons(record: dict[str, Any]) -> dict[str, Any]:
    """Polygons are most of a large file's memory and nobody needs them, so they go while the file is read."""
    record.pop("segmentation", None)
    return record


def _list_of(content: dict[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    if key not in content:
        found = ", ".join(list(content)[:8])
        raise UserError(f"{path}: the key {key!r} is missing (found {found or 'none'}) - give a COCO detection file")
    rows = content[key]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: {key!r} has to be a list of objects - convert the file to COCO's form")
    return rows


def _column(rows: list[dict[str, Any]], key: str, where: str, path: Path) -> list[Any]:
    try:
        return [row[key] for row in rows]
    except KeyError:
        number = next(number for number, row in enumerate(rows) if key not in row)
        raise UserError(f"{path}: {where}[{number}] has no {key!r} - add it") from None


def _unique_ids(rows: list[dict[str, Any]], where: str, path: Path) -> list[Any]:
    ids = _column(rows, "id", where, path)
    seen: set[Any] = set()
    for value in ids:
        if not isinstance(value, (int, float, str)):
            raise UserError(f"{path}: {where} have the id {value!r} - ids have to be numbers or strings")
        if value in seen:
            raise UserError(f"{path}: {where} have the id {value!r} twice - ids have to be unique")
        seen.add(value)
    return ids


def _pixels(values: list[Any], key: str, path: Path) -> np.ndarray:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value < 2**31:
            raise UserError(f"{path}: an image has the {key} {value!r} - it has to be a number of pixels")
    return np.array(values).astype(np.int32)


def _corners(bbox: Any) -> tuple[float, float, float, float]:
    """(x, y, width, height) to corners; NaN for anything else, to be counted with the boxes that are too small."""
    if isinstance(bbox, list) and len(bbox) == 4 and all(isinstance(value, (int, float)) for value in bbox):
        x, y, width, height = bbox
        return x, y, x + width, y + height
    return math.nan, math.nan, math.nan, math.nan


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)))


def _image_folder(json_path: Path, first: str, images: Path | None) -> Path:
    if images is not None:
        return Path(images)
    beside = json_path.parent / "images"
    return beside if not (json_path.parent / first).is_file() and beside.is_dir() else json_path.parent


def _require_files(root: Path, file_names: list[str], json_path: Path) -> None:
    """Lists each folder once instead of asking for each file, which matters on network disks."""
    listed: dict[str, set[str]] = {}
    for name in file_names:
        folder, base = os.path.split(os.path.join(root, name))
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if base not in listed[folder]:
            raise UserError(f"{json_path}: the image {name!r} is not in {root} - set data.images to the images' folder")


def _real_paths(index: CocoIndex) -> list[str]:
    root = os.path.realpath(index.root)
    return [os.path.normpath(os.path.join(root, name)) for name in index.file_names]
