"""The student: the one module that is trained, wrapped for several processes and run once per step."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from dtg_core.config import StageRule
from dtg_core.guidance.consensus import consensus_quality
from dtg_core.losses import dense_terms, ordinary_terms
from dtg_core.protocol import Detector
from dtg_core.structures import Assignment, LossName, LossTerm, Predictions, Supervision, ViewBatch


class StudentModule(nn.Module):
    """A detector with the losses of both branches.

    The labelled pass puts every parameter into the graph of every process at every step (an empty gather sums to a connected
    0), so no search for unused parameters is needed.
    """

    def __init__(self, detector: Detector, rules: Mapping[str, StageRule]) -> None:
        super().__init__()
        self.detector = detector
        self.rules = rules

    def forward(
        self, labeled: ViewBatch, unlabeled: ViewBatch | None, supervision: Mapping[str, Supervision]
    ) -> dict[LossName, LossTerm]:
        """The loss terms of a step; ``supervision`` is the teacher's, for ``unlabeled``."""
        truth = {name: Supervision(labeled.targets) for name in self.detector.stages}
        terms = loss_terms(self.detector, learn(self.detector, labeled, truth), self.rules, "labeled")
        if unlabeled is not None and supervision:
            terms |= loss_terms(self.detector, learn(self.detector, unlabeled, supervision), self.rules, "unlabeled")
        return terms


#: What a stage learns on a batch: what it predicts, and what it should predict.
Learnt = tuple[Predictions, Assignment]


def learn(detector: Detector, views: ViewBatch, supervision: Mapping[str, Supervision]) -> dict[str, Learnt]:
    """Run the stages that ``supervision`` names; objects become assignments by each stage's own rule."""
    learnt: dict[str, Learnt] = {}
    for name, predictions in detector.run(views, supervision).items():
        assignment, targets = supervision[name].assignment, supervision[name].targets
        if assignment is None:
            assert targets is not None
            with torch.autocast(views.pixels.device.type, enabled=False):
                assignment = detector.stages[name].assign(predictions.samples, targets, views.sizes, views.seeds)
        elif assignment.dense is not None and assignment.dense.members is not None:
            assignment = consensus_quality(detector.stages[name], predictions, assignment)
        learnt[name] = predictions, assignment
    return learnt


def loss_terms(
    detector: Detector, learnt: Mapping[str, Learnt], rules: Mapping[str, StageRule], branch: Literal["labeled", "unlabeled"]
) -> dict[LossName, LossTerm]:
    """The terms of what was learnt in a branch, in float32; ``rules`` matter to dense guidance only."""
    terms: dict[LossName, LossTerm] = {}
    for name, (predictions, assignment) in learnt.items():
        with torch.autocast(predictions.logits.device.type, enabled=False):
            unreduced = detector.stages[name].losses(predictions, assignment)
            dense = assignment.dense is not None
            found = dense_terms(unreduced, predictions.logits, assignment, rules[name]) if dense else ordinary_terms(unreduced)
        terms |= {LossName(branch, name, kind): term for kind, term in found.items()}
    return terms
