"""A sheet of labelled images and the views that training makes of them, with their boxes moved along.

    python scripts/show_views.py [--config FILE] [--labeled JSON] [--set key=value ...] --output views.png

Its settings are those of train.py; look at it before a long run on your own data.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from command_line import Parser, main_guard, number
from read_settings import QUICKSTART, settings_from
from shared_flags import add_overwrite, require_new

from dtg_core.drafts import writing
from dtg_core.errors import UserError, printable
from dtg_core.ranges import Count, Seed
from dtg_core.settings_text import yaml_scalar


def parser() -> Parser:
    result = Parser("Show labelled, weak and strong views of labelled images.")
    add = result.add_argument
    add("--config", type=Path, metavar="FILE", help="YAML settings (default: configs/quickstart.yaml)")
    add("--labeled", metavar="ANNOTATIONS.json", help="labelled images, COCO format (data.labeled)")
    add("--images", metavar="DIR", help="folder that file names in the JSON are relative to (data.images)")
    add("--seed", type=number(Seed), metavar="N", help="seed of all random draws (run.seed)")
    result.add_list("--set", "dotted.key=value", "set any value of the config")
    add("--count", type=number(Count), default=4, metavar="N", help="images (default: 4)")
    add("--output", type=Path, default=Path("views.png"), metavar="FILE", help="picture to write (default: views.png)")
    add_overwrite(result)
    return result


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)
    output = arguments.output
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"--output {output}: not a picture - give a name that ends in .png")
    require_new([output], arguments.overwrite, inputs=[arguments.config])
    keys = {"data.labeled": arguments.labeled, "data.images": arguments.images, "run.seed": arguments.seed}
    given = [f"{key}={yaml_scalar(value)}" for key, value in keys.items() if value is not None]
    settings, _, _ = settings_from(arguments.config or QUICKSTART, [*given, *arguments.set])

    from dtg_core.data.sources import open_sources
    from dtg_core.engine.pictures import views_sheet

    index = open_sources(replace(settings.data, val=None), True).labeled
    rows = [row for row in range(len(index)) if len(index.objects(row)[0])][: arguments.count]
    picture = views_sheet(index, rows, settings.views, settings.run.seed)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        picture.save(output)
    print(f"written to {output}")
    print(f"images, from the top: {', '.join(printable(index.file_names[row]) for row in rows)}")
    return 0


if __name__ == "__main__":
    main_guard(main)
