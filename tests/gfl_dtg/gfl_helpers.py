"""What the tests of GFL share: the reference's recorded values, a pyramid of a few weights and random objects."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtg_core.structures import Targets, Unreduced, ViewBatch

FIXTURES = Path(__file__).parents[1] / "fixtures"


def load(name: str) -> Mapping[str, np.ndarray]:
    """Recorded inputs and outputs of mmdetection."""
    return np.load(FIXTURES / f"{name}.npz")


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


class TinyPyramid(nn.Module):
    """Mean pixels of each stride's cells through one convolution per level."""

    def __init__(self, channels: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.strides = strides
        self.convs = nn.ModuleList(nn.Conv2d(3, channels, 3, padding=1) for _ in strides)

    def forward(self, views: ViewBatch) -> list[Tensor]:
        pixels = views.pixels.float() / 255 - 0.5
        maps = [F.avg_pool2d(pixels, stride, ceil_mode=True) for stride in self.strides]
        return [conv(x).relu() for conv, x in zip(self.convs, maps)]


def views_of(pixels: Tensor, targets: Targets, sizes: list[tuple[int, int]] | None = None) -> ViewBatch:
    """A batch of views that fill their canvas, or have the given (height, width)."""
    number, _, height, width = pixels.shape
    shown = torch.tensor(sizes if sizes is not None else [(height, width)] * number, dtype=torch.float32)
    return ViewBatch(pixels, shown, targets, torch.arange(number), torch.eye(3).expand(number, 3, 3))


def no_targets() -> Targets:
    return Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))


def random_targets(counts: list[int], canvas: tuple[int, int], classes: int, generator: torch.Generator) -> Targets:
    """Boxes of any place and size, ``counts`` per image; some of them share anchors."""
    image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    number = sum(counts)
    side = torch.tensor([canvas[1], canvas[0]])
    center = torch.rand(number, 2, generator=generator) * side
    half = 4 + torch.rand(number, 2, generator=generator) ** 2 * side / 2
    labels = torch.randint(classes, (number,), generator=generator)
    return Targets(torch.cat((center - half, center + half), 1), labels, image)


def reduced(unreduced: Unreduced) -> dict[str, Tensor]:
    """The core's reduction for ordinary targets in one process."""
    count = unreduced.classification_count.clamp(min=1)
    return {
        "classification": unreduced.classification.sum() / count,
        "background": unreduced.background.sum() / count,
        "box": (unreduced.box_weight * unreduced.box).sum() / unreduced.box_count.clamp(min=1),
    }
