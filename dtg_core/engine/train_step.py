"""The training step. ``train_step`` is the whole method: teach, student, weigh, update, average.

The batch (data/plan.py), the schedules and the random draws depend only on the step's number, and everything that steps change
is in ``Training``, so a run can resume at any step without replaying the earlier ones.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from numpy.typing import ArrayLike
from torch import Tensor, nn

from dtg_core.config import Config, OptimConfig
from dtg_core.engine.schedules import learning_rate, unlabeled_weight
from dtg_core.guidance.paradigms import teach
from dtg_core.guidance.thresholds import Thresholds
from dtg_core.losses import weigh
from dtg_core.models.backbone import compile_backbones
from dtg_core.models.student import StudentModule
from dtg_core.models.teacher import make_teacher, update_teacher
from dtg_core.protocol import Detector
from dtg_core.structures import Figures, Losses, LossName, LossTerm, StepBatch, Supervision

Name = TypeVar("Name")


def make_optimizer(module: nn.Module, config: OptimConfig, accelerator: Accelerator) -> torch.optim.Optimizer:
    """SGD with momentum (Sec. 4.2) or AdamW over the parameters that are not frozen.

    A CPU updates each parameter in one pass (fused); other devices use multi-tensor kernels. So does a CPU with a loss scaler: a
    fused kernel skips a step by itself, without Accelerate noticing.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    fused = accelerator.device.type == "cpu" and accelerator.scaler is None
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused, foreach=not fused)
    return torch.optim.SGD(
        parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused, foreach=not fused
    )


@dataclass(frozen=True)
class Training:
    """Everything that steps need or change, on its device."""

    config: Config
    accelerator: Accelerator
    module: StudentModule
    student: nn.Module  # ``module``, wrapped where several processes share the work
    teacher: Detector
    optimizer: torch.optim.Optimizer  # Accelerate's wrapper
    thresholds: Thresholds

    @property
    def detectors(self) -> dict[str, Detector]:
        """What is evaluated and kept, by name."""
        return {"teacher": self.teacher, "student": self.module.detector}

    @property
    def plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself, whose state a checkpoint holds."""
        return cast(torch.optim.Optimizer, getattr(self.optimizer, "optimizer", self.optimizer))


def prepare(config: Config, detector: Detector, objects: ArrayLike, accelerator: Accelerator) -> Training:
    """Student, teacher, optimizer and thresholds at step 0, laid out and compiled as ``config.run`` says.

    Args:
        config: the run's settings. detector: the student's, with its initial weights.
        objects: [C] mean objects per labelled image, by class.
        accelerator: device, precision, processes; no longer divides losses by a launcher's micro-batches.
    """
    accelerator.gradient_accumulation_steps = 1  # train_step does the division itself, and exactly
    if config.run.channels_last:
        detector.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    teacher = make_teacher(detector).to(accelerator.device)
    if config.run.compile:
        compile_backbones(detector)
        compile_backbones(teacher)
    module = StudentModule(detector, config.guidance.stages)
    student, optimizer = accelerator.prepare(module, make_optimizer(module, config.optim, accelerator))
    thresholds = Thresholds(config.guidance.stages, detector.stages, objects, accelerator.device)
    return Training(config, accelerator, module, student, teacher, optimizer, thresholds)


def train_step(training: Training, batches: Sequence[StepBatch]) -> tuple[Losses, Figures]:
    """One step of Eq. 1, from a batch to the updated student and teacher.

    Args:
        training: what this step needs and changes.
        batches: the micro-batches of one step, usually one: labelled views, and pairs of unlabelled views or None.

    Returns:
        The losses, and other figures by name: guidance, and the totals of both branches; all still on the device. "skipped" is
        1 if the gradient or the updated weights were not finite; the teacher is then unchanged, and in the first case so is the
        student, except for the statistics of trained batch norms. "overflowed" is set if the weights themselves are not finite,
        which no later step can repair.
    """
    config, accelerator, student, teacher = training.config, training.accelerator, training.student, training.teacher
    step, detector = batches[0].step, training.module.detector
    for group in training.optimizer.param_groups:
        group["lr"] = learning_rate(step, config.optim)
    weight = unlabeled_weight(step, config.guidance)

    first = accelerator.process_index * len(batches)  # index of this process's first part of the step
    lessons = [_teach(training, batch, part, guided=weight > 0) for part, batch in enumerate(batches, first)]
    counts = _count_ahead(training, lessons) if len(lessons) > 1 else None
    summed: dict[LossName, Any] = {}
    figures: Figures = {}
    for lesson in lessons:
        # Gradients of the processes are averaged once, in the last backward pass of a step.
        with nullcontext() if lesson is lessons[-1] else accelerator.no_sync(student):
            terms = _forward(training, student, lesson)
            counts = counts or _over_processes(_counts(terms), accelerator)
            losses = {name: term.total / counts[name] for name, term in terms.items()}
            # Gradients are averaged over processes, and the divisors are sums over processes.
            losses = {name: loss * accelerator.num_processes for name, loss in losses.items()}
            accelerator.backward(weigh(losses, config.guidance.stages, weight))
        add_up(summed, {name: loss.detach() for name, loss in losses.items()})
        add_up(figures, {name: value / len(lessons) for name, value in lesson.figures.items()})

    norm = accelerator.clip_grad_norm_(student.parameters(), config.optim.clip_norm or float("inf"))
    finite = bool(torch.as_tensor(norm).isfinite())  # sync: a step that is not finite must not reach the weights
    if not finite:  # nothing moves without gradients, not even by momentum
        training.optimizer.zero_grad(set_to_none=True)
    if finite or accelerator.scaler is not None:  # a scaler has to be told of the step, to lower its scale
        training.optimizer.step()
    share_statistics(detector, accelerator)
    healthy = finite and is_finite(detector)
    if healthy:
        update_teacher(teacher, detector, step, config.optim.ema)
        training.thresholds.follow(*_found(lessons, accelerator))
    else:
        heal_statistics(detector, teacher)
        if finite and not is_finite(detector):
            figures["overflowed"] = 1.0
    training.optimizer.zero_grad(set_to_none=True)
    for branch in dict.fromkeys(name.branch for name in summed):
        of_branch = {name: loss for name, loss in summed.items() if name.branch == branch}
        figures[f"loss/{branch}"] = weigh(of_branch, config.guidance.stages, 1.0)
    return summed, figures | {"skipped": float(not healthy)}


@dataclass(frozen=True)
class Lesson:
    """A micro-batch and what the teacher says about it."""

    batch: StepBatch
    part: int  # index in the step, over all processes
    supervision: Mapping[str, Supervision]
    figures: Figures


def _teach(training: Training, batch: StepBatch, part: int, guided: bool) -> Lesson:
    if batch.unlabeled is None or not guided:
        return Lesson(batch, part, {}, {})
    config = training.config
    supervision, figures = teach(
        training.teacher, batch.unlabeled, config.guidance.stages, training.accelerator.autocast,
        training.thresholds.scores(),
    )  # fmt: skip
    return Lesson(batch, part, supervision, figures)


def _found(lessons: Sequence[Lesson], accelerator: Accelerator) -> tuple[dict[str, Tensor], int]:
    """Objects of each class found by the teacher, by stage, and in how many images, over all processes."""
    found: dict[str, Any] = {}
    images = 0
    for lesson in lessons:
        counts = {name: part.found for name, part in lesson.supervision.items() if part.found is not None}
        add_up(found, counts)
        images += len(lesson.batch.unlabeled.student.sizes) if lesson.batch.unlabeled and counts else 0
    if accelerator.num_processes > 1 and found:
        total = cast(Tensor, accelerator.reduce(torch.cat(list(found.values())), "sum"))
        found = dict(zip(found, total.split([len(count) for count in found.values()])))
    return found, images * accelerator.num_processes


def _forward(training: Training, student: nn.Module, lesson: Lesson) -> dict[LossName, LossTerm]:
    """The student's loss terms. Dropout and the like depend only on the seed, the step and the part."""
    batch, supervision = lesson.batch, lesson.supervision
    torch.manual_seed((training.config.run.seed * 1_000_003 + batch.step) * 1_009 + lesson.part)
    with training.accelerator.autocast():
        return student(batch.labeled, batch.unlabeled.student if batch.unlabeled and supervision else None, supervision)


@torch.no_grad()
def _count_ahead(training: Training, lessons: Sequence[Lesson]) -> Losses:
    """The divisors of all micro-batches, which have to be known before the first backward pass.

    They depend on the student's predictions, so this costs an extra forward pass of each micro-batch, without gradients. In
    return, N micro-batches give the gradient of one batch, exactly if all images have one size (otherwise padding differs).
    """
    buffers = list(training.module.buffers())
    before = [buffer.clone() for buffer in buffers]
    counts: dict[LossName, Any] = {}
    for lesson in lessons:
        add_up(counts, _counts(_forward(training, training.module, lesson)))
    for buffer, old in zip(buffers, before):
        buffer.copy_(old)  # batch statistics are counted in the pass that trains
    return _over_processes(counts, training.accelerator)


def _counts(terms: Mapping[LossName, LossTerm]) -> Losses:
    return {name: term.count.detach().float() for name, term in terms.items()}


def _over_processes(counts: Losses, accelerator: Accelerator) -> Losses:
    """The divisor of each loss, in one reduction: its count in all processes, at least 1."""
    total = cast(Tensor, accelerator.reduce(torch.stack(list(counts.values())), "sum"))
    return dict(zip(counts, total.clamp(min=1).unbind()))


@torch.no_grad()
def is_finite(module: nn.Module) -> bool:
    """Whether all parameters that train and all float buffers are finite; values that overflow when squared count as infinite."""
    tensors: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
    tensors += [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    # sync: the teacher must never average in the weights of an overflowing update. The 2-norm is the fastest on a CPU.
    return bool(torch.stack(torch._foreach_norm(tensors)).isfinite().all())


@torch.no_grad()
def share_statistics(detector: nn.Module, accelerator: Accelerator) -> None:
    """Average trained batch statistics over the processes, so that the teacher is the same in all of them."""
    if accelerator.num_processes == 1:
        return
    norms = [module for module in detector.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training]
    own = [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]
    if own:
        mean = cast(Tensor, accelerator.reduce(torch.cat([buffer.flatten() for buffer in own]), "mean"))
        torch._foreach_copy_(own, [part.view_as(to) for part, to in zip(mean.split([to.numel() for to in own]), own)])


@torch.no_grad()
def heal_statistics(detector: nn.Module, teacher: nn.Module) -> None:
    """Replace batch statistics that a bad batch has spoilt with the teacher's: no later batch would repair them."""
    for own, averaged in zip(detector.buffers(), teacher.buffers()):
        if own.is_floating_point():
            own.copy_(torch.where(own.isfinite(), own, averaged))


def add_up(sums: dict[Name, Any], figures: Mapping[Name, Tensor | float]) -> None:
    """Add each figure to the sum of its name."""
    for name, value in figures.items():
        sums[name] = sums.get(name, 0.0) + value


@dataclass
class Window:
    """Running sums of the figures between two log lines; they stay on the device until the line is written."""

    sums: Figures = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, losses: Losses, figures: Figures) -> None:
        """Add what a step gives; of a skipped step, only the fact that it was skipped."""
        if figures["skipped"]:
            figures = {"skipped": figures["skipped"]}
        else:
            figures = {**{str(name): loss for name, loss in losses.items()}, **figures}
        add_up(self.sums, figures)
        for name in figures:
            self.counts[name] = self.counts.get(name, 0) + 1

    def floats(self, accelerator: Accelerator) -> dict[str, float]:
        """The sums as numbers, averaged over the processes, in one transfer and one reduction."""
        tensors = {name: value for name, value in self.sums.items() if isinstance(value, Tensor)}
        moved = torch.stack(list(tensors.values())).tolist() if tensors else []  # sync: one per log line
        numbers = dict(zip(tensors, moved))
        sums = {name: numbers[name] if name in numbers else float(cast(float, value)) for name, value in self.sums.items()}
        if accelerator.num_processes == 1 or not sums:
            return sums
        mean = accelerator.reduce(torch.tensor(list(sums.values()), device=accelerator.device), "mean")
        return dict(zip(sums, cast(Tensor, mean).tolist()))

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Each figure's mean over the steps that gave it and over the processes."""
        return {name: value / self.counts[name] for name, value in self.floats(accelerator).items()}

    def clear(self) -> None:
        self.sums, self.counts = {}, {}
