"""Finished runs side by side, in the form of the paper's tables.

Runs whose settings only differ in the seed or the fold are one row: a mean and the standard deviation over them. A *fold* is
another draw of the same data: ``data.shapes_seed``, or files whose names only differ in the number of a fold. Settings that
cannot have had an effect, such as the sparse threshold of a dense stage, are left out before runs are compared, and images per
process and micro-batches are replaced by the images of a step, which are what training depends on. The launcher's mixed
precision counts as a setting.
"""
from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dtg_core.config import RENAMED
from dtg_core.drafts import write_text, writing
from dtg_core.engine.effective import BATCH, PRECISION, effective, paradigm_of, stage_paradigms
from dtg_core.engine.metrics import logged_warnings, read_metrics
from dtg_core.engine.page import Line, Point, Table, chart, charts, page, paragraph, section, table
from dtg_core.errors import UserError
from dtg_core.settings import plain_yaml
from dtg_core.settings_text import dotted, yaml_scalar

COMPARED = ("AP", "AP50", "AP75")
SEED, BUILT_IN_FOLD = "run.seed", "data.shapes_seed"
LABELED, UNLABELED = "data.labeled", "data.unlabeled"
FOLD_FILES = (LABELED, UNLABELED)
#: In fold1_10_labeled.json and instances_train2017.1@10.json: the 1.
_FOLD = re.compile(r"(?<=(?<![a-z])fold)[-_]?\d+|(?<=\.)\d+(?=@)", re.IGNORECASE)


@dataclass(frozen=True)
class Run:
    """One finished run."""

    path: Path
    settings: dict[str, Any]  # those with an effect, by dotted key
    results: dict[str, Any]  # of results.json
    digests: dict[str, str | None]  # of the labelled, unlabelled and validation data that it has read
    curve: list[tuple[int, float, float]]  # step, seconds of training until then, the teacher's AP
    seconds: float  # of training, without evaluations
    waiting: float  # seconds of these that were spent waiting for data
    warnings: list[str]  # of training
    over: tuple[str, ...] = ()  # values of other settings in which the runs of a row may differ

    @property
    def name(self) -> str:
        """Detector and paradigm, of each stage if they differ."""
        return f"{self.settings.get('detector', 'detector')}, {paradigm_of(stage_paradigms(self.settings))}"

    @property
    def draw(self) -> tuple[Any, ...]:
        """Seed, fold and the like, which tell the runs of a row apart and pair those of two rows."""
        return *(str(self.settings.get(key)) for key in (SEED, BUILT_IN_FOLD, LABELED)), *self.over


@dataclass(frozen=True)
class Row:
    """Runs that only differ in seed and fold."""

    name: str
    runs: list[Run]

    def values(self, which: str, figure: str) -> list[float | None]:
        """The figure of each run, by seed and fold."""
        return [run.results[which].get(figure) for run in sorted(self.runs, key=lambda run: run.draw)]


@dataclass(frozen=True)
class Comparison:
    """Rows in the order in which they were given, and {key: values by row} where the rows differ; "" has no effect there."""

    rows: list[Row]
    differing: dict[str, list[str]]
    notes: list[str]


def compare(paths: Sequence[Path], over: Sequence[str] = (), labels: Mapping[Path, str] | None = None) -> Comparison:
    """Read runs and group them.

    Args:
        paths: run folders.
        over: keys, besides seed and fold, that may differ between the runs of a row.
        labels: by path, what a run's row is called besides its detector and paradigm; None: by its settings.

    Raises:
        UserError: a run is not finished, is given twice, was evaluated on another data set than the first, or learnt from
            files that have changed since another run of its row.
    """
    runs = [read_run(path) for path in paths]
    unknown = [key for key in over if not any(key in run.settings for run in runs)]
    if unknown:
        raise UserError(f"--over {unknown[0]}: no run has such a setting with an effect - give a key as in config.yaml")
    runs = [replace(run, over=tuple(json.dumps(run.settings.get(key)) for key in over)) for run in runs]
    first = runs[0]
    for run in runs[1:]:
        _refuse_other_images(run, first)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_shared(run, over), sort_keys=True), []).append(run)
    for members in groups.values():
        _refuse_copies(members)
        _refuse_changed_data(members)
    differing = _differing(list(groups.values()), over)
    names = _names(list(groups.values()), differing, labels or {})
    rows = [Row(name, members) for name, members in zip(names, groups.values())]
    notes = [*_other_labels(runs)]
    notes += [
        f"{row.name}: its seeds or folds are not those of {first.name}, so the difference holds their spread too"
        for row, first in ((row, reference(rows, row)) for row in rows)
        if {run.draw for run in row.runs} != {run.draw for run in first.runs}
    ]  # fmt: skip
    return Comparison(rows, differing, notes)


def reference(rows: Sequence[Row], row: Row) -> Row:
    """The row that a row is compared with: the first with its detector and its labelled images."""
    return next(other for other in rows if _labeled_by(other) == _labeled_by(row))


def read_run(path: Path) -> Run:
    """A run folder's settings, results and curve. Raises UserError unless it is finished and evaluated."""
    config, results = _read(path / "config.yaml", path), _read(path / "results.json", path)
    told = dotted(plain_yaml(config, str(path / "config.yaml"), RENAMED))
    try:
        found = json.loads(results)
        step, _ = found["step"], [float(found[which]["AP"] or 0) for which in ("teacher", "student")]
        batch = {f"{BATCH}.{kind}": found[BATCH][kind] for kind in ("labeled", "unlabeled")}
        settings = effective(told | batch | {PRECISION: found[PRECISION]})
        digests = {which: found["data"][which] and found["data"][which]["sha256"] for which in ("labeled", "unlabeled", "val")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'results.json'}: not the results of a run - give a folder that train.py wrote") from error
    if step != settings.get("run.steps"):
        raise UserError(f"{path}: not finished (evaluated at step {step} of {settings.get('run.steps')}) - "
                        "let it end, or continue it with --resume auto")
    curve, seconds, waiting, before = [], 0.0, 0.0, 0
    lines = list(read_metrics(path / "metrics.jsonl"))
    for line in lines:
        if line.get("step_seconds"):
            seconds += (line["step"] - before) * line["step_seconds"]
            waiting += (line["step"] - before) * (line.get("data_seconds") or 0)
            before = line["step"]
        if line.get("teacher/AP") is not None:
            curve.append((line["step"], seconds, line["teacher/AP"]))
    return Run(path, settings, found, digests, curve, seconds, waiting, logged_warnings(lines))


def tables(comparison: Comparison) -> dict[str, Table]:
    """The tables by title: results, the student's, AP on the way, cost, AP of each class, settings that differ."""
    rows, runs = comparison.rows, [run for row in comparison.rows for run in row.runs]
    versus = [f"{name} - baseline" for name in COMPARED] if len(rows) > 1 else []
    results: Table = [["", *COMPARED, *versus, "runs"]]
    student: Table = [["student", *COMPARED]]
    cost: Table = [["", "minutes of training", "seconds per step", "waiting for data", "steps", "images of a step"]]
    for row in rows:
        means = [_mean_and_spread(row.values("teacher", name)) for name in COMPARED]
        differences = [_difference(row, reference(rows, row), name) for name in COMPARED] if versus else []
        results.append([row.name, *means, *differences, str(len(row.runs))])
        student.append([row.name, *(_mean_and_spread(row.values("student", name)) for name in COMPARED)])
        cost.append([row.name, *_cost(row)])
    found = {"Results": results, "Student (the teacher is its moving average)": student}
    if any(len(run.curve) > 1 for run in runs):
        way: Table = [["step", *(row.name for row in rows)]]
        for step in sorted({point[0] for run in runs for point in run.curve}):
            at_step = ([dict((at, ap) for at, _, ap in run.curve).get(step) for run in row.runs] for row in rows)
            way.append([str(step), *map(_mean_and_spread, at_step)])
        found["Teacher's AP on the way"] = way
    found["Cost"] = cost
    classes = list(runs[0].results["teacher"].get("classes", {}))
    if classes:
        per_class: Table = [["teacher's AP of", *(row.name for row in rows)]]
        for name in classes:
            values = ([run.results["teacher"]["classes"].get(name) for run in row.runs] for row in rows)
            per_class.append([name, *map(_mean_and_spread, values)])
        found["Classes"] = per_class
    if comparison.differing:
        header = ["setting", *(row.name for row in rows)]
        found["Settings that differ"] = [header, *([key, *values] for key, values in comparison.differing.items())]
    return found


def to_markdown(comparison: Comparison) -> str:
    """All tables, as text that is readable as it is."""
    parts = []
    for title, rows in tables(comparison).items():
        cells = [[cell.replace("|", "\\|") for cell in line] for line in rows]
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        parts.append("\n".join([f"## {title}", "", *lines]))
    parts.append("\n".join(_remarks(comparison)))
    return "\n\n".join(parts) + "\n"


def to_html(comparison: Comparison) -> str:
    """The same and the curves of AP, as one page without any reference to another file."""
    parts = [section(title, table(lines)) for title, lines in tables(comparison).items()]
    curves = draw_curves(comparison)
    remarks = [paragraph(line.removeprefix("- ")) for line in _remarks(comparison)]
    return page("Comparison of runs", [parts[0], *remarks, *([curves] if curves else []), *parts[1:]])


def draw_curves(comparison: Comparison) -> str:
    """Charts of the teachers' AP against step and training time, each run a thin line, their mean a thick one, as HTML.

    Empty when no run was evaluated on its way.
    """
    if not any(len(run.curve) > 1 for row in comparison.rows for run in row.runs):
        return ""
    against = []
    for column, (title, label, scale) in enumerate((("Teacher's AP against step", "step", 1),
                                                    ("Teacher's AP against time", "minutes of training", 60))):
        lines = []
        for number, row in enumerate(comparison.rows):
            curves = [[(point[column] / scale, point[2]) for point in run.curve] for run in row.runs]
            lines += [Line(row.name, curve, number, thin=len(curves) > 1) for curve in curves]
            lines.append(Line(row.name, _mean_curve(row, column, scale), number))
        against.append(chart(title, lines, label, size=(560, 300)))
    return charts(against)


def save(comparison: Comparison, folder: Path) -> None:
    """Write ``compare.md`` and ``compare.html``. Raises UserError when the folder cannot be written."""
    texts = {"compare.md": to_markdown(comparison), "compare.html": to_html(comparison)}
    with writing(folder, "give another folder"):
        for name, text in texts.items():
            write_text(folder / name, text)


def _mean_curve(row: Row, column: int, scale: float) -> list[Point]:
    """The mean curve of a row's runs, if there are several, evaluated at the same steps; otherwise empty."""
    curves = [run.curve for run in row.runs]
    if len(curves) < 2 or len({tuple(point[0] for point in curve) for curve in curves}) > 1:
        return []
    return [(statistics.fmean(point[column] for point in points) / scale, statistics.fmean(point[2] for point in points))
            for points in zip(*curves)]


def _cost(row: Row) -> list[str]:
    """The cells of a row in the table of costs; times are means over its runs."""
    first, seconds = row.runs[0], statistics.fmean(run.seconds for run in row.runs)
    steps = int(first.settings["run.steps"])
    waiting = statistics.fmean(run.waiting for run in row.runs) / seconds if seconds else 0.0
    images = [first.settings.get(f"{BATCH}.{kind}") for kind in ("labeled", "unlabeled")]
    return [f"{seconds / 60:.1f}", f"{seconds / steps:.3f}", f"{waiting:.0%}", str(steps),
            " + ".join(str(number) for number in images if number is not None)]


def _read(file: Path, run: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        if not run.is_dir():
            problem = "is a file, not a folder" if run.exists() else "there is no such run folder"
            raise UserError(f"{run}: {problem} - give folders that train.py wrote") from None
        what = "not finished" if file.name == "results.json" else "not a run folder"
        raise UserError(f"{run}: {what} (no {file.name}) - give finished runs that have a validation set") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a text file - give a folder that train.py wrote") from error


def _labeled_by(row: Row) -> tuple[Any, ...]:
    """Detector and labelled images, whatever the fold."""
    settings = row.runs[0].settings
    labeled = settings.get(LABELED)
    images = settings.get("data.shapes_labeled") if labeled is None else _FOLD.sub("*", labeled)
    return settings.get("detector"), images


def _shared(run: Run, over: Sequence[str]) -> dict[str, Any]:
    """The settings that all runs of a row have in common."""
    kept = {key: value for key, value in run.settings.items() if key not in (SEED, BUILT_IN_FOLD, *over)}
    return kept | {key: _FOLD.sub("*", kept[key]) for key in FOLD_FILES if isinstance(kept.get(key), str)}


def _evaluated_on(run: Run) -> tuple[str, list[str]]:
    """The images, and the classes."""
    val = run.settings.get("data.val")
    images = f"{run.settings.get('data.shapes_val')} synthetic images" if val is None else str(val)
    return images, list(run.results["teacher"].get("classes", {}))


def _drawing(run: Run) -> Any:
    """Which drawing of the built-in data a run was evaluated on; None for files."""
    return run.settings.get(BUILT_IN_FOLD) if run.settings.get("data.val") is None else None


def _refuse_other_images(run: Run, first: Run) -> None:
    """UserError unless both were evaluated on the same images, boxes and classes, wherever their file is. Folds of the built-in
    data have their own images, as many in each."""
    own, firsts = _evaluated_on(run), _evaluated_on(first)
    same_images = run.digests["val"] == first.digests["val"] if _drawing(run) == _drawing(first) else own == firsts
    if own[1] == firsts[1] and same_images:
        return
    same = " - a file of the same name, but with other images or boxes" if own == firsts else ""
    raise UserError(f"{run.path}: evaluated on other images or classes than {first.path} ({own[0]} and {firsts[0]}{same}) - "
                    "compare them apart")


def _refuse_changed_data(runs: Sequence[Run]) -> None:
    """Runs of the same files must have read the same boxes from them."""
    seen: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        for which in ("labeled", "unlabeled"):
            files = (which, *(run.settings.get(key) for key in (BUILT_IN_FOLD, *FOLD_FILES)))
            other = seen.setdefault(files, run)
            if other.digests[which] != run.digests[which]:
                raise UserError(f"{run.path}: its {which} data are not those of {other.path}, though the files' names are the "
                                "same - a mean over both would be of two things, so compare them apart")


def _other_labels(runs: Sequence[Run]) -> Iterator[str]:
    """A note on each file, or drawing of the built-in data, from which not all runs have read the same labels."""
    first: dict[str, Run] = {}
    told = set()
    for run in runs:
        digest, labeled = run.digests["labeled"], run.settings.get(LABELED)
        data = ([run.settings.get(key) for key in (BUILT_IN_FOLD, "data.shapes_labeled")] if labeled is None
                else os.path.abspath(labeled))  # fmt: skip
        rules = {key: value for key, value in run.settings.items() if key.startswith("data.rules.")}  # told as settings that differ
        key = json.dumps([data, rules], sort_keys=True)
        other = first.setdefault(key, run)
        if other.digests["labeled"] != digest and (key, digest) not in told:
            told.add((key, digest))
            yield (f"{other.path} and {run.path}: their labels differ, though both are of {labeled or 'the built-in data'}, so "
                   "differences in AP may be due to that - train the older again")


def _refuse_copies(runs: Sequence[Run]) -> None:
    seen: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        draw = *run.draw, str(run.settings.get(UNLABELED))
        if draw in seen:
            raise UserError(f"{run.path}: has the settings, seed and fold of {seen[draw].path} - a mean over both would "
                            "count one run twice, so give one of them")
        seen[draw] = run


def _differing(groups: Sequence[Sequence[Run]], over: Sequence[str]) -> dict[str, list[str]]:
    """{key: value by row} for the keys that distinguish the rows; "" where a key has no effect."""
    shared = [_shared(members[0], over) for members in groups]
    names = [members[0].name for members in groups]
    found = {}
    for key in dict.fromkeys(key for settings in shared for key in settings):
        values = [yaml_scalar(settings[key]) if key in settings else "" for settings in shared]
        told = {value for value in values if value}
        # Between rows of the same name, also what only one of them has, as after an update of the program.
        alike = any(a != b and names[i] == names[j] for i, a in enumerate(values) for j, b in enumerate(values))
        if len(told) > 1 or alike:
            found[key] = values
    return found


def _names(groups: Sequence[Sequence[Run]], differing: Mapping[str, Sequence[str]], labels: Mapping[Path, str]) -> list[str]:
    """Detector, paradigm and label; for those that occur more than once, also the settings by which they differ: from each other,
    or from the first one if these are many."""
    names = [", ".join(filter(None, (members[0].name, labels.get(members[0].path)))) for members in groups]
    full = []
    for row, name in enumerate(names):
        alike = [other for other, its in enumerate(names) if its == name]
        keys = [key for key, values in differing.items() if len({values[other] for other in alike}) > 1]
        if len(keys) > 3:
            keys = [key for key in keys if differing[key][row] != differing[key][alike[0]]]
        told = [f"{'.'.join(key.split('.')[-2:])}={differing[key][row] or 'unset'}" for key in keys]
        full.append(name if not told else f"{name}, {', '.join(told[:3])}{', ...' if len(told) > 3 else ''}")
    doubles = {name for name in full if full.count(name) > 1}
    return [f"{name} ({number})" if name in doubles else name for number, name in enumerate(full, 1)]


def _mean_and_spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.2f}{spread}"


def _difference(row: Row, first: Row, figure: str) -> str:
    """Difference of the teachers' means; with its spread if both rows have the same seeds and folds, run by run. Empty if they
    were evaluated on different drawings of the built-in data."""
    if row is first or {_drawing(run) for run in row.runs} != {_drawing(run) for run in first.runs}:
        return ""
    ours, theirs = ([value or 0.0 for value in one.values("teacher", figure)] for one in (row, first))
    paired = sorted(run.draw for run in row.runs) == sorted(run.draw for run in first.runs) and len(ours) > 1
    spread = f" ± {statistics.stdev(a - b for a, b in zip(ours, theirs)):.2f}" if paired else ""
    return f"{statistics.fmean(ours) - statistics.fmean(theirs):+.2f}{spread}"


def _remarks(comparison: Comparison) -> Iterator[str]:
    yield ("- AP, AP50, AP75: the teacher's, mean ± standard deviation over seeds and folds. Differences are to the baseline, the "
           "first row of the same detector and labelled images, with their deviation run by run where seeds and folds are equal. "
           "Times are those of this machine then.")
    yield from (f"- {note}." for note in comparison.notes)
    for row in comparison.rows:
        yield f"- {row.name}: {', '.join(str(run.path) for run in row.runs)}"
        for run in row.runs:
            for change in run.results.get("changed", ()):
                yield f"- {run.path}: had other settings or data until step {change['step']} ({'; '.join(change['changes'])})"
            yield from (f"- {run.path}: warned at {warning}" for warning in run.warnings)
