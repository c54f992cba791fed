"""Boxes on your own images: pictures, one COCO results JSON and one CSV.

    python scripts/predict.py RUN_OR_WEIGHTS PATH... --output DIR [--score 0.3]

A PATH is an image, a folder or a quoted pattern such as "photos/**/*.jpg". ``DIR/pictures`` keeps the paths relative to what
was given, ``DIR/detections.json`` and ``DIR/detections.csv`` hold the classes' names and ids of the training data.

Exit status: 0; 1 with ``--strict`` when a file could not be read; 2 after a mistake that is told in one line.
"""
from __future__ import annotations

import csv
import glob
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import Parser, main_guard, one_of

from dtg_core.errors import UserError, printable

if TYPE_CHECKING:
    from PIL import Image

    from dtg_core.engine.predict import Predictor

COLUMNS = ("file", "class", "category_id", "score", "x1", "y1", "x2", "y2")
SAVED_AS_THEY_ARE = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}  # pictures of other formats become PNG


def parser() -> Parser:
    result = Parser("Find objects in images with a trained detector.")
    add = result.add_argument
    add("weights", type=Path, metavar="RUN_OR_WEIGHTS", help="run folder, or a weights file of one")
    add("paths", nargs="+", metavar="PATH", help="images, folders, or quoted patterns")
    add("--output", type=Path, required=True, metavar="DIR", help="where pictures and lists go")
    add("--which", type=one_of(("teacher", "student")), default="teacher", metavar="teacher|student",
        help="of a run folder (default: teacher)")
    add("--score", type=float, default=0.3, metavar="S", help="lowest score of a box (default: 0.3)")
    add("--batch", type=int, default=8, metavar="N", help="images at once (default: 8)")
    add("--no-pictures", action="store_true", help="write the lists only")
    add("--strict", action="store_true", help="exit with status 1 when a file cannot be read")
    add("--device", help="cpu, cuda, cuda:1, mps (default: what there is)")
    return result


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)
    if arguments.batch < 1:
        raise UserError(f"--batch: use at least 1 (found {arguments.batch})")
    if not 0 <= arguments.score < 1:
        raise UserError(f"--score: use 0 to 1 (found {arguments.score})")
    names, root = find_images(arguments.paths, arguments.output)

    from dtg_core.engine.predict import load_detector

    predictor = load_detector(arguments.weights, arguments.device, arguments.which)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        pictures = not arguments.no_pictures
        boxes, failed = predict(predictor, root, names, arguments.output, arguments.score, arguments.batch, pictures)
    except OSError as error:
        raise UserError(f"{arguments.output}: cannot be written ({error.strerror}) - give another --output") from error
    skipped = f", {failed} could not be read" if failed else ""
    print(f"{boxes} boxes in {len(names) - failed} images{skipped}; written to {arguments.output}")
    return 1 if failed and arguments.strict else 0


def find_images(paths: Sequence[str], output: Path) -> tuple[list[str], Path]:
    """The images that are meant, as names relative to a common folder, and that folder.

    What lies under ``output`` is no input.

    Raises:
        UserError: nothing is found under a path, or ``output`` is an input folder or holds one.
    """
    from dtg_core.data.files import list_images
    from dtg_core.data.report import Report

    files: list[str] = []
    roots: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            found = [os.path.join(path, name) for name in list_images(Path(path), Report())]
            roots.append(path)
        elif os.path.exists(path):
            found = [path]
            roots.append(os.path.dirname(path) or ".")
        else:
            found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
            roots.append(os.path.dirname(re.split(r"[*?[]", path)[0]) or ".")
        if not found:
            raise UserError(f"{path}: no image there - give images, folders of images, or a quoted pattern")
        files += found
    target = os.path.realpath(output)
    for path in map(os.path.realpath, roots):
        if os.path.commonpath((target, path)) == target:
            raise UserError(f"{output}: holds the images themselves - give another --output")
    whole = [os.path.abspath(name) for name in files if not os.path.realpath(name).startswith(target + os.sep)]
    root = os.path.commonpath([os.path.abspath(path) for path in roots])
    return list(dict.fromkeys(os.path.relpath(name, root) for name in whole)), Path(root)


def predict(
    predictor: Predictor, root: Path, names: Sequence[str], output: Path, score: float, batch: int, pictures: bool
) -> tuple[int, int]:
    """Write everything. Returns the number of boxes, and of files that could not be read."""
    from dtg_core.engine.pictures import draw_found

    number, failed = 0, [0]
    lists = [output / f"detections.{kind}" for kind in ("json", "csv")]
    drafts = [path.with_name(f"{path.name}.tmp") for path in lists]  # renamed when they are whole
    with open(drafts[0], "w", encoding="utf-8") as results, open(drafts[1], "w", encoding="utf-8", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(COLUMNS)
        results.write("[")
        for some in batches(predictor, root, names, batch, failed):
            for (image_id, name, image), found in zip(some, predictor.predict([image for *_, image in some], score, batch)):
                for box, box_score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()):
                    x1, y1, x2, y2 = (round(value, 3) for value in box)
                    category = predictor.category_ids[label]
                    results.write((",\n" if number else "\n") + json.dumps({
                        "image_id": image_id, "file_name": name, "category_id": category,
                        "bbox": [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)], "score": round(box_score, 6),
                    }))  # fmt: skip
                    rows.writerow((text(name), predictor.class_names[label], category, f"{box_score:.6f}", x1, y1, x2, y2))
                    number += 1
                if pictures:
                    save(draw_found(image, found, predictor.class_names), output / "pictures" / name)
        results.write("\n]\n")
    for draft, path in zip(drafts, lists):
        os.replace(draft, path)
    return number, failed[0]


def batches(
    predictor: Predictor, root: Path, names: Sequence[str], batch: int, failed: list[int]
) -> Iterator[list[tuple[int, str, Image.Image]]]:
    """(number from 1, name, image) of the files that can be read; the others are told and counted in ``failed``."""
    from dtg_core.data.images import read_image

    some: list[tuple[int, str, Image.Image]] = []
    for image_id, name in enumerate(names, 1):
        try:
            some.append((image_id, name, read_image(root / name, rules=predictor.settings.data.rules)))
        except UserError as error:
            failed[0] += 1
            print(f"skipped: {printable(str(error))}", file=sys.stderr)
        if len(some) == batch:
            yield some
            some = []
    if some:
        yield some


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path if path.suffix.lower() in SAVED_AS_THEY_ARE else path.with_name(f"{path.name}.png"))


def text(name: str) -> str:
    """A file name that UTF-8 can hold."""
    return name.encode("utf-8", "backslashreplace").decode()


if __name__ == "__main__":
    main_guard(main)
