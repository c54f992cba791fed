"""Faster R-CNN (Ren et al. 2015) on a feature pyramid: pyramid -> RPN -> proposals -> R-CNN."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from dtg_core.anchors import anchor_grid
from dtg_core.postprocess import best_pairs, final_boxes
from dtg_core.protocol import Detector, Outputs, Stage
from dtg_core.structures import AnchorGrid, Detections, Predictions, Supervision, ViewBatch
from faster_rcnn_dtg.config import FasterRCNNConfig
from faster_rcnn_dtg.rcnn import RCNN, RCNNStage, sample_proposals
from faster_rcnn_dtg.rpn import RPN, RPNStage, propose


class FasterRCNN(Detector):
    """The detector. Stages: ``rpn`` on anchors, ``rcnn`` on proposals.

    Args:
        pyramid: turns a ViewBatch into a list of L maps [N, ``config.channels``, h, w], one for each of ``config.strides``.
        config: the detector's settings.
        num_classes: C.
    """

    def __init__(self, pyramid: nn.Module, config: FasterRCNNConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.pyramid = pyramid
        self.rpn = RPN(config.channels, len(config.ratios))
        self.rcnn = RCNN(config.rcnn, config.channels, config.strides, num_classes)
        self.stages: Mapping[str, Stage] = {"rpn": RPNStage(config.rpn), "rcnn": RCNNStage(config.rcnn, num_classes)}

    def grid(self, canvas: tuple[int, int], device: torch.device) -> AnchorGrid:
        """The RPN's anchors on a canvas (padded height, width)."""
        return anchor_grid(canvas, self.config.strides, self.config.anchor_scale, self.config.ratios, device)

    def run(self, views: ViewBatch, supervision: Mapping[str, Supervision] | None = None) -> Outputs:
        """Predictions of both stages or, with ``supervision``, of the stages that it names.

        The R-CNN's samples are the given proposals, otherwise the detector's own. With targets, a training subset of them
        is drawn; true boxes are only added to the detector's own proposals.
        """
        wanted = self.stages if supervision is None else supervision
        guide = supervision.get("rcnn", Supervision()) if supervision else Supervision()
        grid = self.grid(views.canvas, views.pixels.device)
        pyramid = self.pyramid(views)
        outputs: dict[str, Predictions] = {}
        proposals = guide.proposals
        if "rpn" in wanted or proposals is None:
            outputs["rpn"] = self.rpn(pyramid, grid)
        if "rcnn" in wanted:
            if proposals is None:
                proposals = propose(outputs["rpn"], views.sizes, self.config.rpn)
            if guide.targets is not None:
                add_truth = guide.proposals is None and guide.add_truth and self.config.rcnn.add_truth
                proposals = sample_proposals(proposals, guide.targets, self.config.rcnn, views.seeds, add_truth)
            outputs["rcnn"] = self.rcnn(pyramid, proposals)
        return {name: output for name, output in outputs.items() if name in wanted}

    @torch.no_grad()
    def detect(self, outputs: Outputs, views: ViewBatch, score_threshold: float) -> Detections:
        """Final boxes in the views' pixels: R-CNN scores above the threshold, class-wise NMS, the best of each image."""
        config, stage, predictions = self.config.rcnn, self.stages["rcnn"], outputs["rcnn"]
        rows, scores = best_pairs(predictions, views.sizes, config.pre_nms, score_threshold)
        return final_boxes(stage, predictions, rows, scores, views.sizes, config.nms_iou, config.detections_per_image)
