"""A run's checkpoints: what they hold besides tensors, how a run goes on from one, and what happens if one cannot be written.

Their files are checkpoint.py's; which of them a run may continue is resume.py's.
"""
from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dtg_core.drafts import writing
from dtg_core.engine.checkpoint import (
    checkpoint_name,
    discard_newer,
    load_checkpoint,
    newer_checkpoints,
    newest_checkpoint,
    save_checkpoint,
    weights_step,
)
from dtg_core.engine.folder import RunFolder
from dtg_core.engine.processes import on_main
from dtg_core.engine.recorder import Recorder
from dtg_core.engine.replay import describe
from dtg_core.engine.resume import BEGINNING, changed_course, check_stamp, other_validation
from dtg_core.engine.run_state import RunState
from dtg_core.engine.train_step import Training, Window
from dtg_core.errors import UserError
from dtg_core.models.teacher import copy_frozen
from dtg_core.settings_text import flatten
from dtg_core.structures import Losses, StepBatch

MOST_UNSAVED = 3  # failed checkpoints in a row before the run stops, rather than training for days without one


class Checkpointer:
    """Saves ``training`` and ``state``, and restores both; every process takes part."""

    def __init__(self, training: Training, state: RunState, folder: RunFolder, recorder: Recorder) -> None:
        self.training, self.state, self.folder, self.recorder = training, state, folder, recorder
        self.config, self.accelerator = training.config, training.accelerator
        self.unsaved_in_a_row = 0  # checkpoints that could not be written; counted in the main process

    # Resuming -----------------------------------------------------------------------------------------------------------

    def resume(self, resume: str, insist: bool) -> int:
        """Restore a checkpoint and return its step. All processes use the one that the main process chooses.

        Args:
            resume: "auto" for the newest, or a checkpoint's folder. insist: continue it even with other settings or data.
        """
        state, auto = self.state, resume == "auto"
        chosen = on_main(self.accelerator, lambda: newest_checkpoint(self.folder.checkpoints) if auto else Path(resume))
        if chosen is None:
            self.recorder.say(f"{self.folder.checkpoints}: no checkpoint yet - starting at step 0")
            return 0
        notes: list[str] = []
        saved = load_checkpoint(
            chosen, self.training.module, self.training.teacher, self.training.plain_optimizer,
            check=lambda saved: notes.extend(check_stamp(saved.get("stamp", {}), state.stamp, insist)),
        )  # fmt: skip
        step = saved["step"]
        for note in notes:
            self.recorder.say(note)
        if step < self.config.run.steps:
            self.recorder.say(f"resuming from {chosen} at step {step}")
        self._restore(saved)
        if insist or not auto:  # otherwise the same training is repeated and gives the same figures
            on_main(self.accelerator, lambda: self._put_away(step))
        if self.accelerator.is_main_process:
            discard_newer(self.folder.checkpoints, step)
        return step

    def _restore(self, saved: Mapping[str, Any]) -> None:
        """The counterpart of ``_contents``."""
        state, watch, step = self.state, self.recorder.watch, saved["step"]
        state.window = Window(dict(saved["window"]["sums"]), dict(saved["window"]["counts"]))
        watch.restore(saved["watch"])
        self._keep_start(saved["stamp"]["config"])
        state.changed = list(saved["changed"])
        if course := changed_course(saved["stamp"], state.stamp, step):
            state.changed.append({"step": step, "changes": course})
            copy_frozen(self.training.teacher, self.training.module.detector)
        if other_validation(saved["stamp"], state.stamp):
            watch.supervised_ap = None
        self.training.thresholds.restore(saved["thresholds"])
        state.evaluation_due = saved["evaluation_due"]
        if state.evaluation_due and (evaluated := self.folder.results()).get("step") == step:  # after the checkpoint
            state.evaluation_due = False
            watch.evaluation(step, evaluated["teacher"]["AP"])
        state.skipped_in_a_row = saved["skipped_in_a_row"]
        if self.accelerator.scaler is not None and saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])

    def _keep_start(self, former: Mapping[str, Any]) -> None:
        """The settings that say how training began stay those of the checkpoint, so that the run's record is true."""
        config, given = self.state.config, flatten(self.state.config)
        kept = {key: former[key] for key in BEGINNING}
        for key, value in kept.items():
            if given[key] and given[key] != value:  # not what is merely left out
                self.recorder.say(f"{key}: stays {value}, as the run began with it (found {given[key]})")
        self.state.config = replace(
            config, run=replace(config.run, init=kept["run.init"], reset_head=kept["run.reset_head"]),
            backbone=replace(config.backbone, pretrained=kept["backbone.pretrained"], weights=kept["backbone.weights"]),
        )  # fmt: skip
        self.state.stamp["config"] |= kept

    def _put_away(self, step: int) -> None:
        """Move away files of later steps than ``step``, so that they are not taken for results of this training."""
        evaluated = self.folder.evaluated
        made = {"results.json": evaluated, "precision.json": evaluated, "weights": weights_step(self.folder.path)}
        later = [name for name, at in made.items() if at is not None and at > step]
        later += [f"checkpoints/{path.name}" for path in newer_checkpoints(self.folder.checkpoints, step)]
        if not later:
            return
        with writing(self.folder.path, "make room, and resume again"):
            place = self.folder.set_aside(later)
        self.recorder.say(f"{place}: holds what there was of after step {step} now, which this course may not come to")

    # Saving -------------------------------------------------------------------------------------------------------------

    def save(self, done: int) -> None:
        """Write a checkpoint; if that fails, the older one stays and training goes on, but not forever."""
        contents = self._contents()
        on_main(self.accelerator, lambda: self._save(done, contents))

    def _save(self, done: int, contents: Mapping[str, Any]) -> None:
        try:
            self._write(self.folder.checkpoints, done, contents)
            self.unsaved_in_a_row = 0
        except OSError as error:
            self.unsaved_in_a_row += 1
            at_end = done == self.config.run.steps  # the weights are smaller, and may still fit
            if self.unsaved_in_a_row >= MOST_UNSAVED and not at_end:
                raise UserError(f"{self.folder.checkpoints}: not written {MOST_UNSAVED} times in a row ({error.strerror}) - make "
                                f"room{self.folder.how_to_continue}") from error
            goes_on = "evaluation follows" if at_end else "training goes on"
            older = ", the older one stays" if self.folder.has_checkpoint else ""
            self.recorder.say(f"warning: checkpoint at step {done} not written ({error.strerror}) - {goes_on}{older}")

    @contextlib.contextmanager
    def reading(self, done: int) -> Iterator[None]:
        """If reading fails after ``done`` whole steps, save what was learnt, and say in the error how to continue."""
        try:
            yield
        except UserError as error:
            if done and self.accelerator.num_processes == 1:  # several cannot: the others are in the middle of the next step
                with contextlib.suppress(OSError):
                    self._write(self.folder.checkpoints, done, self._contents())
            # The remedy is another file or another setting.
            again = "; --resume auto --resume-with-changes continues" if self.folder.has_checkpoint else ""
            raise UserError(f"{error}{again}") from error

    def save_nonfinite(self, batches: Sequence[StepBatch], losses: Losses) -> None:
        """Write the last of too many non-finite steps, for ``--replay``, and say what was not finite."""
        step, folder = batches[0].step, self.folder.nonfinite
        told, contents = describe(batches, losses, self.accelerator), self._contents()
        if not self.accelerator.is_main_process:
            return
        try:
            shutil.rmtree(folder / checkpoint_name(step), ignore_errors=True)  # an earlier try's, which would be kept
            saved = self._write(folder, step, contents, keep=1)
            (folder / "step.json").write_text(json.dumps({**told, "checkpoint": saved.name}, indent=1) + "\n")
        except OSError as error:
            self.recorder.say(f"warning: {folder}: not written ({error.strerror})")
        odd = [name for name, value in told["losses"].items() if value in ("nan", "inf", "-inf")]
        self.recorder.say(f"error: step {step}: loss or gradient not finite {self.config.run.max_skipped} times in a row "
                          f"({', '.join(odd) or 'the losses are finite, the gradient is not'}) - lower optim.lr or set "
                          f"optim.clip_norm; look closer with --replay {folder / 'step.json'}")

    def _write(self, folder: Path, step: int, contents: Mapping[str, Any], keep: int = 2) -> Path:
        training = self.training
        return save_checkpoint(folder, step, training.module, training.teacher, training.plain_optimizer, contents, keep)

    def _contents(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors. Every process takes part."""
        state, scaler = self.state, self.accelerator.scaler
        return {
            "stamp": state.stamp,
            "window": {"sums": state.window.floats(self.accelerator), "counts": state.window.counts},
            "watch": self.recorder.watch.state(),
            "thresholds": self.training.thresholds.state(),
            "evaluation_due": state.evaluation_due,
            "skipped_in_a_row": state.skipped_in_a_row,
            "changed": state.changed,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
