"""YOLO text files and Pascal VOC XML files as records of a COCO JSON.

Lines and objects that cannot be read are counted; what leaves the meaning of a whole file in doubt is a UserError with its
line.
"""
from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from dtg_core.config import DEFAULT_RULES, DataRules
from dtg_core.data.files import JUNK, OWN, VIDEO, list_images, no_folder
from dtg_core.data.findings import Report
from dtg_core.data.images import image_size, is_turned
from dtg_core.errors import UserError, counted
from dtg_core.settings import plain_yaml

Record = dict[str, Any]
YAML = ".yaml", ".yml"
SLACK = 0.01  # by which rounded YOLO coordinates may leave 0 to 1
NO_FILE = "images have no annotation file and are taken to show no object - --only-labeled leaves them out"
#: Names of folders by which data sets are split.
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing", "train2017", "val2017", "test2017"}
APART = ("folders seem to be parts of a data set that should stay apart, and one JSON has the images of all - import each by "
         "itself, with its own folder for --images and --labels")
ORPHAN = "annotation files with objects have no image and are left out"
THIN = "boxes without a positive width and height are left out"
ODD_LINE = "lines are not 'class x y width height' in 0 to 1 and left out"
ODD_OBJECT = "objects have no name or no box and are left out"
LEFT_OUT = "images have no annotation file and are left out"
TURNED = ("images have an EXIF orientation, and their labels count as drawn on the turned image - if they were drawn on the stored "
          "pixels, take the orientation out of the files")


def import_yolo(
    images: Path, labels: Path, names: Path, report: Report, only_labeled: bool = False, rules: DataRules = DEFAULT_RULES
) -> Record:
    """COCO records of YOLO labels.

    Args:
        images: folder. labels: folder with a ``.txt`` for each image, see ``_label_file``; each line is "class x y width
            height" (the box's centre and sides as shares of the image), the same with keypoints, or "class x y x y x y ..."
            (a polygon).
        names: the classes: a ``.txt`` with a name in each line, or a YAML file with the key ``names``; its ``kpt_shape`` says
            that lines have keypoints, which are left out.
        report: collects what was left out.
        only_labeled: leave out images without a label file; otherwise they count as showing no object, as in YOLO.
        rules: which images can be used.
    """
    class_names, keypoints = _class_names(names), _keypoints(names)
    records: list[Record] = []
    annotations: list[Record] = []
    kinds: dict[tuple[int, bool], list[str]] = {}  # of lines: columns and whether they can be a pose, with the places of long ones
    for name, (height, width), path in _sized(images, labels, ".txt", report, rules, only_labeled):
        records.append({"id": len(records) + 1, "file_name": name, "width": width, "height": height})
        if path is None:
            continue
        report.add(images, TURNED, [name] if is_turned(images / name, rules) else [])
        for number, line in enumerate(_text(path).splitlines(), 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            values = _yolo_numbers(line.split(), place)
            if values:
                kinds.setdefault((len(values), _is_pose(values)), []).extend([place] if len(values) > 5 else [])
            found = _yolo_object(values, place, len(class_names), keypoints) if values else None
            if found is None:
                report.add(labels, ODD_LINE, [place])
                continue
            label, (x1, y1, x2, y2) = found
            if x2 <= x1 or y2 <= y1:
                report.add(labels, THIN, [place])
                continue
            box = [x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height]
            annotations.append(_annotation(len(annotations), len(records), label + 1, box))
    if keypoints is None and len(kinds) == 1:
        _doubt_polygons(kinds, labels, report)
    return _coco(records, annotations, class_names, labels, report, rules)


def import_voc(
    images: Path, labels: Path, names: Path | None, report: Report, only_labeled: bool = False, rules: DataRules = DEFAULT_RULES,
    zero_based: bool = False,
) -> Record:
    """COCO records of Pascal VOC's XML files.

    Args:
        images: folder. labels: folder with an ``.xml`` for each image, see ``_label_file``.
        names: the classes, as in ``import_yolo``, for files that share them; None: those that occur, in alphabetical order.
        report, only_labeled, rules: as in ``import_yolo``.
        zero_based: coordinates count from 0, as some programs write them; VOC's own count pixels from 1.
    """
    records: list[Record] = []
    objects: list[Record] = []
    given = None if names is None else _class_names(names)
    class_names = list(given or ())
    first = 0 if zero_based else 1
    for name, (height, width), path in _sized(images, labels, ".xml", report, rules, only_labeled):
        record = {"id": len(records) + 1, "file_name": name, "width": width, "height": height}
        records.append(record)
        if path is None:
            continue
        root = _voc_root(path)
        record |= _voc_size(root)
        for number, (label, corners, difficult) in enumerate(_voc_objects(root)):
            if label is None or corners is None:
                report.add(labels, ODD_OBJECT, [f"{path} object {number + 1}"])
                continue
            if label not in class_names:
                if given is not None:
                    raise UserError(f"{path} object {number + 1}: the class {label!r} is not among the {len(given)} names - "
                                    f"add it to {names}")
                class_names.append(label)
            x1, y1, x2, y2 = corners
            box = [x1 - first, y1 - first, x2 - x1 + first, y2 - y1 + first]
            if box[2] <= 0 or box[3] <= 0:
                report.add(labels, THIN, [f"{path} object {number + 1}"])
                continue
            entry = _annotation(len(objects), len(records), class_names.index(label) + 1, box)
            objects.append(entry | {"ignore": int(difficult)})
    order = given or sorted(class_names)
    for entry in objects:
        entry["category_id"] = order.index(class_names[entry["category_id"] - 1]) + 1
    return _coco(records, objects, order, labels, report, rules)


def _sized(
    folder: Path, labels: Path, suffix: str, report: Report, rules: DataRules, only_labeled: bool
) -> Iterator[tuple[str, tuple[int, int], Path | None]]:
    """Name, upright (height, width), and label file if there is one, of each readable image that is wanted."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {no_folder(folder)} - give the folder of the images")
    names = list_images(folder, report, expected=(suffix, *YAML))  # the labels themselves may lie among the images
    parts = sorted({first for name in names if (first := Path(name).parts[0]).lower() in PARTS and first != name})
    report.add(folder, APART, parts if len(parts) > 1 else ())
    stems = Counter(os.path.splitext(name)[0] for name in names)
    report.add(folder, "images have the annotation file of others, as only the suffix tells them apart",
               (name for name in names if stems[os.path.splitext(name)[0]] > 1))
    used = set()
    for name in names:
        path = _label_file(labels, name, suffix)
        used.add(path)
        if only_labeled and path is None:
            report.add(labels, LEFT_OUT, [name])
            continue
        try:
            size = image_size(folder / name, rules)[1]
        except UserError as error:
            report.add(folder, "images cannot be used and are left out", [str(error).replace(f"{folder / name}: ", f"{name}: ", 1)])
            continue
        report.add(labels, NO_FILE, [] if path else [name])
        yield name, size, path
    others = sorted(path for path in labels.rglob("*") if path.suffix.lower() == suffix and path not in used)
    report.add(labels, ORPHAN, (path.relative_to(labels) for path in others if _has_objects(path)))


def _has_objects(path: Path) -> bool:
    """Whether it is a label file with an object: an ``.xml`` with one, or a text that begins with the number of a class."""
    content = path.read_bytes() if path.is_file() else b""
    return b"<object" in content if path.suffix.lower() == ".xml" else next(iter(content.split()), b"").isdigit()


def _label_file(labels: Path, name: str, suffix: str) -> Path | None:
    """The label file with the image's relative path and stem, or otherwise with its last folder ``images`` replaced by
    ``labels``, as Ultralytics does; None: there is none."""
    stem = os.path.splitext(name)[0]
    before, found, after = f"/{stem}".rpartition("/images/")
    stems = [stem, f"{before}/labels/{after}"[1:]] if found else [stem]
    paths = (labels / f"{each}{ending}" for each in stems for ending in (suffix, suffix.upper()))
    return next((path for path in paths if path.is_file()), None)


def _annotation(number: int, image: int, category: int, box: list[float]) -> Record:
    box = [round(value, 4) for value in box]
    return {"id": number + 1, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}


def _coco(
    records: list[Record], annotations: list[Record], class_names: list[str], source: Path, report: Report, rules: DataRules
) -> Record:
    if not annotations:
        odd = [finding for finding in report.findings.values() if finding.kind not in (NO_FILE, LEFT_OUT, JUNK, OWN, VIDEO)]
        if odd:
            worst = max(odd, key=lambda finding: finding.count)
            raise UserError(f"{worst} - no object is left of {counted(len(records), 'image')}, so correct the files")
        found = counted(len(records), "image")
        raise UserError(f"{source}: no object found for {found} - check that both folders have the same names")
    lost = [report.findings[key] for kind in (THIN, ODD_LINE, ODD_OBJECT) if (key := (str(source), kind)) in report.findings]
    count = sum(finding.count for finding in lost)
    if count > rules.max_bad_annotations * (len(annotations) + count):
        raise UserError(f"{'; '.join(map(str, lost))} - correct the files, or raise data.rules.max_bad_annotations")
    categories = [{"id": number, "name": name} for number, name in enumerate(class_names, 1)]
    return {"images": records, "annotations": annotations, "categories": categories}


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: it cannot be read ({error.strerror}) - check the path") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text (byte {error.object[error.start]:#04x}) - save it as "
                        "UTF-8") from error


def _class_names(path: Path) -> list[str]:
    if not _is_yaml(path):
        names = [line.strip() for line in _text(path).splitlines() if line.strip()]
    else:
        found = _value(path, "names")
        if isinstance(found, dict):
            if set(found) != set(map(str, range(len(found)))):
                numbers = ", ".join(list(map(str, found))[:5])
                raise UserError(f"{path}: its names have the numbers {numbers} - number them from 0 without a gap, as the "
                                "labels do")
            found = [found[str(number)] for number in range(len(found))]
        names = [str(name) for name in found] if isinstance(found, list) else []
    if not names:
        raise UserError(f"{path}: no class names found - list them under 'names', or one a line in a .txt")
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UserError(f"{path}: two classes are called {name!r} - join them, or rename one")
    return names


def _is_yaml(path: Path) -> bool:
    return path.suffix.lower() in YAML


def _value(path: Path, key: str) -> Any:
    """The value of a YAML file's key, None if it has no such key."""
    content = plain_yaml(_text(path), str(path))
    return content.get(key) if isinstance(content, dict) else None


# YOLO ------------------------------------------------------------------------------------------------------------------


def _keypoints(names: Path) -> int | None:
    """How many keypoint numbers follow a line's box, None if the file does not say."""
    shape = _value(names, "kpt_shape") if _is_yaml(names) else None
    if shape is None:
        return None
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(side) is int for side in shape)) \
            or shape[0] < 1 or shape[1] not in (2, 3):
        raise UserError(f"{names}: its kpt_shape is {shape} - write [number of keypoints, 2 or 3]")
    return shape[0] * shape[1]


def _yolo_numbers(words: list[str], place: str) -> list[float] | None:
    """The numbers of a line, class first; None for a line that is left out."""
    if any("," in word for word in words):
        raise UserError(f"{place}: it has commas - separate the numbers by spaces")
    if len(words) == 6:
        raise UserError(f"{place}: it has 6 columns, as detections with a score - give labels, with 5")
    try:
        values = [float(word) for word in words]
    except ValueError:
        return None
    return values if len(values) >= 5 and all(map(math.isfinite, values)) and values[0].is_integer() else None


def _is_pose(values: list[float]) -> bool:
    """Whether a line can be a box with keypoints x, y and visibility."""
    points = values[5:]
    return len(points) > 0 and len(points) % 3 == 0 and set(points[2::3]) <= {0, 1, 2}


def _doubt_polygons(kinds: dict[tuple[int, bool], list[str]], labels: Path, report: Report) -> None:
    """Polygons hardly ever all have the same number of corners, but boxes with keypoints do; with two numbers per keypoint,
    though, these cannot be told from oriented boxes."""
    [((columns, pose), places)] = kinds.items()
    remedy = "give the data.yaml with their kpt_shape by --names"
    if pose:
        points = counted((columns - 5) // 3, "keypoint")
        raise UserError(f"{labels}: every line has {columns} columns, as boxes with {points} have - {remedy}")
    if columns > 5 and columns % 2:
        report.add(labels, f"lines of {columns} columns are taken for polygons - for boxes with keypoints {remedy}", places)


def _yolo_object(
    values: list[float], place: str, classes: int, keypoints: int | None
) -> tuple[int, tuple[float, float, float, float]] | None:
    """Label and corners as shares of the image; None for a line that is left out."""
    label, numbers = int(values[0]), values[1:]
    if not 0 <= label < classes:
        raise UserError(f"{place}: the class {label} is not among the {classes} names, which count from 0 - add its name")
    if keypoints is not None:
        if len(numbers) not in (4, 4 + keypoints):
            raise UserError(f"{place}: it has {len(values)} columns, but 5, or {5 + keypoints} by kpt_shape, are wanted - fix the "
                            "line, or kpt_shape")
        numbers = numbers[:4]
    if not all(-SLACK <= value <= 1 + SLACK for value in numbers):
        return None
    if len(numbers) == 4:
        x, y, width, height = numbers
        return label, (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if len(numbers) % 2:
        return None
    xs, ys = numbers[::2], numbers[1::2]
    return label, (min(xs), min(ys), max(xs), max(ys))


# Pascal VOC ------------------------------------------------------------------------------------------------------------


def _voc_root(path: Path) -> ElementTree.Element:
    """Files that define entities are refused, because these may expand without limit."""
    text = _text(path)
    for word in ("<!DOCTYPE", "<!ENTITY"):
        if word in text:
            line = text[: text.index(word)].count("\n") + 1
            raise UserError(f"{path}:{line}: it has {word[2:]}, which annotations do not need - remove it")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        line, column = getattr(error, "position", (1, 0))
        raise UserError(f"{path}:{line}:{column + 1}: it is not XML ({error}) - export it again") from error
    except RecursionError as error:
        raise UserError(f"{path}: it is not an annotation (nested too deeply) - export it again") from error
    if root.tag != "annotation" and root.find(".//object") is None:
        raise UserError(f"{path}: its first element is <{root.tag}>, not Pascal VOC's <annotation> - export it as Pascal VOC")
    return root


def _voc_size(root: ElementTree.Element) -> dict[str, int]:
    """Width and height that the boxes were drawn for, {} if the file does not say."""
    told = {key: (root.findtext(f"size/{key}") or "").strip() for key in ("width", "height")}
    found = {key: int(text) for key, text in told.items() if text.isdecimal() and 0 < len(text) < 7}
    return found if len(found) == 2 and all(found.values()) else {}


def _voc_objects(root: ElementTree.Element) -> Iterator[tuple[str | None, tuple[float, ...] | None, bool]]:
    """Name, corners and difficulty of each object."""
    for entry in root.iter("object"):
        box = entry.find("bndbox")
        corners: tuple[float, ...] | None = None
        with contextlib.suppress(ValueError):
            if box is not None:
                corners = tuple(float(box.findtext(key) or "") for key in ("xmin", "ymin", "xmax", "ymax"))
        if corners is not None and not all(map(math.isfinite, corners)):
            corners = None
        yield (entry.findtext("name") or "").strip() or None, corners, (entry.findtext("difficult") or "").strip() == "1"
