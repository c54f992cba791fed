"""Boxes as deltas from a sample's box (Girshick et al., "Rich feature hierarchies"), with mmdetection's clamp.

torchvision's ``BoxCoder`` is not used: it clamps dw and dh on the upper side only, casts boxes to the deltas' dtype, copies
its weights to the device at each call and divides by the side of a zero-size box.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

Stds = tuple[float, float, float, float]

MAX_LOG_SCALE = abs(math.log(16 / 1000))  # a side grows or shrinks by 62.5 times at most
TINY_SIDE = 1e-3  # pixels; keeps the quotients of degenerate boxes finite


def _center_size(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.float().unbind(-1)
    return (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1).clamp(min=TINY_SIDE), (y2 - y1).clamp(min=TINY_SIDE)


def encode(samples: Tensor, boxes: Tensor, stds: Stds = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Deltas [..., 4] (dx, dy, dw, dh) / stds in float32 that move samples [..., 4] onto boxes [..., 4]."""
    x, y, width, height = _center_size(samples)
    to_x, to_y, to_width, to_height = _center_size(boxes)
    deltas = ((to_x - x) / width, (to_y - y) / height, (to_width / width).log(), (to_height / height).log())
    return torch.stack([delta / std for delta, std in zip(deltas, stds)], -1)


def decode(samples: Tensor, deltas: Tensor, stds: Stds = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Boxes [..., 4] in float32, not clipped, that deltas [..., 4] make of samples [..., 4]; inverse of ``encode``."""
    x, y, width, height = _center_size(samples)
    dx, dy, dw, dh = (delta * std for delta, std in zip(deltas.float().unbind(-1), stds))
    x, y = x + dx * width, y + dy * height
    half_width = width * dw.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp() / 2
    half_height = height * dh.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp() / 2
    return torch.stack((x - half_width, y - half_height, x + half_width, y + half_height), -1)
