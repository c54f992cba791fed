"""Train a detector on a few labelled and many unlabelled images.

    accelerate launch scripts/train.py --detector gfl
    accelerate launch scripts/train.py --detector faster_rcnn --paradigm sparse --set optim.lr=0.02
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from common import DETECTORS, is_supervised, load_settings, main_guard, train_parser

from dtg_core.settings import to_yaml


def main(argv: Sequence[str]) -> int:
    arguments = train_parser().parse(argv)
    settings, origins, warnings = load_settings(arguments)
    if arguments.print_config:
        print(to_yaml(settings, origins))
        return 0
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)

    import torch
    from accelerate import Accelerator

    from dtg_core.data.sources import open_sources
    from dtg_core.engine.run import Fit, RunFolder

    accelerator = Accelerator()
    with accelerator.main_process_first():  # the first process makes the embedded data set
        sources = open_sources(settings.data, is_supervised(settings))
    torch.manual_seed(settings.run.seed)  # the same first weights in every paradigm and process
    detector = DETECTORS[settings.detector](settings, len(sources.labeled.class_names))

    folder = RunFolder(Path(settings.run.output or f"runs/{settings.detector}-{settings.paradigm}-seed{settings.run.seed}"))
    metadata = {
        "detector": settings.detector,
        "class_names": list(sources.labeled.class_names),
        "category_ids": list(sources.labeled.category_ids),
        "config": to_yaml(settings),
    }
    fit = Fit(settings, detector, sources, folder, accelerator, metadata)
    if arguments.dry_run:
        return 0
    if accelerator.is_main_process:
        folder.open(resume=arguments.resume is not None, overwrite=arguments.overwrite)
    accelerator.wait_for_everyone()
    fit.run(arguments.resume)
    accelerator.print(f"done: {folder.path}")
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    main_guard(main)
