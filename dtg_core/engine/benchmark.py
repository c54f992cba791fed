"""What a training step costs compared with the networks' own passes.

The *bare passes* are the networks alone on the same views: the teacher's forward pass without gradients, and the student's
forward and backward passes on the labelled and the strong views, with the sum of all predictions as the loss. A stage on
proposals gets those of the real step, so that the shapes are equal and making proposals counts towards the step. Clipping,
optimizer and moving average are part of the step and not of the bare passes. ``overhead`` is step / bare passes: 1.05 is 5 % more.

Step, bare passes and parts are timed in turn within one process, so that whatever else the machine does affects all of them; a
figure is the median over the repeats. The learning rate is 0: each repeat does the same work.
"""
from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator

from dtg_core.boxes import to_float64
from dtg_core.config import Config, Paradigm, StageRule
from dtg_core.data.plan import StepData
from dtg_core.data.sources import Sources
from dtg_core.engine import train_step as steps
from dtg_core.engine.memory import keep_freed_memory, peak_memory
from dtg_core.engine.waits import device_work
from dtg_core.guidance.paradigms import teach
from dtg_core.protocol import Detector
from dtg_core.structures import PairBatch, Proposals, StepBatch, Supervision, ViewBatch

#: Parts of a step in their order. "other" is the rest: sums over processes, checks for values that are not finite.
PARTS = ("data", "teacher", "guidance", "student", "losses", "backward", "optimizer", "ema", "other")
WARM_UP = 2  # repeats that are not counted: caches fill, memory is allocated


def benchmark(
    config: Config, detector: Detector, sources: Sources, accelerator: Accelerator, paradigm: Paradigm, repeats: int,
    candidates: int, against: Paradigm | None = None,
) -> dict[str, Any]:
    """Figures of one kind of step, as JSON values.

    Args:
        config: the run's settings. detector: the student's, untrained. sources: of images. accelerator: device and precision.
        paradigm: of every stage; "none": supervised. repeats: number of counted ones.
        candidates: rough number per image; untrained teachers have none of their own, see ``with_candidates``.
        against: another paradigm whose step is timed in turn with this one's.

    Returns:
        "overhead"; "seconds" of "step", "bare_passes" and each of ``PARTS``; "host_waits" and "operations" of a step;
        "peak_memory" in bytes; "guidance": the step's own figures; with ``against`` also "against": {"paradigm", "seconds",
        "ratio": this step / that step}.
    """
    keep_freed_memory()
    device = accelerator.device
    config = replace(config, optim=replace(config.optim, lr=0.0))
    guidance, data = config.guidance, config.data
    first = guidance.start_step + guidance.ramp_steps  # from here on unlabelled losses count in full
    unlabeled = 0 if paradigm == "none" else data.unlabeled_per_device
    made = StepData(sources.labeled, sources.unlabeled, config.views, config.run.seed, data.labeled_per_device, unlabeled)
    batch = made[first].to(device)
    rules = guidance.stages
    if batch.unlabeled is not None:
        rules = with_candidates(detector.to(device).eval(), batch.unlabeled, rules, candidates)

    def training(kind: Paradigm, detector: Detector) -> steps.Training:
        chosen = {name: replace(rule, paradigm=kind) for name, rule in rules.items()}
        settings = replace(config, guidance=replace(guidance, stages=chosen))
        made = steps.prepare(settings, detector, sources.labeled.objects_per_image(), accelerator)
        made.student.train()
        return made

    other = None if against is None else training(against, copy.deepcopy(detector))
    main = training(paradigm, detector)
    step = partial(steps.train_step, main, [batch])
    _, figures = step()
    memory = peak_memory(device)
    # AdamW keeps its step counts on the host.
    with device_work([state["step"] for state in main.plain_optimizer.state.values() if "step" in state]) as work:
        step()
    times = _times(main, other, batch, lambda repeat: made[first + repeat], repeats)
    result = summary(times)
    result |= {"host_waits": work.waits.total(), "operations": work.operations.total(), "peak_memory": memory}
    result["guidance"] = {
        name.removeprefix("guidance/"): float(value) for name, value in figures.items() if name.startswith("guidance/")
    }
    if against is not None:
        result["against"] = {
            "paradigm": against, "seconds": statistics.median(times["against"]),
            "ratio": _ratio(times["step"], times["against"]),
        }  # fmt: skip
    return result


def _times(
    main: steps.Training, other: steps.Training | None, batch: StepBatch, read: Callable[[int], StepBatch], repeats: int
) -> dict[str, list[float]]:
    """Seconds of each counted repeat, by name: steps of ``main`` and ``other`` on ``batch``, and all else in turn with them."""
    device = main.accelerator.device
    timers: dict[str, Callable[[], Any]] = {
        "step": partial(steps.train_step, main, [batch]), "bare_passes": bare_passes(main, batch)
    }  # fmt: skip
    if other is not None:
        timers["against"] = partial(steps.train_step, other, [batch])
    times: dict[str, list[float]] = defaultdict(list)
    for repeat in range(WARM_UP + repeats):
        found = {name: _seconds(action, device) for name, action in timers.items()}
        main.optimizer.zero_grad(set_to_none=True)
        found["data"] = _seconds(partial(read, repeat), device)
        found |= parts_of_step(main, batch)
        for name, value in found.items() if repeat >= WARM_UP else ():
            times[name].append(value)
    return times


def summary(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """``overhead`` and ``seconds`` from the seconds of each repeat, by name.

    The overhead is the median of the repeats' quotients: a machine that is slow for a while is so for both.
    """
    names = ("step", "bare_passes", *PARTS)
    return {
        "overhead": _ratio(times["step"], times["bare_passes"]),
        "seconds": {name: statistics.median(times[name]) for name in names if name in times},
    }


def _ratio(first: Sequence[float], second: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(first, second, strict=True))


@torch.no_grad()
def with_candidates(teacher: Detector, pair: PairBatch, rules: Mapping[str, StageRule], count: int) -> dict[str, StageRule]:
    """Rules whose ``tau`` is set so that about ``count`` samples per image are candidates in each stage.

    An untrained teacher scores all samples alike, and the thresholds of a trained one would leave none. ``pseudo_score`` of all
    stages becomes the last stage's tau: sparse guidance then keeps the boxes for which dense guidance has clusters.
    """
    outputs = teacher.run(pair.teacher)
    taus = {}
    for name, predictions in outputs.items():
        best = predictions.logits.amax(2).float()
        logits = to_float64(best[predictions.samples.usable(pair.teacher.sizes)].sort(descending=True).values)
        place = min(count * len(best), len(logits) - 1)
        middle = (logits[place - 1] + logits[place]) / 2  # at least one candidate, and one sample that is not
        taus[name] = min(max(float(middle.sigmoid()), 1e-6), 1 - 1e-6)
    pseudo = taus[list(outputs)[-1]]
    changed = {name: replace(rules[name], tau=tau, background_tau=None) for name, tau in taus.items()}
    return {name: replace(rule, pseudo_score=pseudo) for name, rule in {**rules, **changed}.items()}


def bare_passes(training: steps.Training, batch: StepBatch) -> Callable[[], None]:
    """The networks' own passes of a step (see the module), ready to be called repeatedly."""
    config, accelerator, teacher, detector = training.config, training.accelerator, training.teacher, training.module.detector
    branches: list[tuple[ViewBatch, Mapping[str, Supervision]]] = []
    told = None
    with torch.no_grad(), accelerator.autocast():
        truth = {name: Supervision(batch.labeled.targets) for name in detector.stages}
        branches.append((batch.labeled, _same_samples(detector, batch.labeled, truth)))
        if batch.unlabeled is not None:
            told = _same_samples(teacher, batch.unlabeled.teacher, None)
            lessons, _ = teach(teacher, batch.unlabeled, config.guidance.stages)
            if lessons:
                branches.append((batch.unlabeled.student, _same_samples(detector, batch.unlabeled.student, lessons)))

    def run() -> None:
        with accelerator.autocast():
            if batch.unlabeled is not None:
                with torch.no_grad():
                    teacher.run(batch.unlabeled.teacher, told)
            outputs = [detector.run(views, samples) for views, samples in branches]
        predictions = [predicted for output in outputs for predicted in output.values()]
        sums = [part.float().sum() for predicted in predictions for part in (predicted.logits, predicted.raw)]
        torch.stack(sums).sum().backward()

    return run


def _same_samples(detector: Detector, views: ViewBatch, supervision: Mapping[str, Supervision] | None) -> dict[str, Supervision]:
    """Supervision that makes ``run`` use the proposals that it has made under ``supervision``."""
    outputs = detector.run(views, supervision)
    return {
        name: Supervision(proposals=predictions.samples if isinstance(predictions.samples, Proposals) else None)
        for name, predictions in outputs.items()
    }


# Parts -----------------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds by name; what a function calls under another name does not count towards its own."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock = device, clock
        self.seconds: dict[str, float] = defaultdict(float)
        self.running, self.since = ["other"], clock()

    def lap(self) -> None:
        """Add the time since the last call to what runs now."""
        _wait_for(self.device)
        now = self.clock()
        self.seconds[self.running[-1]] += now - self.since
        self.since = now

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, with its time counted under ``name``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.lap()
            self.running.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.lap()
                self.running.pop()

        return run


def parts_of_step(training: steps.Training, batch: StepBatch) -> dict[str, float]:
    """Seconds of each part of a step except its data. The host waits for the device between parts, so they may exceed a step."""
    places: Sequence[tuple[str, Any, str]] = (
        ("teacher", training.teacher, "run"),
        ("guidance", steps, "teach"),  # without the teacher's pass
        ("student", training.module.detector, "run"),  # with making its proposals
        ("losses", training.module, "forward"),  # assignment and losses: without the student's pass
        ("backward", training.accelerator, "backward"),
        ("optimizer", training.accelerator, "clip_grad_norm_"),
        ("optimizer", training.optimizer, "step"),
        ("ema", steps, "update_teacher"),
    )
    watch = Stopwatch(training.accelerator.device)
    with contextlib.ExitStack() as stack:
        for name, owner, attribute in places:
            stack.enter_context(mock.patch.object(owner, attribute, watch.timed(name, getattr(owner, attribute))))
        watch.since = watch.clock()
        steps.train_step(training, [batch])
        watch.lap()
    return {name: watch.seconds[name] for name in PARTS if name != "data"}


def _seconds(action: Callable[[], Any], device: torch.device) -> float:
    _wait_for(device)
    began = time.perf_counter()
    action()
    _wait_for(device)
    return time.perf_counter() - began


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# Report ----------------------------------------------------------------------------------------------------------------


def table(figures: Mapping[str, Any]) -> Iterator[str]:
    """Lines for the terminal."""
    seconds = figures["seconds"]
    whole = seconds["step"]
    yield f"{'step':<12} {1e3 * whole:9.1f} ms"
    for name in PARTS:
        if name in seconds:
            note = "made beside the step by loader processes" if name == "data" else f"{seconds[name] / whole:6.1%}"
            yield f"  {name:<10} {1e3 * seconds[name]:9.1f} ms  {note}"
    yield f"{'bare passes':<12} {1e3 * seconds['bare_passes']:9.1f} ms"
    more = figures["overhead"] - 1
    yield f"overhead     {figures['overhead']:9.3f}     step / bare passes, {abs(more):.1%} {'more' if more >= 0 else 'less'}"
    if "against" in figures:
        other = figures["against"]
        yield f"{other['paradigm']:<12} {1e3 * other['seconds']:9.1f} ms  this step / that step: {other['ratio']:.3f}"
    yield f"host waits   {figures['host_waits']:9d}"
    yield f"operations   {figures['operations']:9d}"
    yield f"peak memory  {figures['peak_memory'] / 2**20:9.0f} MB"
    if figures["guidance"]:
        yield "guidance     " + ", ".join(f"{name} {_short(value)}" for name, value in figures["guidance"].items())


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else str(value)
