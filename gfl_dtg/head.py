"""GFL's head: a classification and a box tower, shared by all levels of the pyramid.

torchvision's ``FCOSClassificationHead`` is exactly such a tower: convolutions with GroupNorm and ReLU, normal init (0.01)
and a last convolution with a prior bias. A prior of one half is a bias of zero, so it serves as the box tower too.
"""
from __future__ import annotations

from functools import partial
from math import gcd

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSClassificationHead

from gfl_dtg.config import GFLConfig


class GFLHead(nn.Module):
    """Class logits and distance bins of every anchor (GFocal's ``GFLHead``).

    Args:
        config: ``channels``, ``tower_depth``, ``reg_max``, ``prior`` and the number of ``strides`` are used.
        num_classes: C.
    """

    def __init__(self, config: GFLConfig, num_classes: int) -> None:
        super().__init__()
        # 32 groups for 256 channels, and groups of at least 8 channels for fewer: a coarse level may be a single cell.
        norm = partial(nn.GroupNorm, gcd(32, config.channels, max(config.channels // 8, 1)))
        depth, bins = config.tower_depth, 4 * (config.reg_max + 1)
        self.classification = FCOSClassificationHead(config.channels, 1, num_classes, depth, config.prior, norm)
        self.box = FCOSClassificationHead(config.channels, 1, bins, depth, 0.5, norm)
        self.scales = nn.Parameter(torch.ones(len(config.strides)))

    def forward(self, pyramid: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Predictions of the levels [N, channels, h, w], in the order of AnchorGrid (level, y, x).

        Returns:
            logits: [N, A, C].
            raw: [N, A, 4 * (reg_max + 1)] logits of the bins of the left, top, right and bottom side.
        """
        raw = [self.box([level]) * scale for level, scale in zip(pyramid, self.scales)]
        return self.classification(pyramid), torch.cat(raw, 1)
