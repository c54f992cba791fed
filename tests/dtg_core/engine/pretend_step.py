"""Counts the host waits of one dense training step on a pretended device, with 1 and with 4 unlabelled images.

    python pretend_step.py gfl|faster_rcnn [consensus]
    python pretend_step.py gfl|faster_rcnn lacks_float64

``consensus`` turns on the options for weak teachers. ``lacks_float64`` trains and detects on a device that has no float64.

Not a test: ``test_train_step.py`` runs it in a process of its own.
"""
from __future__ import annotations

import contextlib
import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import make_pair, make_views, tiny_detector
from pretend_device import DEVICE, PretendDevice, module_to_device, to_device
from torch.utils._pytree import tree_leaves

import dtg_core.boxes
import dtg_core.guidance.clustering
from dtg_core.anchors import anchor_grid
from dtg_core.config import Config, GuidanceConfig, OptimConfig, paper_stages
from dtg_core.engine.train_step import Training, make_optimizer, train_step
from dtg_core.engine.waits import device_work
from dtg_core.guidance.thresholds import Thresholds
from dtg_core.models.student import StudentModule
from dtg_core.models.teacher import make_teacher
from dtg_core.structures import Movable, StepBatch

torch.get_device_module("pretend").get_amp_supported_dtype = lambda: [torch.bfloat16]
ROOT = Path(__file__).resolve().parents[3]
BOXES, LABELS = [[[4.0, 4, 30, 34]], [[20.0, 10, 60, 50], [2, 30, 20, 60]]], [[0], [1, 2]]


class LacksFloat64(PretendDevice):
    """Refuses float64 as Apple's GPUs do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if any(isinstance(leaf, torch.Tensor) and leaf.device == DEVICE and leaf.dtype == torch.float64 for leaf in tree_leaves(out)):
            raise TypeError(f"{func.name()}: float64 on the device")
        return out


class OneProcess:
    """What ``train_step`` needs of an Accelerator."""

    num_processes, process_index, scaler, device = 1, 0, None, DEVICE

    def autocast(self):
        return contextlib.nullcontext()

    def reduce(self, tensor, reduction):
        return tensor

    def backward(self, loss):
        loss.backward()

    def clip_grad_norm_(self, parameters, limit):
        return torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=False)

    def unwrap_model(self, model):
        return model


def moved(batch):
    """``Movable.to``, to the pretended device."""
    changed = {}
    for name, value in vars(batch).items():
        if isinstance(value, Movable):
            changed[name] = moved(value)
        elif isinstance(value, torch.Tensor):
            changed[name] = to_device(value)
    return replace(batch, **changed)


CONSENSUS = {"quality": "consensus", "consensus_rank": 0.1, "cluster_trust": True, "soft_background": True, "member_iou": 0.1,
             "member_share": 0.1, "member_tau": 0.3, "share_classes": True, "tau_rate": 1e-6, "collisions": "all"}  # fmt: skip
OPTIONS: dict[str, Any] = CONSENSUS if "consensus" in sys.argv else {}


def make_parts(name: str, images: int) -> tuple[StudentModule, Any, Config, StepBatch]:
    """A student and a teacher with candidates in every stage, and a step's batch."""
    detector = tiny_detector(name)
    with torch.no_grad():
        for key, parameter in detector.named_parameters():
            if key.endswith("bias") and parameter.min() < -2:
                parameter.fill_(0.3)
    stages = {stage: replace(rule, tau=0.5, **OPTIONS) for stage, rule in paper_stages().items()}
    guidance = GuidanceConfig(start_step=0, ramp_steps=1, stages=stages)
    config = Config(guidance=guidance, optim=OptimConfig(lr=1e-4, momentum=0.9, warmup_steps=0))
    batch = StepBatch(0, make_views(2, 64, 64, BOXES, LABELS), make_pair(images, 64, 64))
    return StudentModule(detector, stages).train(), make_teacher(detector), config, batch


def parts_of(student: StudentModule, teacher: Any, config: Config, objects: torch.Tensor) -> Training:
    thresholds = Thresholds(config.guidance.stages, student.detector.stages, objects)
    optimizer = make_optimizer(student, config.optim, OneProcess())
    return Training(config, OneProcess(), student, student, teacher, optimizer, thresholds)


def count(name: str, images: int) -> PretendDevice:
    student, teacher, config, plain = make_parts(name, images)
    twin, twin_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    with device_work() as work:  # what the benchmark counts on the CPU
        train_step(parts_of(twin, twin_teacher, config, torch.ones(3)), [plain])
    module_to_device(student)
    module_to_device(teacher)
    step = parts_of(student, teacher, config, to_device(torch.ones(3))), [moved(plain)]
    train_step(*step)  # fills the caches of anchors
    with PretendDevice() as device:
        _, figures = train_step(*step)
    assert figures["skipped"] == 0
    assert all(figures[f"guidance/{stage}/candidates"] > 0 for stage in student.detector.stages)
    assert work.waits.total() == sum(device.syncs.values()), (work.waits, device.syncs)
    anchor_grid.cache_clear()  # as after a new size of canvas
    with PretendDevice() as anew:
        train_step(*step)
    assert anew.syncs == device.syncs
    return device


def without_float64(name: str) -> None:
    """A step and detections; what they do on the CPU instead gives the CPU's numbers."""
    for module in (dtg_core.boxes, dtg_core.guidance.clustering):
        module.lacks_float64 = lambda device: device.type == DEVICE.type
    student, teacher, config, plain = make_parts(name, 2)
    views, expected = plain.labeled, make_teacher(student.detector).detect(student.detector.run(plain.labeled), plain.labeled, 0.1)
    module_to_device(student)
    module_to_device(teacher)
    training, batch = parts_of(student, teacher, config, to_device(torch.ones(3))), moved(plain)
    with LacksFloat64(), torch.no_grad():
        found = student.detector.detect(student.detector.run(batch.labeled), moved(views), 0.1)
    assert len(expected.boxes) > 0
    assert torch.equal(found.boxes.inner, expected.boxes)
    with LacksFloat64():
        _, figures = train_step(training, [batch])
    assert figures["skipped"] == 0
    assert all(figures[f"guidance/{stage}/candidates"] > 0 for stage in student.detector.stages)


if "lacks_float64" in sys.argv:
    without_float64(sys.argv[1])
    sys.exit()
for number in (1, 4):
    found = count(sys.argv[1], number)
    print(f"images {number} {sum(found.syncs.values())} host waits, {sum(found.kernels.values())} operations")
    for site, times in sorted(found.sites.items()):
        print(f"    {times} x {site.replace(f'{ROOT}/', '')}")
