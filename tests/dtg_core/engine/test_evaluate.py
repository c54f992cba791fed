"""Evaluation equals pycocotools on clean data, and is right or refuses where pycocotools is silently wrong."""

from __future__ import annotations

import contextlib
import io
import json
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_views
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from dtg_core.data.coco import load_coco
from dtg_core.data.index import CocoIndex
from dtg_core.engine.evaluate import (
    FIGURES,
    SetDetections,
    coco_metrics,
    coco_results,
    find,
    format_metrics,
    metrics_and_curves,
    unseen,
)
from dtg_core.errors import UserError
from dtg_core.structures import Detections, ViewBatch


def index_of(sizes: list[tuple[int, int]], boxes: Any, labels: Any, image: Any, crowd: Any, classes: int = 3) -> CocoIndex:
    """An index with odd ids: images 100, 107, ..., categories 9, 8, 7, ..."""
    counts = np.bincount(np.asarray(image, np.int64), minlength=len(sizes))
    return CocoIndex(
        Path(),
        [100 + 7 * row for row in range(len(sizes))],
        [f"{row}.png" for row in range(len(sizes))],
        np.array(sizes, np.int32),
        np.asarray(boxes, np.float32).reshape(-1, 4),
        np.asarray(labels, np.int64),
        np.concatenate(([0], counts.cumsum())).astype(np.int64),
        np.asarray(crowd, bool),
        tuple("abcdefgh"[:classes]),
        [9 - label for label in range(classes)],
    )


def random_case(seed: int, images: int = 6, classes: int = 3) -> tuple[CocoIndex, SetDetections]:
    rng = np.random.default_rng(seed)
    sizes = [(int(rng.integers(60, 300)), int(rng.integers(60, 300))) for _ in range(images)]
    image = np.sort(rng.integers(0, images, 14))
    corner = rng.uniform(0, 40, (14, 2)).round(1)
    boxes = np.concatenate((corner, corner + rng.uniform(3, 160, (14, 2)).round(1)), 1)
    labels, crowd = rng.integers(0, classes, 14), rng.random(14) < 0.15
    index = index_of(sizes, boxes, labels, image, crowd, classes)
    picked = rng.integers(0, 14, 60)
    moved = index.boxes[picked].astype(np.float64) + rng.normal(0, 4, (60, 4)) * (rng.random((60, 1)) < 0.8)
    moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
    wrong = rng.random(60) < 0.2
    rows = np.column_stack(
        (
            moved,
            rng.random(60).round(1 + seed % 2),
            np.where(wrong, rng.integers(0, classes, 60), labels[picked]),
            image[picked],
        )
    )
    return index, SetDetections([np.arange(images)], [rows])


def reference(index: CocoIndex, found: SetDetections) -> COCOeval:
    """pycocotools by its own front door, with the data set's ids."""
    starts = index.box_start
    annotations: list[dict[str, Any]] = []
    for row, image_id in enumerate(index.image_ids):
        for box in range(starts[row], starts[row + 1]):
            x1, y1, x2, y2 = index.boxes[box].astype(float).tolist()
            annotations.append(
                {
                    "id": 1000 + box,
                    "image_id": image_id,
                    "category_id": index.category_ids[index.labels[box]],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": int(index.crowd[box]),
                }
            )
    results = [
        {
            "image_id": index.image_ids[int(image)],
            "category_id": index.category_ids[int(label)],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for x1, y1, x2, y2, score, label, image in found.merged()[1].tolist()
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": number} for number in index.image_ids],
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for number, name in zip(index.category_ids, index.class_names)],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", range(25))
def test_equals_pycocotools(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    index, found = random_case(seed)
    metrics, wanted = coco_metrics(index, found), reference(index, found)
    for name, value in zip(FIGURES, wanted.stats):
        assert metrics[name] == (None if value < 0 else pytest.approx(100 * value, abs=1e-9))
    for label, name in enumerate(index.class_names):
        precision = wanted.eval["precision"][:, :, sorted(index.category_ids).index(index.category_ids[label]), 0, 2]
        mean = precision[precision > -1].mean() if (precision > -1).any() else None
        assert metrics["classes"][name] == (None if mean is None else pytest.approx(100 * mean, abs=1e-9))
    assert capsys.readouterr().out == ""
    assert metrics["AP"] > 1  # the case says something
    assert "AP75" in format_metrics(metrics)


def test_faster_coco_eval_agrees() -> None:
    pytest.importorskip("faster_coco_eval")
    for seed in range(5):
        index, found = random_case(seed)
        first, second = coco_metrics(index, found, faster=False), coco_metrics(index, found)
        for name in FIGURES:
            assert first[name] == (None if second[name] is None else pytest.approx(second[name], abs=1e-9))


def perfect() -> tuple[CocoIndex, SetDetections]:
    """Three objects of two classes in three images, the last of which is empty, and exactly these detections."""
    boxes = [[10, 10, 50, 60], [5, 5, 25, 25], [30, 8, 130, 130]]
    index = index_of([(200, 200)] * 3, boxes, [0, 1, 0], [0, 0, 1], [False] * 3)
    rows = np.column_stack((index.boxes, [0.9, 0.8, 0.7], index.labels, [0, 0, 1])).astype(np.float64)
    return index, SetDetections([np.arange(3)], [rows])


@pytest.mark.parametrize("faster", [False, True])
def test_images_that_were_not_seen_do_not_count(faster: bool) -> None:
    """Else each object of a file that cannot be read would be one that the detector has missed."""
    if faster:
        pytest.importorskip("faster_coco_eval")
    index, found = perfect()
    (rows,) = found.rows
    seen = np.array([0, 2])
    part = SetDetections([seen], [rows[np.isin(rows[:, 6], seen)]])
    assert coco_metrics(index, part, faster)["AP"] == pytest.approx(100)
    assert unseen(index, part) == [index.file_names[1]]
    assert unseen(index, found) == []


def test_perfect_and_empty() -> None:
    index, found = perfect()
    metrics = coco_metrics(index, found)
    assert metrics["AP"] == metrics["AP75"] == metrics["AR100"] == pytest.approx(100)
    assert metrics["classes"] == {"a": pytest.approx(100), "b": pytest.approx(100), "c": None}
    assert metrics["APs"] == pytest.approx(100)

    nothing = coco_metrics(index, SetDetections([np.arange(3)], []))
    assert nothing["AP"] == nothing["AR100"] == 0
    assert coco_results(index, SetDetections()) == []
    assert coco_metrics(index, SetDetections())["AP"] is None  # no image was seen

    no_truth = index_of([(200, 200)] * 3, [], [], [], [])
    metrics = coco_metrics(no_truth, found)
    assert [metrics[name] for name in FIGURES] == [None] * 12
    assert format_metrics(metrics).count("-") == 15


def test_results_carry_the_data_sets_ids() -> None:
    index, found = perfect()
    index = replace(index, image_ids=["x", "y", "z"], category_ids=[40, 2, 3])
    results = json.loads(json.dumps(coco_results(index, found)))
    assert results[1] == {"image_id": "x", "category_id": 2, "bbox": [5.0, 5.0, 20.0, 20.0], "score": 0.8}
    assert [row["category_id"] for row in results] == [40, 2, 40]


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        (4, np.nan, "not finite"),
        (0, np.nan, "not finite"),
        (2, np.inf, "not finite"),
        (5, 3, "unknown class"),
        (5, -1, "unknown class"),
        (5, 0.5, "unknown class"),
        (6, 3, "unknown image"),
        (6, -1, "unknown image"),
        (2, 0, "negative side"),
    ],
)
def test_impossible_detections_are_refused(column: int, value: float, problem: str) -> None:
    index, found = perfect()
    found.rows[0][1, column] = value
    with pytest.raises(ValueError, match=problem):
        coco_metrics(index, found)


def test_images_counted_twice_are_refused() -> None:
    index, found = perfect()
    twice = SetDetections(found.seen * 2, found.rows * 2)  # two processes that saw the same images
    with pytest.raises(ValueError, match="twice"):
        coco_metrics(index, twice)


# Faulty annotation files: the clean figure or an error --------------------------------------------------------------------


def clean_json() -> dict[str, Any]:
    return {
        "images": [{"id": number, "file_name": f"{number}.png", "width": 200, "height": 200} for number in (1, 2, 3)],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {
                "id": number,
                "image_id": number,
                "category_id": 1 + number % 2,
                "bbox": [10, 10, 40 * number, 50],
                "area": 2000 * number,
                "iscrowd": 0,
            }
            for number in (1, 2, 3)
        ],
    }


def each(change: Callable[[dict[str, Any]], None], key: str = "annotations") -> Callable[[dict[str, Any]], None]:
    def apply(content: dict[str, Any]) -> None:
        for entry in content[key]:
            change(entry)

    return apply


def one_more(**change: Any) -> Callable[[dict[str, Any]], None]:
    """A further annotation that differs from the first one so."""
    return lambda content: content["annotations"].append({**content["annotations"][0], "id": 9, **change})


def spread_category_ids(content: dict[str, Any]) -> None:
    each(lambda entry: entry.update(id=50 * entry["id"]), "categories")(content)
    each(lambda entry: entry.update(category_id=50 * entry["category_id"]))(content)


#: Changes of ``clean_json``, and whether the file is refused then.
FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None], bool]] = {
    "clean": (lambda content: None, False),
    "annotation ids from 0": (each(lambda entry: entry.update(id=entry["id"] - 1)), False),
    "one annotation id": (each(lambda entry: entry.update(id=7)), False),
    "no annotation id": (each(lambda entry: entry.pop("id")), False),
    "image ids as text in annotations": (each(lambda entry: entry.update(image_id=str(entry["image_id"]))), True),
    "no area": (each(lambda entry: entry.pop("area")), False),
    "huge area": (each(lambda entry: entry.update(area=1e12)), False),
    "zero area": (each(lambda entry: entry.update(area=0)), False),
    "no iscrowd": (each(lambda entry: entry.pop("iscrowd")), False),
    "unknown image": (one_more(image_id=99), True),
    "unknown category": (one_more(category_id=99), True),
    "negative width": (one_more(bbox=[9, 9, -5, 5]), True),
    "three numbers": (one_more(bbox=[9, 9, 5]), True),
    "no number": (one_more(bbox=[]), True),
    "category id as text": (each(lambda entry: entry.update(category_id=str(entry["category_id"]))), True),
    "duplicate image id": (each(lambda entry: entry.update(id=1), "images"), True),
    "category ids with gaps": (spread_category_ids, False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_annotations_give_the_clean_figure_or_an_error(tmp_path: Path, fault: str) -> None:
    for number in (1, 2, 3):
        Image.new("RGB", (200, 200)).save(tmp_path / f"{number}.png")
    content, (change, refused) = clean_json(), FAULTS[fault]
    change(content)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    if refused:
        with pytest.raises(UserError, match=re.escape(str(path))):
            load_coco(path)
        return
    index = load_coco(path)
    rows = [[10, 10, 10 + 40 * number, 60, 0.5 + number / 10, number % 2, number - 1] for number in (1, 2, 3)]
    metrics = coco_metrics(index, SetDetections([np.arange(3)], [np.array(rows, np.float64)]))
    assert metrics["AP"] == pytest.approx(100)
    assert metrics["APm"] == pytest.approx(100)  # areas of 2000 to 6000 px, whatever the file says
    assert metrics["APs"] is metrics["APl"] is None


# Running a detector -------------------------------------------------------------------------------------------------------


class Scripted(nn.Module):
    """Detects given boxes of stored images, moved to each view; the network half is not autocast-free."""

    def __init__(self, boxes: dict[Any, list[list[float]]]) -> None:
        super().__init__()
        self.boxes, self.scale = boxes, nn.Parameter(torch.ones(1))

    def run(self, views: ViewBatch) -> dict[str, Any]:
        assert not self.training
        assert not torch.is_grad_enabled()
        return {}

    def detect(self, outputs: dict[str, Any], views: ViewBatch, score_threshold: float) -> Detections:
        rows = [(torch.tensor(box), row) for row, image_id in enumerate(views.image_ids) for box in self.boxes[image_id]]
        image = torch.tensor([row for _, row in rows], dtype=torch.int64)
        boxes = torch.stack([box for box, _ in rows]) if rows else torch.zeros(0, 4)
        scale = torch.stack((views.view_from_image[:, 0, 0], views.view_from_image[:, 1, 1]), 1)[image].repeat(1, 2)
        return Detections(
            boxes * scale, torch.full((len(rows),), score_threshold), torch.zeros(len(rows), dtype=torch.int64), image
        )


def view_of(index: CocoIndex, rows: list[int], matrix: Tensor) -> ViewBatch:
    views = make_views(len(rows), 64, 64)
    return replace(
        views, view_from_image=matrix.repeat(len(rows), 1, 1), image_ids=tuple(index.image_ids[row] for row in rows)
    )


def test_find_moves_boxes_back_and_clips() -> None:
    index, _ = perfect()
    boxes = {100: [[10.0, 10, 50, 60], [150, 150, 250, 250]], 107: [], 114: [[1.0, 2, 3, 4]]}
    detector = Scripted(boxes).train()
    batches = [view_of(index, [2, 0], torch.diag(torch.tensor([0.32, 0.3, 1]))), view_of(index, [1], torch.eye(3))]
    found = find(detector, index, batches, torch.device("cpu"), 0.25)
    assert detector.training
    seen, rows = found.merged()
    assert seen.tolist() == [0, 1, 2]
    np.testing.assert_allclose(rows[:, :4], [[10, 10, 50, 60], [150, 150, 200, 200], [1, 2, 3, 4]], atol=1e-3)
    assert rows[:, 4:].tolist() == [[0.25, 0, 0], [0.25, 0, 0], [0.25, 0, 2]]


def test_boxes_in_an_image_of_unknown_size_stay() -> None:
    index, _ = perfect()
    index = replace(index, sizes=np.array([(0, 0), *index.sizes[1:].tolist()], np.int32))
    found = find(Scripted({100: [[10.0, 10, 50, 60]]}), index, [view_of(index, [0], torch.eye(3))], torch.device("cpu"), 0.25)
    np.testing.assert_allclose(found.merged()[1][:, :4], [[10, 10, 50, 60]])


def test_find_keeps_no_batch() -> None:
    """Fault 80: views are asked for one batch at a time and let go, so memory does not grow with the data set."""
    index, _ = perfect()
    seen: list[weakref.ref[Tensor]] = []

    def batches() -> Iterator[ViewBatch]:
        for row in range(3):
            assert sum(one() is not None for one in seen) <= 1
            views = view_of(index, [row], torch.eye(3))
            views = replace(views, pixels=views.pixels.clone())
            seen.append(weakref.ref(views.pixels))
            yield views

    found = find(Scripted({100: [[1.0, 2, 3, 4]], 107: [], 114: []}), index, batches(), torch.device("cpu"), 0.25)
    assert found.merged()[0].tolist() == [0, 1, 2]
    assert len(seen) == 3


def test_find_moves_boxes_back_through_a_flip() -> None:
    index, _ = perfect()
    flip = torch.tensor([[-1.0, 0, 200], [0, 1, 0], [0, 0, 1]])
    found, views = SetDetections(), view_of(index, [0], flip)
    one = torch.zeros(1, dtype=torch.int64)
    found.add(Detections(torch.tensor([[150.0, 10, 190, 60]]), torch.ones(1), one, one), views, [0], index)
    np.testing.assert_allclose(found.merged()[1][0, :4], [10, 10, 50, 60], atol=1e-4)


def test_find_keeps_the_detectors_mode_when_it_fails() -> None:
    index, _ = perfect()
    detector = Scripted({}).train()
    with pytest.raises(KeyError):
        find(detector, index, [view_of(index, [0], torch.eye(3))], torch.device("cpu"), 0.0)
    assert detector.training


def _two_processes(folder: str) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # an earlier test in the process that was forked may have left its own
    accelerator = Accelerator(cpu=True)
    index, _ = perfect()
    boxes: dict[Any, list[list[float]]] = {100: [[10, 10, 50, 60]], 107: [[30, 8, 130, 130]], 114: []}
    shares = [[0], [1, 2]][accelerator.process_index]
    batches = [view_of(index, [row], torch.eye(3)) for row in shares]
    found = find(Scripted(boxes), index, batches, torch.device("cpu"), 0.5, accelerator)
    metrics = coco_metrics(index, found)
    Path(folder, f"{accelerator.process_index}.json").write_text(json.dumps(metrics))
    if accelerator.process_index == 0:
        boxes.clear()  # this process fails, the other one must not wait
    try:
        find(Scripted(boxes), index, batches, torch.device("cpu"), 0.5, accelerator)
    except (KeyError, RuntimeError) as error:
        Path(folder, f"{accelerator.process_index}.txt").write_text(repr(error))


def test_two_processes_share_the_images(tmp_path: Path) -> None:
    from accelerate import debug_launcher

    debug_launcher(_two_processes, (str(tmp_path),), 2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["classes"]["a"] == pytest.approx(100)
    assert "KeyError" in (tmp_path / "0.txt").read_text()
    assert "evaluation failed on process 0" in (tmp_path / "1.txt").read_text()


def test_curves_are_the_evaluators() -> None:
    index, found = random_case(1)
    metrics, curves = metrics_and_curves(index, found)
    precision = reference(index, found).eval["precision"]
    assert metrics == coco_metrics(index, found)
    for iou, threshold in (("0.50", 0), ("0.75", 5)):
        known = [name for name, ap in metrics["classes"].items() if ap is not None]
        assert list(curves[iou]) == known
        for label, name in enumerate(index.class_names):
            if name in known:
                place = sorted(index.category_ids).index(index.category_ids[label])
                np.testing.assert_allclose(curves[iou][name], precision[threshold, :, place, 0, 2], atol=1e-4)
    assert any(max(values) > 0 for values in curves["0.50"].values())
