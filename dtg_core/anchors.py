"""Anchor grids: one function from a canvas to all of its anchors, in float32, with explicit strides.

torchvision's ``AnchorGenerator`` derives strides by integer division of the image size, rounds its anchors to whole pixels
and takes the features' dtype; each of these moves anchors, so the few lines are written here.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch
from torch import Tensor

from dtg_core.structures import AnchorGrid

Made = TypeVar("Made", Tensor, AnchorGrid)


def cached(most: int) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    """``lru_cache`` for tensors: none of a graph that is being traced, which are no numbers; all can be used in training."""
    def decorate(make: Callable[..., Made]) -> Callable[..., Made]:
        stored = lru_cache(most)(torch.inference_mode(False)(make))

        @wraps(make)
        def found(*given: object) -> Made:
            return make(*given) if torch.compiler.is_compiling() else stored(*given)

        found.cache_clear = stored.cache_clear  # type: ignore[attr-defined]
        return found

    return decorate


def cell_anchors(size: float, ratios: tuple[float, ...]) -> Tensor:
    """[R, 4] anchors of area ``size``^2 centred at (0, 0); a ratio is height / width (mmdetection's AnchorGenerator)."""
    root = torch.tensor(ratios, dtype=torch.float64).sqrt()
    half_height, half_width = size * root / 2, size / root / 2
    return torch.stack((-half_width, -half_height, half_width, half_height), 1).float()


@cached(32)
def _cells(size: float, ratios: tuple[float, ...], device: torch.device) -> Tensor:
    """``cell_anchors`` on the device: the only numbers that a grid takes from the host, once per run."""
    return cell_anchors(size, ratios).to(device)


# Holds the views of a few steps. Training with random sizes sees hundreds of canvases, so a grid has to be cheap to make: the host
# only launches its kernels.
@cached(8)
def anchor_grid(
    canvas: tuple[int, int], strides: tuple[int, ...], scale: float, ratios: tuple[float, ...], device: torch.device
) -> AnchorGrid:
    """The anchors of one canvas.

    Args:
        canvas: padded (height, width); a level has ceil(height / stride) rows.
        strides: of the levels, finest first, each twice the one before (the level rule of Sec. 3.2 counts octaves).
        scale: side of a level's square anchor in units of its stride.
        ratios: height / width of the anchors at each location.
        device: where the tensors are made.

    Returns:
        AnchorGrid whose anchor of ratio r at row y, column x of a level has its centre at (x, y) * stride.
    """
    height, width = canvas
    shapes = tuple((-(-height // stride), -(-width // stride)) for stride in strides)
    cells = tuple(_cells(scale * stride, ratios, device) for stride in strides)
    levels = []
    for (rows, columns), stride, cell in zip(shapes, strides, cells):
        places = (torch.arange(count, device=device) * stride for count in (rows, columns))
        y, x = torch.meshgrid(*places, indexing="ij")
        shifts = torch.stack((x, y, x, y), -1).reshape(-1, 1, 4)
        levels.append((shifts + cell).reshape(-1, 4))
    return AnchorGrid(torch.cat(levels), cells, shapes, strides, float(scale * strides[0]))
