"""What a run will cost, estimated from two of its steps, which are discarded. Nothing is written."""
from __future__ import annotations

import math
import shutil
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from dtg_core.config import Config
from dtg_core.data.plan import step_data
from dtg_core.data.sources import Sources
from dtg_core.drafts import existing
from dtg_core.engine.memory import keep_freed_memory, peak_memory
from dtg_core.engine.schedules import images_of_a_step
from dtg_core.engine.train_step import Training, prepare, train_step
from dtg_core.errors import UserError, counted
from dtg_core.protocol import Detector
from dtg_core.structures import Figures, Losses

CHECKPOINTS = 3  # kept at once while a new one is written


def dry_run(config: Config, detector: Detector, sources: Sources, folder: Path, accelerator: Accelerator) -> list[str]:
    """Train on two batches with unlabelled images, the first in views of the largest size, and forecast.

    Args:
        config: the run's settings. detector: the student's; it is changed. sources: the data.
        folder: the run's, which may not exist.

    Returns:
        Lines for the user.

    Raises:
        UserError: the disk has no room for the checkpoints, or an image of the batches cannot be used.
    """
    keep_freed_memory()
    made = prepare(config, detector, sources.labeled.objects_per_image(), accelerator)
    parts = min(config.optim.accumulate, 2)  # of micro-batches; with several, each passes the student twice
    training, reading, broken = _two_steps(made, sources, parts)
    training, reading, whole = forecast(training, reading, parts, config)
    size = _checkpoint_bytes(made.module, made.teacher, made.optimizer)
    free = shutil.disk_usage(existing(folder)).free
    if free < size * CHECKPOINTS:
        raise UserError(f"{folder}: the disk has {free / 1e9:.2f} GB left, and the run needs about "
                        f"{size * CHECKPOINTS / 1e9:.2f} GB - make room, or give another --output")
    on_gpu = accelerator.device.type == "cuda"
    labeled, unlabeled = images_of_a_step(config, accelerator.num_processes)
    pool, unlabeled = ("none", 0) if sources.unlabeled is None else (str(len(sources.unlabeled)), unlabeled)
    return [
        f"data: {len(sources.labeled)} labelled, {pool} unlabelled and {len(sources.val) if sources.val else 0} validation images",
        f"batch: {labeled} labelled and {unlabeled} unlabelled images, over "
        f"{counted(accelerator.num_processes, 'process', 'processes')}",
        f"step: {training:.2f} s training, {reading:.2f} s reading with one process",
        *slow_reading(training, reading, config),
        *(["losses were not finite - lower optim.lr, or check the data"] if broken else []),
        f"run: about {timedelta(seconds=round(whole))} for {config.run.steps} steps, evaluation not counted",
        f"memory: {peak_memory(accelerator.device) / 1e9:.1f} GB of the {'GPU' if on_gpu else 'process'} at most",
        f"disk: {size / 1e6:.0f} MB a checkpoint, {free / 1e9:.1f} GB free",
        "dry run: nothing was written",
    ]


def _two_steps(made: Training, sources: Sources, parts: int) -> tuple[float, float, bool]:
    """Seconds of a step with ``parts`` micro-batches, and of reading one; and whether a step went wrong."""
    config, accelerator = made.config, made.accelerator
    largest = replace(config.views, short_edge=(config.views.short_edge[1],) * 2)
    both = [step_data(replace(config, views=views), sources, accelerator.process_index, accelerator.num_processes)
            for views in (largest, config.views)]  # fmt: skip
    full = min(config.guidance.start_step + config.guidance.ramp_steps, config.run.steps - 1)  # unlabelled losses count in full
    made.student.train()
    reading = training = 0.0
    broken = False
    for step, data in enumerate(both, full):  # the first one shows the memory and warms up; its times are overwritten
        began = time.perf_counter()
        batch = data[step]
        reading = time.perf_counter() - began
        losses, figures = train_step(made, [batch.to(accelerator.device)] * parts)
        broken |= _broken(losses, figures, accelerator.scaler is not None)  # sync: a step is over when its figures have arrived
        training = time.perf_counter() - began - reading
    return training, reading, broken


def slow_reading(training: float, reading: float, config: Config) -> list[str]:
    """What to do if training will wait for images, whose steps take these seconds (see ``forecast``)."""
    if reading <= max(config.data.workers, 1) * training:
        return []
    return ["reading is the slower part - raise data.workers if cores are idle, or store smaller images: no view's side is over "
            f"{config.views.long_edge} px (views.long_edge)"]


def forecast(training: float, reading: float, parts: int, config: Config) -> tuple[float, float, float]:
    """Seconds that a step takes to train and, with one process, to read, and that the whole run takes.

    Args:
        training: seconds of a step with ``parts`` micro-batches. reading: of a micro-batch. config: the run's settings.
    """
    accumulate, workers = config.optim.accumulate, config.data.workers
    training, reading = training / parts * accumulate, reading * accumulate
    step = max(training, reading / workers) if workers else training + reading
    return training, reading, step * config.run.steps


def _broken(losses: Losses, figures: Figures, scaled: bool) -> bool:
    """Whether a step went wrong. Under an fp16 scaler only the losses show it, because its first gradients overflow until it has
    found its scale."""
    numbers = [float(loss) for loss in losses.values()]
    return bool(figures["skipped"]) and not (scaled and all(map(math.isfinite, numbers)))


def _checkpoint_bytes(student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    tensors = [*student.state_dict().values(), *teacher.state_dict().values()]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
