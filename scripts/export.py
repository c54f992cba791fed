"""A trained detector as one graph for torch.export and ONNX, with decoding and NMS in it.

    python scripts/export.py RUN_OR_WEIGHTS --output DIR [--format onnx|torch_export|both] [--size H W] [--images PATH...]

Each file is run on images and compared with the detector itself; one that differs is kept as ``.rejected``. ``DIR/teacher.json``
describes the graph's inputs and outputs, see docs/export.md. ONNX needs the extra ``export``.

Exit status: 0; 2 after a mistake, reported in one line, and when a file is rejected.
"""
from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from command_line import Parser, main_guard, number, one_of, warn
from shared_flags import add_rules, add_weights, rules_of

from dtg_core.drafts import require_writable, writing
from dtg_core.errors import UserError, printable
from dtg_core.ranges import Count, PartialShare

if TYPE_CHECKING:
    from PIL import Image

    from dtg_core.config import DataRules, ViewsConfig

FORMATS = {"onnx": ("onnx",), "torch_export": ("torch_export",), "both": ("torch_export", "onnx")}
IMAGES = 20  # maximum number that are compared
TOLERATED = 0.05  # relative difference between an image's size in the graph and in evaluation


def parser() -> Parser:
    result = Parser("Write a trained detector as a graph that runs without this project.")
    add = result.add_argument
    add_weights(result, device=False)
    add("--output", type=Path, required=True, metavar="DIR", help="where the files go")
    add("--format", type=one_of(tuple(FORMATS)), default="both", metavar="onnx|torch_export|both", help="default: both")
    add("--size", type=number(Annotated[int, "[32, 8192]"]), nargs=2, metavar=("H", "W"),
        help="size of the graph's image, px (default: a square of views.test_short_edge)")
    add("--score", type=number(PartialShare), metavar="S", help="lowest score of a box (default: the run's run.score_threshold)")
    add("--opset", type=number(Count), default=18, metavar="N", help="ONNX opset (default: 18)")
    add("--images", nargs="+", type=os.path.expanduser, metavar="PATH",
        help=f"images, folders or patterns to compare on, {IMAGES} at most (default: from the built-in synthetic data set)")
    add_rules(result)
    return result


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)

    from dtg_core.data.files import IMAGE_SUFFIXES
    from dtg_core.data.inputs import find_images
    from dtg_core.data.shapes import draw_scene
    from dtg_core.engine.export import export
    from dtg_core.engine.predict import find_weights, load_detector

    names, root = list[str](), Path()
    if arguments.images:
        names, root, warnings = find_images(arguments.images, arguments.output, IMAGE_SUFFIXES)
        warn(warnings)
    weights = find_weights(arguments.weights, arguments.which)
    require_writable(arguments.output)  # before the long work
    predictor = load_detector(weights, "cpu")
    settings = predictor.settings
    side = settings.views.test_short_edge
    size: tuple[int, int] = tuple(arguments.size or (side, side))  # type: ignore[assignment]
    score = settings.run.score_threshold if arguments.score is None else arguments.score
    rules = rules_of(arguments, settings.data.rules)
    pictures = list(islice(readable(root, names, rules), IMAGES))
    if names and not pictures:
        raise UserError(f"{arguments.images[0]}: no image there can be read - give other --images")
    warn(other_sizes(pictures, size, settings.views))
    pictures = pictures or [draw_scene(0, "val", number).image for number in range(IMAGES)]
    formats = FORMATS[arguments.format]
    with writing(arguments.output):
        for line in export(predictor, pictures, arguments.output, weights.stem, formats, size, score, arguments.opset):
            print(line)
    return 0


def readable(root: Path, names: Sequence[str], rules: DataRules) -> Iterator[Image.Image]:
    """The images that can be read; what cannot is reported."""
    from dtg_core.data.images import read_image

    for name in names:
        try:
            yield read_image(root / name, rules=rules)
        except UserError as error:
            print(f"skipped: {printable(str(error))}", file=sys.stderr)


def other_sizes(pictures: Sequence[Image.Image], size: tuple[int, int], views: ViewsConfig) -> list[str]:
    """A warning if a graph of ``size`` (height, width) shows the pictures to the detector larger or smaller than evaluation."""
    from dtg_core.data.geometry import fitted

    seen = [fitted(picture.height, picture.width, views.test_short_edge, views.long_edge) for picture in pictures]
    factors = [min(size[0] / height, size[1] / width) for height, width in seen]
    if all(abs(factor - 1) <= TOLERATED for factor in factors):
        return []
    worst = max(factors, key=lambda factor: abs(math.log(factor)))
    wanted = [max(sides) for sides in zip(*seen)]
    return [f"--size: in {size[0]} x {size[1]} px, objects have up to {worst:.2f} times the size at which the run was evaluated - "
            f"give --size {wanted[0]} {wanted[1]} to keep it"]


if __name__ == "__main__":
    main_guard(main)
