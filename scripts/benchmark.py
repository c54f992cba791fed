"""Time of a training step by part, compared with the networks' own passes; host waits, memory, and the speed of the data.

    python scripts/benchmark.py --detector gfl --backbone resnet50 --size 512 --images 1+2
    python scripts/benchmark.py --detector faster_rcnn --config configs/quickstart.yaml --against sparse --json figures.json
    python scripts/benchmark.py --data --config configs/quickstart.yaml

``overhead`` is step / bare passes; 1.05 is 5 % more. The *bare passes* are the networks alone on views and proposals of the
same shapes: the teacher's forward pass without gradients, and the student's forward and backward passes on the labelled and
the strong views with the sum of all predictions as the loss. So making proposals, guidance, assignment, losses, gradient
clipping, the optimizer and the moving average are all overhead. Making the data is not: loader processes do it during the
step.

Everything is timed in turn within one process; figures are medians over ``--repeats``, ratios are medians of the repeats'
ratios. Weights are random, so no files are needed. Random weights give no candidates, so the guidance thresholds are set
such that about ``--candidates`` samples per image are above them. The learning rate is 0, so that all repeats do the same.
``host_waits`` are operators whose result the host needs (counted on the CPU too, where nothing waits). ``peak_memory`` is that
of the process after its first step, including the program and the weights, or on a GPU that of PyTorch's tensors.

``--data`` compares weak and strong views with the same operations by torchvision.transforms.v2, in pairs per second on one core.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from command_line import Parser, main_guard, number, one_of
from read_settings import DETECTORS, PARADIGMS, RunSettings, build_detector, settings_from, stage_paradigm
from shared_flags import add_overwrite, require_new, write_json

from dtg_core.config import without_weights
from dtg_core.errors import UserError
from dtg_core.ranges import Count
from dtg_core.settings_text import yaml_scalar

IMAGES = 16  # of the built-in data set, labelled and unlabelled


def parser() -> Parser:
    result = Parser("Measure the cost of a training step.")
    add = result.add_argument
    add("--detector", type=one_of(DETECTORS), metavar="|".join(DETECTORS), help="required unless --data is given")
    add("--config", type=Path, metavar="FILE", help="YAML settings (default: the paper's values)")
    add("--backbone", metavar="TIMM_NAME", help="any timm model with feature maps (backbone.name)")
    add("--size", type=number(Count), metavar="PX", help="side of the square views (default: the config's)")
    add("--images", metavar="L+U", help="labelled and unlabelled images per step (default: the config's)")
    add("--paradigm", type=one_of(PARADIGMS), default="dense", metavar="dense|sparse|supervised", help="default: dense")
    add("--against", type=one_of(("dense", "sparse")), metavar="dense|sparse", help="also time this paradigm's step, in turn")
    add("--candidates", type=number(Count), default=100, metavar="N",
        help="candidates per image in each stage (default: 100)")
    add("--repeats", type=number(Count), default=20, metavar="N", help="timed repeats (default: 20)")
    add("--json", metavar="FILE|-", help="write the figures; -: to standard output, instead of the table")
    add_overwrite(result)
    add("--data", action="store_true", help="measure the speed of making views instead")
    result.add_list("--set", "dotted.key=value", "set any value of the config")
    return result


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)
    if arguments.detector is None and not arguments.data:
        raise UserError(f"--detector: missing - choose from {', '.join(DETECTORS)}")
    if arguments.against == arguments.paradigm:
        raise UserError(f"--against: is the paradigm itself (found {arguments.against}) - name another")
    if arguments.against and arguments.paradigm == "supervised":
        raise UserError("--against: a supervised step has other images than a guided one - leave it out, or change --paradigm")
    settings = _settings(arguments)
    if arguments.json not in (None, "-"):
        require_new([Path(arguments.json)], arguments.overwrite, "--json", [arguments.config])

    figures, lines = (_data if arguments.data else _step)(arguments, settings)
    if arguments.json == "-":
        print(json.dumps(figures, indent=1))
        return 0
    print("\n".join(lines))
    if arguments.json:
        write_json(Path(arguments.json), figures)
    return 0


def _settings(arguments: argparse.Namespace) -> RunSettings:
    """The config with the flags' values and without what a benchmark does not need."""
    keys = {"detector": arguments.detector or "gfl", "backbone.name": arguments.backbone and yaml_scalar(arguments.backbone)}
    if arguments.images is not None:
        counts = arguments.images.split("+")
        if len(counts) != 2 or not all(count.isdecimal() and int(count) for count in counts):
            raise UserError(f"--images: use labelled+unlabelled, such as 1+4 (found {arguments.images})")
        keys |= {"data.labeled_per_device": counts[0], "data.unlabeled_per_device": counts[1]}
    if arguments.size is not None:
        size = arguments.size
        keys |= {"views.short_edge": f"[{size}, {size}]", "views.long_edge": str(size), "views.test_short_edge": str(size)}
    given = [f"{key}={value}" for key, value in keys.items() if value is not None]
    settings, _, _ = settings_from(arguments.config, [*given, *arguments.set])
    data = settings.data
    if data.labeled is None:
        data = replace(data, shapes_labeled=IMAGES, shapes_unlabeled=IMAGES, shapes_val=1)
    return replace(without_weights(settings), data=data)


def _step(arguments: argparse.Namespace, settings: RunSettings) -> tuple[dict[str, Any], list[str]]:
    import torch
    from accelerate import Accelerator

    from dtg_core.data.sources import open_sources
    from dtg_core.engine.benchmark import benchmark, table

    accelerator = Accelerator()
    sources = open_sources(settings.data, False)
    torch.manual_seed(settings.run.seed)
    detector = build_detector(settings, len(sources.labeled.class_names))
    figures = benchmark(
        settings, detector, sources, accelerator, stage_paradigm(arguments.paradigm), arguments.repeats, arguments.candidates,
        arguments.against,
    )
    data, views = settings.data, settings.views
    about = {
        "detector": settings.detector, "backbone": settings.backbone.name, "paradigm": arguments.paradigm,
        "images": f"{data.labeled_per_device}+{data.unlabeled_per_device}", "short_edge": list(views.short_edge),
        "device": str(accelerator.device), "threads": torch.get_num_threads(), "repeats": arguments.repeats,
    }  # fmt: skip
    return {**about, **figures}, [", ".join(f"{name} {value}" for name, value in about.items()), *table(figures)]


def _data(arguments: argparse.Namespace, settings: RunSettings) -> tuple[dict[str, Any], list[str]]:
    from dtg_core.data.sources import open_sources
    from dtg_core.engine.benchmark_data import benchmark_views, table

    pool = open_sources(settings.data, False).unlabeled
    assert pool is not None
    figures = benchmark_views(pool, settings.views, arguments.repeats)
    return figures, list(table(figures))


if __name__ == "__main__":
    main_guard(main)
