"""A sheet of labeled images and the views that training makes of them, with the boxes that move along.

    python scripts/show_views.py [--config FILE] [--labeled JSON] [--set key=value ...] --output views.png

Takes the settings of train.py; look at it before a long run on your own data.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common import load_settings, main_guard, train_parser

from dtg_core.errors import UserError


def parser() -> argparse.ArgumentParser:
    result = train_parser()
    result.description = "Show labeled, weak and strong views of labeled images."
    result.add_argument("--count", type=int, default=4, metavar="N", help="images (default: 4)")
    return result


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)  # type: ignore[attr-defined]
    output = Path(arguments.output or "views.png")
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"--output {output}: not a picture - give a name that ends in .png")
    if arguments.count < 1:
        raise UserError(f"--count: use at least 1 (found {arguments.count})")
    arguments.detector = arguments.detector or "gfl"  # views are the same for all
    settings, _, _ = load_settings(arguments)

    from dtg_core.data.sources import open_sources
    from dtg_core.engine.pictures import views_sheet

    index = open_sources(settings.data, True).labeled
    rows = [row for row in range(len(index)) if len(index.objects(row)[0])][: arguments.count]
    picture = views_sheet(index, rows, settings.views, settings.run.seed)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        picture.save(output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}) - give another --output") from error
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    main_guard(main)
