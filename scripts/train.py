"""Train a detector on a few labelled and many unlabelled images.

    accelerate launch scripts/train.py --detector gfl
    accelerate launch scripts/train.py --detector faster_rcnn --paradigm sparse --set optim.lr=0.02

Exit status: 0; 2 after a mistake, reported in one line; 3 when the losses are no longer finite; 143 or 130 when a
signal has stopped it, after a checkpoint.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import main_guard, warn
from launch import fit_to_processes, start_accelerator
from read_settings import RunSettings, build_detector, is_supervised, load_settings, train_parser, without_effect

from dtg_core.config import without_weights
from dtg_core.drafts import require_writable
from dtg_core.engine.schedules import batch_remarks, images_of_a_step
from dtg_core.errors import UserError, counted
from dtg_core.settings_text import to_yaml

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dtg_core.data.sources import Sources
    from dtg_core.engine.folder import RunFolder
    from dtg_core.protocol import Detector


def main(argv: Sequence[str]) -> int:
    arguments = train_parser().parse(argv)
    if arguments.replay:
        arguments.config = _config_of(arguments.replay)
    settings, origins, remarks = load_settings(arguments)
    remarks += without_effect(arguments.set, settings)
    if arguments.print_config:
        warn(remarks)
        print(to_yaml(settings, origins))
        return 0

    accelerator = start_accelerator(settings.optim.accumulate)
    settings = fit_to_processes(settings, accelerator, arguments.scale_lr)
    if not arguments.scale_lr and not arguments.replay:
        remarks += batch_remarks(settings, accelerator.num_processes)
    if accelerator.is_main_process:
        warn(remarks)
    return _run(arguments, settings, accelerator)


def _run(arguments: argparse.Namespace, settings: RunSettings, accelerator: Accelerator) -> int:
    """Read the data and train, or do what --replay or --dry-run asks for instead. Returns the exit status."""
    import torch

    from dtg_core.data.findings import Report
    from dtg_core.data.sources import open_sources
    from dtg_core.engine.dry_run import dry_run
    from dtg_core.engine.folder import RunFolder
    from dtg_core.engine.processes import main_first, on_main
    from dtg_core.engine.reach import classes_out_of_reach, note_small_boxes
    from dtg_core.engine.trainer import Trainer

    folder = RunFolder(default_folder(settings) if settings.run.output is None else Path(settings.run.output))
    # A checkpoint replaces all initial weights, whose files may be gone by then.
    resumed = arguments.resume is not None and (arguments.resume != "auto" or on_main(accelerator, lambda: folder.has_checkpoint))
    if not arguments.replay:  # before the data is read, which may take a while
        on_main(accelerator, lambda: _preflight(folder, settings, arguments, resumed))
    report = Report()
    # First in one process, which makes the built-in data set.
    sources = main_first(accelerator, lambda: open_sources(settings.data, is_supervised(settings), report))
    labeled = settings.data.labeled or "built-in synthetic data"
    note_small_boxes(sources.labeled, labeled, settings.views, report)
    if accelerator.is_main_process:
        warn(report.lines())
    if arguments.replay:
        return _replay(arguments, settings, sources, accelerator)
    torch.manual_seed(settings.run.seed)  # the same initial weights in every paradigm and process
    detector, remarks = _detector(settings, sources, resumed)
    if accelerator.is_main_process:
        if not resumed:
            remarks += [f"{labeled}: {line}" for line in classes_out_of_reach(detector, sources.labeled, settings.views)]
        warn(remarks)
    if arguments.dry_run:
        for line in dry_run(settings, detector, sources, folder.path, accelerator):
            accelerator.print(line)
        return 0

    on_main(accelerator, lambda: folder.open(resume=arguments.resume is not None, overwrite=arguments.overwrite))
    accelerator.print(f"{folder.path}: {_size(settings, accelerator.num_processes)}")
    trainer = Trainer(settings, detector, sources, folder, accelerator, _metadata(settings, sources))
    status = trainer.run(arguments.resume, arguments.resume_with_changes, arguments.stop_at)
    stopped = arguments.stop_at is not None and arguments.stop_at < settings.run.steps
    if status == 0 and not stopped:
        accelerator.print(f"done: {folder.path}")
    return status


def _config_of(step: Path) -> Path:
    """The config.yaml of the run that has written ``step``, the file given by --replay."""
    config = step.parent.parent / "config.yaml"
    if not step.is_file() or not config.is_file():
        found = f"no {config} beside it" if step.is_file() else "no such file"
        raise UserError(f"--replay {step}: {found} - give nonfinite/step.json of a run folder")
    return config


def _preflight(folder: RunFolder, settings: RunSettings, arguments: argparse.Namespace, resumed: bool) -> None:
    """UserError for what would otherwise end the run only after its data has been read."""
    import torch

    from dtg_core.models.backbone import require_available, require_known

    (require_known if resumed or settings.run.init is not None else require_available)(settings.backbone)
    require_writable(folder.path)
    _require_free(folder, settings, arguments)
    _require_start(None if resumed else settings.run.init, arguments.resume)
    with torch.device("meta"):  # a backbone that the detector cannot use; takes no memory
        build_detector(without_weights(settings), 1)


def _require_start(init: str | None, resume: str | None) -> None:
    """UserError if there is nothing at the path that the run should start from."""
    from dtg_core.data.files import holds_run
    from dtg_core.engine.predict import find_weights

    if resume is not None and resume != "auto":
        if not Path(resume).is_dir():
            raise UserError(f"--resume {resume}: no such checkpoint - give auto, or a checkpoint's folder")
        if holds_run(Path(resume)):
            raise UserError(f"--resume {resume}: a run's folder - give --resume auto with --output {resume}, or a folder in "
                            f"{Path(resume) / 'checkpoints'}")
    if init is not None and not (path := find_weights(Path(init))).is_file():
        raise UserError(f"--init {path}: no such weights file - give a .safetensors file, or a run folder")


def _require_free(folder: RunFolder, settings: RunSettings, arguments: argparse.Namespace) -> None:
    """Like RunFolder.require_free; a dry run, which writes nothing, only warns."""
    init = settings.run.init
    try:
        if arguments.overwrite and init is not None and Path(init).resolve().is_relative_to(folder.path.resolve()):
            raise UserError(f"--init {init}: lies in {folder.path}, which --overwrite empties - give another --output")
        folder.require_free(arguments.resume is not None, arguments.overwrite)
    except UserError as error:
        if not arguments.dry_run:
            raise
        warn([str(error)])


def default_folder(settings: RunSettings) -> Path:
    """The folder of a run that names none; runs on different labelled files do not share one."""
    labeled = settings.data.labeled
    parts = (settings.detector, settings.paradigm, *([Path(labeled).stem] if labeled else []), f"seed{settings.run.seed}")
    return Path("runs", "-".join(parts))


def _detector(settings: RunSettings, sources: Sources, resumed: bool) -> tuple[Detector, list[str]]:
    """The detector with its initial weights, and warnings; bare if a run is resumed, whose checkpoint has them."""
    from dtg_core.engine.initial import start_from
    from dtg_core.engine.predict import find_weights

    classes, bare = sources.labeled.class_names, without_weights(settings)
    if resumed or settings.run.init is None:
        return build_detector(bare if resumed else settings, len(classes)), []
    detector = build_detector(bare, len(classes))
    path = find_weights(Path(settings.run.init))
    return detector, start_from(path, detector, partial(build_detector, bare), classes, settings.run.reset_head)


def _size(settings: RunSettings, processes: int) -> str:
    """What the launcher has made of the run, such as "2 processes, 4 labelled and 8 unlabelled images a step"."""
    labeled, unlabeled = images_of_a_step(settings, processes)
    others = "" if is_supervised(settings) else f" and {unlabeled} unlabelled"
    return f"{counted(processes, 'process', 'processes')}, {labeled} labelled{others} images a step"


def _metadata(settings: RunSettings, sources: Sources) -> dict[str, Any]:
    """What a weights file says about itself, besides its settings."""
    return {
        "detector": settings.detector,
        "class_names": list(sources.labeled.class_names),
        "category_ids": list(sources.labeled.category_ids),
    }


def _replay(arguments: argparse.Namespace, settings: RunSettings, sources: Sources, accelerator: Accelerator) -> int:
    from dtg_core.engine.replay import replay
    from dtg_core.engine.trainer import GAVE_UP

    detector = build_detector(without_weights(settings), len(sources.labeled.class_names))
    again, lines = replay(arguments.replay, settings, detector, sources, accelerator)
    print("\n".join([*lines, "not finite again" if again else "finite this time"]))
    return GAVE_UP if again else 0


if __name__ == "__main__":
    main_guard(main)
