"""Soft Teacher's nine colour operations (ssod/datasets/pipelines/rand_aug.py). None of them moves a pixel."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAGNITUDES = 9  # drawn from 1 to this


def _factor(magnitude: int) -> float:
    """Enhancement factor 0.28 to 1.72; below 1 less, above 1 more."""
    return 0.18 * magnitude + 0.1


def identity(image: Image.Image, magnitude: int) -> Image.Image:
    return image


def autocontrast(image: Image.Image, magnitude: int) -> Image.Image:
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image, magnitude: int) -> Image.Image:
    return ImageOps.equalize(image)


def solarize(image: Image.Image, magnitude: int) -> Image.Image:
    return ImageOps.solarize(image, min(int(25.6 * magnitude), 255))


def color(image: Image.Image, magnitude: int) -> Image.Image:
    return ImageEnhance.Color(image).enhance(_factor(magnitude))


def contrast(image: Image.Image, magnitude: int) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(_factor(magnitude))


def brightness(image: Image.Image, magnitude: int) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(_factor(magnitude))


def sharpness(image: Image.Image, magnitude: int) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(_factor(magnitude))


def posterize(image: Image.Image, magnitude: int) -> Image.Image:
    return ImageOps.posterize(image, 4 - int(0.4 * magnitude))


OPERATIONS: tuple[Callable[[Image.Image, int], Image.Image], ...] = (
    identity, autocontrast, equalize, solarize, color, contrast, brightness, sharpness, posterize,
)  # fmt: skip


def random_color(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """One of the nine, equally likely, with a magnitude of 1 to 9; never changes its input."""
    which, magnitude = generator.integers(len(OPERATIONS)), generator.integers(1, MAGNITUDES + 1)
    return OPERATIONS[which](image, int(magnitude))
