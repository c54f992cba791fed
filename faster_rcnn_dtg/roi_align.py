"""RoIAlign (He et al. 2017): torchvision's, except for gradients on the CPU, where its kernel is slow.

A bin is a weighted sum of pixels, four for each of its sampling points, which is what an embedding bag computes.
"""
from __future__ import annotations

import torch
import torchvision
from torch import Tensor
from torch.nn.functional import embedding_bag


def roi_align(features: Tensor, rois: Tensor, size: int, scale: float, sampling_ratio: int) -> Tensor:
    """[R, channels, size, size] float32, ``torchvision.ops.roi_align`` with ``aligned=True``.

    Args:
        features: [N, channels, h, w] float32 map.
        rois: [R, 5] float32: image, then x1, y1, x2, y2 in the view's pixels.
        size: bins per side.
        scale: map pixels per pixel of the view.
        sampling_ratio: sampling points per side of a bin; 0: as many as there are pixels.
    """
    if features.device.type == "cpu" and features.requires_grad and sampling_ratio > 0:
        return bag_roi_align(features, rois, size, scale, sampling_ratio)
    return torchvision.ops.roi_align(features, rois, size, scale, sampling_ratio, aligned=True)


def bag_roi_align(features: Tensor, rois: Tensor, size: int, scale: float, sampling_ratio: int) -> Tensor:
    """The same, as a bag of pixels for each bin, so that the gradient adds whole pixels, not channel by channel."""
    _, channels, height, width = features.shape
    x1, y1, x2, y2 = (rois[:, 1:] * scale - 0.5).unbind(1)
    points = (torch.arange(size * sampling_ratio, device=rois.device) + 0.5) / (size * sampling_ratio)
    row, row_weight = _interpolation(y1, y2, points, height)
    column, column_weight = _interpolation(x1, x2, points, width)
    pixel = (rois[:, :1].long() * height + row).unsqueeze(2) * width + column.unsqueeze(1)  # [R, S * 2, S * 2]
    weight = row_weight.unsqueeze(2) * column_weight.unsqueeze(1) / sampling_ratio**2

    def bags(values: Tensor) -> Tensor:
        """[R * size * size, (2 * sampling_ratio) ** 2], a row for each bin."""
        bins = values.unflatten(2, (size, -1)).unflatten(1, (size, -1))  # [R, size, 2 * ratio, size, 2 * ratio]
        return bins.transpose(2, 3).flatten(3).flatten(0, 2)

    pixels = features.permute(0, 2, 3, 1).reshape(-1, channels)
    pooled = embedding_bag(bags(pixel), pixels, per_sample_weights=bags(weight), mode="sum")
    return pooled.view(-1, size, size, channels).permute(0, 3, 1, 2)


def _interpolation(low: Tensor, high: Tensor, points: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Pixels [R, S * 2] on both sides of each sampling point along one axis, and their weights; 0 beyond the map.

    Args:
        low, high: [R] sides of the boxes in map pixels, the first pixel's centre at 0.
        points: [S] positions in (0, 1) along the side.
        length: of the map.
    """
    place = low.unsqueeze(1) + (high - low).unsqueeze(1) * points
    inside = (place >= -1) & (place <= length)  # torchvision's tolerance of one pixel
    place = place.clamp(0, length - 1)
    first = place.floor()
    share = place - first
    pixel = torch.stack((first, (first + 1).clamp(max=length - 1)), 2).long()
    weight = torch.stack((1 - share, share), 2) * inside.unsqueeze(2)
    return pixel.flatten(1), weight.flatten(1)
