"""What a run shows and writes down while it trains: settings, log lines, warnings, pictures and report.html.

Every process has a ``Recorder`` and calls it alike, because means are over all of them; only the main process writes. What cannot
be written or drawn is told, and training goes on.
"""
from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from dtg_core.data.sources import Sources
from dtg_core.drafts import write_text
from dtg_core.engine.evaluate import SetDetections
from dtg_core.engine.folder import RunFolder
from dtg_core.engine.metrics import Clock, MetricsWriter, Progress, Trackers, guidance_figures
from dtg_core.engine.report import save_pictures, write_report
from dtg_core.engine.run_state import RunState
from dtg_core.engine.schedules import learning_rate, unlabeled_weight
from dtg_core.engine.train_step import Training
from dtg_core.engine.watch import Watch
from dtg_core.errors import one_line
from dtg_core.settings_text import flatten, to_yaml
from dtg_core.structures import Figures, Losses

SHOWN = ("AP", "AP50", "AP75")


class Recorder:
    """The log of a run, on the terminal and in its folder."""

    metrics: MetricsWriter  # these three only where ``reports``
    trackers: Trackers
    progress: Progress

    def __init__(self, training: Training, state: RunState, sources: Sources, folder: RunFolder) -> None:
        self.training, self.state, self.sources, self.folder = training, state, sources, folder
        self.config, self.accelerator = training.config, training.accelerator
        labeled = sources.labeled
        self.watch = Watch(
            self.config.guidance.only(training.teacher.stages), float(labeled.objects_per_image().sum()), labeled.class_names,
            self._score_histogram,
        )
        self.reports = False  # whether this is the main process, and it trains
        self.given_up: set[str] = set()  # which of pictures and report.html have failed

    def open(self, start: int) -> None:
        """Begin the record of training from step ``start``."""
        if not self.accelerator.is_main_process:
            return
        config, folder = self.state.config, self.folder.path
        self._write("config.yaml", to_yaml(config))
        # The line of an evaluation that is to be done again is dropped.
        self.metrics = MetricsWriter(folder / "metrics.jsonl", start, "teacher/AP" if self.state.evaluation_due else None)
        self.trackers = Trackers(config.run.trackers, folder, flatten(config))
        self.progress = Progress(config.run.steps, start)
        self.reports = True

    def close(self) -> None:
        """End the progress bar and the trackers."""
        if self.reports:
            self.progress.close()
            self.trackers.close()

    def step(self, losses: Losses, figures: Figures) -> None:
        """Take in what a step gives."""
        self.state.window.add(losses, figures)
        if self.reports:
            self.progress.advance()

    def line(self, done: int, clock: Clock) -> None:
        """Log the means since the previous log line. Every process takes part; the main one writes."""
        window, guidance = self.state.window, self.config.guidance
        means, steps = window.means(self.accelerator), window.counts["skipped"]
        window.clear()
        times = clock.lap(done)
        if not self.reports:
            return
        branches = {branch: means[f"loss/{branch}"] for branch in ("labeled", "unlabeled") if f"loss/{branch}" in means}
        limits = {stage: scores.tolist() for stage, scores in self.training.thresholds.scores().items()}
        means["lr"] = learning_rate(done - 1, self.config.optim)
        if branches.get("unlabeled"):
            means["unlabeled_weight"] = unlabeled_weight(done - 1, guidance)
            means["loss_ratio"] = branches["unlabeled"] / max(branches["labeled"], 1e-12)
            for stage, scores in limits.items():
                means |= {f"guidance/{stage}/lowest_threshold": min(scores), f"guidance/{stage}/highest_threshold": max(scores)}
        shown = branches | {"skipped": means["skipped"]}
        self.metrics.write(done, means | times)
        self.trackers.write(done, means | times)
        self.progress.report({name: value for name, value in shown.items() if value} | guidance_figures(means))
        self.warn(done, self.watch.line(done, steps, means) + self.watch.thresholds(limits))

    def end(self, done: int) -> None:
        """Warn after the last step."""
        self.warn(done, self.watch.end(done) if self.reports else ())

    def evaluation(self, done: int, results: Mapping[str, Any], curves: Mapping[str, Any]) -> None:
        """Log an evaluation, and write it to results.json; ``curves`` are the teacher's."""
        if not self.reports:
            return
        values = {f"{who}/{name}": results[who][name] for who in self.training.detectors for name in SHOWN}
        self.metrics.write(done, values)
        self.trackers.write(done, {name: value for name, value in values.items() if value is not None})
        for who in self.training.detectors:
            told = [(name, results[who][name]) for name in SHOWN]
            figures = "  ".join(f"{name} {'-' if value is None else f'{value:.2f}'}" for name, value in told)
            self.progress.say(f"step {done}  {who:7}  {figures}")
        self._write("precision.json", json.dumps(curves) + "\n")
        self._write("results.json", json.dumps(results, indent=1) + "\n")
        self.warn(done, self.watch.evaluation(done, results["teacher"]["AP"]))

    def show(self, evaluated: int | None = None, found: SetDetections | None = None) -> None:
        """Write report.html, with new pictures if there was an evaluation, of step ``evaluated`` and with what the teacher has
        ``found`` in it."""
        if not self.reports:
            return
        folder = self.folder.path
        if evaluated is not None:
            self._draw("pictures", lambda: save_pictures(folder / "pictures", evaluated, self.training, self.sources, found))
        self._draw("report.html", lambda: write_report(folder))

    def _draw(self, name: str, action: Callable[[], None]) -> None:
        """A failure here disables the drawing, not the run."""
        if name in self.given_up:
            return
        try:
            action()
        except Exception as error:
            self.given_up.add(name)
            self.say(f"warning: {self.folder.path / name}: given up ({one_line(error)}) - training goes on")

    def _write(self, name: str, text: str) -> None:
        """Write a file of the run's folder."""
        try:
            write_text(self.folder.path / name, text)
        except OSError as error:
            self.say(f"warning: {self.folder.path / name}: not written ({error.strerror}) - training goes on")

    def say(self, message: str) -> None:
        """Show a line on stderr, once and not in each process."""
        if self.reports:
            self.progress.say(message)
        elif self.accelerator.is_main_process:
            print(message, file=sys.stderr, flush=True)

    def warn(self, done: int, warnings: Iterable[str]) -> None:
        """Show warnings, and log them, as nobody may be looking."""
        for warning in warnings:
            self.say(f"warning: {warning}")
            if self.reports:
                self.metrics.write(done, {"warning": warning})

    @torch.no_grad()
    def _score_histogram(self, stage: str) -> str:
        """How the teacher scores the samples of the last step's unlabelled images; only for a warning, so it may be slow."""
        pair = self.state.recent[0].unlabeled
        if pair is None:
            return "no unlabelled image"
        predictions = self.training.teacher.run(pair.teacher)[stage]
        scores = predictions.logits.amax(2)[predictions.samples.usable(pair.teacher.sizes)].sigmoid().float().cpu()
        counts = torch.histc(scores, 10, 0, 1).int().tolist()
        tenths = ", ".join(f"{index / 10:.1f}: {count}" for index, count in enumerate(counts) if count)
        return f"scores of {len(scores)} samples by tenths: {tenths}; highest {scores.max():.3f}"
