"""A run: training from the first or a later step to evaluated weights, with checkpoints, log lines and an orderly stop."""
from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dtg_core.config import Config
from dtg_core.data.plan import MicroBatches, eval_batches, items_of, step_data, steps_loader
from dtg_core.data.sources import Sources
from dtg_core.drafts import write_text, writing
from dtg_core.engine.checkpoint import (
    checkpoint_name,
    discard_newer,
    load_checkpoint,
    load_metadata,
    newer_checkpoints,
    newest_checkpoint,
    save_checkpoint,
    save_weights,
)
from dtg_core.engine.evaluate import SetDetections, find, metrics_and_curves, unseen
from dtg_core.engine.failures import advice
from dtg_core.engine.folder import RunFolder
from dtg_core.engine.loop import Window, prepare, train_step
from dtg_core.engine.memory import keep_freed_memory
from dtg_core.engine.metrics import Clock, RunReport, guidance_figures
from dtg_core.engine.processes import greatest, on_main
from dtg_core.engine.replay import describe
from dtg_core.engine.report import save_pictures, write_report
from dtg_core.engine.resume import changed_course, check_stamp, other_validation, stamp
from dtg_core.engine.schedules import learning_rate, unlabeled_weight
from dtg_core.engine.signals import StopSignals
from dtg_core.engine.watch import Watch
from dtg_core.errors import UserError
from dtg_core.guidance.paradigms import Figures
from dtg_core.losses import weigh
from dtg_core.models.teacher import copy_frozen
from dtg_core.protocol import Detector
from dtg_core.settings_text import flatten, to_yaml
from dtg_core.structures import StepBatch

#: Exit statuses of a run besides 0; for a signal it is 128 plus the signal's number.
GAVE_UP = 3
STOPPING = "stopping after this step, with a checkpoint - a second signal ends the run at once, without one"
MOST_UNSAVED = 3  # failed checkpoints in a row before the run stops, rather than training for days without one


#: Settings that only matter to a run's first step.
BEGINNING = "run.init", "run.reset_head", "backbone.pretrained", "backbone.weights"


class Fit:
    """Training of one detector; ``run`` does it all. There is one in every process of a run.

    Args:
        config: all settings. detector: the student's, on the CPU. sources: the data. folder: the run folder, opened.
        metadata: what a weights file has to contain, besides its tensors, to be usable on its own.
    """

    def __init__(
        self, config: Config, detector: Detector, sources: Sources, folder: RunFolder, accelerator: Accelerator,
        metadata: Mapping[str, Any],
    ) -> None:
        self.config, self.sources, self.folder = config, sources, folder
        self.accelerator, self.metadata = accelerator, metadata
        keep_freed_memory()
        objects = sources.labeled.objects_per_image()
        self.training = prepare(config, detector, objects, accelerator)
        self.stamp = stamp(config, sources, accelerator.num_processes, accelerator.mixed_precision)

        self.window = Window()  # since the last log line
        self.changed: list[dict[str, Any]] = []  # where training was continued with other settings or data
        self.evaluation_due = False  # at the step of the resumed checkpoint
        self.skipped_in_a_row = 0
        self.unsaved_in_a_row = 0  # checkpoints that could not be written; counted in the main process
        self.recent: Sequence[StepBatch] = ()
        self.watch = Watch(config.guidance, float(objects.sum()), sources.labeled.class_names, self._score_histogram)
        self.report: RunReport | None = None
        self.given_up: set[str] = set()  # which of pictures and report.html have failed

    def run(self, resume: str | None, insist: bool = False, stop_at: int | None = None) -> int:
        """Train, from a checkpoint if ``resume`` is "auto" or names one, and evaluate.

        Args:
            resume: the checkpoint. insist: continue it even with other settings or data.
            stop_at: step after which to write a checkpoint and stop, as on a signal.

        Returns:
            The exit status: 0, ``GAVE_UP``, or 128 plus the number of a signal.
        """
        start = self._resume(resume, insist) if resume else 0
        if start > self.config.run.steps:
            raise UserError(f"{self.folder.path}: is at step {start} already, and run.steps={self.config.run.steps} is less - "
                            "raise --steps")
        if start == self.config.run.steps and on_main(self.accelerator, self._weights_step) != start:
            self.evaluation_due = True  # it was stopped at what is now its last step
        if start == self.config.run.steps and not self.evaluation_due:
            self._say(f"{self.folder.path}: finished already, at step {start} - raise --steps to go on")
            return 0
        if stop_at is not None and start >= stop_at:
            self._say(f"{self.folder.path}: at step {start} already, not before --stop-at {stop_at}")
            return 0
        if self.accelerator.is_main_process:
            self._write("config.yaml", to_yaml(self.config))
            self.report = RunReport(self.folder.path, self.config.run, flatten(self.config), start, self.evaluation_due)
        try:
            with StopSignals(note=STOPPING if self.accelerator.is_main_process else "") as signals:
                status = self._train(start, signals, stop_at)
            if status:  # otherwise an evaluation did
                self._show()
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            problem = advice(error, self.recent, self.evaluation_due, self.accelerator)
            if problem is None:
                raise
            raise UserError(f"{problem}{self._continues()}") from error
        finally:
            if self.report:
                self.report.close()
        if status > 128:
            self._say(f"stopped by signal {status - 128}{self._continues()}")
        return status

    def _train(self, start: int, signals: StopSignals, stop_at: int | None) -> int:
        run = self.config.run
        if self.evaluation_due:
            if start == run.steps:
                return self._finish(signals)
            if not self._evaluate(start, signals):
                return 128 + signals.agreed
        clock = Clock(start)
        for batches in clock.waiting(self._batches(start)):
            done, self.recent = batches[0].step + 1, batches
            figures = train_step(self.training, batches)
            signals.agreed = greatest(self.accelerator, signals.received)
            self.window.add(figures)
            if self.report:
                self.report.progress.advance()
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if figures["skipped"] else 0
            if "overflowed" in figures:
                self._say(f"error: step {done - 1}: the update has overflowed the weights - lower optim.lr or set "
                          "optim.clip_norm, and go on from the last checkpoint with --resume auto --resume-with-changes")
                return GAVE_UP
            if self.skipped_in_a_row >= run.max_skipped:  # it may have been lowered on resuming
                return self._give_up(batches, figures)

            if done % run.log_every == 0 or done == run.steps:
                self._log(done, clock)
            if done == run.steps:
                for warning in self.watch.end(done) if self.report else ():
                    self._say(warning)
                return self._finish(signals)
            with clock.paused():
                self._evaluate_and_save(done, signals, stop_at)
            if signals.agreed:
                return 128 + signals.agreed
            if done == stop_at:
                self._say(f"stopped at step {done}{self._continues()}")
                return 0
        return 0

    def _batches(self, start: int) -> Iterator[list[StepBatch]]:
        """For each step, this process's micro-batches, on its device."""
        config, accelerator, parts = self.config, self.accelerator, self.config.optim.accumulate
        first_part, all_parts = accelerator.process_index * parts, accelerator.num_processes * parts
        data = MicroBatches([
            step_data(config, self.sources, part, all_parts) for part in range(first_part, first_part + parts)
        ])
        loader = items_of(steps_loader(data, start * parts, config.run.steps * parts, config.data.workers))
        self.training.student.train()
        for step in range(start, config.run.steps):
            with self._reading(step):
                batches = [next(loader) for _ in range(parts)]
            yield [batch.to(accelerator.device, non_blocking=True) for batch in batches]

    # Log and evaluation -------------------------------------------------------------------------------------------------

    def _log(self, done: int, clock: Clock) -> None:
        """Log the means since the previous log line. Every process takes part; the main one writes."""
        means, steps = self.window.means(self.accelerator), self.window.counts["skipped"]
        self.window.clear()
        times = clock.lap(done)
        if self.report is None:
            return
        losses = {branch: {name: value for name, value in means.items() if name.startswith(f"{branch}/")}
                  for branch in ("labeled", "unlabeled")}  # fmt: skip
        branches = {branch: weigh(found, self.config.guidance.stages, 1.0) for branch, found in losses.items() if found}
        limits = {stage: scores.tolist() for stage, scores in self.training.thresholds.scores().items()}
        means["lr"] = learning_rate(done - 1, self.config.optim)
        if branches.get("unlabeled"):
            means["unlabeled_weight"] = unlabeled_weight(done - 1, self.config.guidance)
            means["loss_ratio"] = branches["unlabeled"] / max(branches["labeled"], 1e-12)
            for stage, scores in limits.items():
                means |= {f"guidance/{stage}/lowest_threshold": min(scores), f"guidance/{stage}/highest_threshold": max(scores)}
        shown = branches | {"skipped": means["skipped"]}
        self.report.line(done, means | times, {name: value for name, value in shown.items() if value} | guidance_figures(means))
        for warning in self.watch.line(done, steps, means) + self.watch.thresholds(limits):
            self._say(warning)

    def _evaluate(self, done: int, signals: StopSignals) -> bool:
        """Write and evaluate teacher and student, each image in one process only. False: interrupted by a signal."""
        on_main(self.accelerator, lambda: self._write_weights(done))
        if self.sources.val is None:
            self._show(done)
            self.evaluation_due = False
            return True
        results: dict[str, Any] = {
            "step": done, "images_of_a_step": self.stamp["global_batch"], "mixed_precision": self.stamp["mixed_precision"],
            "data": self.stamp["data"], "changed": self.changed,
        }  # fmt: skip
        found: dict[str, SetDetections] = {}
        curves: dict[str, Any] = {}
        for which, detector in (("teacher", self.training.teacher), ("student", self.training.module.detector)):
            batches = items_of(eval_batches(
                self.sources.val, self.config.views, self.config.run.evaluate_batch, self.accelerator.process_index,
                self.accelerator.num_processes, self.config.data.workers,
            ))
            with self._reading(done):
                found[which] = find(
                    detector, self.sources.val, takewhile(lambda _: not signals.received, batches), self.accelerator.device,
                    self.config.run.score_threshold, self.accelerator,
                )  # fmt: skip
            signals.agreed = greatest(self.accelerator, signals.received)
            if signals.agreed:
                return False
            if unread := unseen(self.sources.val, found[which]):
                results["unread"] = len(unread)
            results[which], curves[which] = on_main(
                self.accelerator, partial(metrics_and_curves, self.sources.val, found[which])
            )
        if self.report:
            self.report.evaluation(done, results)
            self._write("precision.json", json.dumps(curves["teacher"]) + "\n")
            self._write("results.json", json.dumps(results, indent=1) + "\n")
            self._keep_best(done, results["teacher"]["AP"])
            for warning in self.watch.evaluation(done, results["teacher"]["AP"]):
                self._say(warning)
        self._show(done, found["teacher"])
        self.evaluation_due = False
        return True

    def _show(self, evaluated: int | None = None, found: SetDetections | None = None) -> None:
        """Write report.html, with new pictures if there was an evaluation."""
        if self.report is None:
            return
        folder, training = self.folder.path, self.training
        if evaluated is not None:
            self._draw("pictures", lambda: save_pictures(
                folder / "pictures", evaluated, training.teacher, training.module.detector, self.sources, self.config, found,
                self.accelerator.device, training.thresholds.scores(),
            ))  # fmt: skip
        self._draw("report.html", lambda: write_report(folder))

    def _draw(self, name: str, action: Callable[[], None]) -> None:
        """A failure here disables the drawing, not the run."""
        if name in self.given_up:
            return
        try:
            action()
        except Exception as error:
            self.given_up.add(name)
            reason = " ".join(str(error).split()) or type(error).__name__
            self._say(f"warning: {self.folder.path / name}: given up ({reason}) - training goes on")

    @torch.no_grad()
    def _score_histogram(self, stage: str) -> str:
        """How the teacher scores the samples of the last step's unlabelled images; only for a warning, so it may be slow."""
        pair = self.recent[0].unlabeled
        if pair is None:
            return "no unlabelled image"
        samples, predictions = self.training.teacher.run(pair.teacher)[stage]
        scores = predictions.logits.amax(2)[samples.usable(pair.teacher.sizes)].sigmoid().float().cpu()
        counts = torch.histc(scores, 10, 0, 1).int().tolist()
        tenths = ", ".join(f"{index / 10:.1f}: {count}" for index, count in enumerate(counts) if count)
        return f"scores of {len(scores)} samples by tenths: {tenths}; highest {scores.max():.3f}"

    # Checkpoints --------------------------------------------------------------------------------------------------------

    def _resume(self, resume: str, insist: bool) -> int:
        """Restore a checkpoint and return its step. All processes use the one that the main process chooses."""
        auto = resume == "auto"
        chosen = on_main(self.accelerator, lambda: newest_checkpoint(self.folder.checkpoints) if auto else Path(resume))
        if chosen is None:
            self._say(f"{self.folder.checkpoints}: no checkpoint yet - starting at step 0")
            return 0
        notes: list[str] = []
        state = load_checkpoint(
            chosen, self.training.module, self.training.teacher, self.training.plain_optimizer,
            check=lambda state: notes.extend(check_stamp(state.get("stamp", {}), self.stamp, insist)),
        )  # fmt: skip
        for note in notes:
            self._say(note)
        if state["step"] < self.config.run.steps:
            self._say(f"resuming from {chosen} at step {state['step']}")
        self.window = Window(dict(state["window"]["sums"]), dict(state["window"]["counts"]))
        self.watch.restore(state["watch"])
        self._keep_start(state["stamp"]["config"])
        self.changed = list(state.get("changed", []))
        if course := changed_course(state["stamp"], self.stamp, state["step"]):
            self.changed.append({"step": state["step"], "changes": course})
            copy_frozen(self.training.teacher, self.training.module.detector)
        if other_validation(state["stamp"], self.stamp):
            self.watch.supervised_ap = None
        self.training.thresholds.restore(state.get("thresholds", {}))
        self.evaluation_due = state["evaluation_due"]
        if self.evaluation_due and (evaluated := self.folder.results()).get("step") == state["step"]:  # after the checkpoint
            self.evaluation_due = False
            self.watch.evaluation(state["step"], evaluated["teacher"]["AP"])
        self.skipped_in_a_row = state["skipped_in_a_row"]
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if insist or not auto:  # otherwise the same training is repeated and gives the same figures
            on_main(self.accelerator, lambda: self._put_away(state["step"]))
        if self.accelerator.is_main_process:
            discard_newer(self.folder.checkpoints, state["step"])
        return state["step"]

    def _keep_start(self, former: Mapping[str, Any]) -> None:
        """The settings that say how training began stay those of the checkpoint, so that the run's record is true."""
        run, backbone, given = self.config.run, self.config.backbone, flatten(self.config)
        kept = {key: former.get(key, given[key]) for key in BEGINNING}
        for key, value in kept.items():
            if given[key] and given[key] != value:  # not what is merely left out
                self._say(f"{key}: stays {value}, as the run began with it (found {given[key]})")
        self.config = replace(
            self.config, run=replace(run, init=kept["run.init"], reset_head=kept["run.reset_head"]),
            backbone=replace(backbone, pretrained=kept["backbone.pretrained"], weights=kept["backbone.weights"]),
        )  # fmt: skip
        self.stamp["config"] |= kept
        self.metadata = {**self.metadata, "config": to_yaml(self.config)}

    def _put_away(self, step: int) -> None:
        """Move away files of later steps than ``step``, so that they are not taken for results of this training."""
        evaluated = self.folder.evaluated
        made = {"results.json": evaluated, "precision.json": evaluated, "weights": self._weights_step()}
        later = [name for name, at in made.items() if at is not None and at > step]
        later += [f"checkpoints/{path.name}" for path in newer_checkpoints(self.folder.checkpoints, step)]
        if not later:
            return
        with writing(self.folder.path, "make room, and resume again"):
            place = self.folder.set_aside(later)
        self._say(f"{place}: holds what there was of after step {step} now, which this course may not come to")

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors. Every process takes part."""
        scaler = self.accelerator.scaler
        return {
            "stamp": self.stamp,
            "window": {"sums": self.window.floats(self.accelerator), "counts": self.window.counts},
            "watch": self.watch.state(),
            "thresholds": self.training.thresholds.state(),
            "evaluation_due": self.evaluation_due,
            "skipped_in_a_row": self.skipped_in_a_row,
            "changed": self.changed,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def _save(self, done: int) -> None:
        """Write a checkpoint; if that fails, the older one stays and training goes on, but not forever."""
        state = self._state()
        on_main(self.accelerator, lambda: self._write_checkpoint(done, state))

    def _checkpoint(self, folder: Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
        training = self.training
        return save_checkpoint(folder, step, training.module, training.teacher, training.plain_optimizer, state, keep)

    def _write_checkpoint(self, done: int, state: Mapping[str, Any]) -> None:
        try:
            self._checkpoint(self.folder.checkpoints, done, state)
            self.unsaved_in_a_row = 0
        except OSError as error:
            self.unsaved_in_a_row += 1
            at_end = done == self.config.run.steps  # the weights are smaller, and may still fit
            if self.unsaved_in_a_row >= MOST_UNSAVED and not at_end:
                raise UserError(f"{self.folder.checkpoints}: not written {MOST_UNSAVED} times in a row ({error.strerror}) - make "
                                f"room{self._continues()}") from error
            goes_on = "evaluation follows" if at_end else "training goes on"
            older = ", the older one stays" if self.folder.has_checkpoint else ""
            self._say(f"warning: checkpoint at step {done} not written ({error.strerror}) - {goes_on}{older}")

    def _evaluate_and_save(self, done: int, signals: StopSignals, stop_at: int | None) -> None:
        """What is due after ``done`` steps. A checkpoint comes first, so that nothing is lost if the evaluation fails; where the
        run is to stop anyway it comes last, so that a run that goes on from there need not evaluate again."""
        run, guided = self.config.run, self.sources.unlabeled is not None
        # Before guidance begins, too: what it has brought, or spoilt, is seen against that.
        before = guided and done == self.config.guidance.start_step
        self.evaluation_due = bool(run.evaluate_every) and (done % run.evaluate_every == 0 or before)
        saved = bool(signals.agreed) or (bool(run.checkpoint_every) and done % run.checkpoint_every == 0 and done != stop_at)
        if saved:
            self._save(done)
        if self.evaluation_due and not signals.agreed:
            self._evaluate(done, signals)
        if not saved and (signals.agreed or done == stop_at):
            self._save(done)

    def _finish(self, signals: StopSignals) -> int:
        """Save what was learnt before evaluating it, so that nothing is lost if that fails."""
        self.evaluation_due = True
        self._save(self.config.run.steps)
        done = self._evaluate(self.config.run.steps, signals)
        return 0 if done else 128 + signals.agreed

    @contextlib.contextmanager
    def _reading(self, done: int) -> Iterator[None]:
        """If reading fails after ``done`` whole steps, save what was learnt, and say in the error how to continue."""
        try:
            yield
        except UserError as error:
            if done and self.accelerator.num_processes == 1:  # several cannot: the others are in the middle of the next step
                with contextlib.suppress(OSError):
                    self._checkpoint(self.folder.checkpoints, done, self._state())
            # The remedy is another file or another setting.
            again = "; --resume auto --resume-with-changes continues" if self.folder.has_checkpoint else ""
            raise UserError(f"{error}{again}") from error

    def _continues(self) -> str:
        """The end of a message if there is a checkpoint to continue from."""
        return "; --resume auto continues" if self.folder.has_checkpoint else ""

    def _write_weights(self, done: int) -> None:
        """Write both detectors as they are after ``done`` steps. If that fails before the last one, training goes on."""
        for which, detector in (("teacher", self.training.teacher), ("student", self.training.module.detector)):
            path = self.folder.path / "weights" / f"{which}.safetensors"
            try:
                save_weights(path, detector, self._metadata(which, done))
            except OSError as error:
                if done < self.config.run.steps:
                    self._say(f"warning: {path}: not written ({error.strerror}) - training goes on")
                    return
                raise UserError(f"{path}: not written ({error.strerror}) - make room{self._continues()}") from error

    def _keep_best(self, done: int, ap: float | None) -> None:
        """Write the teacher once more if no earlier evaluation on the same images has found as much AP."""
        path, images = self.folder.path / "weights" / "best.safetensors", self.stamp["data"]["val"]
        best: dict[str, Any] = {}
        with contextlib.suppress(UserError):  # there is none yet
            best = load_metadata(path)
        if ap is None or (best.get("val") == images and best["AP"] >= ap):
            return
        try:
            save_weights(path, self.training.teacher, {**self._metadata("teacher", done), "AP": ap, "val": images})
        except OSError as error:
            self._say(f"warning: {path}: not written ({error.strerror}) - training goes on")

    def _metadata(self, which: str, done: int) -> dict[str, Any]:
        """What a weights file says about itself."""
        thresholds = {name: scores.tolist() for name, scores in self.training.thresholds.scores().items()}
        return {**self.metadata, **({"thresholds": thresholds} if thresholds else {}), "which": which, "step": done}

    def _give_up(self, batches: Sequence[StepBatch], figures: Figures) -> int:
        """Write the last of too many non-finite steps, for ``--replay``."""
        step, folder = batches[0].step, self.folder.nonfinite
        losses = {name: value for name, value in figures.items() if name.count("/") == 2}
        told, state = describe(batches, losses, self.accelerator), self._state()
        if self.accelerator.is_main_process:
            try:
                shutil.rmtree(folder / checkpoint_name(step), ignore_errors=True)  # an earlier try's, which would be kept
                saved = self._checkpoint(folder, step, state, keep=1)
                (folder / "step.json").write_text(json.dumps({**told, "checkpoint": saved.name}, indent=1) + "\n")
            except OSError as error:
                self._say(f"warning: {folder}: not written ({error.strerror})")
            odd = [name for name, value in told["losses"].items() if value in ("nan", "inf", "-inf")]
            self._say(f"error: step {step}: loss or gradient not finite {self.config.run.max_skipped} times in a row "
                      f"({', '.join(odd) or 'the losses are finite, the gradient is not'}) - lower optim.lr or set "
                      f"optim.clip_norm; look closer with --replay {folder / 'step.json'}")
        return GAVE_UP

    # Small helpers ------------------------------------------------------------------------------------------------------

    def _weights_step(self) -> int | None:
        """The step of which the weights are; None: there are none."""
        try:
            return load_metadata(self.folder.path / "weights" / "teacher.safetensors").get("step")
        except UserError:
            return None

    def _write(self, name: str, text: str) -> None:
        try:
            write_text(self.folder.path / name, text)
        except OSError as error:
            self._say(f"warning: {self.folder.path / name}: not written ({error.strerror}) - training goes on")

    def _say(self, message: str) -> None:
        if self.report is not None:
            self.report.progress.say(message)
        elif self.accelerator.is_main_process:
            print(message, file=sys.stderr, flush=True)
