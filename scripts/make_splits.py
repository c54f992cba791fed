"""Split a labelled set into few labelled and many unlabelled images.

    python scripts/make_splits.py --annotations instances_train2017.json --output splits/ [--percent 1 2 5 10] [--folds 1-5]

For each share and fold it writes ``fold1_10_labeled.json``, a COCO JSON for ``--labeled``, and
``fold1_10_unlabeled.json``, the list of all other images for ``--unlabeled``; and once ``manifest.json`` with counts and
checksums. File names stay those of the source, so training needs ``--images DIR``, or a link ``images`` beside the splits.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Parser, main_guard, one_of

from dtg_core.errors import UserError

if TYPE_CHECKING:
    import argparse

    import numpy as np

PROTOCOLS = ("softteacher", "stac", "ubteacher")


def parser() -> Parser:
    result = Parser("Make labelled and unlabelled splits of a COCO JSON.")
    add = result.add_argument
    add("--annotations", type=Path, required=True, metavar="JSON", help="labelled images, COCO format")
    add("--output", type=Path, required=True, metavar="DIR", help="where the splits go")
    add("--protocol", type=one_of(PROTOCOLS), default=PROTOCOLS[0], metavar="|".join(PROTOCOLS),
        help="how images are drawn (default: softteacher)")
    add("--percent", type=float, nargs="+", metavar="P", help="shares of the images (default: 1 2 5 10)")
    add("--count", type=int, nargs="+", metavar="N", help="numbers of images, instead of shares")
    add("--folds", default="1-5", metavar="A-B", help="numbers of the folds, which are their seeds (default: 1-5)")
    add("--indices", type=Path, metavar="FILE", help="Unbiased Teacher's COCO_supervision.txt, for --protocol ubteacher")
    add("--min-per-class", type=int, default=0, metavar="K", help="add images until each class has K boxes")
    add("--group-by", metavar="KEY|REGEX", help="keep images together that share this key, or this part of their file name")
    return result


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)
    shares, folds = _shares(arguments), _folds(arguments.folds)

    import numpy as np

    from dtg_core.data.coco import parse_coco
    from dtg_core.data.splits import fill_classes, group_images

    content, counts = parse_coco(arguments.annotations)
    images = content["images"]
    groups = group_images(images, arguments.group_by)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{arguments.output}: cannot be written ({error.strerror}) - give another --output") from error
    names = [category["name"] for category in content["categories"]]
    made = []
    for name, wanted, percent in shares(len(images)):
        for fold in folds:
            positions = _draw(arguments, content, counts, groups, wanted, percent, fold)
            if arguments.min_per_class:
                positions = fill_classes(positions, groups, counts, names, arguments.min_per_class, fold)
            files = _write(arguments.output, f"fold{fold}_{name}", content, np.sort(positions))
            boxes = dict(zip(names, counts[positions].sum(0).tolist()))
            made.append({"name": f"fold{fold}_{name}", "fold": fold, "images": len(positions), "boxes": boxes,
                         "sha256": files})  # fmt: skip
            print(f"fold{fold}_{name}: {len(positions)} labelled and {len(images) - len(positions)} other images")
    manifest = {
        "source": arguments.annotations.name,
        "sha256": sha256(arguments.annotations),
        "images": len(images),
        "protocol": arguments.protocol,
        "min_per_class": arguments.min_per_class,
        "group_by": arguments.group_by,
        "splits": made,
    }
    (arguments.output / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return 0


def _shares(arguments: argparse.Namespace) -> Any:
    """A function from the number of images to (name, number of draws, percent) of each wanted share."""
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
            found = [(f"{count}images", count, 0.0) for count in arguments.count]
        else:
            percents = arguments.percent or (1, 2, 5, 10)
            found = [(f"{percent:g}", int(percent / 100 * images), percent) for percent in percents]
        for _, wanted, _ in found:
            if not 1 <= wanted < images:
                raise UserError(f"{arguments.annotations}: {wanted} of {images} images are no share - choose at least 1 and "
                                "not all")  # fmt: skip
        return found

    return shares


def _folds(text: str) -> range:
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal() or not 0 <= int(first) <= int(last or first) < 2**32:
        raise UserError(f"--folds: {text!r} - give a number or a span such as 1-5")
    return range(int(first), int(last or first) + 1)


def _draw(
    arguments: argparse.Namespace, content: dict[str, Any], counts: np.ndarray, groups: np.ndarray, wanted: int,
    percent: float, fold: int,
) -> np.ndarray:
    import numpy as np

    from dtg_core.data.splits import draw, draw_from_file, draw_groups

    images = content["images"]
    if arguments.protocol == "ubteacher":
        order = sorted(range(len(images)), key=lambda row: images[row]["id"])
        usable = np.array([row for row in order if counts[row].any()], np.int64)
        return draw_from_file(arguments.indices, percent, fold, usable)
    if arguments.group_by:
        return draw_groups(groups, wanted, fold)
    return draw(arguments.protocol, len(images), wanted, fold)


def _write(folder: Path, name: str, content: dict[str, Any], positions: np.ndarray) -> dict[str, str]:
    """Write both files of a fold; gives their checksums."""
    chosen = set(positions.tolist())
    images = content["images"]
    labeled = [image for row, image in enumerate(images) if row in chosen]
    ids = {image["id"] for image in labeled}
    annotations = [annotation for annotation in content["annotations"] if annotation["image_id"] in ids]
    rest = [{key: image[key] for key in ("id", "file_name", "width", "height") if key in image}
            for row, image in enumerate(images) if row not in chosen]  # fmt: skip
    sums = {}
    for part, value in (
        ("labeled", {"images": labeled, "annotations": annotations, "categories": content["categories"]}),
        ("unlabeled", {"images": rest}),
    ):
        path = folder / f"{name}_{part}.json"
        path.write_text(json.dumps(value), encoding="utf-8")
        sums[path.name] = sha256(path)
    return sums


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main_guard(main)
