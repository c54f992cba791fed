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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import Parser, main_guard, number
from hidden_labels import read_images, unlabeled, unlabeled_data
from shared_flags import add_overwrite, add_weights, require_new

from dtg_core.drafts import writing
from dtg_core.errors import UserError, counted, printable
from dtg_core.ranges import Count, Whole

if TYPE_CHECKING:
    from torch import Tensor

    from dtg_core.config import StageRule
    from dtg_core.engine.explain import Tallies, Tally
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
    from dtg_core.engine.explain import Tallies, explain, objects_in
    from dtg_core.engine.pictures import guidance_sheet
    from dtg_core.engine.predict import load_detector

    teacher = load_detector(arguments.weights, arguments.device)
    student = load_detector(arguments.weights, arguments.device, "student") if arguments.weights.is_dir() else teacher
    settings = teacher.settings
    rules = {name: settings.guidance.stages[name] for name in stages_of(teacher, arguments.stage)}
    require_new((arguments.output / f"{name}.png" for name in rules), arguments.overwrite)
    config = unlabeled_data(settings.data, arguments.unlabeled, arguments.weights)
    require_apart([config.unlabeled] if config.unlabeled else [], arguments.output)
    labeled, images, truth = read_images(arguments.truth, config, teacher.class_names)
    data = StepData(labeled, images, settings.views, settings.run.seed, 1, arguments.count)

    most = min(arguments.measure, len(images)) if truth is not None else 1  # each once, or nearly so
    counts = [(name, Tallies(score)) for name, rule in rules.items() for score in limits(rule, teacher.thresholds.get(name))]
    seen = set()
    for step in range(arguments.step, arguments.step + -(-most // arguments.count)):
        pair = unlabeled(data, step).to(teacher.device)
        explained = explain(teacher.detector, student.detector, pair, rules, teacher.thresholds)
        if step == arguments.step:
            for name, told in explained.items():
                path = arguments.output / f"{name}.png"
                with writing(path):
                    arguments.output.mkdir(parents=True, exist_ok=True)
                    guidance_sheet(told, pair, teacher.class_names, range(arguments.count)).save(path)
                print(f"written to {path}")
            print(f"images, from the top: {', '.join(printable(str(name)) for name in pair.teacher.image_ids)}")
            tell_thresholds(teacher, rules)
        if truth is not None:
            seen |= set(pair.teacher.image_ids)
            objects = objects_in(pair.teacher, truth, pair.hull)
            for name, count in counts:
                count.add(explained[name], objects)
    if truth is not None:
        print(f"against the hidden labels of {counted(len(seen), 'image')}, IoU 0.5:")
        for name, count in counts:
            tell_counts(name, count, rules[name].tau)
    return 0


def limits(rule: StageRule, threshold: Tensor | None) -> Sequence[float | Tensor]:
    """The scores from which boxes are counted."""
    return sorted({rule.tau, rule.pseudo_score}) if threshold is None else [threshold]


def tell_thresholds(predictor: Predictor, stages: Iterable[str]) -> None:
    for name in stages:
        if name in predictor.thresholds:
            scores = predictor.thresholds[name].tolist()
            names = predictor.class_names if len(scores) > 1 else ("object",)
            told = ", ".join(f"{printable(thing)} {score:.2f}" for thing, score in zip(names, scores))
            print(f"{name}, thresholds that training has come to: {told}")


def tell_counts(name: str, found: Tallies, tau: float) -> None:
    score, adapted = found.score, not isinstance(found.score, (int, float))
    over = "their threshold" if adapted else f"{score:g}"
    if adapted or score >= tau:  # below tau there are no clusters
        print(line(f"{name}, clusters over {over}", found.clusters))
    print(line(f"{name}, pseudo boxes over {over}", found.final))


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
