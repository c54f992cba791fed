"""Thresholds that follow the teacher: one for each class, as many objects in an unlabelled image as in a labelled one.

Not in the paper, whose tau is a number. The scores of a teacher drift, and of each class at its own pace, so that a fixed tau
lets more and more in; LabelMatch (Chen et al., CVPR 2022) reads the thresholds off the scores of all unlabelled images every now
and then. Here they take a small step after each batch. Dense guidance counts clusters, sparse guidance pseudo boxes.
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
#: classes that occur in crowds, which few images hold.
FLOOD = 20.0


class Thresholds:
    """Scores over which each class counts, of the stages whose rule has a ``tau_rate``; tau or pseudo_score at first.

    A class that no labelled image holds is not expected in others, so its threshold rises for good.

    Args:
        rules: of the stages. stages: by name. objects: [C] labelled objects of an image by class, on average.
        device: of the scores.
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
            # A dense RPN knows objects only; pseudo boxes have their classes in every stage.
            own = wanted.sum(0, keepdim=True) if dense and stage.num_classes == 1 else wanted
            start = logit(min(max(rule.tau if dense else rule.pseudo_score, 1e-6), 1 - 1e-6))  # in float32 neither 0 nor 1
            self._stages[name] = _Followed(torch.full_like(own, start), own, start, rule.tau_rate)

    def scores(self) -> dict[str, Tensor]:
        """[C] of each such stage; [1] of an RPN that is guided densely."""
        return {name: stage.logits.sigmoid() for name, stage in self._stages.items()}

    def follow(self, found: Mapping[str, Tensor], images: int) -> None:
        """Move by ``tau_rate`` times the error relative to what is wanted, or to one object where less is, in logits.

        Args:
            found: [C] objects of each class that the teacher has found in ``images`` images, by stage; {} before it guides.
        """
        for name, count in found.items():
            self._stages[name].move(count / images)

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {name: {"start": stage.start, "logits": stage.logits.tolist()} for name, stage in self._stages.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up those of ``state`` that have started where these do, and have as many classes; the others start anew."""
        for name, stage in self._stages.items():
            told = state.get(name)
            if told is not None and told["start"] == stage.start and len(told["logits"]) == len(stage.logits):
                stage.logits.copy_(torch.tensor(told["logits"]))


@dataclass(frozen=True)
class _Followed:
    """The thresholds of one stage, as logits [C], which move in place."""

    logits: Tensor
    wanted: Tensor  # [C] objects of an image
    start: float  # a logit
    rate: float

    def move(self, found: Tensor) -> None:
        """By what has been found of each class in an image, [C]."""
        error = (found - self.wanted) / self.wanted.clamp(min=1)
        self.logits.add_(error.clamp(max=FLOOD), alpha=self.rate)
        self.logits.clamp_(min(logit(LOWEST), self.start), max(logit(HIGHEST), self.start))


def count_classes(labels: Tensor, num_classes: int, counted: Tensor | None = None) -> Tensor:
    """[C] float32, how many of ``labels`` [M] int64 are of each class; where ``counted`` [M] bool is given, of those alone."""
    ones = torch.ones_like(labels, dtype=torch.float32) if counted is None else counted.float()
    return torch.zeros(num_classes, device=labels.device).index_add_(0, labels, ones)  # bincount would wait for the device
