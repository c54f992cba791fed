"""Moves of an image as 3x3 matrices, and the one warp that applies them.

A matrix maps (x, y, 1) of the image before to the image after, in the edge convention: pixel 0 spans 0 to 1, so a flip is
x -> width - x. Later moves are multiplied from the left. Operations and limits are Soft Teacher's
(ssod/datasets/pipelines/rand_aug.py and geo_utils.py, without its mistaken vertical flip).
"""
from __future__ import annotations

import math

import numpy as np
from PIL import Image

from dtg_core.config import ViewsConfig

Matrix = np.ndarray  # [3, 3] float64

FILL = (125, 125, 125)  # colour of pixels that come from outside the image, and of erased patches


def scale(x: float, y: float) -> Matrix:
    """Stretch by x and y."""
    return np.diag((x, y, 1.0))


def shift(x: float, y: float) -> Matrix:
    """Move by x and y pixels."""
    return np.array(((1, 0, x), (0, 1, y), (0, 0, 1)), np.float64)


def flip(width: float) -> Matrix:
    """Mirror left and right."""
    return np.array(((-1, 0, width), (0, 1, 0), (0, 0, 1)), np.float64)


def rotation(degrees: float, height: float, width: float) -> Matrix:
    """Turn clockwise about the centre of the image."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = np.array(((cos, -sin, 0), (sin, cos, 0), (0, 0, 1)), np.float64)
    return shift(width / 2, height / 2) @ turn @ shift(-width / 2, -height / 2)


def shear(degrees_x: float, degrees_y: float) -> Matrix:
    """Shear along x, then along y, about the top left corner, by Soft Teacher's factors tanh(angle in radians)."""
    along_x = np.array(((1, math.tanh(math.radians(degrees_x)), 0), (0, 1, 0), (0, 0, 1)), np.float64)
    along_y = np.array(((1, 0, 0), (math.tanh(math.radians(degrees_y)), 1, 0), (0, 0, 1)), np.float64)
    return along_y @ along_x


def fitted(height: int, width: int, short_edge: int, long_edge: int) -> tuple[int, int]:
    """(height, width) of an image scaled so that its sides reach one of the two limits and exceed neither."""
    factor = min(short_edge / min(height, width), long_edge / max(height, width))
    return max(round(height * factor), 1), max(round(width * factor), 1)


def random_move(height: int, width: int, config: ViewsConfig, generator: np.random.Generator) -> Matrix:
    """One of: shift along x, shift along y, rotation, shear; all equally likely."""
    which = generator.integers(4)
    first, second = generator.uniform(-1, 1, 2)
    if which == 0:
        return shift(first * config.translate * width, 0)
    if which == 1:
        return shift(0, first * config.translate * height)
    if which == 2:
        return rotation(first * config.rotate, height, width)
    return shear(first * config.shear, second * config.shear)


def warp(image: Image.Image, matrix: Matrix) -> Image.Image:
    """Apply a matrix on a canvas of the same size, bilinear, with ``FILL`` outside."""
    inverse = np.linalg.inv(matrix)[:2].ravel().tolist()  # PIL asks where a pixel comes from, in the edge convention
    return image.transform(image.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR, fillcolor=FILL)
