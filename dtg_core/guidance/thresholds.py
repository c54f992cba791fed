"""Thresholds that adapt to the teacher: one per class, so that it finds as many objects per image as labelled images have.

Not in the paper, whose tau is a fixed number. A teacher's scores drift, each class at its own pace, so that a fixed tau lets
more and more in; LabelMatch (Chen et al., CVPR 2022) reads the thresholds off the scores of all unlabelled images from time to
time. Here they take a small step after each batch. Dense guidance counts clusters, sparse guidance pseudo boxes.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dtg_core.config import StageRule
from dtg_core.guidance.clustering import logit
from dtg_core.protocol import Stage

#: Bounds of the thresholds. Without them a teacher that finds too little would lower its threshold until only noise passes, and
#: one that finds too much would raise it until nothing does. A starting value may lie outside.
LOWEST, HIGHEST = 0.1, 0.99
#: Cap on the relative error, so that one crowded image cannot move a threshold too far. A lower cap would bias the thresholds of
#: classes that occur in crowds, in few images.
FLOOD = 20.0


class Thresholds:
    """Scores above which each class counts, for stages whose rule has a ``tau_rate``; initially tau or pseudo_score.

    A class that occurs in no labelled image is not expected in others, so its threshold only ever rises.

    Args:
        rules, stages: by the stages' names. objects: [C] mean objects per labelled image, by class.
        device: where the scores are kept.
    """

    def __init__(
        self, rules: Mapping[str, StageRule], stages: Mapping[str, Stage], objects: ArrayLike | Tensor,
        device: torch.device | None = None,
    ) -> None:
        wanted = torch.as_tensor(objects, dtype=torch.float32, device=device)
        self._stages: dict[str, _Followed] = {}
        for name, stage in stages.items():
            rule = rules[name]
            if rule.tau_rate == 0 or rule.paradigm == "none":
                continue
            dense = rule.paradigm == "dense"
            # A dense RPN only knows objects; pseudo boxes have their classes in every stage.
            own = wanted.sum(0, keepdim=True) if dense and stage.num_classes == 1 else wanted
            start = logit(min(max(rule.tau if dense else rule.pseudo_score, 1e-6), 1 - 1e-6))  # in float32 neither 0 nor 1
            self._stages[name] = _Followed(torch.full_like(own, start), own, start, rule.tau_rate)

    def scores(self) -> dict[str, Tensor]:
        """[C] for each such stage; [1] for an RPN that is guided densely."""
        return {name: stage.logits.sigmoid() for name, stage in self._stages.items()}

    def follow(self, found: Mapping[str, Tensor], images: int) -> None:
        """Move, in logits, by ``tau_rate`` times the error relative to the wanted number of objects, or to 1 if that is less.

        Args:
            found: [C] objects of each class that the teacher has found in ``images`` images, by stage; {} before guidance starts.
        """
        for name, count in found.items():
            self._stages[name].move(count / images)

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {name: {"start": stage.start, "logits": stage.logits.tolist()} for name, stage in self._stages.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take those of ``state`` that have the same start and number of classes; the others start anew."""
        for name, stage in self._stages.items():
            told = state.get(name)
            if told is not None and told["start"] == stage.start and len(told["logits"]) == len(stage.logits):
                stage.logits.copy_(torch.tensor(told["logits"]))


@dataclass(frozen=True)
class _Followed:
    """The thresholds of one stage, as logits [C], which are changed in place."""

    logits: Tensor
    wanted: Tensor  # [C] objects per image
    start: float  # a logit
    rate: float

    def move(self, found: Tensor) -> None:
        """Adapt to the objects of each class found per image, [C]."""
        error = (found - self.wanted) / self.wanted.clamp(min=1)
        self.logits.add_(error.clamp(max=FLOOD), alpha=self.rate)
        self.logits.clamp_(min(logit(LOWEST), self.start), max(logit(HIGHEST), self.start))


def count_classes(labels: Tensor, num_classes: int, counted: Tensor | None = None) -> Tensor:
    """[C] float32, how many of ``labels`` [M] int64 are of each class; if ``counted`` [M] bool is given, only of those."""
    ones = torch.ones_like(labels, dtype=torch.float32) if counted is None else counted.float()
    return torch.zeros(num_classes, device=labels.device).index_add_(0, labels, ones)  # bincount would wait for the device
