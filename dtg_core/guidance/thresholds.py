"""Thresholds that follow the teacher: one for each class, as many objects in an unlabelled image as in a labelled one.

Not in the paper, whose tau is a number. The scores of a teacher drift, and of each class at its own pace, so that a fixed tau
lets more and more in; LabelMatch (Chen et al., CVPR 2022) reads the thresholds off the scores of all unlabelled images every now
and then. Here they take a small step after each batch. Dense guidance counts clusters, sparse guidance pseudo boxes.
"""
from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dtg_core.config import StageRule
from dtg_core.protocol import Stage

#: A teacher that finds less than there is would else end in noise, and one that finds more in silence. Starts may lie beyond.
LOWEST, HIGHEST = 0.1, 0.99


class Thresholds:
    """Scores over which each class counts, of the stages whose rule has a ``tau_rate``; tau or pseudo_score at first.

    Args:
        rules: of the stages. stages: by name. objects: [C] labelled objects of an image by class, on average.
        device: of the scores.
    """

    def __init__(
        self, rules: Mapping[str, StageRule], stages: Mapping[str, Stage], objects: ArrayLike | Tensor,
        device: torch.device | None = None,
    ) -> None:
        all_wanted = torch.as_tensor(objects, dtype=torch.float32, device=device)
        self._rates: dict[str, float] = {}
        self._wanted: dict[str, Tensor] = {}
        self._logits: dict[str, Tensor] = {}
        self._bounds: dict[str, tuple[float, float]] = {}
        for name, stage in stages.items():
            rule = rules[name]
            if rule.tau_rate == 0 or rule.paradigm == "none":
                continue
            dense = rule.paradigm == "dense"
            # A dense RPN knows objects only; pseudo boxes have their classes in every stage.
            self._wanted[name] = all_wanted.sum(0, keepdim=True) if dense and stage.num_classes == 1 else all_wanted
            start = _logit(rule.tau if dense else max(rule.pseudo_score, 1e-6))
            self._logits[name] = torch.full_like(self._wanted[name], start)
            self._rates[name], self._bounds[name] = rule.tau_rate, (min(_logit(LOWEST), start), max(_logit(HIGHEST), start))

    def scores(self) -> dict[str, Tensor]:
        """[C] of each such stage; [1] of an RPN that is guided densely."""
        return {name: logits.sigmoid() for name, logits in self._logits.items()}

    def follow(self, found: Mapping[str, Tensor], images: int) -> None:
        """Move by ``tau_rate`` times the relative error, which is between -1 and 1, in logits.

        Args:
            found: [C] objects of each class that the teacher has found in ``images`` images, by stage; {} before it guides.
        """
        for name, count in found.items():
            logits, wanted = self._logits[name], self._wanted[name]
            error = (count / images - wanted) / wanted.clamp(min=1)
            logits += self._rates[name] * error.clamp(-1, 1)
            logits.clamp_(*self._bounds[name])

    def state(self) -> dict[str, list[float]]:
        """JSON values for a checkpoint."""
        return {name: logits.tolist() for name, logits in self._logits.items()}

    def restore(self, state: Mapping[str, list[float]]) -> None:
        """Take up those that ``state`` knows, as far as the classes are the same."""
        for name, logits in self._logits.items():
            if len(state.get(name, ())) == len(logits):
                logits.copy_(torch.tensor(state[name]))


def objects_over(threshold: Tensor | None, labels: Tensor, scores: Tensor) -> Tensor | None:
    """[C] float32, how many boxes of each class are over its threshold [C]; None without one.

    Args:
        threshold: see ``Thresholds.scores``. labels: [M] int64. scores: [M].
    """
    if threshold is None:
        return None
    return torch.zeros_like(threshold).index_add_(0, labels, (scores > threshold[labels]).to(threshold))


def _logit(score: float) -> float:
    return math.log(score / (1 - score))
