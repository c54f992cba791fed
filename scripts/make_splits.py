"""Split a labelled set into few labelled and many unlabelled images.

    python scripts/make_splits.py --annotations instances_train2017.json --output splits/ [--percent 1 2 5 10] [--folds 1-5]
    python scripts/make_splits.py --annotations mine.json --output splits/ --val 20

For each share and fold it writes ``fold1_10_labeled.json``, a COCO JSON for ``--labeled``, and
``fold1_10_unlabeled.json``, the list of all other images for ``--unlabeled``; and once ``manifest.json`` with counts and
checksums. ``--val`` sets images aside first, with their labels, as ``val.json``; if no share is given, all others become
``labeled.json``. File names stay those of the source, so training needs ``--images DIR``, or a link ``images`` next to the splits.
"""
from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import Parser, main_guard, number, one_of, warn
from shared_flags import add_overwrite, add_rules, require_new, rules_of

from dtg_core.drafts import draft_of, writing
from dtg_core.errors import UserError, counted
from dtg_core.ranges import Count, Percent, Positive, Whole

if TYPE_CHECKING:
    import argparse

    import numpy as np

    from dtg_core.config import DataRules

PARTS = "labeled", "unlabeled"
MUCH = 1.5  # a split with more than this many times the images asked for gives a warning
PERCENTS = 1, 2, 5, 10
PROTOCOLS = ("softteacher", "stac", "ubteacher")


def parser() -> Parser:
    result = Parser("Make labelled and unlabelled splits of a COCO JSON.")
    add = result.add_argument
    add("--annotations", type=Path, required=True, metavar="JSON", help="labelled images, COCO format")
    add("--output", type=Path, required=True, metavar="DIR", help="where the splits go")
    add_overwrite(result)
    add("--protocol", type=one_of(PROTOCOLS), metavar="|".join(PROTOCOLS), help="how images are drawn (default: softteacher)")
    add("--percent", type=number(Positive), nargs="+", metavar="P", help="shares of the images (default: 1 2 5 10)")
    add("--count", type=number(Count), nargs="+", metavar="N", help="numbers of images, instead of shares")
    add("--val", type=number(Percent), metavar="P", help="first set P percent of the images aside as val.json")
    add("--val-seed", type=number(Whole), metavar="N", help="of the draw of --val (default: 0)")
    add("--folds", metavar="A-B", help="numbers of the folds, also used as their seeds (default: 1-5)")
    add("--indices", type=Path, metavar="FILE", help="Unbiased Teacher's COCO_supervision.txt, for --protocol ubteacher")
    add("--min-per-class", type=number(Whole), default=0, metavar="K", help="add images until each class has K boxes")
    add_rules(result)
    add("--group-by", metavar="KEY|REGEX", help="keep images together that share this key, or this part of their file name")
    return result


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)
    _check_flags(arguments)
    arguments.protocol, arguments.val_seed = arguments.protocol or PROTOCOLS[0], arguments.val_seed or 0
    folds, rules = _folds(arguments.folds or "1-5"), rules_of(arguments)
    whole = ["val.json", *(["labeled.json"] if not _names(arguments) else [])] if arguments.val else []
    files = [f"fold{fold}_{name}_{part}.json" for name in _names(arguments) for fold in folds for part in PARTS]
    require_new((arguments.output / name for name in ("manifest.json", *whole, *files)), arguments.overwrite,
                inputs=(arguments.annotations, arguments.indices))

    pool = _read(arguments, rules)
    held, pool = _set_aside(arguments, pool)
    made = _write(arguments, held, pool, _drawn(arguments, pool, folds))
    for one in made:
        others = "" if one["name"] in held else f" and {counted(len(pool.groups) - one['images'], 'other image')}"
        print(f"{one['name']}: {one['images']} labelled{others or ' images'}")
    return 0


@dataclass(frozen=True)
class _Pool:
    """The images to draw from, with their labels."""

    content: dict[str, Any]  # of a COCO JSON
    counts: np.ndarray  # [images, C] int64, boxes of each class
    groups: np.ndarray  # [images] int64, images of one number stay together

    @property
    def class_names(self) -> list[str]:
        return [category["name"] for category in self.content["categories"]]


def _read(arguments: argparse.Namespace, rules: DataRules) -> _Pool:
    """All images of the source; what is odd about them is printed."""
    from dtg_core.data.coco import parse_coco
    from dtg_core.data.findings import Report
    from dtg_core.data.splits import group_images

    content, counts = parse_coco(arguments.annotations, rules, report := Report())
    images = content["images"]
    file, times = Counter(image["file_name"] for image in images).most_common(1)[0]
    if times > 1:
        raise UserError(f"{arguments.annotations}: lists the file {file!r} {times} times, and the splits could share it - make it "
                        "one image with all its boxes")
    warn(report.lines())
    groups = group_images(images, arguments.group_by)
    if int(groups.max()) == 0 < len(images) - 1:
        raise UserError(f"--group-by {arguments.group_by!r}: makes 1 group of all {len(images)} images, which cannot be split - "
                        "give a pattern that tells them apart")
    return _Pool(content, counts, groups)


def _set_aside(arguments: argparse.Namespace, pool: _Pool) -> tuple[dict[str, Any], _Pool]:
    """For ``--val``, the files that are whole sets, by name, and the images that are left; otherwise no file, and all images."""
    import numpy as np

    if not arguments.val:
        return {}, pool
    held, rest = _hold_out(pool.groups, arguments.val, arguments.val_seed)
    _look_at_classes(pool.class_names, pool.counts[held], pool.counts[rest])
    left = _labeled(pool.content, rest)
    files = {"val.json": _labeled(pool.content, held)} | ({} if _names(arguments) else {"labeled.json": left})
    return files, _Pool(left, pool.counts[rest], np.unique(pool.groups[rest], return_inverse=True)[1])


def _drawn(arguments: argparse.Namespace, pool: _Pool, folds: range) -> list[tuple[str, int, np.ndarray]]:
    """Name, fold and positions [n] of the labelled images of each split."""
    from dtg_core.data.splits import fill_classes

    found = []
    for share, wanted, percent in _shares(arguments, len(pool.groups)):
        for fold in folds:
            name = f"fold{fold}_{share}"
            positions = _draw(arguments, pool, wanted, percent, fold)
            if arguments.min_per_class:
                positions = fill_classes(positions, pool.groups, pool.counts, pool.class_names, arguments.min_per_class, fold)
            _look_at_size(arguments, name, len(positions), wanted, pool.groups)
            found.append((name, fold, positions))
    return found


def _write(
    arguments: argparse.Namespace, whole: dict[str, Any], pool: _Pool, drawn: Sequence[tuple[str, int, np.ndarray]]
) -> list[dict[str, Any]]:
    """Write all files or none, as a few would block the next try. Returns what the manifest says of each split."""
    import numpy as np

    made: list[dict[str, Any]] = []
    with writing(arguments.output), ExitStack() as drafts:
        write = partial(_write_draft, drafts, arguments.output)
        for name, value in whole.items():
            made.append({"name": name, "images": len(value["images"]), "sha256": {name: write(name, json.dumps(value))}})
        for name, fold, positions in drawn:
            parts = zip(PARTS, (_labeled(pool.content, np.sort(positions)), _others(pool.content["images"], positions)))
            sums = {f"{name}_{part}.json": write(f"{name}_{part}.json", json.dumps(value)) for part, value in parts}
            boxes = dict(zip(pool.class_names, pool.counts[positions].sum(0).tolist()))
            made.append({"name": name, "fold": fold, "images": len(positions), "boxes": boxes, "sha256": sums})
        write("manifest.json", json.dumps(_manifest(arguments, len(pool.groups), made), indent=1) + "\n")
    return made


def _write_draft(drafts: ExitStack, folder: Path, name: str, text: str) -> str:
    """Write a file that gets its name when ``drafts`` ends. Returns its checksum."""
    draft = drafts.enter_context(draft_of(folder / name))
    draft.write_text(text, encoding="utf-8")
    return sha256(draft)


def _manifest(arguments: argparse.Namespace, images: int, splits: list[dict[str, Any]]) -> dict[str, Any]:
    """What was split and how, for ``manifest.json``."""
    return {
        "source": arguments.annotations.name,
        "sha256": sha256(arguments.annotations),
        "images": images,
        "set_aside": arguments.val,
        "val_seed": arguments.val_seed if arguments.val else None,
        "protocol": arguments.protocol,
        "min_per_class": arguments.min_per_class,
        "group_by": arguments.group_by,
        "splits": splits,
    }


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together."""
    names = _names(arguments)
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise UserError(f"--{'count' if arguments.count else 'percent'}: {twice[0].removesuffix('images')} stands there twice - "
                        "give each share once")
    if arguments.count and arguments.percent:
        raise UserError("--percent and --count: they say the same in two ways - give one of them")
    if arguments.val_seed is not None and not arguments.val:
        raise UserError("--val-seed: it is of the draw of --val - give both, or leave it out")
    if arguments.protocol == "ubteacher":
        if arguments.indices is None or arguments.count or arguments.group_by or arguments.val:
            raise UserError("--protocol ubteacher: it takes its images from --indices FILE by --percent - give these two, "
                            "and no --count, --group-by or --val")
    elif not names and (odd := next((key for key in ("min_per_class", "folds", "protocol") if getattr(arguments, key)), None)):
        remedy = "give another --val-seed for another draw" if odd == "folds" else "leave it out"
        raise UserError(f"--{odd.replace('_', '-')}: it is of labelled shares, and --val alone makes none - add --percent or "
                        f"--count, or {remedy}")
    elif arguments.indices is not None:
        raise UserError("--indices: belongs to --protocol ubteacher - leave one of the two out")


def _shares(arguments: argparse.Namespace, images: int) -> list[tuple[str, int, float]]:
    """Name, number of draws and percent of each wanted share of the images."""
    names = _names(arguments)
    if not names:
        draws = []
    elif arguments.count:
        draws = [(count, 0.0) for count in arguments.count]
    else:
        draws = [(int(percent / 100 * images), percent) for percent in arguments.percent or PERCENTS]
    found = [(name, *draw) for name, draw in zip(names, draws)]
    for name, wanted, _ in found:
        if not 1 <= wanted < images:
            asked = f"--count {wanted}" if arguments.count else f"--percent {name}: {wanted} of {images} images"
            raise UserError(f"{asked}: a share has at least 1 of the {images} images and not all - give other shares "
                            f"(--{'count 10' if arguments.count else 'percent 10'})")
    return found


def _names(arguments: argparse.Namespace) -> list[str]:
    """Names of the shares, as in the files' names; none if only a validation set was asked for."""
    if arguments.count:
        return [f"{count}images" for count in arguments.count]
    if arguments.val and not arguments.percent:
        return []
    return [f"{percent:g}" for percent in arguments.percent or PERCENTS]


def _look_at_classes(names: Sequence[str], held: np.ndarray, rest: np.ndarray) -> None:
    """Warn of classes that one of two parts has no box of; ``held`` and ``rest`` [n, C] are boxes per image."""
    for part, counts, others in (("val.json", held.sum(0), rest.sum(0)), ("the other images", rest.sum(0), held.sum(0))):
        if missing := [name for name, count, other in zip(names, counts, others) if count == 0 < other]:
            named = ", ".join(map(repr, missing[:3])) + ", ..." * (len(missing) > 3)
            warn([f"{part}: no box of {counted(len(missing), 'class', 'classes')} ({named}) - try another --val-seed"])


def _hold_out(groups: np.ndarray, percent: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the images set aside for validation, whole groups of them, and of the others, both sorted."""
    import numpy as np

    from dtg_core.data.splits import draw_groups

    held = draw_groups(groups, max(round(percent / 100 * len(groups)), 1), seed)
    rest = np.setdiff1d(np.arange(len(groups)), held)
    if len(rest) == 0:
        raise UserError(f"--val {percent:g}: all {len(groups)} images would be set aside - give a smaller share, or smaller groups")
    return held, rest


def _look_at_size(arguments: argparse.Namespace, name: str, images: int, wanted: int, groups: np.ndarray) -> None:
    """Refuse a split without other images, and warn about one that is much larger than requested."""
    causes = [f"--group-by {arguments.group_by!r} makes {counted(int(groups.max()) + 1, 'group')}"] if arguments.group_by else []
    causes += [f"--min-per-class {arguments.min_per_class} adds images"] if arguments.min_per_class else []
    why = " and ".join(causes) or "the protocol drew so many"
    if images == len(groups):
        raise UserError(f"{name}: all {images} images would be labelled and no other is left ({why}) - ask for fewer, or for "
                        "smaller groups")
    if images > MUCH * wanted:
        warn([f"{name}: {images} labelled images instead of {wanted} ({why})"])


def _folds(text: str) -> range:
    first, span, last = text.partition("-")
    last = last if span else first
    if not first.isdecimal() or not last.isdecimal() or not 0 <= int(first) <= int(last) < 2**32:
        raise UserError(f"--folds: {text!r} - give a number or a span such as 1-5")
    return range(int(first), int(last) + 1)


def _draw(arguments: argparse.Namespace, pool: _Pool, wanted: int, percent: float, fold: int) -> np.ndarray:
    """[n] int64, positions of the labelled images of a split."""
    import numpy as np

    from dtg_core.data.splits import draw, draw_from_file, draw_groups

    images = pool.content["images"]
    if arguments.protocol == "ubteacher":
        order = sorted(range(len(images)), key=lambda row: images[row]["id"])
        # The file's numbers refer to detectron2's list: images with a non-crowd annotation, however small.
        boxed = {annotation["image_id"] for annotation in pool.content["annotations"] if annotation.get("iscrowd", 0) == 0}
        usable = np.array([row for row in order if images[row]["id"] in boxed], np.int64)
        return draw_from_file(arguments.indices, percent, fold, usable)
    if arguments.group_by:
        return draw_groups(pool.groups, wanted, fold)
    return draw(arguments.protocol, len(images), wanted, fold)


def _labeled(content: dict[str, Any], positions: np.ndarray) -> dict[str, Any]:
    """A COCO JSON of the images at ``positions`` with their labels."""
    images = [content["images"][row] for row in positions.tolist()]
    ids = {image["id"] for image in images}
    annotations = [annotation for annotation in content["annotations"] if annotation["image_id"] in ids]
    return {"images": images, "annotations": annotations, "categories": content["categories"]}


def _others(images: Sequence[dict[str, Any]], positions: np.ndarray) -> dict[str, Any]:
    """A list of all other images, without labels."""
    chosen, keys = set(positions.tolist()), ("id", "file_name", "width", "height")
    return {"images": [{key: image[key] for key in keys if key in image} for row, image in enumerate(images) if row not in chosen]}


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main_guard(main)
