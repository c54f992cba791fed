"""The student: the one module that is trained, wrapped for several processes and run once per step."""
from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from dtg_core.config import StageRule
from dtg_core.losses import dense_terms, ordinary_terms
from dtg_core.protocol import Detector
from dtg_core.structures import LossTerm, Supervision, ViewBatch


class StudentModule(nn.Module):
    """A detector with the losses of both branches.

    The labelled pass puts every parameter into the graph of every process at every step (an empty gather sums to a connected
    0), so no search for unused parameters is needed.
    """

    def __init__(self, detector: nn.Module, rules: Mapping[str, StageRule]) -> None:
        super().__init__()
        self.detector = detector
        self.rules = rules

    def forward(
        self, labeled: ViewBatch, unlabeled: ViewBatch | None, supervision: Mapping[str, Supervision]
    ) -> dict[str, LossTerm]:
        """Loss terms by name; ``supervision`` is the teacher's, for ``unlabeled``."""
        detector = cast(Detector, self.detector)
        truth = {name: Supervision(labeled.targets) for name in detector.stages}
        terms = self._branch("labeled", labeled, truth)
        if unlabeled is not None and supervision:
            terms |= self._branch("unlabeled", unlabeled, supervision)
        return terms

    def _branch(self, branch: str, views: ViewBatch, supervision: Mapping[str, Supervision]) -> dict[str, LossTerm]:
        detector = cast(Detector, self.detector)
        terms: dict[str, LossTerm] = {}
        for name, (samples, predictions) in detector.run(views, supervision).items():
            stage, told = detector.stages[name], supervision[name]
            with torch.autocast(views.pixels.device.type, enabled=False):
                if told.assignment is not None:
                    unreduced = stage.losses(samples, predictions, told.assignment)
                    found = dense_terms(unreduced, predictions, told.assignment, self.rules[name])
                else:
                    assert told.targets is not None
                    assignment = stage.assign(samples, told.targets, views.sizes, views.seeds)
                    found = ordinary_terms(stage.losses(samples, predictions, assignment))
            terms |= {f"{branch}/{name}/{kind}": term for kind, term in found.items()}
        return terms
