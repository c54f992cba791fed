"""COCO's detection metric, and running a detector over a data set for it.

No user file reaches the evaluator: the ground truth is rebuilt from a checked ``CocoIndex`` with ids 1, 2, 3, ... and
areas of its boxes, because evaluators respond to odd ids, missing areas and NaN with wrong numbers instead of errors. Results
for the user carry the data set's own ids.
"""
from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dtg_core.boxes import clip, project
from dtg_core.protocol import Detector
from dtg_core.structures import Detections, ViewBatch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dtg_core.data.index import CocoIndex

#: COCO's twelve figures, in the evaluator's order.
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
#: IoU thresholds whose precision-recall curves are kept, with their places among the evaluator's ten.
CURVES = {"0.50": 0, "0.75": 5}


@dataclass
class SetDetections:
    """Detections of the images seen so far, in the pixels of the stored images. K images, D detections."""

    seen: list[NDArray[np.int64]] = field(default_factory=list)  # parts of [K], rows of the index
    rows: list[NDArray[np.float64]] = field(default_factory=list)  # parts of [D, 7]: x1, y1, x2, y2, score, label, image

    def add(self, detections: Detections, views: ViewBatch, image: Sequence[int], index: CocoIndex) -> None:
        """Add a batch's detections.

        Args:
            detections: in the pixels of ``views``, on any device; fetched in one transfer.
            views: on the CPU; only ``view_from_image`` is used.
            image: [N] row of each view's image in ``index``.
            index: gives the images' sizes, to which the boxes are clipped.
        """
        columns = (*detections.boxes.unbind(1), detections.scores, detections.labels, detections.image)
        # sync: the batch's detections; float32, because not every device has float64.
        table = torch.stack([column.float() for column in columns], 1).cpu().double().numpy()
        view, row = table[:, 6].astype(np.int64), np.asarray(image, np.int64)
        sizes = np.asarray(index.sizes, np.float64)[row]
        sizes[sizes == 0] = np.inf  # the data set does not say
        image_from_view = views.view_from_image.double().inverse()
        moved = project(torch.from_numpy(table[:, :4]), image_from_view[view], "corners")
        table[:, :4] = clip(moved, torch.from_numpy(sizes)[view]).numpy()
        table[:, 6] = row[view]
        self.seen.append(row)
        self.rows.append(table)

    def merged(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Images [K] and rows [D, 7] in the images' order, whichever process saw them first."""
        rows = np.concatenate([*self.rows, np.zeros((0, 7))])
        return np.sort(np.concatenate([*self.seen, np.zeros(0, np.int64)])), rows[np.argsort(rows[:, 6], kind="stable")]


def coco_metrics(index: CocoIndex, found: SetDetections, faster: bool = True) -> dict[str, Any]:
    """COCO's metric of detections.

    Args:
        index: the ground truth; crowd boxes count as COCO counts them.
        found: detections of images of ``index``, each image once; objects of images that were not seen do not count.
        faster: by faster-coco-eval if it is installed, which gives the same figures sooner; otherwise by pycocotools.

    Returns:
        {"AP": .., ... the twelve FIGURES in 0..100, None if there is no object to find, "classes": {name: AP or None}}.

    Raises:
        ValueError: an image given twice, an unknown image or class, a value that is not finite.
    """
    return metrics_and_curves(index, found, faster)[0]


def metrics_and_curves(
    index: CocoIndex, found: SetDetections, faster: bool = True
) -> tuple[dict[str, Any], dict[str, dict[str, list[float]]]]:
    """``coco_metrics``, and the curves behind it.

    Returns:
        (what ``coco_metrics`` returns, {IoU of CURVES: {class: its precision at recalls 0, 0.01, .. 1}}); classes without any
        object have no curve.
    """
    seen, rows = found.merged()
    _check(index, seen, rows)
    coco, coco_eval = _evaluator(faster)
    with contextlib.redirect_stdout(io.StringIO()):  # the evaluators print
        truth, results = coco(), coco()
        truth.dataset, results.dataset = _truth(index), _results(index, rows)
        truth.createIndex()
        results.createIndex()
        evaluation = coco_eval(truth, results, "bbox")
        evaluation.params.imgIds = (seen + 1).tolist()
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = {name: _percent(value) for name, value in zip(FIGURES, evaluation.stats)}
    precision = evaluation.eval["precision"]  # [IoU thresholds, recalls, classes, areas, detection limits], -1: no object
    classes: dict[str, float | None] = {}
    curves: dict[str, dict[str, list[float]]] = {iou: {} for iou in CURVES}
    for row, name in enumerate(index.class_names):
        values = precision[:, :, row, 0, -1]
        known = (values > -1).any()
        classes[name] = _percent(values[values > -1].mean()) if known else None
        for iou, threshold in CURVES.items() if known else ():
            curves[iou][name] = values[threshold].round(4).tolist()
    return {**figures, "classes": classes}, curves


def coco_results(index: CocoIndex, found: SetDetections) -> list[dict[str, Any]]:
    """Detections in COCO's results format, with the ids and in the pixels of the data set's JSON; JSON values."""
    image_ids, category_ids = index.image_ids, index.category_ids
    rows = found.merged()[1]
    if index.scale is not None:
        rows[:, :4] /= index.scale[rows[:, 6].astype(np.int64)][:, [0, 1, 0, 1]]
    return [
        {"image_id": image_ids[int(row[6])], "category_id": category_ids[int(row[5])],
         "bbox": [round(float(value), 3) for value in (row[0], row[1], row[2] - row[0], row[3] - row[1])],
         "score": round(float(row[4]), 6)}
        for row in rows
    ]


@torch.no_grad()
def find(
    detector: Detector, index: CocoIndex, batches: Iterable[ViewBatch | None], device: torch.device, score_threshold: float,
    accelerator: Accelerator | None = None,
) -> SetDetections:
    """Run a detector over views of the images of ``index`` and gather what all processes found.

    Args:
        detector: a ``dtg_core.protocol.Detector``; in evaluation mode meanwhile.
        index: its ``image_ids`` are those in the views.
        batches: this process's share of the images, on the CPU; None where no image of a batch can be read.
        device: where the detector is.
        score_threshold: of kept detections.
        accelerator: provides autocast for the network, and the other processes.

    Raises:
        Whatever fails, on every process, so that none waits for the others.
    """
    row = {image_id: number for number, image_id in enumerate(index.image_ids)}
    training, found, failure = detector.training, SetDetections(), None
    detector.eval()
    try:
        for views in batches:
            if views is None:
                continue
            moved = views.to(device, non_blocking=True)
            with accelerator.autocast() if accelerator is not None else contextlib.nullcontext():
                outputs = detector.run(moved)
            detections = detector.detect(outputs, moved, score_threshold)
            found.add(detections, views, [row[image_id] for image_id in views.image_ids], index)
    except Exception as error:
        if accelerator is None or accelerator.num_processes == 1:
            raise
        failure = error
    finally:
        detector.train(training)
    if accelerator is None or accelerator.num_processes == 1:
        return found
    return _gathered(found, failure)


def _gathered(found: SetDetections, failure: Exception | None) -> SetDetections:
    """Join all processes' parts; a failure of one becomes an error of all."""
    from accelerate.utils import gather_object

    parts = gather_object([(*found.merged(), repr(failure) if failure else None)])
    if failure is not None:
        raise failure
    for process, (_, _, problem) in enumerate(parts):
        if problem is not None:
            raise RuntimeError(f"evaluation failed on process {process}: {problem}")
    return SetDetections([seen for seen, _, _ in parts], [rows for _, rows, _ in parts])


def unseen(index: CocoIndex, found: SetDetections) -> list[str]:
    """The files of ``index`` that could not be read, or were not given to ``find``."""
    return [index.file_names[row] for row in np.setdiff1d(np.arange(len(index)), found.merged()[0]).tolist()]


def too_many_unread(index: CocoIndex, unread: Sequence[str]) -> str:
    """What is wrong if more files of ``index`` are ``unread`` than its rules allow, or all of them, so that the figures are of too
    few images; empty: nothing."""
    if not unread or (len(unread) <= index.rules.max_bad_images * len(index) and len(unread) < len(index)):
        return ""
    return (f"{index.root}: {len(unread)} of {len(index)} images cannot be read (first {unread[0]}) - fix them, take them out, or "
            "raise data.rules.max_bad_images")


def format_metrics(metrics: dict[str, Any]) -> str:
    """The twelve figures and each class's AP as a text table."""
    def shown(value: float | None) -> str:
        return "   -" if value is None else f"{value:5.1f}"

    lines = [
        "  ".join(f"{name} {shown(metrics[name])}" for name in FIGURES[start : start + 6]) for start in (0, 6)
    ]
    width = max((len(name) for name in metrics["classes"]), default=0)
    return "\n".join([*lines, *(f"  {name:<{width}}  AP {shown(value)}" for name, value in metrics["classes"].items())])


def _evaluator(faster: bool) -> tuple[Any, Any]:
    """The (COCO, COCOeval) classes of a package."""
    if faster:
        with contextlib.suppress(ImportError):
            from faster_coco_eval import COCO, COCOeval_faster

            return COCO, COCOeval_faster
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


def _check(index: CocoIndex, seen: NDArray[np.int64], rows: NDArray[np.float64]) -> None:
    images, classes = len(index.image_ids), len(index.class_names)
    if len(np.unique(seen)) != len(seen):
        raise ValueError("an image was evaluated twice")
    if not np.isfinite(rows).all():
        raise ValueError("a detection is not finite")
    if not np.isin(rows[:, 6], seen).all() or not np.isin(seen, np.arange(images)).all():
        raise ValueError("a detection is of an unknown image")
    if not np.isin(rows[:, 5], np.arange(classes)).all():
        raise ValueError("a detection is of an unknown class")
    if (rows[:, 2:4] < rows[:, :2]).any():
        raise ValueError("a detection has a negative side")


def _header(index: CocoIndex) -> dict[str, Any]:
    return {
        "info": {},
        "images": [{"id": number} for number in range(1, len(index.image_ids) + 1)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(index.class_names, 1)],
    }


def _entries(boxes: NDArray[Any], image: NDArray[Any], label: NDArray[Any], crowd: NDArray[Any]) -> list[dict[str, Any]]:
    """Annotations numbered from 1, of boxes [B, 4] with image and label [B] counted from 0."""
    corners = boxes.astype(np.float64)
    sides = corners[:, 2:] - corners[:, :2]
    bboxes, areas = np.concatenate((corners[:, :2], sides), 1).tolist(), sides.prod(1).tolist()
    numbers = (image.astype(np.int64) + 1).tolist(), (label.astype(np.int64) + 1).tolist(), crowd.astype(np.int64).tolist()
    return [
        {"id": number, "image_id": image_id, "category_id": category, "bbox": bbox, "area": area, "iscrowd": is_crowd}
        for number, (bbox, area, image_id, category, is_crowd) in enumerate(zip(bboxes, areas, *numbers), 1)
    ]


def _truth(index: CocoIndex) -> dict[str, Any]:
    annotations = _entries(index.boxes, index.image_of_box, index.labels, index.crowd)
    for annotation, area in zip(annotations, [] if index.areas is None else index.areas.tolist()):
        annotation["area"] = area
    return {**_header(index), "annotations": annotations}


def _results(index: CocoIndex, rows: NDArray[np.float64]) -> dict[str, Any]:
    annotations = _entries(rows[:, :4], rows[:, 6], rows[:, 5], np.zeros(len(rows)))
    for annotation, score in zip(annotations, rows[:, 4].tolist()):
        annotation["score"] = score
    return {**_header(index), "annotations": annotations}


def _percent(value: float) -> float | None:
    return None if value < 0 else 100 * float(value)
