"""The built-in synthetic data set: drawn scenes in COCO format, a small but real detection problem.

Seven shapes in any rotation, aspect and size from 16 to 80 px on 160 px images. Texture and colour say nothing about the class;
objects overlap, leave the image and lie among lines and shapes of no class; light, blur, noise and JPEG quality vary.
Image k of a split depends on (seed, split, k) only, so a larger split starts with the images of a smaller one.
"""
from __future__ import annotations

import json
import logging
import math
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from dtg_core.drafts import writing

log = logging.getLogger(__name__)

VERSION = 2  # part of the cache folder's name: raise it when a scene changes
SIDE = 160  # of an image, px
FINE = 2  # outlines are drawn on a canvas this much finer, then averaged
SIZES = (16.0, 80.0)  # longer side of an object before rotation, px
MOST_OBJECTS = 6
CLUTTER = (0, 4)  # lines and shapes of no class on the background
CONTRAST = 170  # least difference of an object's mean colour from what it covers, summed over the channels of 0..255
TEXTURE = (8.0, 35.0)  # strength of textures, 0..255
ASPECT = 0.7  # least ratio of an object's sides
VISIBLE = 0.4  # least share of an object's pixels that later objects leave uncovered
SPLITS = ("labeled", "unlabeled", "val")


@dataclass(frozen=True)
class ShapesPaths:
    """Files of a data set on disk."""

    labeled: Path  # COCO JSON
    unlabeled: Path  # folder of images
    val: Path  # COCO JSON
    images: Path  # folder that the JSONs' file names are relative to
    unlabeled_truth: Path  # COCO JSON of the unlabelled images, for analysis only


@dataclass(frozen=True)
class Scene:
    """One image and its objects."""

    image: Image.Image
    quality: int  # of the JPEG
    boxes: list[tuple[float, float, float, float]]  # (x1, y1, x2, y2) of whole outlines, cut at the border
    labels: list[int]


# Outlines lie in -1 to 1: a polygon to fill, and one to cut out again or None.
Outline = tuple[np.ndarray, np.ndarray | None]


def _circle(radius: float) -> np.ndarray:
    angles = np.arange(48) * (2 * math.pi / 48)
    return np.stack((radius * np.cos(angles), radius * np.sin(angles)), 1)


def _rays(radii: tuple[float, ...], count: int) -> np.ndarray:
    """A polygon whose corners have the given radii in turn."""
    angles = np.arange(count) * (2 * math.pi / count) - math.pi / 2
    reach = np.resize(radii, count)
    return np.stack((reach * np.cos(angles), reach * np.sin(angles)), 1)


def _heart() -> np.ndarray:
    t = np.arange(48) * (2 * math.pi / 48)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack((np.sin(t) ** 3, -(y + 2.5) / 14.5), 1)


_BAR = 0.32
_CROSS = ((-_BAR, -1), (_BAR, -1), (_BAR, -_BAR), (1, -_BAR), (1, _BAR), (_BAR, _BAR),
          (_BAR, 1), (-_BAR, 1), (-_BAR, _BAR), (-1, _BAR), (-1, -_BAR), (-_BAR, -_BAR))  # fmt: skip

OUTLINES: dict[str, Outline] = {
    "ellipse": (_circle(1), None),
    "rectangle": (np.array(((-1, -1), (1, -1), (1, 1), (-1, 1)), np.float64) * 0.88, None),
    "triangle": (_rays((1.1,), 3), None),
    "star": (_rays((1.1, 0.45), 10), None),
    "cross": (np.array(_CROSS, np.float64), None),
    "ring": (_circle(1), _circle(0.52)),
    "heart": (_heart(), None),
}
CLASS_NAMES = tuple(OUTLINES)


def make_shapes(root: Path | None, labeled: int, unlabeled: int, val: int, seed: int = 0) -> ShapesPaths:
    """The data set on disk, drawn on first use (seconds) and kept.

    Args:
        root: folder for data sets; None: the first of $DTG_CACHE, $XDG_CACHE_HOME/dtg-ssod, ~/.cache/dtg-ssod.
        labeled: number of labelled images.
        unlabeled: number of images without labels.
        val: number of images to evaluate on.
        seed: of the scenes.

    Raises:
        UserError: the folder cannot be written.
    """
    root = _cache() if root is None else Path(root)
    folder = root / f"shapes-v{VERSION}-{labeled}-{unlabeled}-{val}-seed{seed}"
    if not folder.is_dir():
        log.info("drawing the shapes data set once into %s", folder)
        # Written next to its place and renamed, so that a stopped process leaves nothing half done and two do not mix.
        draft = root / f".{folder.name}-{uuid.uuid4().hex}"
        with writing(root, "set DTG_CACHE to a folder with room"):
            try:
                for split, count in zip(SPLITS, (labeled, unlabeled, val)):
                    _write_split(draft, split, count, seed)
                _rename(draft, folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    images = folder / "images"
    return ShapesPaths(
        folder / "labeled.json", images / "unlabeled", folder / "val.json", images, folder / "unlabeled_truth.json"
    )


def draw_scene(seed: int, split: str, number: int) -> Scene:
    """Image ``number`` of a split."""
    generator = np.random.default_rng((seed, SPLITS.index(split), number))
    canvas = _texture(SIDE, SIDE, _color(generator), generator)
    if generator.random() < 0.5:  # a second background
        edge = _filled(_halfplane(generator))
        canvas = _mixed(canvas, _texture(SIDE, SIDE, _color(generator), generator), edge)
    canvas = _clutter(canvas, int(generator.integers(CLUTTER[0], CLUTTER[1] + 1)), generator)
    boxes: list[tuple[float, float, float, float]] = []
    labels: list[int] = []
    masks: list[np.ndarray] = []  # of the whole objects
    seen: list[np.ndarray] = []  # of what later objects leave visible
    for _ in range(int(generator.integers(1, MOST_OBJECTS + 1))):
        label = int(generator.integers(len(CLASS_NAMES)))
        placed = _place(OUTLINES[CLASS_NAMES[label]], masks, seen, generator)
        if placed is None:
            continue
        alpha, box = placed
        canvas = _paint(canvas, alpha, generator)
        boxes.append(box)
        labels.append(label)
    if generator.random() < 0.5:
        canvas = _strokes(canvas, int(generator.integers(1, 4)), generator)
    image = _photograph(canvas, generator)
    return Scene(image, int(generator.integers(45, 96)), boxes, labels)


def _place(
    outline: Outline, masks: list[np.ndarray], seen: list[np.ndarray], generator: np.random.Generator
) -> tuple[np.ndarray, tuple[float, float, float, float]] | None:
    """Alpha [SIDE, SIDE] and box of an object at a free enough place, or None; updates the lists of masks."""
    for _ in range(8):
        size = generator.uniform(*SIZES)
        aspect, angle = generator.uniform(ASPECT, 1), generator.uniform(0, 2 * math.pi)
        half = size / 2 * np.array((1, aspect))
        margin = 0.2 * size  # the centre stays this far inside, so most of an object is in the image
        center = generator.uniform(margin, SIDE - margin, 2)
        turn = np.array(((math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))))
        fine = Image.new("L", (SIDE * FINE, SIDE * FINE))
        pen = ImageDraw.Draw(fine)
        for polygon, ink in zip(outline, (255, 0)):
            if polygon is not None:
                corners = (polygon * half) @ turn + center
                pen.polygon((corners * FINE - 0.5).ravel().tolist(), fill=ink)  # PIL draws from pixel centres
        extent = fine.getbbox()
        if extent is None:
            continue
        alpha = np.asarray(fine.reduce(FINE))
        mask = alpha >= 128
        left = [rest & ~mask for rest in seen]
        if all(rest.sum() >= VISIBLE * whole.sum() for rest, whole in zip(left, masks)):
            seen[:] = [*left, mask]
            masks.append(mask)
            x1, y1, x2, y2 = (edge / FINE for edge in extent)
            return alpha, (x1, y1, x2, y2)
    return None


def _paint(canvas: np.ndarray, alpha: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Fill an object with a texture whose mean colour differs from what it covers."""
    rows, columns = np.nonzero(alpha.any(1))[0], np.nonzero(alpha.any(0))[0]
    here = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    below = canvas[here].mean((0, 1))
    ink = _color(generator)
    for _ in range(10):
        if np.abs(ink - below).sum() > CONTRAST:
            break
        ink = _color(generator)
    height, width = canvas[here].shape[:2]
    texture = _texture(height, width, ink, generator)
    texture *= generator.uniform(0.75, 1.0) + 0.25 * np.linspace(0, 1, width, dtype=np.float32)[:, None]  # shading
    canvas = canvas.copy()
    canvas[here] = _mixed(canvas[here], texture, alpha[here].astype(np.float32) / 255)
    return canvas


def _color(generator: np.random.Generator) -> np.ndarray:
    """[3] float32 in 0..255."""
    return generator.uniform(20, 235, 3).astype(np.float32)


def _texture(height: int, width: int, base: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """[height, width, 3] float32 in 0..255 with a mean colour near ``base``."""
    kind = int(generator.integers(6))
    y, x = np.ogrid[0:height, 0:width]
    angle = generator.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    along, across = (x * cos + y * sin).astype(np.float32), (y * cos - x * sin).astype(np.float32)
    period = generator.uniform(5, 20)
    strength = generator.uniform(*TEXTURE)
    if kind == 0:  # plain
        field = np.zeros((height, width), np.float32)
    elif kind == 1:  # gradient
        field = (along - along.mean()) / max(float(np.ptp(along)), 1.0) * 2
    elif kind == 2:  # stripes
        field = np.clip(np.sin(along * (2 * math.pi / period)) * 3, -1, 1)
    elif kind == 3:  # checks
        field = np.clip(np.sin(along * (2 * math.pi / period)) * np.sin(across * (2 * math.pi / period)) * 6, -1, 1)
    elif kind == 4:  # fine noise
        field = generator.uniform(-1, 1, (height, width)).astype(np.float32)
    else:  # clouds
        cells = max(round(max(height, width) / period), 2)
        coarse = Image.fromarray(generator.uniform(-1, 1, (cells, cells)).astype(np.float32))
        field = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    tint = generator.uniform(-1, 1, 3) + generator.choice((-1.0, 1.0))  # mostly in brightness
    return np.clip(base + strength * field[..., None] * tint.astype(np.float32), 0, 255)


def _clutter(canvas: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Shapes of no class and lines, below all objects."""
    for _ in range(count):
        if generator.random() < 0.5:
            canvas = _strokes(canvas, 1, generator)
        else:
            mask = _filled(_blob(generator))
            canvas = _mixed(canvas, _texture(SIDE, SIDE, _color(generator), generator), mask)
    return canvas


def _blob(generator: np.random.Generator) -> np.ndarray:
    """A lumpy closed curve or a jagged polygon, unlike any class."""
    size, center = generator.uniform(6, 28), generator.uniform(0, SIDE, 2)
    if generator.random() < 0.5:
        angles = np.arange(40) * (2 * math.pi / 40)
        radii = 1 + sum(
            generator.uniform(0.15, 0.4) * np.cos(k * angles + generator.uniform(0, 2 * math.pi)) for k in (2, 3, 5)
        )
    else:
        count = int(generator.integers(6, 10))
        angles = np.sort(generator.uniform(0, 2 * math.pi, count))
        radii = generator.uniform(0.3, 1.3, count)
    stretch = generator.uniform(0.4, 1.0)
    return np.stack((radii * np.cos(angles), stretch * radii * np.sin(angles)), 1) * size + center


def _halfplane(generator: np.random.Generator) -> np.ndarray:
    """A polygon that covers one side of a random line."""
    angle, center = generator.uniform(0, 2 * math.pi), generator.uniform(0.2 * SIDE, 0.8 * SIDE, 2)
    along, across = np.array((math.cos(angle), math.sin(angle))), np.array((-math.sin(angle), math.cos(angle)))
    far = 3 * SIDE
    return center + far * np.stack((along, along + across, -along + across, -along))


def _strokes(canvas: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Long lines, arcs and rows of short strokes that look like text."""
    image = Image.fromarray(canvas.astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(count):
        ink = tuple(_color(generator).astype(int).tolist())
        kind, width = int(generator.integers(3)), int(generator.integers(1, 3))
        x, y = generator.uniform(0, SIDE, 2)
        if kind == 0:
            pen.line([(x, y), tuple(generator.uniform(0, SIDE, 2))], fill=ink, width=width)
        elif kind == 1:
            radius, start = generator.uniform(10, 50), generator.uniform(0, 360)
            bounds = (x - radius, y - radius, x + radius, y + radius)
            pen.arc(bounds, start, start + generator.uniform(30, 130), fill=ink, width=width)
        else:
            height = generator.uniform(4, 9)
            for letter in range(int(generator.integers(3, 9))):
                left = x + letter * height * 0.9
                corners = generator.uniform(0, 1, (4, 2)) * (height * 0.7, height) + (left, y)
                pen.line(corners.ravel().tolist(), fill=ink, width=1)
    return np.asarray(image).astype(np.float32)


def _photograph(canvas: np.ndarray, generator: np.random.Generator) -> Image.Image:
    """Light, blur and noise."""
    angle, slope = generator.uniform(0, 2 * math.pi), generator.uniform(0, 0.35)
    y, x = np.ogrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    light = generator.uniform(0.6, 1.2) * (1 + slope * (x * math.cos(angle) + y * math.sin(angle)))
    canvas = canvas * light[..., None].astype(np.float32)
    if generator.random() < 0.6:
        radius = generator.uniform(0.3, 1.3)
        blurred = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
        canvas = np.asarray(blurred).astype(np.float32)
    noise = generator.standard_normal(canvas.shape, dtype=np.float32) * np.float32(generator.uniform(0, 12))
    return Image.fromarray(np.clip(canvas + noise, 0, 255).astype(np.uint8))


def _filled(polygon: np.ndarray) -> np.ndarray:
    """[SIDE, SIDE] float32 in 0..1, how much of each pixel a polygon covers."""
    fine = Image.new("L", (SIDE * FINE, SIDE * FINE))
    ImageDraw.Draw(fine).polygon((polygon * FINE).ravel().tolist(), fill=255)
    return np.asarray(fine.reduce(FINE)).astype(np.float32) / 255


def _mixed(below: np.ndarray, above: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return below + (above - below) * alpha[..., None]


def _write_split(folder: Path, split: str, count: int, seed: int) -> None:
    place = folder / "images" / split
    place.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        scene = draw_scene(seed, split, number)
        name = f"{number:06d}.jpg"
        scene.image.save(place / name, quality=scene.quality)
        file_name = name if split == "unlabeled" else f"{split}/{name}"
        images.append({"id": number + 1, "file_name": file_name, "height": SIDE, "width": SIDE})
        for (x1, y1, x2, y2), label in zip(scene.boxes, scene.labels):
            annotations.append({
                "id": len(annotations) + 1, "image_id": number + 1, "category_id": label + 1, "iscrowd": 0,
                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1),
            })  # fmt: skip
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASS_NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    name = "unlabeled_truth" if split == "unlabeled" else split
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def _rename(draft: Path, folder: Path) -> None:
    try:
        os.rename(draft, folder)
    except OSError:  # another process was faster
        if not folder.is_dir():
            raise


def _cache() -> Path:
    if "DTG_CACHE" in os.environ:
        return Path(os.environ["DTG_CACHE"])
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "dtg-ssod"
