"""The GFL detector: pyramid, head and final NMS."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from dtg_core.anchors import anchor_grid
from dtg_core.postprocess import best_pairs, final_boxes
from dtg_core.protocol import Detector, Outputs, Stage
from dtg_core.structures import AnchorGrid, Detections, Predictions, Supervision, ViewBatch
from gfl_dtg.config import GFLConfig
from gfl_dtg.head import GFLHead
from gfl_dtg.stage import GFLStage


class GFL(Detector):
    """Generalized Focal Loss detector, with the one stage ``head``.

    Args:
        pyramid: turns a ViewBatch into a list of L features [N, channels, ceil(H / stride), ceil(W / stride)].
        config: the detector's settings.
        num_classes: C.
    """

    def __init__(self, pyramid: nn.Module, config: GFLConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.pyramid = pyramid
        self.head = GFLHead(config, num_classes)
        self.stages: Mapping[str, Stage] = {"head": GFLStage(config, num_classes)}

    def grid(self, canvas: tuple[int, int], device: torch.device) -> AnchorGrid:
        """One square anchor at each location."""
        return anchor_grid(canvas, self.config.strides, self.config.anchor_scale, (1.0,), device)

    def run(self, views: ViewBatch, supervision: Mapping[str, Supervision] | None = None) -> Outputs:
        """Predictions of ``head``; nothing is computed when ``supervision`` does not name it."""
        if supervision is not None and "head" not in supervision:
            return {}
        logits, raw = self.head(self.pyramid(views))
        return {"head": Predictions(self.grid(views.canvas, logits.device), logits, raw)}

    @torch.no_grad()
    def detect(self, outputs: Outputs, views: ViewBatch, score_threshold: float) -> Detections:
        """Final boxes: an anchor gives one for each class above the threshold, unless its centre lies in the padding."""
        config, stage, predictions = self.config, self.stages["head"], outputs["head"]
        samples = predictions.samples
        assert isinstance(samples, AnchorGrid)
        rows, scores = best_pairs(predictions, views.sizes, config.pre_nms, score_threshold, samples.level_sizes)
        return final_boxes(stage, predictions, rows, scores, views.sizes, config.nms_iou, config.detections_per_image)
