"""Weak, strong, labelled and test views of an image, and batches of them (Soft Teacher's recipes, used in Sec. 3.1).

    labelled = resize, flip, colour        strong (student) = resize, flip, colour and a geometric move in random order, erase
    weak (teacher) = resize, flip          test = resize

Images stay 8-bit PIL images until the end. A view knows the matrix that moved it; colour and erasing never affect it.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dtg_core.boxes import SMALLEST_SIDE, clip, project, shortest_side
from dtg_core.config import Hull, ViewsConfig
from dtg_core.data.geometry import FILL, Matrix, fitted, flip, random_move, scale, warp
from dtg_core.data.photometric import random_color
from dtg_core.structures import PairBatch, Targets, ViewBatch

CANVAS_MULTIPLE = 32  # stride of the coarsest map of a usual backbone
NO_BOXES, NO_LABELS = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)  # of an unlabelled image


@dataclass(frozen=True)
class View:
    """One image as a network sees it, before padding."""

    pixels: Tensor  # [3, height, width] uint8
    boxes: Tensor  # [G, 4] float32 in the view
    labels: Tensor  # [G] int64
    view_from_image: Matrix  # [3, 3] float64

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.pixels.shape[1], self.pixels.shape[2]


def labeled_view(
    image: Image.Image, boxes: np.ndarray, labels: np.ndarray, config: ViewsConfig, generator: np.random.Generator
) -> View:
    """Resize, flip, colour; ``boxes`` [G, 4] and ``labels`` [G] are those of the image."""
    image, matrix = _resized_and_flipped(image, config, generator)
    if config.color:
        image = random_color(image, generator)
    return _view(image, boxes, labels, matrix, config.box_hull)


def weak_view(
    image: Image.Image, boxes: np.ndarray, labels: np.ndarray, config: ViewsConfig, generator: np.random.Generator
) -> View:
    """Resize, flip: the teacher's view."""
    image, matrix = _resized_and_flipped(image, config, generator)
    return _view(image, boxes, labels, matrix, config.box_hull)


def strong_view(
    image: Image.Image, boxes: np.ndarray, labels: np.ndarray, config: ViewsConfig, generator: np.random.Generator
) -> View:
    """Resize, flip, colour and a geometric move in random order, erase: the student's view. Boxes under patches stay."""
    image, matrix = _resized_and_flipped(image, config, generator)
    color_first, moved = generator.random() < 0.5, generator.random() < config.geometric
    if config.color and color_first:
        image = random_color(image, generator)
    if moved:
        move = random_move(image.height, image.width, config, generator)
        image, matrix = warp(image, move), move @ matrix
    if config.color and not color_first:
        image = random_color(image, generator)
    view = _view(image, boxes, labels, matrix, config.box_hull)
    _erase(view.pixels, config, generator)
    return view


def test_view(image: Image.Image, boxes: np.ndarray, labels: np.ndarray, config: ViewsConfig) -> View:
    """Resize to the test size, nothing random."""
    image, matrix = _resized(image, config.test_short_edge, config.long_edge)
    return _view(image, boxes, labels, matrix, config.box_hull)


def test_canvas(height: int, width: int, config: ViewsConfig) -> tuple[int, int]:
    """(height, width) of an image's test view with its padding, if no larger one is in the batch.

    Test views should only share a batch with those of the same canvas: the rest of the canvas affects predictions through group
    normalisation and at the borders.
    """
    return canvas([fitted(height, width, config.test_short_edge, config.long_edge)])


def canvas(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The smallest (height, width) in multiples of 32 that holds views of all sizes."""
    height, width = (-(-max(side) // CANVAS_MULTIPLE) * CANVAS_MULTIPLE for side in zip(*sizes, strict=True))
    return height, width


test_view.__test__ = test_canvas.__test__ = False  # type: ignore[attr-defined]  # not tests, as pytest may think


def collate(views: Sequence[View], seeds: Sequence[int], image_ids: Sequence[Any]) -> ViewBatch:
    """Pad N views with zeros on the right and at the bottom to a common canvas whose sides are multiples of 32.

    Args:
        views: N views of any sizes.
        seeds: N, of all random draws for the images in this step.
        image_ids: N, the user's.
    """
    pixels = torch.zeros(len(views), 3, *canvas([view.size for view in views]), dtype=torch.uint8)
    for padded, view in zip(pixels, views):
        padded[:, : view.size[0], : view.size[1]] = view.pixels
    counts = torch.tensor([view.boxes.shape[0] for view in views])
    return ViewBatch(
        pixels=pixels,
        sizes=torch.tensor([view.size for view in views], dtype=torch.float32),
        targets=Targets(
            boxes=torch.cat([view.boxes for view in views]),
            labels=torch.cat([view.labels for view in views]),
            image=torch.repeat_interleave(torch.arange(len(views)), counts),
        ),
        seeds=torch.tensor(seeds, dtype=torch.int64),
        view_from_image=torch.from_numpy(np.stack([view.view_from_image for view in views])).float(),
        image_ids=tuple(image_ids),
    )


def collate_pair(
    weak: Sequence[View], strong: Sequence[View], seeds: Sequence[int], image_ids: Sequence[Any], hull: Hull = "ellipse"
) -> PairBatch:
    """Two views of the same N images, each branch padded on its own, and the matrix [N, 3, 3] from weak to strong."""
    from_image = np.stack([view.view_from_image for view in strong])
    to_image = np.linalg.inv(np.stack([view.view_from_image for view in weak]))
    return PairBatch(
        teacher=collate(weak, seeds, image_ids),
        student=collate(strong, seeds, image_ids),
        student_from_teacher=torch.from_numpy(from_image @ to_image).float(),
        hull=hull,
    )


def _resized(image: Image.Image, short_edge: int, long_edge: int) -> tuple[Image.Image, Matrix]:
    height, width = fitted(image.height, image.width, short_edge, long_edge)
    matrix = scale(width / image.width, height / image.height)  # as achieved with whole pixels, not as requested
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)  # PIL averages when it shrinks
    return image, matrix


def _resized_and_flipped(image: Image.Image, config: ViewsConfig, generator: np.random.Generator) -> tuple[Image.Image, Matrix]:
    low, high = config.short_edge
    image, matrix = _resized(image, int(generator.integers(low, high + 1)), config.long_edge)
    if generator.random() < config.flip:
        image, matrix = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), flip(image.width) @ matrix
    return image, matrix


def _view(image: Image.Image, boxes: np.ndarray, labels: np.ndarray, matrix: Matrix, hull: Hull) -> View:
    pixels = torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))
    if len(boxes) == 0:
        return View(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), matrix)
    moved = project(torch.from_numpy(boxes).double(), torch.from_numpy(matrix), hull)
    moved = clip(moved, torch.tensor((image.height, image.width), dtype=torch.float64)).float()
    kept = shortest_side(moved) >= SMALLEST_SIDE
    return View(pixels, moved[kept], torch.from_numpy(labels)[kept], matrix)


def _erase(pixels: Tensor, config: ViewsConfig, generator: np.random.Generator) -> None:
    """Cut patches out of ``pixels`` [3, height, width] in place; a patch has the view's aspect ratio, cut off at the border."""
    height, width = pixels.shape[1:]
    low, high = config.erase_patches
    for share, x, y in generator.random((int(generator.integers(low, high + 1)), 3)):
        top, left = int(y * height), int(x * width)
        side = share * config.erase_size
        pixels[:, top : top + round(side * height), left : left + round(side * width)] = FILL[0]
