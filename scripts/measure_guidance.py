"""How well guidance pulls a student towards the true labels: settings compared in minutes, without training.

    python scripts/measure_guidance.py RUN_OR_WEIGHTS --compare "low: tau=0.2" "high: tau=0.4 rank=false" "sparse: paradigm=sparse"

Needs a trained detector (a short supervised run will do) and unlabelled images whose labels are known but hidden from it: those
of the built-in data set, or --truth. For each setting it compares the gradient of each unlabelled loss with that of the labelled
loss on the true labels of the same strong views, and counts how right the labels are; see ``dtg_core/engine/fidelity.py``.

A setting is "NAME: KEY=VALUE ...". Keys are those of a stage's rule: ``tau`` for all stages, ``rpn.tau`` for one of them.
Without --compare the run's dense and sparse rules are measured, with tau and pseudo_score even if thresholds have adapted in
training (``tau_rate``). Stages that the run did not guide at all are dense.

Each image is drawn once, in batches of equal size, so --images and --batch are upper limits: with few images, both are lower.
A single batch has no standard error. With --step the images may come from two passes, and some of them twice; this is reported.

Its bias: true labels are assigned by the detector's own rule and reduced by its own divisors, as sparse guidance does. So compare
settings of one paradigm; between paradigms only training decides. And it sees a single step: with too high a threshold, cosines
are high too, because pushing everything down resembles what true labels demand of an overfitted detector, but in training scores
then sink from step to step (RESULTS.md, blood cells). Thresholds should find about as many boxes as there are objects.
"""
from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import Parser, main_guard, number, progress
from hidden_labels import read_images, unlabeled, unlabeled_data
from shared_flags import add_overwrite, add_weights, require_new, write_json

from dtg_core.errors import UserError, counted
from dtg_core.ranges import Count, Whole

if TYPE_CHECKING:
    from dtg_core.config import Config
    from dtg_core.engine.fidelity import Agreement, Measured
    from dtg_core.structures import PairBatch, Targets

STAGES = "guidance.stages."  # with a stage's name, the prefix of its keys
DEFAULT = ["dense: paradigm=dense", "sparse: paradigm=sparse"]
BIAS = ("bias: the true labels are assigned and reduced by the detector's own rules, as sparse guidance does - compare settings "
        "of one paradigm, and let training decide between paradigms. One step is seen: a threshold that is too high looks good "
        "here and lets scores sink in training, so clusters or pseudo boxes should be about as many as true objects.")
LEGEND = ("class, box, rank, all: cosine of the unlabelled loss' gradient with that of the true labels (rank: with their class "
          "loss'), its standard error over batches (a single one has none), and x the ratio of their norms. right: share of the "
          "samples trained towards an object whose target box overlaps a true one of the class by 0.5 or more, IoU: of those. "
          "found, missed: share of the samples of true objects that are labelled so, or called background. An image has "
          "positives, clusters of a size, and pseudo boxes.")


def parser() -> Parser:
    result = Parser("Compare the gradients of guidance with those of hidden true labels, for several settings.")
    add = result.add_argument
    add_weights(result, which=False)
    result.add_list("--compare", "'NAME: KEY=VALUE ...'", "settings to measure (default: dense and sparse)")
    result.add_list("--set", "dotted.key=value", "change the run's config first")
    add("--truth", type=Path, metavar="JSON", help="hidden labels of the unlabelled images (built-in synthetic data set: known)")
    add("--unlabeled", type=os.path.expanduser, metavar="DIR|JSON", help="other unlabelled images than the run's")
    add("--images", type=number(Count), default=128, metavar="N",
        help="most images to measure on, each once (default: 128)")
    add("--batch", type=number(Count), default=16, metavar="N", help="most images per gradient (default: 16)")
    add("--step", type=number(Whole), default=0, metavar="N",
        help="draw images and views from this step on (default: 0)")
    add("--json", metavar="FILE|-", help="where the figures go; -: to stdout, instead of the table")
    add_overwrite(result)
    return result


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)
    if arguments.json not in (None, "-"):
        require_new([Path(arguments.json)], arguments.overwrite, "--json", [arguments.truth, arguments.unlabeled])

    from dtg_core.data.plan import StepData
    from dtg_core.engine.explain import objects_in
    from dtg_core.engine.fidelity import measure
    from dtg_core.engine.predict import load_detector
    from dtg_core.settings import overridden

    teacher = load_detector(arguments.weights, arguments.device)
    student = load_detector(arguments.weights, arguments.device, "student") if arguments.weights.is_dir() else teacher
    detector = teacher.detector
    stages = list(detector.stages)
    settings = overridden(guided(teacher.settings, stages), arguments.set)
    compared = {name: changed(settings, keys, stages) for name, keys in named(arguments.compare or DEFAULT).items()}

    config = unlabeled_data(settings.data, arguments.unlabeled, arguments.weights)
    labeled, images, truth = read_images(arguments.truth, config, teacher.class_names)
    if truth is None:
        raise UserError("--truth: missing - give a COCO JSON with the labels of the unlabelled images")
    most = min(arguments.images, len(images))  # repeated images would make batches alike and standard errors too small
    number = -(-most // arguments.batch)
    size = most // number  # the same for all batches, as they count equally in the means
    data = StepData(labeled, images, settings.views, settings.run.seed, 1, size)
    steps = range(arguments.step, arguments.step + number)
    pairs = (unlabeled(data, step).to(teacher.device) for step in progress(steps, unit="batch"))
    objects: list[int] = []  # true objects of each batch
    names: set[object] = set()  # of the images

    def with_truth(pair: PairBatch) -> tuple[PairBatch, Targets]:
        targets = objects_in(pair.student, truth, pair.hull)
        objects.append(len(targets.labels))
        names.update(pair.student.image_ids)
        return pair, targets

    batches = map(with_truth, pairs)
    rules = {name: setting.guidance.stages for name, setting in compared.items()}
    found = measure(detector, student.detector, batches, rules)

    count = number * size
    content = {"weights": str(arguments.weights), "objects": sum(objects) / count}
    content |= as_json(found, arguments.compare or DEFAULT, arguments.set, count)
    if arguments.json == "-":
        print(json.dumps(content, indent=1))
        return 0
    if arguments.json:
        write_json(Path(arguments.json), content)
    batched = "1 batch" if number == 1 else f"{number} batches of {size}"
    print(f"{drawn(count, len(names), len(images))} in {batched}, with {sum(objects) / count:.1f} true objects each\n")
    print(f"{table(found, stages)}\n\n{LEGEND}\n{BIAS}")
    return 0


def drawn(count: int, different: int, there: int) -> str:
    """How many images were drawn, out of those that exist."""
    if different < count:  # in a second pass through them, or in place of unreadable ones
        share = f"{different} different ones of {there}"
    else:
        share = "all there are" if count == there else f"of {there}"
    return f"{counted(count, 'image')} ({share})"


def guided(settings: Config, names: Sequence[str]) -> Config:
    """If a run guided none of its detector's stages, make them dense, so that a supervised run can be measured."""
    stages = settings.guidance.stages
    if any(stages[name].paradigm != "none" for name in names):
        return settings
    dense = {name: replace(stages[name], paradigm="dense") for name in names}
    return replace(settings, guidance=replace(settings.guidance, stages={**stages, **dense}))


def named(texts: Sequence[str]) -> dict[str, list[str]]:
    """"NAME: KEY=VALUE ..." as the keys and values by name."""
    found: dict[str, list[str]] = {}
    for text in texts:
        name, colon, keys = text.partition(":")
        name = name.strip()
        if not colon or not name:
            raise UserError(f"--compare {text!r}: has no name - write it as 'NAME: KEY=VALUE ...'")
        if name in found:
            raise UserError(f"--compare {text!r}: the name is taken already - give each setting its own")
        found[name] = keys.split()
    return found


def changed(settings: Config, keys: Sequence[str], stages: Sequence[str]) -> Config:
    """The config with a setting's keys, which are checked like those of a run."""
    from dtg_core.config import cross_check
    from dtg_core.engine.effective import reads
    from dtg_core.ranges import check_ranges
    from dtg_core.settings import overridden

    full = [key for short in keys for key in full_keys(short, stages)]
    if any(key.partition("=")[0].endswith("tau_rate") for key in full):
        raise UserError(f"--compare {' '.join(keys)}: tau_rate acts from step to step, and this looks at single ones - compare tau "
                        "and pseudo_score")
    result = overridden(settings, full)
    check_ranges(result)
    cross_check(result, {})
    rules = [result.guidance.stages[stage] for stage in stages]
    if all(rule.paradigm == "none" for rule in rules):
        raise UserError(f"--compare {' '.join(keys)}: no stage is guided - use paradigm=dense or paradigm=sparse")

    def acts(key: str) -> bool:
        stage = key.removeprefix(STAGES).partition(".")[0]
        return not key.startswith(STAGES) or (stage in stages and reads(result.guidance.stages[stage].paradigm, key))

    for short in keys:
        if not any(acts(key.partition("=")[0]) for key in full_keys(short, stages)):
            print(f"warning: --compare {' '.join(keys)}: {short} is without effect, the paradigm of these stages does not read it",
                  file=sys.stderr)
    return result


def full_keys(setting: str, stages: Sequence[str]) -> list[str]:
    """The dotted keys that "tau=0.3" or "rpn.tau=0.3" stand for."""
    if setting.startswith("guidance."):
        return [setting]
    if "." in setting.partition("=")[0]:
        return [f"{STAGES}{setting}"]
    return [f"{STAGES}{stage}.{setting}" for stage in stages]


def as_json(found: Mapping[str, Measured], texts: Sequence[str], overrides: Sequence[str], images: int) -> dict[str, Any]:
    settings = {
        name: {
            "setting": text.partition(":")[2].strip(),
            "stages": {stage: {"gradients": {kind: asdict(value) for kind, value in sums.agreements(stage).items()},
                               "labels": sums.label_figures(stage)} for stage in sums.labels},
            "all": asdict(sums.agreements("all")["all"]),
        }
        for (name, sums), text in zip(found.items(), texts)
    }  # fmt: skip
    return {"images": images, "set": list(overrides), "bias": BIAS, "settings": settings}


def table(found: Mapping[str, Measured], stages: Sequence[str]) -> str:
    """A line for each setting and stage, and one for all stages if there are several."""
    kinds, shares = ("class", "box", "rank", "all"), ("precision", "box_iou", "found", "missed")
    means = ("positives", "clusters", "cluster_size", "pseudo_boxes")
    rows = [["setting", "stage", *kinds, "right", "IoU", "found", "missed", "positives", "clusters", "size", "pseudo"]]
    for name, sums in found.items():
        for stage in [stage for stage in stages if stage in sums.labels]:
            gradients, labels = sums.agreements(stage), sums.label_figures(stage)
            row = [name, stage, *(shown(gradients.get(kind)) for kind in kinds), *(f"{labels[share]:.3f}" for share in shares)]
            rows.append(row + [f"{labels[mean]:.1f}" if mean in labels else "-" for mean in means])
        if len(stages) > 1:
            rows.append([name, "all", "", "", "", shown(sums.agreements("all")["all"])])
    widths = [max(len(row[place]) for row in rows if place < len(row)) for place in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def shown(value: Agreement | None) -> str:
    if value is None:
        return "-"
    spread = "" if value.error is None else f"±{value.error:.3f}".replace("0.", ".")
    return f"{value.cosine:.3f}{spread} x{value.ratio:.2f}"


if __name__ == "__main__":
    main_guard(main)
