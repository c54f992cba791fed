"""Turn YOLO or Pascal VOC labels into a COCO JSON, with the same checks as any other.

    python scripts/import_annotations.py --format yolo --images DIR --labels DIR --names data.yaml --output own.json
    python scripts/import_annotations.py --format voc --images DIR --labels DIR --output own.json

Images without a file of labels become images without objects. File names in the JSON are relative to ``--images``.
"""
from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from common import Parser, main_guard, one_of

from dtg_core.errors import UserError


def parser() -> Parser:
    result = Parser("Turn YOLO or Pascal VOC labels into a COCO JSON.")
    add = result.add_argument
    add("--format", type=one_of(("yolo", "voc")), required=True, metavar="yolo|voc", help="what is imported")
    add("--images", type=Path, required=True, metavar="DIR", help="folder of the images, with any subfolders")
    add("--labels", type=Path, required=True, metavar="DIR", help="folder of the .txt or .xml files, arranged like the "
                                                                  "images")
    add("--names", type=Path, metavar="FILE", help="YOLO's classes: data.yaml, or a .txt with one name a line")
    add("--zero-based", action="store_true", help="VOC coordinates count from 0, not from 1")
    add("--output", type=Path, required=True, metavar="JSON", help="file to write")
    return result


def main(argv: Sequence[str]) -> int:
    from dtg_core.data.coco import load_coco
    from dtg_core.data.importers import import_voc, import_yolo
    from dtg_core.data.report import Report

    arguments = parser().parse(argv)
    if (arguments.format == "yolo") != (arguments.names is not None):
        raise UserError("--names: YOLO's labels need it, VOC's have names of their own - give it for yolo only")
    if not arguments.labels.is_dir():
        raise UserError(f"{arguments.labels}: there is no such folder - give the folder of the labels")
    if arguments.output.exists():
        raise UserError(f"{arguments.output}: it exists already - give another --output, or delete it")
    report = Report()
    if arguments.format == "yolo":
        content = import_yolo(arguments.images, arguments.labels, arguments.names, report)
    else:
        content = import_voc(arguments.images, arguments.labels, report, arguments.zero_based)
    draft = arguments.output.with_name(f"{arguments.output.name}.tmp")
    try:
        draft.write_text(json.dumps(content), encoding="utf-8")
        index = load_coco(draft, arguments.images, report=report)
        os.replace(draft, arguments.output)
    except OSError as error:
        raise UserError(f"{arguments.output}: cannot be written ({error.strerror}) - give another --output") from error
    finally:
        draft.unlink(missing_ok=True)
    for line in report.lines():
        print(f"warning: {line}", file=sys.stderr)
    print(f"{arguments.output}: {len(index)} images, {len(index.boxes)} boxes of {len(index.class_names)} classes")
    return 0


if __name__ == "__main__":
    main_guard(main)
