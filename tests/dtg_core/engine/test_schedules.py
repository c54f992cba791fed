"""Schedules at their corners, and the learning rate scaled with the global batch."""
from __future__ import annotations

from dataclasses import replace

import pytest

from dtg_core.config import Config, DataConfig, GuidanceConfig, OptimConfig
from dtg_core.engine.schedules import batch_remarks, images_of_a_step, learning_rate, scale_lr, unlabeled_weight


def test_learning_rate() -> None:
    config = OptimConfig(lr=0.01, warmup_steps=500, milestones=(1000, 1500), gamma=0.1)
    wanted = {0: 1e-5, 250: 0.5005e-2, 499: 0.01 * (0.001 + 0.999 * 499 / 500), 500: 0.01, 999: 0.01, 1000: 1e-3, 1499: 1e-3,
              1500: 1e-4, 10**9: 1e-4}  # fmt: skip
    for step, rate in wanted.items():
        assert learning_rate(step, config) == pytest.approx(rate, rel=1e-12)
    assert learning_rate(0, replace(config, warmup_steps=0)) == 0.01


def test_unlabeled_weight() -> None:
    config = GuidanceConfig(alpha=4.0, start_step=10, ramp_steps=4)
    assert [unlabeled_weight(step, config) for step in (0, 9, 10, 11, 12, 13, 14, 999)] == [0, 0, 1, 2, 3, 4, 4, 4]
    assert unlabeled_weight(10, replace(config, ramp_steps=0)) == 4


def test_learning_rate_scales_with_the_images_of_a_step() -> None:
    """The paper's 8 processes with 1 + 4 images are the reference."""
    config = Config(data=DataConfig(labeled_per_device=1, unlabeled_per_device=4), optim=OptimConfig(lr=0.01))
    assert scale_lr(config, 8).lr == pytest.approx(0.01)
    assert scale_lr(config, 1).lr == pytest.approx(0.01 / 8)
    twice = replace(config, optim=replace(config.optim, accumulate=2))
    assert images_of_a_step(twice, 8) == (16, 64)
    assert scale_lr(twice, 8).lr == pytest.approx(0.02)


def test_a_batch_that_lr_is_not_meant_for_is_told() -> None:
    config = Config(data=DataConfig(labeled_per_device=1, unlabeled_per_device=4), optim=OptimConfig(reference_batch=40))
    assert batch_remarks(config, 8) == batch_remarks(config, 4) == batch_remarks(config, 16) == []
    assert batch_remarks(replace(config, optim=replace(config.optim, accumulate=8)), 1) == []
    told = "a step has {} images, unlabelled ones included, and optim.lr is meant for 40 - add --scale-lr{}, or set optim.reference_batch={} if it was chosen for that"
    assert batch_remarks(config, 1) == [told.format(5, " or optim.accumulate=8", 5)]
    assert batch_remarks(config, 3) == [told.format(15, "", 15)]  # no whole number of parts gives 40
    assert batch_remarks(replace(config, optim=replace(config.optim, accumulate=2)), 1) == [told.format(10, " or optim.accumulate=8", 10)]
    assert batch_remarks(config, 17) == [told.format(85, "", 85)]
    assert batch_remarks(replace(config, optim=scale_lr(config, 1)), 1) == []  # scaled once, and not again from its config.yaml
