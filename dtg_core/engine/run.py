"""A run: its folder, and training from the first or a later step to the evaluated weights.

    config.yaml             every setting
    metrics.jsonl           one object a line: losses and figures of the guidance, means since the line before
    results.json            teacher's and student's COCO figures at the last evaluation
    weights/*.safetensors   teacher and student, self-contained
    checkpoints/            where ``--resume`` continues
"""
from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from accelerate import Accelerator
from torch import nn

from dtg_core.config import Config
from dtg_core.data.plan import StepData, eval_batches, steps_loader
from dtg_core.data.sources import Sources
from dtg_core.engine.checkpoint import (
    discard_newer,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    save_weights,
)
from dtg_core.engine.evaluate import coco_metrics, find
from dtg_core.engine.loop import Window, make_optimizer, train
from dtg_core.engine.metrics import MetricsWriter, Progress
from dtg_core.engine.schedules import learning_rate, unlabeled_weight
from dtg_core.errors import UserError
from dtg_core.models.student import StudentModule
from dtg_core.models.teacher import make_teacher
from dtg_core.settings import to_yaml


@dataclass
class RunFolder:
    """The folder of one run, locked against a second process that would write into it."""

    path: Path
    lock: IO[str] | None = field(default=None, repr=False)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def open(self, resume: bool, overwrite: bool) -> None:
        """Make or re-open the folder. Raises UserError when it holds something and neither flag is given, or is in use."""
        if self.path.is_file():
            raise UserError(f"{self.path}: is a file - give a folder with --output")
        used = self.path.is_dir() and any(entry.name != ".lock" for entry in self.path.iterdir())
        if used and not (resume or overwrite):
            raise UserError(f"{self.path}: the folder holds something already - use --resume auto, --overwrite or another --output")
        if used and overwrite and not (self.path / "config.yaml").is_file():
            raise UserError(f"{self.path}: not the folder of a run (no config.yaml), so --overwrite will not empty it - empty it by hand")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "a+")  # noqa: SIM115 - held until the process ends
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}) - give another --output") from error
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.lock.seek(0)
            owner = self.lock.read().strip() or "unknown"
            raise UserError(f"{self.path}: another run is using it (process {owner}) - wait for it, or give another --output") from error
        self.lock.truncate(0)
        self.lock.write(f"{os.getpid()} on {os.uname().nodename}")
        self.lock.flush()
        if overwrite:
            for entry in self.path.iterdir():
                if entry.name != ".lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def write(self, name: str, text: str) -> None:
        """Write a small file at once, never half of it."""
        temporary = self.path / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path / name)


@dataclass
class Fit:
    """Training of one detector; ``run`` does it all.

    Args:
        config: all settings. detector: the student's, on the CPU. sources: the data. folder: of the run.
        metadata: what a weights file has to tell, beside its tensors, to be used on its own.
    """

    config: Config
    detector: nn.Module
    sources: Sources
    folder: RunFolder
    accelerator: Accelerator
    metadata: Mapping[str, Any]

    def run(self, resume: str | None) -> dict[str, Any] | None:
        """Train, from a checkpoint if ``resume`` is "auto" or names one, and give the final COCO figures."""
        config, accelerator = self.config, self.accelerator
        if config.run.channels_last:
            self.detector.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        module = StudentModule(self.detector, config.guidance.stages)
        self.teacher = make_teacher(self.detector).to(accelerator.device)
        self.student, self.optimizer = accelerator.prepare(module, make_optimizer(module, config.optim))
        start, window = self._resume(resume)

        data = StepData(
            self.sources.labeled, self.sources.unlabeled, config.views, config.run.seed, config.data.labeled_per_device,
            config.data.unlabeled_per_device, accelerator.process_index, accelerator.num_processes,
            unlabeled_from=config.guidance.start_step,
        )
        self.results: dict[str, Any] | None = None
        if accelerator.is_main_process:
            self.folder.write("config.yaml", to_yaml(config))
            self.metrics = MetricsWriter(self.folder.path / "metrics.jsonl", start)
        self.progress = Progress(config.run.steps, start)
        self.clock, self.since = time.perf_counter(), start
        loader = steps_loader(data, start, config.run.steps, config.data.workers)
        with self.progress:
            train(self.student, self.teacher, self.optimizer, loader, config, accelerator, window, self._after_step)
        self._finish()
        return self.results

    def _resume(self, resume: str | None) -> tuple[int, Window]:
        if resume is None:
            return 0, Window()
        path = newest_checkpoint(self.folder.checkpoints) if resume == "auto" else Path(resume)
        if path is None:
            self._say("no checkpoint yet: starting at step 0")
            return 0, Window()
        state = load_checkpoint(path, self._module(), self.teacher, self._plain_optimizer())
        self._say(f"resuming from {path} at step {state['step']}")
        discard_newer(self.folder.checkpoints, state["step"])
        return state["step"], Window(dict(state["window"]["sums"]), dict(state["window"]["counts"]))

    def _after_step(self, done: int, window: Window) -> None:
        run = self.config.run
        if self.accelerator.is_main_process:
            self.progress.advance()
        if done % run.log_every == 0 or done == run.steps:
            self._log(done, window)
        if run.evaluate_every and done % run.evaluate_every == 0 and done < run.steps:
            self._evaluate(done)
        if run.checkpoint_every and done % run.checkpoint_every == 0 and done < run.steps:
            self._save(done, window)

    def _log(self, done: int, window: Window) -> None:
        means = window.means()
        window.clear()
        pace = (time.perf_counter() - self.clock) / max(done - self.since, 1)
        self.clock, self.since = time.perf_counter(), done
        labeled = sum(value for name, value in means.items() if name.startswith("labeled/"))
        unlabeled = sum(value for name, value in means.items() if name.startswith("unlabeled/"))
        means |= {
            "lr": learning_rate(done - 1, self.config.optim),
            "unlabeled_weight": unlabeled_weight(done - 1, self.config.guidance) if unlabeled else 0.0,
            "step_seconds": pace,
        }
        if unlabeled:
            means["loss_ratio"] = unlabeled / max(labeled, 1e-12)
        if self.accelerator.is_main_process:
            self.metrics.write(done, means)
            shown = {"labeled": labeled}
            if unlabeled:
                shown["unlabeled"] = unlabeled
            for name, value in means.items():
                kind = name.rsplit("/", 1)[-1]
                if name.startswith("guidance/") and kind in ("candidates", "clusters", "pseudo_boxes"):
                    shown[f"{name.split('/')[1]} {kind}"] = value
            self.progress.report(shown)

    def _save(self, done: int, window: Window) -> None:
        state = {"window": {"sums": window.floats(), "counts": window.counts}}
        if self.accelerator.is_main_process:
            try:
                save_checkpoint(self.folder.checkpoints, done, self._module(), self.teacher, self._plain_optimizer(), state)
            except OSError as error:
                self._say(f"warning: checkpoint at step {done} not written ({error.strerror}) - training goes on, the older one stays")
        self.accelerator.wait_for_everyone()

    def _evaluate(self, done: int) -> None:
        if self.sources.val is None:
            return
        began = time.perf_counter()
        results: dict[str, Any] = {"step": done}
        for which, detector in (("teacher", self.teacher), ("student", self._module().detector)):
            batches = eval_batches(
                self.sources.val, self.config.views, self.config.run.evaluate_batch, self.accelerator.process_index,
                self.accelerator.num_processes,
            )
            found = find(
                detector, self.sources.val, batches, self.accelerator.device, self.config.run.score_threshold, self.accelerator
            )
            results[which] = coco_metrics(self.sources.val, found)
        self.results = results
        if self.accelerator.is_main_process:
            self.folder.write("results.json", json.dumps(results, indent=1) + "\n")
            self.metrics.write(done, {f"{who}/{key}": results[who][key] for who in ("teacher", "student")
                                      for key in ("AP", "AP50", "AP75")})
            for who in ("teacher", "student"):
                figures = results[who]
                self._say(f"step {done}  {who:7}  AP {figures['AP']:.2f}  AP50 {figures['AP50']:.2f}  AP75 {figures['AP75']:.2f}")
        self.clock += time.perf_counter() - began  # evaluation is not step time

    def _finish(self) -> None:
        steps = self.config.run.steps
        if self.accelerator.is_main_process:
            for which, detector in (("teacher", self.teacher), ("student", self._module().detector)):
                save_weights(self.folder.path / "weights" / f"{which}.safetensors", detector, {**self.metadata, "which": which})
        self._save(steps, Window())
        self._evaluate(steps)

    def _module(self) -> StudentModule:
        return cast(StudentModule, self.accelerator.unwrap_model(self.student))

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        return cast(torch.optim.Optimizer, getattr(self.optimizer, "optimizer", self.optimizer))

    def _say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            progress = getattr(self, "progress", None)
            progress.say(message) if progress else self.accelerator.print(message)
