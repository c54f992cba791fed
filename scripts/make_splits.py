"""Split a labelled set into few labelled and many unlabelled images.

    python scripts/make_splits.py --annotations instances_train2017.json --output splits/ [--percent 1 2 5 10] [--folds 1-5]

For each share and fold it writes ``fold1_10_labeled.json``, a COCO JSON for ``--labeled``, and
``fold1_10_unlabeled.json``, the list of all other images for ``--unlabeled``; and once ``manifest.json`` with counts and
checksums. File names stay those of the source, so training needs ``--images DIR``, or a link ``images`` beside the splits.
"""
from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Parser, add_overwrite, add_rules, main_guard, one_of, require_new, rules_of

from dtg_core.drafts import draft_of, writing
from dtg_core.errors import UserError, counted

if TYPE_CHECKING:
    import argparse

    import numpy as np

PARTS = "labeled", "unlabeled"
MUCH = 1.5  # times the images asked for, beyond which a split is told
PERCENTS = 1, 2, 5, 10
PROTOCOLS = ("softteacher", "stac", "ubteacher")


def parser() -> Parser:
    result = Parser("Make labelled and unlabelled splits of a COCO JSON.")
    add = result.add_argument
    add("--annotations", type=Path, required=True, metavar="JSON", help="labelled images, COCO format")
    add("--output", type=Path, required=True, metavar="DIR", help="where the splits go")
    add_overwrite(result)
    add("--protocol", type=one_of(PROTOCOLS), default=PROTOCOLS[0], metavar="|".join(PROTOCOLS),
        help="how images are drawn (default: softteacher)")
    add("--percent", type=float, nargs="+", metavar="P", help="shares of the images (default: 1 2 5 10)")
    add("--count", type=int, nargs="+", metavar="N", help="numbers of images, instead of shares")
    add("--folds", default="1-5", metavar="A-B", help="numbers of the folds, which are their seeds (default: 1-5)")
    add("--indices", type=Path, metavar="FILE", help="Unbiased Teacher's COCO_supervision.txt, for --protocol ubteacher")
    add("--min-per-class", type=int, default=0, metavar="K", help="add images until each class has K boxes")
    add_rules(result)
    add("--group-by", metavar="KEY|REGEX", help="keep images together that share this key, or this part of their file name")
    return result


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)
    shares, folds, rules = _shares(arguments), _folds(arguments.folds), rules_of(arguments)
    files = [f"fold{fold}_{name}_{part}.json" for name in _names(arguments) for fold in folds for part in PARTS]
    require_new((arguments.output / name for name in ("manifest.json", *files)), arguments.overwrite)

    import numpy as np

    from dtg_core.data.coco import parse_coco
    from dtg_core.data.splits import fill_classes, group_images

    content, counts = parse_coco(arguments.annotations, rules)
    images = content["images"]
    groups = group_images(images, arguments.group_by)
    if int(groups.max()) == 0 < len(images) - 1:
        raise UserError(f"--group-by {arguments.group_by!r}: makes 1 group of all {len(images)} images, which cannot be split - "
                        "give a pattern that tells them apart")
    names = [category["name"] for category in content["categories"]]
    drawn = []
    for name, wanted, percent in shares(len(images)):
        for fold in folds:
            positions = _draw(arguments, content, groups, wanted, percent, fold)
            if arguments.min_per_class:
                positions = fill_classes(positions, groups, counts, names, arguments.min_per_class, fold)
            _look_at_size(arguments, f"fold{fold}_{name}", len(positions), wanted, groups)
            drawn.append((f"fold{fold}_{name}", fold, positions))
    made: list[dict[str, Any]] = []
    manifest = {
        "source": arguments.annotations.name,
        "sha256": sha256(arguments.annotations),
        "images": len(images),
        "protocol": arguments.protocol,
        "min_per_class": arguments.min_per_class,
        "group_by": arguments.group_by,
        "splits": made,
    }
    with writing(arguments.output), ExitStack() as drafts:  # all files or none: a few would block the next try
        for name, fold, positions in drawn:
            sums = {}
            for part, value in zip(PARTS, _parts(content, np.sort(positions))):
                draft = drafts.enter_context(draft_of(arguments.output / f"{name}_{part}.json"))
                draft.write_text(json.dumps(value), encoding="utf-8")
                sums[f"{name}_{part}.json"] = sha256(draft)
            boxes = dict(zip(names, counts[positions].sum(0).tolist()))
            made.append({"name": name, "fold": fold, "images": len(positions), "boxes": boxes, "sha256": sums})
        draft = drafts.enter_context(draft_of(arguments.output / "manifest.json"))
        draft.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for one in made:
        print(f"{one['name']}: {one['images']} labelled and {counted(len(images) - one['images'], 'other image')}")
    return 0


def _shares(arguments: argparse.Namespace) -> Any:
    """A function from the number of images to (name, number of draws, percent) of each wanted share."""
    for flag in ("percent", "count"):
        for value in getattr(arguments, flag) or ():
            if not 0 < value < math.inf:
                raise UserError(f"--{flag}: use numbers over 0 (found {value:g})")
    if arguments.min_per_class < 0:
        raise UserError(f"--min-per-class: use 0 or more (found {arguments.min_per_class})")
    names = _names(arguments)
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise UserError(f"--{'count' if arguments.count else 'percent'}: {twice[0].removesuffix('images')} stands there twice - "
                        "give each share once")
    if arguments.count and arguments.percent:
        raise UserError("--percent and --count: they say the same in two ways - give one of them")
    if arguments.protocol == "ubteacher":
        if arguments.indices is None or arguments.count or arguments.group_by:
            raise UserError("--protocol ubteacher: it takes its images from --indices FILE by --percent - give these two, "
                            "and no "
                            "--count or --group-by")
    elif arguments.indices is not None:
        raise UserError("--indices: belongs to --protocol ubteacher - leave one of the two out")

    def shares(images: int) -> list[tuple[str, int, float]]:
        if arguments.count:
            draws = [(count, 0.0) for count in arguments.count]
        else:
            draws = [(int(percent / 100 * images), percent) for percent in arguments.percent or PERCENTS]
        found = [(name, *draw) for name, draw in zip(names, draws)]
        for _, wanted, _ in found:
            if not 1 <= wanted < images:
                raise UserError(f"{arguments.annotations}: {wanted} of {images} images are no share - choose at least 1 and "
                                "not all")  # fmt: skip
        return found

    return shares


def _names(arguments: argparse.Namespace) -> list[str]:
    """Of the shares, as in the files' names."""
    if arguments.count:
        return [f"{count}images" for count in arguments.count]
    return [f"{percent:g}" for percent in arguments.percent or PERCENTS]


def _look_at_size(arguments: argparse.Namespace, name: str, images: int, wanted: int, groups: np.ndarray) -> None:
    """Refuse a split without other images, and warn of one that is much larger than it was meant."""
    causes = [f"--group-by {arguments.group_by!r} makes {counted(int(groups.max()) + 1, 'group')}"] if arguments.group_by else []
    causes += [f"--min-per-class {arguments.min_per_class} adds images"] if arguments.min_per_class else []
    why = " and ".join(causes) or "the protocol drew so many"
    if images == len(groups):
        raise UserError(f"{name}: all {images} images would be labelled and no other is left ({why}) - ask for fewer, or for "
                        "smaller groups")
    if images > MUCH * wanted:
        print(f"warning: {name}: {images} labelled images instead of {wanted} ({why})", file=sys.stderr)


def _folds(text: str) -> range:
    first, span, last = text.partition("-")
    last = last if span else first
    if not first.isdecimal() or not last.isdecimal() or not 0 <= int(first) <= int(last) < 2**32:
        raise UserError(f"--folds: {text!r} - give a number or a span such as 1-5")
    return range(int(first), int(last) + 1)


def _draw(
    arguments: argparse.Namespace, content: dict[str, Any], groups: np.ndarray, wanted: int, percent: float, fold: int
) -> np.ndarray:
    import numpy as np

    from dtg_core.data.splits import draw, draw_from_file, draw_groups

    images = content["images"]
    if arguments.protocol == "ubteacher":
        order = sorted(range(len(images)), key=lambda row: images[row]["id"])
        # The file's numbers are of detectron2's list: images with an annotation that is no crowd, however small.
        boxed = {annotation["image_id"] for annotation in content["annotations"] if annotation.get("iscrowd", 0) == 0}
        usable = np.array([row for row in order if images[row]["id"] in boxed], np.int64)
        return draw_from_file(arguments.indices, percent, fold, usable)
    if arguments.group_by:
        return draw_groups(groups, wanted, fold)
    return draw(arguments.protocol, len(images), wanted, fold)


def _parts(content: dict[str, Any], positions: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of both files of a fold, in the order of ``PARTS``."""
    chosen = set(positions.tolist())
    images = content["images"]
    labeled = [image for row, image in enumerate(images) if row in chosen]
    ids = {image["id"] for image in labeled}
    annotations = [annotation for annotation in content["annotations"] if annotation["image_id"] in ids]
    rest = [{key: image[key] for key in ("id", "file_name", "width", "height") if key in image}
            for row, image in enumerate(images) if row not in chosen]  # fmt: skip
    return {"images": labeled, "annotations": annotations, "categories": content["categories"]}, {"images": rest}


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main_guard(main)
