"""Merge COCO JSONs, such as a first and a second round of labelling, into one.

    python scripts/merge_annotations.py own.json more.json --images photos/ more_photos/ --output all.json

``--images`` takes one folder for all files, or one for each. The folder that the merged file's names are relative to, for
``--images`` of other scripts, is told at the end. Classes are matched by name, and ids are given anew.
"""
from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, main_guard
from import_annotations import write_checked
from shared_flags import add_overwrite, add_rules, require_new, rules_of

from dtg_core.errors import UserError, counted


def parser() -> Parser:
    result = Parser("Merge COCO JSONs into one.")
    add = result.add_argument
    add("annotations", type=Path, nargs="+", metavar="JSON", help="the files, COCO format")
    add("--images", type=Path, nargs="+", required=True, metavar="DIR", help="folder of their images, for all files or for each")
    add("--output", type=Path, required=True, metavar="JSON", help="file to write")
    add_overwrite(result)
    add_rules(result)
    return result


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)
    files, folders = arguments.annotations, arguments.images
    if len(files) < 2:
        raise UserError(f"{files[0]}: it is alone - give two files or more")
    if len(folders) not in (1, len(files)):
        raise UserError(f"--images: {counted(len(folders), 'folder')} for {len(files)} files - give one for all, or one for each")
    for number, file in enumerate(files):
        if os.path.realpath(file) in map(os.path.realpath, files[:number]):
            raise UserError(f"{file}: is given twice - give it once")
    rules = rules_of(arguments)
    require_new([arguments.output], arguments.overwrite, inputs=files)

    from dtg_core.data.coco import OF_NO_CATEGORY, OF_NO_IMAGE, parse_coco
    from dtg_core.data.findings import Report
    from dtg_core.data.merge import merged

    real = [os.path.realpath(folder) for folder in (folders * len(files) if len(folders) == 1 else folders)]
    root, report = Path(os.path.commonpath(real)), Report()
    contents = {}
    for file in files:
        contents[str(file)], _ = parse_coco(file, rules, found := Report())
        for kind in (OF_NO_IMAGE, OF_NO_CATEGORY):  # what is odd otherwise is also in the merged file, and told of that
            report.take(found, file, kind)
    content = merged(contents, [os.path.relpath(folder, root) for folder in real], report)
    print(f"{write_checked(content, root, arguments.output, rules, report)}, for --images {os.path.relpath(root)}")
    return 0


if __name__ == "__main__":
    main_guard(main)
