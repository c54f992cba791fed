"""Schedules: each is a pure function of the step, so that nothing has to be saved."""
from __future__ import annotations

from dataclasses import replace

from dtg_core.config import Config, GuidanceConfig, OptimConfig
from dtg_core.errors import counted


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


def images_of_a_step(config: Config, processes: int) -> tuple[int, int]:
    """Labelled and unlabelled images of a step over all processes and micro-batches."""
    parts = processes * config.optim.accumulate
    return config.data.labeled_per_device * parts, config.data.unlabeled_per_device * parts


def batch_remarks(config: Config, processes: int) -> list[str]:
    """A warning if a step has less than half, or more than twice, as many images as lr is meant for."""
    optim, images = config.optim, sum(images_of_a_step(config, processes))
    if optim.reference_batch / 2 <= images <= optim.reference_batch * 2:
        return []
    more, left = divmod(optim.reference_batch * optim.accumulate, images)
    same = "" if left or not more else f" or optim.accumulate={more}"
    return [f"a step has {counted(images, 'image')}, unlabelled ones included, and optim.lr is meant for {optim.reference_batch} - "
            f"add --scale-lr{same}, or set optim.reference_batch={images} if it was chosen for that"]


def scale_lr(config: Config, processes: int) -> OptimConfig:
    """``optim`` with lr scaled linearly from the reference batch to this run's, for which it is meant then; the same in every
    paradigm."""
    optim, images = config.optim, sum(images_of_a_step(config, processes))
    return replace(optim, lr=optim.lr * images / optim.reference_batch, reference_batch=images)
