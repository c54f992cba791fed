"""Pictures with boxes, drawn with Pillow alone: predictions, views, and what the teacher teaches.

Everything is drawn on an enlarged copy of the image, so that lines and text keep their size on images of any size.
Boxes are [D, 4] in the image's own pixels.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dtg_core.config import ViewsConfig
from dtg_core.data.index import CocoIndex
from dtg_core.data.views import View, labeled_view, strong_view, weak_view
from dtg_core.engine.explain import BOTH, DENSE_ONLY, OTHER_CLASS, SPARSE_ONLY, Difference, Explained, spearman
from dtg_core.engine.predict import ImageDetections
from dtg_core.errors import UserError
from dtg_core.structures import AnchorGrid, PairBatch, ViewBatch

Color = tuple[int, int, int]
#: Twelve colours that can be told apart on most images.
COLORS: tuple[Color, ...] = (
    (230, 25, 75), (60, 180, 75), (255, 225, 25), (67, 133, 255), (245, 130, 48), (190, 60, 220),
    (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212), (0, 150, 140), (170, 110, 40),
)  # fmt: skip
PAPER, INK, PALE = (255, 255, 255), (30, 30, 30), (130, 130, 130)
LEAST_SIDE = 480  # px; smaller images are enlarged for their predictions
TILE = 300  # px, the longer side of an image on a sheet
GAP = 10
COLUMNS = 4  # of images with predictions on a sheet
MANY = 10  # boxes in a view above which not all are named
LONGEST_LIST = 14  # members of a cluster in the picture of ranks


def color_of(number: int) -> Color:
    """The same colour for the same class or cluster."""
    return COLORS[number % len(COLORS)]


@lru_cache(maxsize=8)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu, which has most alphabets, if it is installed; otherwise Pillow's own."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


@dataclass
class Canvas:
    """An enlarged copy of an image to draw on, in the coordinates of the image."""

    image: Image.Image
    scale: float
    text_size: int = 12
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)  # by labels: x1, y1, x2, y2 on the canvas

    @staticmethod
    def of(image: Image.Image, scale: float, text_size: int = 12) -> Canvas:
        size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
        return Canvas(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), scale, text_size)

    @property
    def pen(self) -> ImageDraw.ImageDraw:
        return ImageDraw.Draw(self.image)

    def box(self, box: Sequence[float] | Tensor | np.ndarray, color: Color, width: int = 2) -> None:
        """A rectangle, with a dark rim when its line is wide."""
        x1, y1, x2, y2 = (float(value) * self.scale for value in box)
        if width > 2:
            self.pen.rectangle((x1 - 1, y1 - 1, max(x1, x2) + 1, max(y1, y2) + 1), outline=INK, width=width + 2)
        self.pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=color, width=width)

    def label(self, x: float, y: float, text: str, color: Color) -> None:
        """Text on a background of ``color`` above or below (x, y), in pixels of the canvas; inside the image, and left out where
        it would cover an earlier label."""
        left, top, right, bottom = self.pen.textbbox((0, 0), text, font=font(self.text_size))
        width, height = right - left + 6, bottom - top + 5
        x = min(max(x, 0), max(self.image.width - width, 0))
        above, below = y - height, min(y, max(self.image.height - height, 0))
        places = [(x, y, x + width, y + height) for y in (above, below) if y >= 0]
        place = next((place for place in places if not any(_meet(place, other) for other in self.taken)), None)
        if place is None:
            return
        self.taken.append(place)
        x, y = place[:2]
        self.pen.rectangle(place, fill=color)
        bright = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2] > 140
        self.pen.text((x + 3 - left, y + 2 - top), text, font=font(self.text_size), fill=INK if bright else PAPER)

    def outline(self, corners: np.ndarray, color: Color) -> None:
        """A closed line through corners [K, 2]."""
        points = [tuple(point) for point in (corners * self.scale).tolist()]
        self.pen.line([*points, points[0]], fill=color)

    def dot(self, x: float, y: float, radius: float, color: Color) -> None:
        """A disk with a dark rim; ``radius`` in pixels of the canvas."""
        x, y = x * self.scale, y * self.scale
        self.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline=INK)


def _meet(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two rectangles x1, y1, x2, y2 overlap by more than an edge."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


# Predictions -----------------------------------------------------------------------------------------------------------


def draw_found(image: Image.Image, found: ImageDetections, class_names: Sequence[str]) -> Image.Image:
    """The image with the boxes, classes and scores that were found in it, the best on top; small images are enlarged. Colour tells
    the class of a box whose label has no room."""
    scale = max(1.0, min(LEAST_SIDE / max(min(image.size), 1), 2 * LEAST_SIDE / max(image.size)))
    size = max(round(min(image.size) * scale / 45), 12)
    canvas = Canvas.of(image, scale, size)
    _draw_boxes(canvas, found, class_names, max(size // 4, 3))
    return canvas.image


def predictions_sheet(
    index: CocoIndex, rows: Sequence[int], found: Sequence[ImageDetections], class_names: Sequence[str]
) -> Image.Image:
    """Images of a data set, each with what was ``found`` in it in colours over its own labels in white; unreadable ones are left
    out."""
    tiles = []
    for row, boxes in zip(rows, found):
        try:
            image = index.image(row)
        except UserError:
            continue
        canvas = Canvas.of(image, TILE / max(image.size))
        for box in index.objects(row)[0]:
            canvas.box(box, PAPER, 3)
        _draw_boxes(canvas, boxes, class_names, 2)
        tiles.append(canvas.image)
    return sheet([tiles[start : start + COLUMNS] for start in range(0, len(tiles), COLUMNS)])


def _draw_boxes(canvas: Canvas, found: ImageDetections, class_names: Sequence[str], width: int) -> None:
    """The best boxes on top, with labels where they do not hide those of better ones."""
    rows = list(zip(found.boxes, found.scores.tolist(), found.labels.tolist()))
    for box, _, label in rows[::-1]:
        canvas.box(box, color_of(label), width)
    for box, score, label in rows:
        x, y = float(box[0]) * canvas.scale, float(box[1]) * canvas.scale
        canvas.label(x, y, f"{class_names[label]} {score:.2f}", color_of(label))


# Sheets ----------------------------------------------------------------------------------------------------------------


def sheet(rows: Sequence[Sequence[Image.Image]], header: Sequence[str] = ()) -> Image.Image:
    """Tiles in rows and columns, with a line of text above each column."""
    head = 24 if header else 0
    heights = [max(tile.height for tile in row) for row in rows]
    columns = max((len(row) for row in rows), default=0)
    widths = [max(row[column].width for row in rows if column < len(row)) for column in range(columns)]
    page = Image.new("RGB", (sum(widths) + GAP * (columns + 1), sum(heights) + GAP * (len(rows) + 1) + head), PAPER)
    pen, x = ImageDraw.Draw(page), GAP
    for column, width in enumerate(widths):
        if column < len(header):
            pen.text((x, GAP), header[column], font=font(14), fill=INK)
        y = GAP + head
        for row, height in zip(rows, heights):
            if column < len(row):
                page.paste(row[column], (x, y))
            y += height + GAP
        x += width + GAP
    return page


def views_sheet(index: CocoIndex, rows: Sequence[int], config: ViewsConfig, seed: int) -> Image.Image:
    """Labelled images as stored, and their labelled, weak and strong views with the boxes that were moved with them.

    A thin line is the stored box moved corner by corner by the view's matrix, the thick one the box that training uses.
    """
    lines = []
    for row in rows:
        image, (boxes, labels) = index.image(row), index.objects(row)
        pixels = torch.from_numpy(np.array(image).transpose(2, 0, 1))
        stored = View(pixels, torch.from_numpy(boxes), torch.from_numpy(labels), np.eye(3))
        makers = (labeled_view, weak_view, strong_view, strong_view)
        views = [stored, *(make(image, boxes, labels, config, np.random.default_rng((seed, row, number)))
                           for number, make in enumerate(makers))]  # fmt: skip
        lines.append([_view_tile(view, boxes, index.class_names) for view in views])
    return sheet(lines, ("stored", "labelled", "weak (teacher)", "strong (student)", "strong, another draw"))


def _view_tile(view: View, stored: np.ndarray, class_names: Sequence[str]) -> Image.Image:
    canvas = _tile(view.pixels)
    x1, y1, x2, y2 = stored.T.astype(np.float64)
    corners = np.stack((np.stack((x1, x2, x2, x1), 1), np.stack((y1, y1, y2, y2), 1), np.ones((len(stored), 4))), 1)
    for moved in view.view_from_image @ corners:
        canvas.outline((moved[:2] / moved[2]).T, PAPER)
    boxes, labels = view.boxes.tolist(), view.labels.tolist()
    for box, label in zip(boxes, labels):
        canvas.box(box, color_of(label), 3 if len(boxes) <= MANY else 2)
    # With many boxes, names would hide what they name: then each class is named once, and colour identifies the others.
    named = range(len(boxes)) if len(boxes) <= MANY else [labels.index(label) for label in dict.fromkeys(labels)]
    for row in named:
        x, y = boxes[row][0] * canvas.scale, boxes[row][1] * canvas.scale
        canvas.label(x, y, class_names[labels[row]], color_of(labels[row]))
    return canvas.image


def _tile(pixels: Tensor, size: Tensor | None = None) -> Canvas:
    """``pixels`` [3, H, W] uint8 without the padding behind ``size`` (height, width)."""
    if size is not None:
        height, width = (int(side) for side in size.tolist())
        pixels = pixels[:, :height, :width]
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
    return Canvas.of(image, TILE / max(image.size))


# Guidance --------------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Color, str]] = {
    BOTH: ((225, 225, 225), "in both"), DENSE_ONLY: ((60, 200, 90), "dense only"),
    SPARSE_ONLY: ((240, 50, 200), "sparse only"), OTHER_CLASS: ((255, 190, 30), "another class"),
}  # fmt: skip


def guidance_sheet(explained: Explained, pair: PairBatch, class_names: Sequence[str], images: Sequence[int]) -> Image.Image:
    """A line for each image: the teacher's clusters, what the student is told, its ranks, and what sparse guidance changes."""
    rows = []
    for image in images:
        found = explained.differences(image)
        rows.append([
            _teacher_tile(explained, pair.teacher, image, class_names), _student_tile(explained, pair.student, image),
            _rank_tile(explained, image), _difference_tile(explained, pair.student, image, found), _reason_tile(found),
        ])  # fmt: skip
    header = ("teacher: candidates by cluster", "student: targets and samples", "rank by teacher and student",
              "positive samples, dense and sparse", "")  # fmt: skip
    return sheet(rows, header)


def _cluster_colors(explained: Explained, image: int) -> dict[int, Color]:
    """{cluster of the image: its colour}, the best first."""
    candidates, clusters = explained.candidates, explained.clusters
    own = [number for number, row in enumerate(clusters.keep.tolist()) if int(candidates.image[row]) == image]
    return {number: color_of(place) for place, number in enumerate(own)}


def _teacher_tile(explained: Explained, views: ViewBatch, image: int, class_names: Sequence[str]) -> Image.Image:
    canvas, colors = _tile(views.pixels[image], views.sizes[image]), _cluster_colors(explained, image)
    candidates, clusters = explained.candidates, explained.clusters
    for row in (candidates.image == image).nonzero().flatten().tolist():
        canvas.box(candidates.box[row], colors[int(clusters.cluster[row])], 1)
    kept = [(number, int(clusters.keep[number])) for number in colors]
    for number, row in kept[::-1]:
        canvas.box(candidates.box[row], colors[number], 3)
    for number, row in kept:
        x, y = (candidates.box[row, :2] * canvas.scale).tolist()
        score = f"{float(candidates.logit[row].sigmoid()):.2f}"
        name = class_names[int(candidates.label[row])] if len(class_names) == explained.num_classes else "object"
        canvas.label(x, y, f"{name} {score}", colors[number])
    return canvas.image


def _student_tile(explained: Explained, views: ViewBatch, image: int) -> Image.Image:
    canvas, colors = _tile(views.pixels[image], views.sizes[image]), _cluster_colors(explained, image)
    dense = explained.dense
    assert dense.dense is not None
    rows = (dense.image == image).nonzero().flatten().tolist()
    for row in rows[::-1]:
        canvas.box(dense.box[row], colors[int(dense.dense.cluster[row])], 3)
    for row in rows:
        _draw_sample(canvas, explained, image, int(dense.sample[row]), colors[int(dense.dense.cluster[row])])
    return canvas.image


def _draw_sample(canvas: Canvas, explained: Explained, image: int, sample: int, color: Color) -> None:
    """An anchor is a dot at its centre, larger on coarser levels; a proposal is a thin box."""
    box = explained.samples.take(torch.tensor([image]), torch.tensor([sample]))[0].tolist()
    if isinstance(explained.samples, AnchorGrid):
        radius = 3 + 2 * int(explained.samples.level[sample])
        canvas.dot((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, radius, color)
    else:
        canvas.box(box, color, 1)


def _rank_tile(explained: Explained, image: int) -> Image.Image:
    """The members of the largest clusters, by score from the top: the teacher's order on the left, the student's on the right."""
    page = Image.new("RGB", (TILE, TILE), (247, 247, 247))
    pen, colors = ImageDraw.Draw(page), _cluster_colors(explained, image)
    dense = explained.dense.dense
    assert dense is not None
    members = {number: (dense.cluster == number).nonzero().flatten() for number in colors}
    shown = sorted((number for number in members if len(members[number]) > 1), key=lambda number: -len(members[number]))[:3]
    if not shown:
        pen.text((GAP, GAP), "no cluster of two or more", font=font(12), fill=PALE)
    width = TILE / max(len(shown), 1)
    for place, number in enumerate(shown):
        rows = members[number]
        rows = rows[dense.teacher_logit[rows].argsort(descending=True)][:LONGEST_LIST]
        teacher, student = dense.teacher_logit[rows], explained.student_logit[rows]
        order = student.argsort(descending=True).argsort().tolist()
        left, right = place * width + 26, (place + 1) * width - 26
        step = (TILE - 74) / max(len(rows) - 1, 1)
        for by_teacher, by_student in enumerate(order):
            start, end = (left, 40 + by_teacher * step), (right, 40 + by_student * step)
            pen.line((*start, *end), fill=colors[number], width=2)
            for x, y in (start, end):
                pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colors[number], outline=INK)
        pen.text((left - 20, 12), "teacher", font=font(11), fill=INK)
        pen.text((right + 20, 12), "student", font=font(11), fill=INK, anchor="ra")
        told = f"\u03c1 = {spearman(teacher, student):+.2f}"  # Spearman's rho
        pen.text(((left + right) / 2, TILE - 12), told, font=font(12), fill=INK, anchor="ms")
    return page


def _difference_tile(explained: Explained, views: ViewBatch, image: int, found: Sequence[Difference]) -> Image.Image:
    canvas = _tile(views.pixels[image], views.sizes[image])
    for box in explained.pseudo.boxes[explained.pseudo.image == image]:
        canvas.box(box, PAPER, 2)
    for kind in (BOTH, OTHER_CLASS, SPARSE_ONLY, DENSE_ONLY):
        for difference in found:
            if difference.kind == kind:
                _draw_sample(canvas, explained, image, difference.sample, KINDS[kind][0])
    return canvas.image


def _reason_tile(found: Sequence[Difference]) -> Image.Image:
    """The legend of the difference tile: how many samples of each kind, and why."""
    page = Image.new("RGB", (TILE, TILE), PAPER)
    pen, y = ImageDraw.Draw(page), 6
    for kind, (color, name) in KINDS.items():
        own = [difference for difference in found if difference.kind == kind]
        if not own and kind == OTHER_CLASS:
            continue
        pen.ellipse((4, y + 2, 16, y + 14), fill=color, outline=INK)
        pen.text((24, y), f"{len(own)} {name}", font=font(13), fill=INK)
        y += 20
        reasons = [difference.reason for difference in own if difference.reason]
        for reason in dict.fromkeys(reasons):
            pen.text((24, y), f"{reasons.count(reason)}: {reason}", font=font(11), fill=PALE)
            y += 16
        y += 6
    pen.rectangle((4, y + 3, 16, y + 13), outline=INK, width=2)
    pen.text((24, y), "pseudo box of sparse guidance", font=font(13), fill=INK)
    return page
