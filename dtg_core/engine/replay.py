"""The step at which a run gave up, written so that it can be run again: weights, seeds, image ids and losses."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from dtg_core.config import Config
from dtg_core.data.plan import step_data
from dtg_core.data.sources import Sources
from dtg_core.engine.checkpoint import load_checkpoint
from dtg_core.engine.effective import PRECISION
from dtg_core.engine.train_step import prepare, train_step
from dtg_core.errors import UserError
from dtg_core.protocol import Detector
from dtg_core.structures import Losses, StepBatch, ViewBatch


def describe(batches: Sequence[StepBatch], losses: Losses, accelerator: Accelerator) -> dict[str, Any]:
    """JSON values that describe a step: seeds and image ids of every micro-batch of every process, and the losses."""
    parts = [
        {"labeled": _images(batch.labeled), "unlabeled": _images(batch.unlabeled.teacher) if batch.unlabeled else []}
        for batch in batches
    ]
    values = torch.tensor([float(value) for value in losses.values()], device=accelerator.device)
    if accelerator.num_processes > 1:
        parts = gather_object(parts)
        values = cast(Tensor, accelerator.reduce(values, "mean"))  # each has its own share of the sum, times their number
    told = {str(name): str(value) for name, value in zip(losses, values.tolist())}
    return {"step": batches[0].step, "parts": parts, "losses": told}


def _images(views: ViewBatch) -> list[dict[str, Any]]:
    return [{"image_id": image, "seed": seed} for image, seed in zip(views.image_ids, views.seeds.tolist())]


def replay(file: Path, config: Config, detector: Detector, sources: Sources, accelerator: Accelerator) -> tuple[bool, list[str]]:
    """Run a captured step again, in one process with the parts of all of them as micro-batches.

    Returns:
        (whether it was not finite again, lines to show).

    Raises:
        UserError: the file or its checkpoint is damaged, the data differs from what was captured, or there are several processes.
    """
    if accelerator.num_processes > 1:
        raise UserError(f"--replay {file}: runs the parts of all processes in one - launch it with one process")
    told = _read(file)
    step, parts = told["step"], told["parts"]
    training = prepare(config, detector, sources.labeled.objects_per_image(), accelerator)
    state = load_checkpoint(file.parent / told["checkpoint"], training.module, training.teacher, training.plain_optimizer)
    captured = state["stamp"][PRECISION]
    if captured != accelerator.mixed_precision:
        raise UserError(f"{file}: captured with mixed_precision {captured}, this is {accelerator.mixed_precision} - launch it with "
                        f"--mixed_precision {captured}")
    if accelerator.scaler is not None and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    training.thresholds.restore(state["thresholds"])

    batches = [step_data(config, sources, part, len(parts))[step] for part in range(len(parts))]
    again = describe(batches, {}, accelerator)["parts"]
    if json.loads(json.dumps(again)) != parts:
        raise UserError(f"{file}: the data has changed since (other images or seeds) - restore it")
    training.student.train()
    losses, figures = train_step(training, [batch.to(accelerator.device) for batch in batches])
    shown = [f"{name} {float(value):.6g}" for name, value in losses.items()]
    return bool(figures["skipped"]), [f"step {step}, {len(parts)} parts, images and seeds as captured", *shown]


def _read(file: Path) -> Mapping[str, Any]:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        if {"step", "parts", "checkpoint", "losses"} <= told.keys():
            return told
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: not a captured step ({error}) - give nonfinite/step.json of a run folder") from error
    raise UserError(f"{file}: not a captured step - give nonfinite/step.json of a run folder")
