"""What the teacher of a run teaches on unlabelled images, and where sparse guidance would have taught something else.

    python scripts/show_guidance.py RUN_OR_WEIGHTS --output DIR [--step N] [--truth JSON]

For each stage a sheet ``DIR/<stage>.png``: the teacher's candidates coloured by NMS cluster with the kept box thick; the
student's view with targets and samples in the same colours; the ranks within the largest clusters by teacher and by student
(the paper's Fig. 4); and the samples that dense and sparse guidance label differently, with the reasons (Fig. 3).

With hidden labels (the built-in data set has them) it reports precision and recall of the clusters' kept boxes next to those of
the pseudo boxes. A weights file alone serves as teacher and student at once.
"""
from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import Parser, main_guard, number
from hidden_labels import hidden_labels, unlabeled, unlabeled_data
from shared_flags import add_overwrite, add_weights, require_new

from dtg_core.drafts import writing
from dtg_core.errors import UserError, counted, printable
from dtg_core.ranges import Count, Whole

if TYPE_CHECKING:
    from dtg_core.engine.explain import Tally
    from dtg_core.engine.predict import Predictor


def parser() -> Parser:
    result = Parser("Show what the teacher of a run teaches its student.")
    add = result.add_argument
    add_weights(result, which=False)
    add("--output", type=Path, required=True, metavar="DIR", help="where the sheets go, one PNG for each stage")
    add_overwrite(result)
    add("--stage", metavar="NAME", help="only this stage of the detector, such as head, rpn or rcnn")
    add("--count", type=number(Count), default=4, metavar="N", help="images on a sheet (default: 4)")
    add("--step", type=number(Whole), default=0, metavar="N",
        help="use the images and views of this training step (default: 0)")
    add("--unlabeled", type=os.path.expanduser, metavar="DIR|JSON", help="other unlabelled images than the run's")
    add("--truth", type=Path, metavar="JSON", help="hidden labels of the unlabelled images, COCO format")
    add("--measure", type=number(Count), default=100, metavar="N",
        help="images compared with the truth (default: 100)")
    return result


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)

    from dtg_core.data.inputs import require_apart
    from dtg_core.data.plan import StepData
    from dtg_core.data.sources import open_sources
    from dtg_core.engine.explain import explain, objects_in, tally
    from dtg_core.engine.pictures import guidance_sheet
    from dtg_core.engine.predict import load_detector

    teacher = load_detector(arguments.weights, arguments.device)
    student = load_detector(arguments.weights, arguments.device, "student") if arguments.weights.is_dir() else teacher
    models, settings = (teacher.detector, student.detector), teacher.settings
    stages = stages_of(teacher, arguments.stage)
    require_new((arguments.output / f"{name}.png" for name in stages), arguments.overwrite)
    config = unlabeled_data(settings.data, arguments.unlabeled, arguments.weights)
    require_apart([config.unlabeled] if config.unlabeled else [], arguments.output)
    sources = open_sources(config, False)
    assert sources.unlabeled is not None
    images = replace(sources.unlabeled, image_ids=sources.unlabeled.file_names)  # by which the truth is found
    truth = hidden_labels(arguments.truth, config, images, teacher.class_names)
    data = StepData(sources.labeled, images, settings.views, settings.run.seed, 1, arguments.count)

    pair = unlabeled(data, arguments.step).to(teacher.device)
    for name in stages:
        explained = explain(*models, pair, name, settings.guidance.stages[name], teacher.thresholds.get(name))
        path = arguments.output / f"{name}.png"
        with writing(path):
            arguments.output.mkdir(parents=True, exist_ok=True)
            guidance_sheet(explained, pair, teacher.class_names, range(arguments.count)).save(path)
        print(f"written to {path}")
    print(f"images, from the top: {', '.join(printable(str(name)) for name in pair.teacher.image_ids)}")
    for name in stages:
        if name in teacher.thresholds:
            limits = teacher.thresholds[name].tolist()
            names = teacher.class_names if len(limits) > 1 else ("object",)
            told = ", ".join(f"{printable(thing)} {score:.2f}" for thing, score in zip(names, limits))
            print(f"{name}, thresholds that training has come to: {told}")
    if truth is None:
        return 0

    most = min(arguments.measure, len(images))  # each once, or nearly so
    steps = range(arguments.step, arguments.step + -(-most // arguments.count))
    pairs = [unlabeled(data, step).to(teacher.device) for step in steps]
    drawn = {name for pair in pairs for name in pair.teacher.image_ids}
    print(f"against the hidden labels of {counted(len(drawn), 'image')}, IoU 0.5:")
    for name in stages:
        rule = settings.guidance.stages[name]
        limit = teacher.thresholds.get(name)
        parts = [(explain(*models, pair, name, rule, limit), objects_in(pair.teacher, truth, pair.hull)) for pair in pairs]
        if limit is not None:
            for kind, count in tally(parts, limit).items():
                print(line(f"{name}, {kind} over their threshold", count))
            continue
        for score in sorted({rule.tau, rule.pseudo_score}):
            for kind, count in tally(parts, score).items():
                if kind != "clusters" or score >= rule.tau:  # below tau there are none
                    print(line(f"{name}, {kind} over {score:g}", count))
    return 0


def stages_of(predictor: Predictor, wanted: str | None) -> list[str]:
    names = list(predictor.detector.stages)
    if wanted is not None and wanted not in names:
        raise UserError(f"--stage {wanted}: the detector has no such stage - choose from {', '.join(names)}")
    return names if wanted is None else [wanted]


def line(name: str, count: Tally) -> str:
    precision = f"{100 * count.precision:.1f}" if count.boxes else "-"  # nothing to count
    recall = f"{100 * count.recall:.1f}" if count.objects else "-"
    overlap = f"{count.overlap / count.right:.3f}" if count.right else "-"
    return (f"  {name:<34} {count.boxes / max(count.images, 1):5.2f} per image   precision {precision:>5}   recall {recall:>5}   "
            f"IoU of the right ones {overlap}")


if __name__ == "__main__":
    main_guard(main)
