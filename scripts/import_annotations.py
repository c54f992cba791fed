"""Turn YOLO or Pascal VOC labels into a COCO JSON, with the same checks as any other.

    python scripts/import_annotations.py --format yolo --images DIR --labels DIR --names data.yaml --output own.json
    python scripts/import_annotations.py --format voc --images DIR --labels DIR --output own.json

Images without a label file count as images without objects, or are left out with ``--only-labeled``. File names in the JSON are
relative to ``--images``. Each part of a data set that is split into folders is imported by itself: ``--images DIR/train/images
--labels DIR/train/labels``, then the same for ``valid``.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import Parser, main_guard, one_of, warn
from shared_flags import add_overwrite, add_rules, require_new, rules_of

from dtg_core.drafts import draft_of, writing
from dtg_core.errors import UserError, counted

if TYPE_CHECKING:
    from dtg_core.config import DataRules
    from dtg_core.data.findings import Report


def parser() -> Parser:
    result = Parser("Turn YOLO or Pascal VOC labels into a COCO JSON.")
    add = result.add_argument
    add("--format", type=one_of(("yolo", "voc")), required=True, metavar="yolo|voc", help="what is imported")
    add("--images", type=Path, required=True, metavar="DIR", help="folder of the images, with any subfolders")
    add("--labels", type=Path, required=True, metavar="DIR", help="folder of the .txt or .xml files, arranged like the "
                                                                  "images, or in folders called labels next to images")
    add("--names", type=Path, metavar="FILE", help="the classes: data.yaml, whose kpt_shape says that boxes have "
                                                       "keypoints, or a .txt with one name per line; VOC: only if several "
                                                       "files should share them")
    add("--zero-based", action="store_true", help="VOC coordinates count from 0, not from 1")
    add("--only-labeled", action="store_true", help="leave out images without a label file, as unlabelled ones")
    add("--output", type=Path, required=True, metavar="JSON", help="file to write")
    add_overwrite(result)
    add_rules(result)
    return result


def main(argv: Sequence[str]) -> int:
    from dtg_core.data.files import no_folder
    from dtg_core.data.findings import Report
    from dtg_core.data.importers import import_voc, import_yolo

    arguments = parser().parse(argv)
    if arguments.format == "yolo" and arguments.names is None:
        raise UserError("--names: YOLO's labels need it, as they have no names - give data.yaml, or a .txt with one a line")
    if arguments.format == "yolo" and arguments.zero_based:
        raise UserError("--zero-based: it is of VOC's pixels, YOLO's labels have none - leave it out")
    if not arguments.labels.is_dir():
        raise UserError(f"{arguments.labels}: {no_folder(arguments.labels)} - give the folder of the labels")
    rules = rules_of(arguments)
    require_new([arguments.output], arguments.overwrite, inputs=[arguments.names])
    report = Report()
    if arguments.format == "yolo":
        content = import_yolo(arguments.images, arguments.labels, arguments.names, report, arguments.only_labeled, rules)
    else:
        content = import_voc(arguments.images, arguments.labels, arguments.names, report, arguments.only_labeled, rules,
                             arguments.zero_based)  # fmt: skip
    print(write_checked(content, arguments.images, arguments.output, rules, report))
    return 0


def write_checked(content: dict[str, Any], images: Path, output: Path, rules: DataRules, report: Report) -> str:
    """Write a COCO content, if it is sound as a data set with the folder of its ``images``, and tell what is odd.

    Returns what it holds, for the terminal. Raises UserError as ``load_coco`` does, and if the file cannot be written.
    """
    from dtg_core.data.coco import load_coco

    with writing(output), draft_of(output) as draft:
        def told(line: str) -> str:
            return line.replace(str(draft), str(output))

        draft.write_text(json.dumps(content), encoding="utf-8")
        try:
            index = load_coco(draft, images, rules=rules, report=report)
        except UserError as error:
            raise UserError(told(str(error))) from error
    warn(map(told, report.lines()))
    return (f"{output}: {counted(len(index), 'image')}, {counted(len(index.boxes), 'box', 'boxes')} of "
            f"{counted(len(index.class_names), 'class', 'classes')}")


if __name__ == "__main__":
    main_guard(main)
