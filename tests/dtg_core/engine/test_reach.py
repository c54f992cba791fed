from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_detector
from PIL import Image

from dtg_core.config import ViewsConfig
from dtg_core.data.findings import Report
from dtg_core.data.index import CocoIndex
from dtg_core.data.views import labeled_view
from dtg_core.engine import reach
from dtg_core.engine.reach import classes_out_of_reach, largest_sides, note_small_boxes

VIEWS = ViewsConfig(short_edge=(96, 160), long_edge=200)  # 128 px in the middle
PLAIN = ViewsConfig(short_edge=(160, 160), test_short_edge=160, flip=0.0, color=False, geometric=0.0, erase_patches=(0, 0))


def index_of(sides: dict[str, list[int]], size: int = 256) -> CocoIndex:
    """One image with a row of square boxes of each class."""
    boxes = [(10.0, 10, 10 + side, 10 + side) for row in sides.values() for side in row]
    labels = np.repeat(np.arange(len(sides)), [len(row) for row in sides.values()])
    return CocoIndex(
        Path(), ["a"], ["a.png"], np.array(((size, size),), np.int32), np.array(boxes, np.float32).reshape(-1, 4), labels,
        np.array((0, len(boxes))), np.zeros(len(boxes), bool), tuple(sides), list(range(len(sides))),
    )  # fmt: skip


def test_a_class_that_fits_no_anchor_is_told_of() -> None:
    """In a view of half the image's size, 16 px in 32 px anchors overlap by a quarter, and the RPN wants 0.3; 24 px by 0.56."""
    detector = tiny_detector("faster_rcnn")
    smallest = detector.grid((128, 128), "cpu").base_size
    tiny, fitting = round(2 * smallest * 0.5), round(2 * smallest * 0.75)
    index = index_of({"tiny": [tiny] * 4, "fitting": [fitting] * 4, "half": [tiny, fitting], "absent": []})
    (line,) = classes_out_of_reach(detector, index, VIEWS)
    assert line.startswith("class 'tiny': 4 of 4 boxes fit no anchor in a view of 128 px")
    assert f"(their side is {smallest / 2:.0f} px, the smallest anchor's {smallest:.0f})" in line
    larger = replace(VIEWS, short_edge=(192, 192))
    assert not list(classes_out_of_reach(detector, index, larger))


@pytest.mark.parametrize("change", ["crowd", "no size", "lost"])
def test_boxes_that_are_never_trained_on_say_nothing(change: str) -> None:
    """The last of under 1 px in the largest view of 160 px, which is reported by itself."""
    index = index_of({"tiny": [8] * 4})
    assert list(classes_out_of_reach(tiny_detector("faster_rcnn"), index, VIEWS))
    sizes = np.full((1, 2), 2000 if change == "lost" else 0, np.int32)
    index = replace(index, crowd=np.ones(4, bool)) if change == "crowd" else replace(index, sizes=sizes)
    assert not list(classes_out_of_reach(tiny_detector("faster_rcnn"), index, VIEWS))


def test_small_boxes_have_samples_by_atss_but_want_a_finer_level() -> None:
    """Views are half as large as the image: boxes of 15 and 17 px in cells of 8 px. A finer level, or larger views, will do."""
    index = index_of({"small": [30] * 4, "larger": [34] * 4, "half": [30, 30, 34, 34], "absent": []})
    detector = tiny_detector("gfl")
    assert detector.grid((128, 128), "cpu").strides[0] == 8
    (line,) = classes_out_of_reach(detector, index, VIEWS)
    assert line.startswith("1 class has boxes of less than 2 cells of the finest level, 16 px, in a view of 128 px: 'small' (15 px) - ")
    assert " - put 4 in front of strides, or enlarge views.short_edge, " in line
    (line,) = classes_out_of_reach(detector, index_of({name: [size] * 4 for name, size in zip("abcd", range(26, 32))}), VIEWS)
    assert line.startswith("4 classes have ")
    assert "px: 'a' (13 px), 'b' (14 px), 'c' (14 px), ... - " in line
    assert not list(classes_out_of_reach(detector, index, replace(VIEWS, short_edge=(144, 144))))
    fine = tiny_detector("gfl", strides=(4, 8, 16))
    assert not list(classes_out_of_reach(fine, index, VIEWS))
    (line,) = classes_out_of_reach(fine, index_of({"tiny": [14] * 4}), VIEWS)
    assert " - enlarge views.short_edge, " in line


def test_of_many_classes_the_most_frequent_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try is an assignment over all anchors: with a thousand classes a start would take minutes."""
    tried = []
    monkeypatch.setattr(reach, "_has_sample", lambda detector, box, size: tried.append(float(box[2] - box[0])))
    often, rare = {f"often{number}": [64] * 4 for number in range(10)}, {f"rare{number}": [32] for number in range(500)}
    lines = list(classes_out_of_reach(tiny_detector("gfl"), index_of({**rare, **often}), VIEWS))
    assert len(tried) <= reach.TRIED
    assert sum(side == 32 for side in tried) == 30  # a half-size view of 64 px: all ten frequent classes, three boxes of each
    assert sum("often" in line for line in lines) == 10


def test_lost_boxes_are_those_that_no_view_shows() -> None:
    boxes = np.array(((100, 100, 109, 400), (100, 100, 110, 400), (5, 5, 7, 7), (0, 0, 900, 9)), np.float32)
    index = CocoIndex(
        Path(), ["a", "b", "c"], ["big.png", "small.png", "unknown.png"], np.array(((1600, 1600), (100, 100), (0, 0)), np.int32),
        np.concatenate((boxes[:2], boxes[2:3], boxes[3:])), np.zeros(4, np.int64), np.array((0, 2, 3, 4)), np.zeros(4, bool),
        ("thing",), [1],
    )  # fmt: skip
    np.testing.assert_allclose(largest_sides(index, PLAIN), (0.9, 1, 3.2, np.inf), rtol=1e-6)
    note_small_boxes(index, "own.json", PLAIN, report := Report())
    assert "own.json: boxes are under 1 px in every training view" in report.lines()[0]
    assert report.lines()[0].endswith("(1: in big.png)")
    shown = labeled_view(Image.new("RGB", (1600, 1600)), *index.objects(0), PLAIN, np.random.default_rng(0)).boxes
    assert len(shown) == 1
    larger = replace(PLAIN, short_edge=(160, 320), long_edge=320)
    np.testing.assert_allclose(largest_sides(index, larger), (1.8, 2, 6.4, np.inf), rtol=1e-6)
    assert np.isinf(largest_sides(replace(index, crowd=np.ones(4, bool)), PLAIN)).all()


@pytest.mark.parametrize(("height", "told"), [(79, ["own.json: boxes, of 7 in all, are under 8 px in every training view"]), (80, [])])
def test_many_small_boxes_are_told_of(height: int, told: list[str]) -> None:
    """Up to a fifth of all may be small; the views are a tenth of the image."""
    boxes = np.array([(0, 0, 300, 70), (0, 0, 300, height)] + [(0, 0, 300, 300)] * 5, np.float32)
    zeros, starts = np.zeros(7, np.int64), np.array((0, 7))
    index = CocoIndex(Path(), ["a"], ["a.png"], np.array(((1600, 1600),), np.int32), boxes, zeros, starts, zeros > 0, ("x",), [1])
    report = Report()
    note_small_boxes(index, "own.json", PLAIN, report)
    assert [line.split(" and ")[0] for line in report.lines()] == told
    assert all(line.endswith(" (2: in a.png, in a.png)") for line in report.lines())


def test_a_class_of_small_boxes_is_told_of() -> None:
    """Though they are few among all; classes without a box, and with just half of them small, are not."""
    boxes = np.array([(0, 0, 300, 70), (0, 0, 300, 90)] + [(0, 0, 70, 300)] * 2 + [(0, 0, 300, 300)] * 30, np.float32)
    labels = np.array([0, 0, 1, 1] + [2] * 30)
    index = CocoIndex(Path(), ["a"], ["a.png"], np.array(((1600, 1600),), np.int32), boxes, labels, np.array((0, 34)), labels < 0,
                      ("cell", "mote", "car", "none"), [1, 2, 3, 4])  # fmt: skip
    report = Report()
    note_small_boxes(index, "own.json", PLAIN, report)
    (line,) = report.lines()
    assert line.startswith("own.json: classes have most of their boxes under 8 px in every training view")
    assert line.endswith("(1: mote)")


def test_crowds_are_no_boxes_of_a_class() -> None:
    """The only cell is small, though two crowds of cells are not."""
    boxes, labels = np.array([(0, 0, 300, 70)] + [(0, 0, 300, 300)] * 12, np.float32), np.array([0] * 3 + [1] * 10)
    crowd, starts = np.isin(np.arange(13), (1, 2)), np.array((0, 13))
    index = CocoIndex(Path(), ["a"], ["a.png"], np.array(((1600, 1600),), np.int32), boxes, labels, starts, crowd, ("cell", "car"), [1, 2])
    report = Report()
    note_small_boxes(index, "own.json", PLAIN, report)
    (line,) = report.lines()
    assert line.endswith("(1: cell)")
