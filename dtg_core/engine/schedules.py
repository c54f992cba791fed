"""Schedules: each is a pure function of the step, so that nothing has to be saved."""
from __future__ import annotations

from dataclasses import replace

from dtg_core.config import Config, GuidanceConfig, OptimConfig


def learning_rate(step: int, config: OptimConfig) -> float:
    """Linear warm-up from lr / 1000, then lr times gamma for each milestone passed (Sec. 4.2). Steps count from 0."""
    rate = config.lr * config.gamma ** sum(step >= milestone for milestone in config.milestones)
    if step < config.warmup_steps:
        rate *= 0.001 + 0.999 * step / config.warmup_steps
    return rate


def unlabeled_weight(step: int, config: GuidanceConfig) -> float:
    """alpha of Eq. 1 with the warm-up of Sec. 4.2: 0 before ``start_step``, then linear over ``ramp_steps`` (A28)."""
    if step < config.start_step:
        return 0.0
    return config.alpha * min(1.0, (step - config.start_step + 1) / max(config.ramp_steps, 1))


def global_batch(config: Config, processes: int) -> tuple[int, int]:
    """Labelled and unlabelled images of a step over all processes and micro-batches."""
    parts = processes * config.optim.accumulate
    return config.data.labeled_per_device * parts, config.data.unlabeled_per_device * parts


def scale_lr(config: Config, processes: int) -> OptimConfig:
    """``optim`` with lr scaled linearly from the reference batch to this run's, the same in every paradigm."""
    optim = config.optim
    return replace(optim, lr=optim.lr * sum(global_batch(config, processes)) / optim.reference_batch)
