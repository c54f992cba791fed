"""COCO metrics of a trained detector, over all classes and for each.

    python scripts/evaluate.py RUN_OR_WEIGHTS [--which teacher|student|best] [--annotations JSON --images DIR] [--output DIR]

Without ``--annotations`` it is evaluated on the validation set of its own run. ``results.json`` and ``detections.json``
(COCO's results format, with the data set's own ids) go to ``--output``, by default ``evaluation`` in the run folder, or next to a
weights file without one, and ``evaluation-NAME`` for ``--annotations NAME.json``. Earlier ones are kept unless ``--overwrite`` is
given.
"""
from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import Parser, main_guard, number, progress
from shared_flags import add_overwrite, add_rules, add_weights, require_new, require_own_files, rules_of

from dtg_core.drafts import draft_of, writing
from dtg_core.errors import UserError
from dtg_core.ranges import Count, PartialShare, Whole

if TYPE_CHECKING:
    from dtg_core.config import DataConfig
    from dtg_core.data.index import CocoIndex
    from dtg_core.engine.predict import Predictor

FILES = "results.json", "detections.json"


def parser() -> Parser:
    result = Parser("Evaluate a trained detector with COCO's metric.")
    add = result.add_argument
    add_weights(result)
    add("--annotations", type=Path, metavar="JSON", help="data set in COCO format (default: the run's validation set)")
    add("--images", type=Path, metavar="DIR", help="folder that its file names are relative to")
    add("--output", type=Path, metavar="DIR", help="where results.json and detections.json go")
    add_overwrite(result)
    add_rules(result)
    add("--score", type=number(PartialShare), metavar="S",
        help="lowest score of a box (default: the run's, 0.05; 0.001 gives a little more AP)")
    add("--batch", type=number(Count), metavar="N", help="images at once (default: the run's)")
    add("--workers", type=number(Whole), metavar="N", help="processes that read the images (default: the run's)")
    return result


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)
    if arguments.images and not arguments.annotations:
        raise UserError("--images: belongs to --annotations - give both, or neither for the run's own validation set")
    rules_of(arguments)  # a mistake is reported before the weights are read

    from dtg_core.data.plan import eval_batches, items_of
    from dtg_core.engine.evaluate import coco_metrics, coco_results, find, format_metrics, too_many_unread, unseen
    from dtg_core.engine.predict import find_weights, load_detector
    from dtg_core.engine.resume import digest

    weights = find_weights(arguments.weights, arguments.which)
    name = f"evaluation-{arguments.annotations.stem}" if arguments.annotations else "evaluation"
    output = arguments.output or (arguments.weights if arguments.weights.is_dir() else _home(weights)) / name
    require_new((output / name for name in FILES), arguments.overwrite, inputs=[arguments.annotations])
    loaded = load_detector(weights, arguments.device)

    data = replace(loaded.settings.data, rules=rules_of(arguments, loaded.settings.data.rules))
    index = _data_set(loaded, data, arguments.annotations, arguments.images, arguments.weights)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)

    run = loaded.settings.run
    workers = loaded.settings.data.workers if arguments.workers is None else arguments.workers
    loader = eval_batches(index, loaded.settings.views, arguments.batch or run.evaluate_batch, workers=workers)
    batches = progress(items_of(loader), len(loader), "batch")
    score = run.score_threshold if arguments.score is None else arguments.score
    found = find(loaded.detector, index, batches, loaded.device, score)
    unread = unseen(index, found)
    if problem := too_many_unread(index, unread):
        raise UserError(problem)
    metrics = coco_metrics(index, found)
    annotations = arguments.annotations or loaded.settings.data.val
    results = {
        "run": str(arguments.weights), "weights": weights.name, "annotations": None if annotations is None else str(annotations),
        "data": digest(index), "images": len(index) - len(unread), "unread": len(unread), "score": score, **metrics,
    }  # fmt: skip
    texts = json.dumps(results, indent=1), json.dumps(coco_results(index, found))
    with writing(output), ExitStack() as drafts:  # both files or none
        for name, text in zip(FILES, texts):
            drafts.enter_context(draft_of(output / name)).write_text(text + "\n", encoding="utf-8")
    print(format_metrics(metrics))
    print(f"written to {output}")
    return 0


def _home(weights: Path) -> Path:
    """The run folder that a weights file lies in, or else the file's own folder."""
    from dtg_core.data.files import holds_run

    folder = weights.absolute().parent
    return folder.parent if folder.name == "weights" and holds_run(folder.parent) else weights.parent


def _data_set(loaded: Predictor, data: DataConfig, annotations: Path | None, images: Path | None, run: Path) -> CocoIndex:
    """The images to evaluate on, by default those of ``run``, whose settings ``data`` has, with the detector's classes in order."""
    from dtg_core.data.coco import load_coco
    from dtg_core.data.index import with_classes
    from dtg_core.data.sources import open_sources

    if annotations is not None:
        index = load_coco(annotations, images, rules=data.rules)
        _warn_of_training_images(index, annotations, data)
    else:
        flags = "--annotations and --images"
        require_own_files(data, {"val": flags, "labeled": flags, "images": flags, "val_images": flags}, run)
        found = open_sources(replace(data, unlabeled=None), True).val
        if found is None:
            raise UserError("--annotations: missing, and the run had no validation set - give a COCO JSON")
        index = found
    if odd := sorted(set(index.class_names) ^ set(loaded.class_names)):
        where, differ = annotations or "validation set", f"only one of them has {', '.join(map(repr, odd[:5]))}"
        raise UserError(f"{where}: its classes are not the detector's ({differ}) - use the same categories")
    return with_classes(index, loaded.class_names)


def _warn_of_training_images(index: CocoIndex, annotations: Path, data: DataConfig) -> None:
    """Warn if the run has learnt from images of ``index``, as far as its labelled file can still be read."""
    from dtg_core.data.coco import load_coco
    from dtg_core.data.index import without

    if data.labeled is None:
        return
    with suppress(UserError):
        labeled = load_coco(Path(data.labeled), Path(data.images) if data.images else None, rules=data.rules)
        if seen := len(index) - len(without(index, labeled)):
            print(f"warning: {annotations}: THE RUN HAS LEARNT FROM {seen} OF ITS {len(index)} IMAGES, SO THE FIGURES SAY NOTHING "
                  "OF NEW IMAGES", file=sys.stderr)


if __name__ == "__main__":
    main_guard(main)
