"""What a detector package provides to the core: stages, and a detector that runs them in order.

A stage turns samples (anchors or proposals) into predictions, assigns objects to its samples by its own rule, and says how
wrong its predictions are under an assignment. It knows nothing of teachers, paradigms or the weights of
Eqs. 1 and 6.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from dtg_core.structures import (
    AnchorGrid,
    Assignment,
    Detections,
    Predictions,
    Rows,
    Samples,
    Supervision,
    Targets,
    Unreduced,
    ViewBatch,
)

#: What ``Detector.run`` returns for each stage, by its name.
Outputs = Mapping[str, Predictions]


class Stage(Protocol):
    """One classifying and box-refining head: GFL's head, the RPN, the R-CNN."""

    num_classes: int

    def groups(self, samples: Samples, rows: Rows) -> Tensor:
        """[M] int64 group of each of M rows in the NMS of a batch: its image and class, or its image and level in an RPN."""

    def decode(self, predictions: Predictions, rows: Rows) -> Tensor:
        """[M, 4] float32 boxes, not clipped, that the stage predicts for M rows."""

    def assign(self, samples: Samples, targets: Targets, sizes: Tensor, seeds: Tensor) -> Assignment:
        """The stage's ordinary label assignment, for ground truth and for sparse pseudo boxes.

        ``sizes`` [N, 2] are the (height, width) of the unpadded views, ``seeds`` [N] decide random sampling.
        """

    def losses(self, predictions: Predictions, assignment: Assignment) -> Unreduced:
        """Losses per assigned sample and per background sample, in float32; ``Unreduced`` says where weights go."""


class Detector(nn.Module):
    """A backbone and its stages. ``detect`` returns tensors without gradients."""

    stages: Mapping[str, Stage]
    pyramid: nn.Module  # of ``dtg_core.models.backbone.build_pyramid``; an exported file tells its mean and deviation

    def grid(self, canvas: tuple[int, int], device: torch.device) -> AnchorGrid:
        """The anchors of a canvas (padded height, width)."""
        raise NotImplementedError

    def run(self, views: ViewBatch, supervision: Mapping[str, Supervision] | None = None) -> Outputs:
        """Predictions of every stage, with their samples, or, with ``supervision``, of those that it names and no others.

        A stage on proposals takes ``Supervision.proposals`` if these are given, otherwise the detector's own. If there are
        ``Supervision.targets``, it draws its training samples from these proposals; otherwise all of them are its samples.
        """
        raise NotImplementedError

    def detect(self, outputs: Outputs, views: ViewBatch, score_threshold: float) -> Detections:
        """Final boxes in the views' pixels: scores above the threshold, after the detector's NMS and limit per image."""
        raise NotImplementedError
