"""Boxes on your own images and videos: pictures, one COCO results JSON and one CSV.

    python scripts/predict.py RUN_OR_WEIGHTS PATH... --output DIR [--score 0.3] [--annotations JSON]

A PATH is an image, a video (with the extra ``video``), a folder or a quoted pattern such as "photos/**/*.jpg". ``DIR/pictures``
keeps the paths relative to what was given; frame 1 of ``trip/clip.mp4`` is ``trip/clip.mp4/000001.jpg``. ``DIR/detections.json``
(COCO's results format) and ``DIR/detections.csv`` use the class names and ids of the training data.

``DIR/images.json`` is the COCO data set, without annotations, that ``detections.json`` belongs to: the classes and every image that
was read, even without boxes. ``DIR/annotations.json`` is the same with the boxes as annotations, for a labelling tool and then
``train.py --labeled``; boxes that are cut to nothing at the image's border are left out of it. Image ids are those of
``--annotations``, a COCO JSON that lists images by name, and those that it does not list are left out; otherwise their positions
among all given images, in the order of the names in a folder, where each frame of a video counts as one.

DIR is a new folder, or that of an earlier prediction, and not inside a given folder: drawn pictures among photos would be taken for
more of them. ``--overwrite`` overwrites its files and deletes none, so pictures that are not made again stay. Ctrl-C keeps the
lists of what is done.

Exit status: 0; 1 when no file could be read, or with ``--strict`` when one could not; 2 after a mistake, reported in one line;
130 after Ctrl-C.
"""
from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from command_line import Parser, main_guard, number, progress, warn
from shared_flags import add_overwrite, add_rules, add_weights, require_new, rules_of

from dtg_core.drafts import writing
from dtg_core.errors import UserError, counted, printable
from dtg_core.ranges import Count, PartialShare

if TYPE_CHECKING:
    from PIL import Image

    from dtg_core.config import DataRules
    from dtg_core.engine.predict import ImageDetections, Predictor

T = TypeVar("T")
LISTS = "detections.json", "detections.csv", "images.json", "annotations.json"
COLUMNS = ("file", "class", "category_id", "score", "x1", "y1", "x2", "y2")
SAVED_AS_THEY_ARE = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}  # pictures of other formats become PNG


@dataclass
class Done:
    """What was done so far."""

    images: int = 0  # and frames
    boxes: int = 0
    failed: int = 0  # files that could not be read, or not to their end
    interrupted: bool = False  # by Ctrl-C
    first: list[Image.Image] = field(default_factory=list)  # the first batch, to look at again if nothing is found


def parser() -> Parser:
    result = Parser("Find objects in images and videos with a trained detector.")
    add = result.add_argument
    add_weights(result)
    add("paths", nargs="+", type=os.path.expanduser, metavar="PATH", help="images, videos, folders, or quoted patterns")
    add("--output", type=Path, required=True, metavar="DIR", help="where pictures and lists go")
    add_overwrite(result)
    add("--annotations", type=Path, metavar="JSON", help="COCO JSON with ids of the images to take (default: all, numbered)")
    add_rules(result)
    add("--score", type=number(PartialShare), default=0.3, metavar="S", help="lowest score of a box (default: 0.3)")
    add("--batch", type=number(Count), default=8, metavar="N", help="images at once (default: 8)")
    add("--no-pictures", action="store_true", help="write the lists only")
    add("--strict", action="store_true", help="exit with status 1 when a file cannot be read")
    return result


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)
    rules_of(arguments)  # a mistake is reported before the weights are read

    from dtg_core.data.files import IMAGE_SUFFIXES
    from dtg_core.data.inputs import find_images, listed_images, require_apart
    from dtg_core.data.video import VIDEO_SUFFIXES

    require_apart(arguments.paths, arguments.output)
    names, root, warnings = find_images(arguments.paths, arguments.output, IMAGE_SUFFIXES | VIDEO_SUFFIXES)
    warn(warnings)
    listed: dict[str, dict[str, Any]] = {}
    if arguments.annotations:
        listed, warnings = listed_images(arguments.annotations, root, names)
        warn(warnings)
        names = list(listed)
    require_own_folder(arguments.output)
    require_new(outputs(arguments.output, () if arguments.no_pictures else names), arguments.overwrite,
                inputs=[arguments.annotations])

    from dtg_core.engine.predict import load_detector

    predictor = load_detector(arguments.weights, arguments.device, arguments.which)
    with writing(arguments.output):
        arguments.output.mkdir(parents=True, exist_ok=True)
        rules = rules_of(arguments, predictor.settings.data.rules)
        found = images(root, names, listed, rules, done := Done())
        predict(predictor, found, names, arguments.output, arguments.score, arguments.batch, not arguments.no_pictures, done)
    if done.interrupted:
        print(f"interrupted after {how_far(done, names)}; written to {arguments.output}", file=sys.stderr)
        return 130
    skipped = f", {done.failed} could not be read" if done.failed else ""
    print(f"{counted(done.boxes, 'box', 'boxes')} in {counted(done.images, 'image')}{skipped}; written to {arguments.output}")
    if done.images and not done.boxes:
        print(f"hint: {lower_score(predictor, done.first, arguments.score, arguments.batch)}", file=sys.stderr)
    return 1 if done.failed and (arguments.strict or not done.images) else 0


def require_own_folder(output: Path) -> None:
    """UserError if ``output`` holds something but no earlier prediction, not even an unfinished one: among somebody's photos, the
    pictures with boxes would be taken for more of them."""
    try:
        there = {name for name in os.listdir(output) if not name.startswith(".")} if output.is_dir() else set()
    except OSError as error:
        raise UserError(f"--output {output}: cannot be read ({error.strerror}) - give a new folder") from error
    if there and not there & {LISTS[0], draft(Path(LISTS[0])).name}:
        raise UserError(f"--output {output}: holds other files - give a new folder")


def predict(
    predictor: Predictor, items: Iterable[tuple[Any, str, Image.Image]], names: Sequence[str], output: Path, score: float,
    batch: int, pictures: bool, done: Done,
) -> None:
    """Write all results for ``items`` (see ``images``), or what is done before Ctrl-C; ``done`` records the progress."""
    from dtg_core.engine.pictures import draw_found
    from dtg_core.engine.signals import StopSignals

    every = frozenset(names)
    with lists_in(output, predictor) as lists, progress(total=total_of(names)) as bar:
        try:
            for some in batches(items, batch):
                decoded = [image for _, _, image in some]
                done.first = done.first or decoded
                for (image_id, name, image), found in zip(some, predictor.predict(decoded, score, batch)):
                    with StopSignals(patient=True) as stop:  # so that lists and pictures agree
                        lists.add(image_id, name, image, found)
                        done.images += 1
                        done.boxes += len(found.boxes)
                        if pictures:
                            save_picture(draw_found(image, found, predictor.class_names), picture_path(output, name, every))
                    if stop.received:
                        raise KeyboardInterrupt
                    bar.update(done.images + done.failed - bar.n)
        except KeyboardInterrupt:
            done.interrupted = True


class Entries:
    """A JSON list, written entry by entry with each on a line of its own; what is around its brackets is left to others."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.count = file, 0

    def add(self, entry: dict[str, Any]) -> None:
        self.file.write((",\n" if self.count else "\n") + json.dumps(entry))
        self.count += 1


class Lists:
    """What was found, image by image. None of it is kept in memory, as frames of videos are many."""

    def __init__(self, predictor: Predictor, results: TextIO, table: TextIO, images: TextIO, labels: TextIO) -> None:
        self.predictor, self.table = predictor, csv.writer(table)
        self.results, self.images, self.labels = Entries(results), Entries(images), Entries(labels)
        self.table.writerow(COLUMNS)

    def add(self, image_id: Any, name: str, image: Image.Image, found: ImageDetections) -> None:
        """Write an image and its boxes."""
        self.images.add({"id": image_id, "file_name": name, "width": image.width, "height": image.height})
        for entry, row in entries(self.predictor, found, name, image_id):
            self.results.add(entry)
            self.table.writerow(row)
            if all(entry["bbox"][2:]):
                self.labels.add(annotation(entry, self.labels.count + 1))


@contextlib.contextmanager
def lists_in(output: Path, predictor: Predictor) -> Iterator[Lists]:
    """Lists in a folder, which get their names when the block ends without an error. Raises OSError."""
    classes = json.dumps([{"id": key, "name": name} for key, name in zip(predictor.category_ids, predictor.class_names)])
    paths = [output / name for name in LISTS]
    drafts = [draft(path) for path in paths]
    with contextlib.ExitStack() as files:
        results, table, listed, labels = (files.enter_context(open(path, "w", encoding="utf-8", newline="")) for path in drafts)
        # Two of the lists need the images. The folder for temporary files may lie in memory, so this one does not go there.
        images = files.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", dir=output))
        results.write("[")
        listed.write('{"info": {"description": "what detections.json was found in"}, "images": [')
        labels.write('{"info": {"description": "the boxes of detections.json, to be corrected"}, "annotations": [')
        yield Lists(predictor, results, table, images, labels)
        results.write("\n]\n")
        labels.write('\n], "images": [')
        for file, rest in ((listed, ' "annotations": [],'), (labels, "")):
            images.seek(0)
            shutil.copyfileobj(images, file)
            file.write(f'\n],{rest} "categories": {classes}}}\n')
    for made, path in zip(drafts, paths):
        os.replace(made, path)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture, or report why it cannot be written: its boxes are in the lists anyway. Raises OSError if no other could be
    written either."""
    from tqdm import tqdm

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        picture.save(path)
    except (OSError, ValueError) as error:  # a format has a largest size, and a file system a longest name
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else None
        if isinstance(error, OSError) and error.errno not in (None, errno.ENAMETOOLONG):
            raise
        tqdm.write(f"no picture: {printable(f'{path}: cannot be written ({reason or error})')}", file=sys.stderr)


def entries(
    predictor: Predictor, found: ImageDetections, name: str, image_id: Any
) -> Iterator[tuple[dict[str, Any], tuple[Any, ...]]]:
    """The objects of an image for the JSON, and the rows for the CSV."""
    for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()):
        x1, y1, x2, y2 = (round(value, 3) for value in box)
        category = predictor.category_ids[label]
        entry = {
            "image_id": image_id, "file_name": name, "category_id": category,
            "bbox": [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)], "score": round(score, 6),
        }  # fmt: skip
        yield entry, (text(name), predictor.class_names[label], category, f"{score:.6f}", x1, y1, x2, y2)


def annotation(entry: dict[str, Any], number: int) -> dict[str, Any]:
    """An object of the JSON as an annotation of a COCO data set with the id ``number``."""
    kept = {key: entry[key] for key in ("image_id", "category_id", "bbox", "score")}
    _, _, width, height = entry["bbox"]
    return {"id": number, **kept, "area": round(width * height, 3), "iscrowd": 0}


def total_of(names: Sequence[str]) -> int | None:
    """How many images there will be; None: there are videos, whose length is unknown."""
    from dtg_core.data.video import VIDEO_SUFFIXES

    return None if any(Path(name).suffix.lower() in VIDEO_SUFFIXES for name in names) else len(names)


def how_far(done: Done, names: Sequence[str]) -> str:
    """"37 of 66 images", or "37 images" if there are videos."""
    total = total_of(names)
    return counted(done.images, "image") if total is None else f"{done.images + done.failed} of {counted(total, 'image')}"


def images(
    root: Path, names: Sequence[str], listed: Mapping[str, Mapping[str, Any]], rules: DataRules, done: Done
) -> Iterator[tuple[Any, str, Image.Image]]:
    """Ids, names and images that can be read, videos frame by frame; what cannot be read is reported and counted in ``done``.

    Those in ``listed`` have the ids and the pixels of its JSON, turned by EXIF or not. Others are numbered from 1; unreadable ones
    have their numbers too, so that fixing one does not change the others'.
    """
    from tqdm import tqdm

    from dtg_core.data.images import read_image
    from dtg_core.data.video import VIDEO_SUFFIXES, read_frames

    numbers = count(1)
    for name in names:
        try:
            if Path(name).suffix.lower() in VIDEO_SUFFIXES:
                for number, frame in enumerate(read_frames(root / name), 1):
                    yield next(numbers), f"{name}/{number:06d}.jpg", frame
            else:
                number, entry = next(numbers), listed.get(name, {})
                size = side(entry.get("height")), side(entry.get("width"))
                image = read_image(root / name, size, rules)
                if all(size) and (image.height, image.width) != size and rules.resized != "keep":
                    found, told = f"{image.width} x {image.height}", f"{size[1]} x {size[0]}"
                    raise UserError(f"{root / name}: it is {found} px but its JSON says {told}, which its boxes would not fit - "
                                    "fix one of them, or set data.rules.resized=keep")
                yield entry.get("id", number), name, image
        except UserError as error:
            done.failed += 1
            tqdm.write(f"skipped: {printable(str(error))}", file=sys.stderr)  # above the bar


def side(value: object) -> int:
    """A side in pixels, 0 if it is not one."""
    return int(value) if isinstance(value, (int, float)) and 1 <= value < 2**31 else 0


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items, the last one shorter."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


def lower_score(predictor: Predictor, pictures: Sequence[Image.Image], score: float, batch: int) -> str:
    """What to do if no box has reached ``score``."""
    scores = [float(found.scores.max()) for found in predictor.predict(pictures, 0.0, batch) if len(found.scores)]
    best = f"; the highest score in the first {counted(len(pictures), 'image')} is {max(scores):.3f}" if scores else ""
    return f"no box over {score:g}{best} - try a lower --score"


def outputs(output: Path, names: Collection[str]) -> Iterator[Path]:
    """The files that are written for ``names``; for a video, whose frames are not known yet, those that exist."""
    from dtg_core.data.video import VIDEO_SUFFIXES

    yield from (output / name for name in LISTS)
    every = frozenset(names)
    for name in names:
        if Path(name).suffix.lower() in VIDEO_SUFFIXES:
            yield from sorted((output / "pictures" / name).glob("*.jpg"))
        else:
            yield picture_path(output, name, every)


def draft(path: Path) -> Path:
    """The name of a list until it is complete."""
    return path.with_name(f"{path.name}.tmp")


def picture_path(output: Path, name: str, names: Container[str]) -> Path:
    """Where the picture of an image goes; ``names`` are those of all files, so that no two share it."""
    if Path(name).suffix.lower() not in SAVED_AS_THEY_ARE:
        name += ".png"
        while name in names:
            name += ".png"
    return output / "pictures" / name


def text(name: str) -> str:
    """A file name in a form that UTF-8 can encode."""
    return name.encode("utf-8", "backslashreplace").decode()


if __name__ == "__main__":
    main_guard(main)
