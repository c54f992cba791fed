"""The training loop of a run, and the order of what is due between its steps.

Each step is ``train_step`` (train_step.py) on batches of data/plan.py. Besides, a run has

    Recorder        log lines, warnings, pictures and report.html (recorder.py)
    Checkpointer    checkpoints, and resuming from them (checkpointer.py)
    Evaluator       weights files and their AP (evaluator.py)
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from accelerate import Accelerator

from dtg_core.config import Config
from dtg_core.data.plan import items_of, micro_batches, steps_loader
from dtg_core.data.sources import Sources
from dtg_core.engine.checkpoint import weights_step
from dtg_core.engine.checkpointer import Checkpointer
from dtg_core.engine.evaluator import Evaluator
from dtg_core.engine.failures import advice
from dtg_core.engine.folder import RunFolder
from dtg_core.engine.memory import keep_freed_memory
from dtg_core.engine.metrics import Clock
from dtg_core.engine.processes import greatest, on_main
from dtg_core.engine.recorder import Recorder
from dtg_core.engine.resume import stamp
from dtg_core.engine.run_state import RunState
from dtg_core.engine.signals import StopSignals
from dtg_core.engine.train_step import prepare, train_step
from dtg_core.errors import UserError
from dtg_core.protocol import Detector
from dtg_core.structures import Figures, Losses, StepBatch

#: Exit statuses of a run besides 0; for a signal it is 128 plus the signal's number.
GAVE_UP = 3
STOPPING = "stopping after this step, with a checkpoint - a second signal ends the run at once, without one"


class Trainer:
    """Training of one detector; ``run`` does it all. There is one in every process of a run.

    Args:
        config: all settings. detector: the student's, on the CPU. sources: the data. folder: the run folder, opened.
        metadata: what a weights file has to contain, besides tensors and settings, to be usable on its own.
    """

    def __init__(
        self, config: Config, detector: Detector, sources: Sources, folder: RunFolder, accelerator: Accelerator,
        metadata: Mapping[str, Any],
    ) -> None:
        self.config, self.sources, self.folder, self.accelerator = config, sources, folder, accelerator
        keep_freed_memory()
        self.training = prepare(config, detector, sources.labeled.objects_per_image(), accelerator)
        self.state = RunState(config, stamp(config, sources, accelerator.num_processes, accelerator.mixed_precision))
        self.recorder = Recorder(self.training, self.state, sources, folder)
        self.checkpointer = Checkpointer(self.training, self.state, folder, self.recorder)
        self.evaluator = Evaluator(self.training, self.state, sources, folder, self.recorder, self.checkpointer, metadata)

    def run(self, resume: str | None, insist: bool = False, stop_at: int | None = None) -> int:
        """Train, from a checkpoint if ``resume`` is "auto" or names one, and evaluate.

        Args:
            resume: the checkpoint. insist: continue it even with other settings or data.
            stop_at: step after which to write a checkpoint and stop, as on a signal.

        Returns:
            The exit status: 0, ``GAVE_UP``, or 128 plus the number of a signal.
        """
        start, steps = self.checkpointer.resume(resume, insist) if resume else 0, self.config.run.steps
        if start > steps:
            raise UserError(f"{self.folder.path}: is at step {start} already, and run.steps={steps} is less - raise --steps")
        if start == steps and on_main(self.accelerator, lambda: weights_step(self.folder.path)) != start:
            self.state.evaluation_due = True  # it was stopped at what is now its last step
        if start == steps and not self.state.evaluation_due:
            self.recorder.say(f"{self.folder.path}: finished already, at step {start} - raise --steps to go on")
            return 0
        if stop_at is not None and start >= stop_at:
            self.recorder.say(f"{self.folder.path}: at step {start} already, not before --stop-at {stop_at}")
            return 0
        self.recorder.open(start)
        try:
            with StopSignals(note=STOPPING if self.accelerator.is_main_process else "") as signals:
                status = self._train(start, signals, stop_at)
            if status:  # otherwise an evaluation did
                self.recorder.show()
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            problem = advice(error, self.state.recent, self.state.evaluation_due, self.accelerator)
            if problem is None:
                raise
            raise UserError(f"{problem}{self.folder.how_to_continue}") from error
        finally:
            self.recorder.close()
        if status > 128:
            self.recorder.say(f"stopped by signal {status - 128}{self.folder.how_to_continue}")
        return status

    def _train(self, start: int, signals: StopSignals, stop_at: int | None) -> int:
        """The loop; returns the exit status."""
        run = self.config.run
        if self.state.evaluation_due:
            if start == run.steps:
                return self._finish(signals)
            if not self.evaluator.run(start, signals):
                return 128 + signals.agreed
        clock = Clock(start)
        for batches in clock.waiting(self._batches(start)):
            done, self.state.recent = batches[0].step + 1, batches
            losses, figures = train_step(self.training, batches)
            signals.agreed = greatest(self.accelerator, signals.received)
            self.recorder.step(losses, figures)
            if self._gives_up(batches, losses, figures):
                return GAVE_UP
            if done % run.log_every == 0 or done == run.steps:
                self.recorder.line(done, clock)
            if done == run.steps:
                self.recorder.end(done)
                return self._finish(signals)
            with clock.paused():
                self._save_and_evaluate(done, signals, stop_at)
            if signals.agreed:
                return 128 + signals.agreed
            if done == stop_at:
                self.recorder.say(f"stopped at step {done}{self.folder.how_to_continue}")
                return 0
        return 0

    def _batches(self, start: int) -> Iterator[list[StepBatch]]:
        """For each step, this process's micro-batches, on its device."""
        config, accelerator, parts = self.config, self.accelerator, self.config.optim.accumulate
        data = micro_batches(config, self.sources, accelerator.process_index, accelerator.num_processes)
        loader = items_of(steps_loader(data, start * parts, config.run.steps * parts, config.data.workers))
        self.training.student.train()
        for step in range(start, config.run.steps):
            with self.checkpointer.reading(step):
                batches = [next(loader) for _ in range(parts)]
            yield [batch.to(accelerator.device, non_blocking=True) for batch in batches]

    def _gives_up(self, batches: Sequence[StepBatch], losses: Losses, figures: Figures) -> bool:
        """Whether a step with these figures is the last one, because no later step would be any better."""
        if "overflowed" in figures:
            self.recorder.say(f"error: step {batches[0].step}: the update has overflowed the weights - lower optim.lr or set "
                              "optim.clip_norm, and go on from the last checkpoint with --resume auto --resume-with-changes")
            return True
        self.state.skipped_in_a_row = self.state.skipped_in_a_row + 1 if figures["skipped"] else 0
        if self.state.skipped_in_a_row < self.config.run.max_skipped:  # it may have been lowered on resuming
            return False
        self.checkpointer.save_nonfinite(batches, losses)
        return True

    def _save_and_evaluate(self, done: int, signals: StopSignals, stop_at: int | None) -> None:
        """What is due after ``done`` steps. A checkpoint comes first, so that nothing is lost if the evaluation fails; where the
        run is to stop anyway it comes last, so that a run that goes on from there need not evaluate again."""
        run = self.config.run
        # Before guidance begins, too: what it has brought, or spoilt, is seen against that. A guided run may
        # continue a supervised one, and is compared with it.
        before = done == self.config.guidance.start_step
        self.state.evaluation_due = bool(run.evaluate_every) and (done % run.evaluate_every == 0 or before)
        saved = bool(signals.agreed) or (bool(run.checkpoint_every) and done % run.checkpoint_every == 0 and done != stop_at)
        if saved:
            self.checkpointer.save(done)
        if self.state.evaluation_due and not signals.agreed:
            self.evaluator.run(done, signals)
        if not saved and (signals.agreed or done == stop_at):
            self.checkpointer.save(done)

    def _finish(self, signals: StopSignals) -> int:
        """Save what was learnt before evaluating it, so that nothing is lost if that fails."""
        self.state.evaluation_due = True
        self.checkpointer.save(self.config.run.steps)
        evaluated = self.evaluator.run(self.config.run.steps, signals)
        return 0 if evaluated else 128 + signals.agreed
