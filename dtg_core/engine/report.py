"""``report.html`` of a run folder: curves, AP of each class, precision over recall, predictions, and what the teacher teaches.

``save_pictures`` draws at each evaluation, ``write_report`` makes the page from what the folder then holds.
"""
from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dtg_core.config import RENAMED
from dtg_core.data.index import CocoIndex
from dtg_core.data.plan import StepData
from dtg_core.data.sources import Sources
from dtg_core.drafts import draft_of, write_text
from dtg_core.engine import evaluate
from dtg_core.engine.effective import paradigm_of, stage_paradigms
from dtg_core.engine.explain import explain
from dtg_core.engine.metrics import logged_warnings, read_metrics
from dtg_core.engine.page import Line, Point, Table, chart, charts, folded, page, paragraph, picture, section, table
from dtg_core.engine.pictures import guidance_sheet, predictions_sheet
from dtg_core.engine.predict import ImageDetections
from dtg_core.engine.train_step import Training
from dtg_core.settings import plain_yaml
from dtg_core.settings_text import dotted

TAUGHT, PREDICTED = 3, 8  # images on the sheets
SCORE = 0.3  # lowest score of predictions that are drawn
MOST_CLASSES = 60  # with a chart of their own
APS = (("teacher", "AP"), ("student", "AP"), ("teacher", "AP50"), ("teacher", "AP75"))

#: Titles of guidance figures; others keep their name.
GUIDANCE = {
    "candidates": "Candidates in an image", "clusters": "Clusters in an image", "cluster_size": "Candidates in a cluster",
    "matched": "Share of candidates that reach the student", "background": "Background samples in an image",
    "pseudo_boxes": "Boxes in an image over the pseudo score", "lowest_threshold": "Lowest adaptive threshold of a class",
    "highest_threshold": "Highest adaptive threshold of a class",
}  # fmt: skip
CAPTIONS = {
    "predictions": f"the teacher's boxes over a score of {SCORE} in colours, labels in white",
    "guidance": "what the teacher teaches in the stage",
}


# Pictures --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def save_pictures(folder: Path, step: int, training: Training, sources: Sources, found: evaluate.SetDetections | None) -> None:
    """Write ``guidance-<stage>-<step>.jpg`` and ``predictions-<step>.jpg``, always of the same images.

    Args:
        folder: where the pictures go. step: the one that was evaluated.
        training: of the run; the student is in evaluation mode meanwhile.
        sources: the run's data. found: the teacher's detections of the validation set, if there is one.

    Raises:
        OSError: cannot be written. UserError: an image cannot be read.
    """
    if sources.val is not None and found is not None:
        rows = sample_rows(sources.val, PREDICTED)
        names = sources.val.class_names
        sheet = predictions_sheet(sources.val, rows, [found_in(found, row, sources.val) for row in rows], names)
        _save(sheet, folder / f"predictions-{step:06}.jpg")
    if sources.unlabeled is None:
        return
    config, teacher, student = training.config, training.teacher, training.module.detector
    pair = StepData(sources.labeled, sources.unlabeled, config.views, config.run.seed, 1, TAUGHT)[0].unlabeled
    assert pair is not None
    pair, thresholds, was_training = pair.to(training.accelerator.device), training.thresholds.scores(), student.training
    student.eval()
    try:
        rules = {name: config.guidance.stages[name] for name in teacher.stages}
        guided = {name: rule for name, rule in rules.items() if rule.paradigm != "none"}
        for name, told in explain(teacher, student, pair, guided, thresholds).items():
            sheet = guidance_sheet(told, pair, sources.labeled.class_names, range(TAUGHT))
            _save(sheet, folder / f"guidance-{name}-{step:06}.jpg")
    finally:
        student.train(was_training)


def sample_rows(index: CocoIndex, count: int) -> list[int]:
    """At most ``count`` rows of images with objects, from across the data set."""
    rows = np.flatnonzero(np.diff(index.box_start))
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)].tolist()


def found_in(found: evaluate.SetDetections, row: int, index: CocoIndex) -> ImageDetections:
    """The detections in an image of ``index`` with a score above SCORE, best first."""
    every = found.merged()[1]
    own = every[(every[:, 6] == row) & (every[:, 4] > SCORE)]
    own = own[own[:, 4].argsort()[::-1]]
    height, width = index.sizes[row].tolist()
    return ImageDetections((height, width), own[:, :4].astype(np.float32), own[:, 4].astype(np.float32), own[:, 5].astype(np.int64))


def _save(sheet: Image.Image, path: Path) -> None:
    with draft_of(path) as draft:
        sheet.save(draft, "JPEG", quality=88)


# The page --------------------------------------------------------------------------------------------------------------


def write_report(folder: Path) -> None:
    """Write ``report.html`` of a run folder that has a ``config.yaml``; whatever else is missing is left out.

    Raises:
        OSError: a file cannot be read or written. UserError, ValueError: one is not what a run writes.
    """
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    settings = dotted(plain_yaml(config, str(folder / "config.yaml"), RENAMED))
    lines = list(read_metrics(folder / "metrics.jsonl"))
    results, precision = (_json(folder / name) for name in ("results.json", "precision.json"))
    step = max((line.get("step", 0) for line in lines), default=0)
    body = [
        paragraph(f"{settings.get('detector', 'detector')} on {settings.get('backbone.name')}, {_paradigms(settings, lines)}; seed "
                  f"{settings.get('run.seed')}; step {step} of {settings.get('run.steps')}"),
        *([section("Warnings", *map(paragraph, warned))] if (warned := logged_warnings(lines)) else []),
        *([section("COCO figures", table(_figures(results)))] if results else []),
        section("Curves", charts(_curves(lines))),
        *([section("Classes", table(_classes(results)))] if results else []),
        *([section("Precision over recall, teacher", *_precision(precision, results))] if precision else []),
        *_pictures(folder / "pictures", step),
        section("Settings", folded("config.yaml", config)),
    ]  # fmt: skip
    write_text(folder / "report.html", page(folder.resolve().name, body))


def _json(file: Path) -> dict[str, Any]:
    """Empty when there is no such file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _paradigms(settings: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    """The paradigms of the stages in the log."""
    logged = {name.split("/")[1] for line in lines for name in line if name.startswith("labeled/")}
    told = paradigm_of({stage: value for stage, value in stage_paradigms(settings).items() if stage in logged})
    return told if told == "supervised" else f"{told} guidance"


def _figures(results: Mapping[str, Any]) -> Table:
    names = evaluate.FIGURES
    return [["", *names], *([who, *(_shown(results[who].get(name)) for name in names)] for who in ("teacher", "student"))]


def _classes(results: Mapping[str, Any]) -> Table:
    teacher, student = (results[who]["classes"] for who in ("teacher", "student"))
    return [["AP of", "teacher", "student"], *([name, _shown(teacher[name]), _shown(student.get(name))] for name in teacher)]


def _curves(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """A chart for each kind of figure in metrics.jsonl."""
    points: dict[str, list[Point]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                points.setdefault(name, []).append((line["step"], value))

    def lines_of(names: Mapping[str, str]) -> list[Line]:
        """Lines for those figures that exist, given as {name in the file: name in the legend}."""
        return [Line(names[name], points[name], color) for color, name in enumerate(names) if name in points]

    def under(branch: str, kind: str = "") -> dict[str, str]:
        """Figures "branch/stage/kind", only of one kind if given; labelled by what is not given."""
        parts = {name: name.split("/")[1:] for name in sorted(points) if name.startswith(f"{branch}/")}
        return {name: stage if kind else f"{stage} {own}" for name, (stage, own) in parts.items() if kind in ("", own)}

    kinds = list(dict.fromkeys(name.split("/")[2] for name in under("guidance")))
    kinds.sort(key=lambda kind: [*GUIDANCE, kind].index(kind))
    skipped = any(value for _, value in points.get("skipped", ()))
    found = [
        ("AP", lines_of({f"{who}/{name}": f"{who} {name}" for who, name in APS})),
        ("Losses on labelled images", lines_of(under("labeled"))),
        ("Losses on unlabelled images, before alpha", lines_of(under("unlabeled"))),
        ("Unlabelled loss for each unit of labelled loss", lines_of({"loss_ratio": ""})),
        *((GUIDANCE.get(kind, kind), lines_of(under("guidance", kind))) for kind in kinds),
        ("Learning rate", lines_of({"lr": ""})),
        ("Seconds of a step", lines_of({"step_seconds": "whole", "data_seconds": "waiting for data"})),
        ("Share of steps that were skipped", lines_of({"skipped": ""} if skipped else {})),
    ]  # fmt: skip
    return [chart(title, some) for title, some in found if some]


def _precision(curves: Mapping[str, Mapping[str, Sequence[float]]], results: Mapping[str, Any]) -> list[str]:
    """Means over all classes, and a small chart for each."""
    def line(number: int, iou: str, values: Sequence[float]) -> Line:
        return Line(f"IoU {iou}", [(place / (len(values) - 1), value) for place, value in enumerate(values)], number)

    means = [line(number, iou, list(map(statistics.fmean, zip(*curves[iou].values()))))
             for number, iou in enumerate(curves) if curves[iou]]  # fmt: skip
    if not means:
        return [paragraph("no object in the validation set")]
    names = list(next(iter(curves.values())))
    known = results.get("teacher", {}).get("classes", {})
    small = [chart(f"{name}, AP {_shown(known.get(name))}",
                   [line(number, iou, curves[iou][name]) for number, iou in enumerate(curves)], "recall", 1.0, 1.0, (240, 160))
             for name in names[:MOST_CLASSES]]  # fmt: skip
    rest = [paragraph(f"the first {MOST_CLASSES} of {len(names)} classes")] if len(names) > MOST_CLASSES else []
    return [charts([chart("Mean over all classes", means, "recall", 1.0, 1.0)]), charts(small), *rest]


def _pictures(folder: Path, step: int) -> list[str]:
    """The newest picture of each kind up to ``step``; later ones are from before the run was resumed."""
    newest: dict[str, tuple[int, Path]] = {}
    for path in sorted(folder.glob("*.jpg")):
        match = re.fullmatch(r"(.+)-(\d+)", path.stem)
        if match and newest.get(match[1], (-1, path))[0] < int(match[2]) <= step:
            newest[match[1]] = int(match[2]), path
    parts = []
    for kind in sorted(newest, reverse=True):  # predictions first
        at, path = newest[kind]
        title, _, stage = kind.partition("-")
        caption = f"Step {at}: {CAPTIONS.get(title, title)} {stage}".rstrip()
        parts.append(picture(path.read_bytes(), "jpeg", caption))
    return [section("Pictures", *parts)] if parts else []


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
