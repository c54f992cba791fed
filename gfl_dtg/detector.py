"""The GFL detector: pyramid, head and final NMS."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dtg_core.anchors import anchor_grid
from dtg_core.config import BackboneConfig
from dtg_core.models.backbone import build_pyramid
from dtg_core.postprocess import final_boxes
from dtg_core.protocol import Detector, Outputs, Stage
from dtg_core.structures import AnchorGrid, Detections, Predictions, Rows, Supervision, ViewBatch
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
        self.stage = GFLStage(config, num_classes)
        self.stages: Mapping[str, Stage] = {"head": self.stage}

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
        config, predictions = self.config, outputs["head"]
        rows, scores = self._best(predictions, views.sizes, score_threshold)
        return final_boxes(self.stage, predictions, rows, scores, views.sizes, config.nms_iou, config.detections_per_image)

    def _best(self, predictions: Predictions, sizes: Tensor, score_threshold: float) -> tuple[Rows, Tensor]:
        """Each level's best (anchor, class) pairs with a score above the threshold, and their scores [M]."""
        samples, num_classes = predictions.samples, self.stage.num_classes
        assert isinstance(samples, AnchorGrid)
        usable = samples.usable(sizes).split(samples.level_sizes, 1)
        chosen, pairs, start = [], [], 0
        for level, mask in zip(predictions.logits.split(samples.level_sizes, 1), usable):
            flat = level.masked_fill(~mask.unsqueeze(2), -torch.inf).flatten(1)
            best = flat.topk(min(self.config.pre_nms, flat.shape[1]), 1)
            chosen.append(best.values)
            pairs.append(best.indices + start)
            start += flat.shape[1]
        scores, pair = torch.cat(chosen, 1).float().sigmoid(), torch.cat(pairs, 1)
        # sync: the number of pairs above the threshold.
        image, column = (scores > score_threshold).nonzero(as_tuple=True)
        pair = pair[image, column]
        return Rows(image, pair // num_classes, pair % num_classes), scores[image, column]


def build(config: GFLConfig, backbone: BackboneConfig, num_classes: int) -> GFL:
    """The detector with a timm backbone and a feature pyramid whose levels above the backbone's are convolutions."""
    return GFL(build_pyramid(backbone, config.channels, config.strides, "conv"), config, num_classes)
