"""Evaluation while a run trains: the weights as they are, what they find in the validation images, and the best ones so far."""
from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from itertools import takewhile
from typing import Any

from dtg_core.data.index import CocoIndex
from dtg_core.data.plan import eval_batches, items_of
from dtg_core.data.sources import Sources
from dtg_core.engine.checkpoint import load_metadata, save_weights
from dtg_core.engine.checkpointer import Checkpointer
from dtg_core.engine.effective import BATCH, PRECISION
from dtg_core.engine.evaluate import SetDetections, find, metrics_and_curves, too_many_unread, unseen
from dtg_core.engine.folder import RunFolder
from dtg_core.engine.processes import greatest, on_main
from dtg_core.engine.recorder import Recorder
from dtg_core.engine.run_state import RunState
from dtg_core.engine.signals import StopSignals
from dtg_core.engine.train_step import Training
from dtg_core.errors import UserError
from dtg_core.protocol import Detector
from dtg_core.settings_text import to_yaml


class Evaluator:
    """Evaluates teacher and student; every process takes part.

    Args:
        metadata: what a weights file has to contain, besides tensors and settings, to be usable on its own.
    """

    def __init__(
        self, training: Training, state: RunState, sources: Sources, folder: RunFolder, recorder: Recorder,
        checkpointer: Checkpointer, metadata: Mapping[str, Any],
    ) -> None:
        self.training, self.state, self.sources, self.folder = training, state, sources, folder
        self.recorder, self.checkpointer, self.metadata = recorder, checkpointer, metadata
        self.config, self.accelerator = training.config, training.accelerator

    def run(self, done: int, signals: StopSignals) -> bool:
        """Write and evaluate teacher and student as they are after ``done`` steps. False: interrupted by a signal."""
        on_main(self.accelerator, lambda: self._write_weights(done))
        val, stamp = self.sources.val, self.state.stamp
        if val is None:
            self.recorder.show(done)
            self.state.evaluation_due = False
            return True
        recorded = {key: stamp[key] for key in (BATCH, PRECISION, "data")}
        results: dict[str, Any] = {"step": done, **recorded, "changed": self.state.changed}
        found: dict[str, SetDetections] = {}
        curves: dict[str, Any] = {}
        for which, detector in self.training.detectors.items():
            with self.checkpointer.reading(done):
                found[which] = self._find(detector, val, signals)
            signals.agreed = greatest(self.accelerator, signals.received)
            if signals.agreed:
                return False
            results[which], curves[which] = on_main(self.accelerator, partial(metrics_and_curves, val, found[which]))
        if unread := max((unseen(val, detections) for detections in found.values()), key=len):
            results["unread"] = len(unread)
        self.recorder.evaluation(done, results, curves["teacher"])
        if problem := too_many_unread(val, unread):  # figures of a lucky rest, which no later evaluation may reach
            self.recorder.warn(done, [f"{problem}; until then no teacher is kept as the best"])
        elif self.accelerator.is_main_process:
            self._keep_best(done, results["teacher"]["AP"])
        self.recorder.show(done, found["teacher"])
        self.state.evaluation_due = False
        return True

    def _find(self, detector: Detector, val: CocoIndex, signals: StopSignals) -> SetDetections:
        """What a detector finds, each image in one process only; breaks off at a signal."""
        config, accelerator = self.config, self.accelerator
        batches = items_of(eval_batches(
            val, config.views, config.run.evaluate_batch, accelerator.process_index, accelerator.num_processes,
            config.data.workers,
        ))  # fmt: skip
        unbroken = takewhile(lambda _: not signals.received, batches)
        return find(detector, val, unbroken, accelerator.device, config.run.score_threshold, accelerator)

    def _write_weights(self, done: int) -> None:
        """Write both detectors as they are after ``done`` steps. If that fails before the last one, training goes on."""
        for which, detector in self.training.detectors.items():
            path = self.folder.path / "weights" / f"{which}.safetensors"
            try:
                save_weights(path, detector, self._metadata(which, done))
            except OSError as error:
                if done < self.config.run.steps:
                    self.recorder.say(f"warning: {path}: not written ({error.strerror}) - training goes on")
                    return
                raise UserError(f"{path}: not written ({error.strerror}) - make room{self.folder.how_to_continue}") from error

    def _keep_best(self, done: int, ap: float | None) -> None:
        """Write the teacher once more if no earlier evaluation on the same images has found as much AP."""
        path, images = self.folder.path / "weights" / "best.safetensors", self.state.stamp["data"]["val"]
        best: dict[str, Any] = {}
        with contextlib.suppress(UserError):  # there is none yet
            best = load_metadata(path)
        if ap is None or (best.get("val") == images and best["AP"] >= ap):
            return
        try:
            save_weights(path, self.training.teacher, {**self._metadata("teacher", done), "AP": ap, "val": images})
        except OSError as error:
            self.recorder.say(f"warning: {path}: not written ({error.strerror}) - training goes on")

    def _metadata(self, which: str, done: int) -> dict[str, Any]:
        """What a weights file says about itself."""
        thresholds = {name: scores.tolist() for name, scores in self.training.thresholds.scores().items()}
        return {**self.metadata, "config": to_yaml(self.state.config), **({"thresholds": thresholds} if thresholds else {}),
                "which": which, "step": done}  # fmt: skip
