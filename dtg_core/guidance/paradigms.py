"""Paradigms: how teacher predictions become supervision for a stage of the student.

``dense``: correspondence, clusters, inverse NMS (the paper's dense-to-dense). ``sparse``: pseudo boxes (sparse-to-dense).
``none``: the stage learns nothing from unlabelled images. Each stage has its own, so Tables 2(a) and 2(c) are just settings.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dtg_core.config import StageRule
from dtg_core.guidance.dense import dense_supervision
from dtg_core.guidance.sparse import sparse_supervision
from dtg_core.guidance.thresholds import LOWEST
from dtg_core.protocol import Detector
from dtg_core.structures import Figures, PairBatch, Supervision


@torch.no_grad()
def teach(
    teacher: Detector, pair: PairBatch, rules: Mapping[str, StageRule],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    thresholds: Mapping[str, Tensor] = {},
) -> tuple[dict[str, Supervision], Figures]:
    """The teacher's pass over its weak views, and what each stage of the student learns from it.

    Args:
        teacher: detector in evaluation mode. pair: weak and strong views. rules: how each stage is guided, by stage name.
        autocast: makes a context with the networks' precision; guidance is float32.
        thresholds: per-class scores [C] of the stages that have them, see ``Thresholds``; the others use tau or pseudo_score.

    Returns:
        (supervision of the guided stages, in the student's view; figures ``guidance/<stage>/<name>``).
    """
    guided = {name: rules[name] for name in teacher.stages if rules[name].paradigm != "none"}
    sparse = [name for name, rule in guided.items() if rule.paradigm == "sparse"]
    with autocast():  # final boxes need all stages
        outputs = teacher.run(pair.teacher, None if sparse else dict.fromkeys(guided, Supervision()))
    grid = teacher.grid(pair.student.canvas, pair.student.pixels.device)
    detections = None
    if sparse:
        lowest = min(rules[name].pseudo_score for name in sparse)
        lowest = min(lowest, LOWEST) if thresholds.keys() & sparse else lowest  # reading the thresholds would wait
        detections = teacher.detect(outputs, pair.teacher, lowest)
    supervision: dict[str, Supervision] = {}
    figures: Figures = {}
    for name, rule in guided.items():
        stage, predictions, threshold = teacher.stages[name], outputs[name], thresholds.get(name)
        if rule.paradigm == "dense":
            supervision[name], told = dense_supervision(stage, predictions, grid, pair, rule, threshold)
        else:
            assert detections is not None
            supervision[name], told = sparse_supervision(detections, predictions.samples, grid, pair, rule, threshold)
        figures |= {f"guidance/{name}/{key}": value for key, value in told.items()}
    return supervision, figures
