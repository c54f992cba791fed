"""The training loop. ``train_step`` is the whole method: teach, student, weigh, update, average.

Everything a step needs follows from its number: the batch (data/plan.py), the schedules and the random draws. So a run resumes at
any step without replaying the steps before.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dtg_core.config import Config, OptimConfig
from dtg_core.engine.schedules import learning_rate, unlabeled_weight
from dtg_core.guidance import teach
from dtg_core.guidance.paradigms import Figures
from dtg_core.losses import weigh
from dtg_core.models.student import StudentModule
from dtg_core.models.teacher import update_teacher
from dtg_core.protocol import Detector
from dtg_core.structures import LossTerm, StepBatch


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum (Sec. 4.2) or AdamW over the parameters that are not frozen, updated by multi-tensor kernels."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, foreach=True)
    return torch.optim.SGD(
        parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, foreach=True
    )


def train_step(
    student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, batch: StepBatch, config: Config,
    accelerator: Accelerator,
) -> Figures:
    """One step of Eq. 1, from a batch to the updated student and teacher.

    Args:
        student: ``StudentModule``, possibly wrapped for several processes. teacher: its averaged detector.
        batch: labelled views, and pairs of unlabelled views or None. config: of the run.

    Returns:
        Losses and figures of the guidance by name, still on the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(batch.step, config.optim)
    weight = unlabeled_weight(batch.step, config.guidance)
    rules, pair = config.guidance.stages, batch.unlabeled

    supervision, figures = {}, Figures()
    if pair is not None and weight > 0:
        supervision, figures = teach(cast(Detector, teacher), pair, rules, config.views.box_hull, accelerator.autocast())
    with accelerator.autocast():
        terms: dict[str, LossTerm] = student(batch.labeled, pair.student if pair and supervision else None, supervision)
    losses = normalized(terms, accelerator)
    accelerator.backward(weigh(losses, rules, weight))

    norm = accelerator.clip_grad_norm_(student.parameters(), config.optim.clip_norm or float("inf"))
    finite = bool(torch.as_tensor(norm).isfinite())  # sync: a step that is not finite must not reach the weights
    if finite:
        optimizer.step()
        update_teacher(teacher, cast(StudentModule, accelerator.unwrap_model(student)).detector, batch.step, config.optim.ema)
    optimizer.zero_grad(set_to_none=True)
    detached = {name: loss.detach() for name, loss in losses.items()}
    return detached | figures | {"skipped": float(not finite)}


def normalized(terms: Mapping[str, LossTerm], accelerator: Accelerator) -> dict[str, Tensor]:
    """Divide each sum by its divisor over all processes. The factor undoes the averaging of gradients over processes."""
    counts = torch.stack([term.count.detach().float() for term in terms.values()])
    counts = cast(Tensor, accelerator.reduce(counts, "sum")).clamp(min=1)
    return {
        name: term.total * accelerator.num_processes / count for (name, term), count in zip(terms.items(), counts.unbind())
    }


@dataclass
class Window:
    """Running sums of the figures between two log lines; they stay on the device until the line is written."""

    sums: Figures = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, figures: Figures) -> None:
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def floats(self) -> dict[str, float]:
        """The sums as numbers, in one transfer."""
        tensors = {name: value for name, value in self.sums.items() if isinstance(value, Tensor)}
        moved = torch.stack(list(tensors.values())).tolist() if tensors else []  # sync: one per log line
        numbers = dict(zip(tensors, moved))
        return {name: numbers[name] if name in numbers else float(cast(float, value)) for name, value in self.sums.items()}

    def means(self) -> dict[str, float]:
        return {name: value / self.counts[name] for name, value in self.floats().items()}

    def clear(self) -> None:
        self.sums, self.counts = {}, {}


def train(
    student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[StepBatch], config: Config,
    accelerator: Accelerator, window: Window, after_step: Callable[[int, Window], None],
) -> None:
    """Run ``train_step`` over ``batches``; ``after_step(steps done, window)`` logs, evaluates and saves."""
    for batch in batches:
        student.train()
        moved = batch.to(accelerator.device, non_blocking=True)
        torch.manual_seed(config.run.seed * 1_000_003 + batch.step)  # dropout and the like follow from the step alone
        window.add(train_step(student, teacher, optimizer, moved, config, accelerator))
        after_step(batch.step + 1, window)
