"""Check a data set before spending an evening on it. Nothing is written except the file that ``--output`` names.

    python scripts/check_data.py --annotations JSON [--images DIR] [--val JSON] [--unlabeled DIR|JSON] [--output check.json]

Reads the annotations as training does, decodes every image, and compares the sets. Oddities are counted, with the first
three items; ``--output`` lists all of them. Exit status 0: usable, 2: not.
"""
from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import Parser, main_guard, number, progress
from shared_flags import add_overwrite, add_rules, require_new, rules_of

from dtg_core.config import DataConfig
from dtg_core.drafts import write_text, writing
from dtg_core.errors import UserError, counted, printable
from dtg_core.ranges import Whole

if TYPE_CHECKING:
    from dtg_core.data.findings import Report
    from dtg_core.data.index import CocoIndex


def parser() -> Parser:
    result = Parser("Check images and annotations.")
    add = result.add_argument
    add("--annotations", required=True, type=os.path.expanduser, metavar="JSON", help="labelled images, COCO format")
    add("--images", type=os.path.expanduser, metavar="DIR", help="folder that file names in the JSONs are relative to")
    add("--val", type=os.path.expanduser, metavar="JSON", help="validation set, checked and compared with the labelled one")
    add("--val-images", type=os.path.expanduser, metavar="DIR", help="folder of the images of --val, if different")
    add("--unlabeled", type=os.path.expanduser, metavar="DIR|JSON", help="unlabelled images, checked and compared with the others")
    add("--output", type=Path, metavar="FILE", help="write every finding as JSON")
    add_overwrite(result)
    add("--workers", type=number(Whole), default=2, metavar="N", help="processes that decode images (default: 2)")
    add_rules(result)
    return result


def main(argv: Sequence[str]) -> int:
    from dtg_core.data.findings import Report

    arguments = parser().parse(argv)
    rules = rules_of(arguments)
    if arguments.output:
        require_new([arguments.output], arguments.overwrite, inputs=(arguments.annotations, arguments.val, arguments.unlabeled))
    data = DataConfig(labeled=arguments.annotations, images=arguments.images, val=arguments.val, val_images=arguments.val_images,
                      unlabeled=arguments.unlabeled, rules=rules)  # fmt: skip
    report = Report()
    problem = None
    try:
        for line in _check(data, arguments.workers, report):
            print(line)
    except UserError as error:
        problem = error
    for line in report.lines():
        print(f"warning: {line}")
    if arguments.output:
        found = {"usable": problem is None, "error": str(problem) if problem else None, "findings": report.as_json()}
        with writing(arguments.output):
            write_text(arguments.output, json.dumps(found, indent=1) + "\n")
    if problem:
        raise problem
    print(f"usable, with {counted(len(report.findings), 'kind')} of warnings" if report.findings else "usable, nothing found")
    return 0


def _check(data: DataConfig, workers: int, report: Report) -> list[str]:
    """Run all checks; returns the lines that describe the sets."""
    from dtg_core.data.check import check_images, check_shared, require_images
    from dtg_core.data.sources import open_sources

    sources = open_sources(data, supervised=data.unlabeled is None, report=report)
    sets: list[tuple[CocoIndex | None, str | None]] = [
        (sources.labeled, data.labeled), (sources.val, data.val), (sources.unlabeled, data.unlabeled)
    ]  # fmt: skip
    named = [(index, Path(name)) for index, name in sets if index is not None and name is not None]
    checked = [check_images(index, name, report, workers, progress) for index, name in named]
    for other, one in combinations(checked, 2):
        check_shared(one, other, report)
    for one in checked:
        require_images(one)
    return [_summary(index, name) for index, name in named]


def _summary(index: CocoIndex, name: Path) -> str:
    import numpy as np

    line = f"{name}: {counted(len(index), 'image')}"
    if index.class_names:
        counts = np.bincount(index.labels[~index.crowd], minlength=len(index.class_names)).tolist()
        shown = ", ".join(f"{class_name} {count}" for class_name, count in list(zip(index.class_names, counts))[:20])
        line += (f", {counted(sum(counts), 'object')} and {counted(int(index.crowd.sum()), 'crowd')} of "
                 f"{counted(len(counts), 'class', 'classes')}: {shown}")
    return printable(line)


if __name__ == "__main__":
    main_guard(main)
