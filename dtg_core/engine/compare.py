"""Finished runs side by side, in the form of the paper's tables.

Runs whose settings differ in the seed or the fold only are one row: a mean and the standard deviation over them. A *fold* is
another draw of the same data: ``data.shapes_seed``, or files whose names differ in the number of a fold only. Settings that
cannot have had an effect, as the sparse threshold of a dense stage, are left out before runs are compared.
"""
from __future__ import annotations

import base64
import html
import importlib
import io
import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dtg_core.config import Config
from dtg_core.engine.metrics import read_metrics
from dtg_core.errors import UserError
from dtg_core.settings import dotted, plain_yaml, yaml_scalar

FIGURES = ("AP", "AP50", "AP75")
#: Settings that change no weight and no figure.
SILENT = {"run.output", "run.log_every", "run.evaluate_every", "run.evaluate_batch", "run.checkpoint_every", "run.trackers",
          "run.max_skipped", "data.workers", "optim.reference_batch"}  # fmt: skip
SEED, EMBEDDED_FOLD = "run.seed", "data.shapes_seed"
FOLD_FILES = ("data.labeled", "data.unlabeled")
#: In fold1_10_labeled.json and instances_train2017.1@10.json: the 1.
_FOLD = re.compile(r"(?<=fold)[-_]?\d+|(?<=\.)\d+(?=@)", re.IGNORECASE)
#: Settings of a stage's rule that only one paradigm reads.
SPARSE_ONLY = {"pseudo_score", "proposals"}
#: Settings that only matter where something is learnt from unlabelled images.
UNLABELED_ONLY = {"data.unlabeled", "data.unlisted", "data.unlabeled_per_device", "data.shapes_unlabeled", "views.geometric",
                  "views.rotate", "views.shear", "views.translate", "views.erase_patches", "views.erase_size"}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One finished run."""

    path: Path
    settings: dict[str, Any]  # those with an effect, by dotted key
    results: dict[str, Any]  # of results.json
    curve: list[tuple[int, float, float]]  # step, seconds of training until then, the teacher's AP
    seconds: float  # of training, without evaluations

    @property
    def name(self) -> str:
        """Detector and paradigm, of each stage if they differ."""
        stages = {key.split(".")[2]: value for key, value in self.settings.items() if _is_stage_paradigm(key)}
        kinds = set(stages.values())
        if len(kinds) <= 1:
            paradigm = "supervised" if kinds <= {"none"} else kinds.pop()
        else:
            paradigm = ", ".join(f"{stage} {value}" for stage, value in stages.items())
        return f"{self.settings.get('detector', 'detector')}, {paradigm}"

    @property
    def draw(self) -> tuple[Any, ...]:
        """Seed and fold: what may differ between the runs of a row."""
        return tuple(str(self.settings.get(key)) for key in (SEED, EMBEDDED_FOLD, *FOLD_FILES))


@dataclass(frozen=True)
class Row:
    """Runs that differ in seed and fold only."""

    name: str
    runs: list[Run]

    def values(self, which: str, figure: str) -> list[float | None]:
        """Of each run, by seed and fold."""
        return [run.results[which].get(figure) for run in sorted(self.runs, key=lambda run: run.draw)]


@dataclass(frozen=True)
class Comparison:
    """Rows in the order in which they were given, and {key: values by row} where the rows differ; "" has no effect there."""

    rows: list[Row]
    differing: dict[str, list[str]]
    notes: list[str]


Table = list[list[str]]  # the first is the header


def compare(paths: Sequence[Path], stages: Mapping[str, Sequence[str]], over: Sequence[str] = ()) -> Comparison:
    """Read runs and group them.

    Args:
        paths: run folders.
        stages: names of each detector's stages; a detector that is not in it has all stages of its settings.
        over: keys, beside seed and fold, that may differ between the runs of a row.

    Raises:
        UserError: a run is not finished, is given twice, or was evaluated on another data set than the first.
    """
    runs = [read_run(path, stages) for path in paths]
    unknown = [key for key in over if not any(key in run.settings for run in runs)]
    if unknown:
        raise UserError(f"--over {unknown[0]}: no run has such a setting with an effect - give a key as in config.yaml")
    first = runs[0]
    for run in runs[1:]:
        if _evaluated_on(run) != _evaluated_on(first):
            raise UserError(f"{run.path}: evaluated on other images or classes than {first.path} "
                            f"({_evaluated_on(run)[0]} and {_evaluated_on(first)[0]}) - compare them apart")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_shared(run, over), sort_keys=True), []).append(run)
    for members in groups.values():
        _refuse_copies(members, over)
    differing = _differing(list(groups.values()), over)
    rows = [Row(name, members) for name, members in zip(_names(list(groups.values()), differing), groups.values())]
    notes = [
        f"{row.name}: its seeds or folds are not those of the first row, so the difference holds their spread too"
        for row in rows[1:] if {run.draw for run in row.runs} != {run.draw for run in rows[0].runs}
    ]  # fmt: skip
    return Comparison(rows, differing, notes)


def read_run(path: Path, stages: Mapping[str, Sequence[str]]) -> Run:
    """A run folder's settings, results and curve. Raises UserError unless it is finished and evaluated."""
    config, results = _read(path / "config.yaml", path), _read(path / "results.json", path)
    settings = effective(dotted(plain_yaml(config, str(path / "config.yaml"))), stages)
    try:
        found = json.loads(results)
        step, _ = found["step"], [float(found[which]["AP"] or 0) for which in ("teacher", "student")]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'results.json'}: not the results of a run - give a folder that train.py wrote") from error
    if step != settings.get("run.steps"):
        raise UserError(f"{path}: not finished (evaluated at step {step} of {settings.get('run.steps')}) - "
                        "let it end, or continue it with --resume auto")
    curve, seconds, before = [], 0.0, 0
    file = path / "metrics.jsonl"
    for line in read_metrics(file) if file.is_file() else ():
        if line.get("step_seconds"):
            seconds += (line["step"] - before) * line["step_seconds"]
            before = line["step"]
        if line.get("teacher/AP") is not None:
            curve.append((line["step"], seconds, line["teacher/AP"]))
    return Run(path, settings, found, curve, seconds)


def effective(settings: Mapping[str, Any], stages: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The settings that had an effect: without other detectors' sections and stages, and what the paradigms do not read."""
    detector = settings.get("detector")
    core = {field.name for field in fields(Config)}
    own = stages.get(str(detector))
    paradigms = {key.split(".")[2]: value for key, value in settings.items() if _is_stage_paradigm(key)}
    paradigms = {stage: value for stage, value in paradigms.items() if own is None or stage in own}
    supervised = set(paradigms.values()) <= {"none"}

    def matters(key: str) -> bool:
        parts = key.split(".")
        if key in SILENT or key == "paradigm":  # the stages' own say more than the run's
            return False
        if len(parts) > 1 and parts[0] not in core and parts[0] != detector:
            return False
        if parts[:2] == ["guidance", "stages"]:
            paradigm = paradigms.get(parts[2])
            sparse = parts[-1] in SPARSE_ONLY
            return paradigm is not None and (parts[-1] == "paradigm" or paradigm == ("sparse" if sparse else "dense"))
        if supervised and (key in UNLABELED_ONLY or parts[0] == "guidance"):
            return False
        embedded = settings.get("data.labeled") is None
        return not (key.startswith("data.shapes_") and not embedded)

    return {key: value for key, value in settings.items() if matters(key)}


def tables(comparison: Comparison) -> dict[str, Table]:
    """The tables by title: results, settings that differ, AP of each class."""
    rows = comparison.rows
    results: Table = [["", *FIGURES, "difference", *(f"student {name}" for name in FIGURES), "runs", "minutes"]]
    for row in rows:
        both = ([_mean_and_spread(row.values(which, name)) for name in FIGURES] for which in ("teacher", "student"))
        teacher, student = both
        minutes = statistics.fmean(run.seconds for run in row.runs) / 60
        results.append([row.name, *teacher, _difference(row, rows[0]), *student, str(len(row.runs)), f"{minutes:.1f}"])
    found = {"Results": results}
    if comparison.differing:
        header = ["setting", *(row.name for row in rows)]
        found["Settings that differ"] = [header, *([key, *values] for key, values in comparison.differing.items())]
    classes = list(rows[0].runs[0].results["teacher"].get("classes", {}))
    if classes:
        per_class: Table = [["teacher's AP of", *(row.name for row in rows)]]
        for name in classes:
            values = ([run.results["teacher"]["classes"].get(name) for run in row.runs] for row in rows)
            per_class.append([name, *map(_mean_and_spread, values)])
        found["Classes"] = per_class
    return found


def to_markdown(comparison: Comparison) -> str:
    """All tables, as text that is readable as it stands."""
    parts = []
    for title, table in tables(comparison).items():
        cells = [[cell.replace("|", "\\|") for cell in line] for line in table]
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        parts.append("\n".join([f"## {title}", "", *lines]))
    parts.append("\n".join(_remarks(comparison)))
    return "\n\n".join(parts) + "\n"


def to_html(comparison: Comparison, picture: bytes | None) -> str:
    """One page without any reference to another file; ``picture`` is a PNG."""
    body = []
    for number, (title, table) in enumerate(tables(comparison).items()):
        lines = [_html_line(line, "td" if row else "th") for row, line in enumerate(table)]
        body.append(f"<h2>{title}</h2><div><table>{''.join(lines)}</table></div>")
        if number == 0 and picture is not None:
            data = base64.b64encode(picture).decode()
            body.append(f'<img alt="AP of the teachers against step and time" src="data:image/png;base64,{data}">')
    body += [f"<p>{html.escape(line.removeprefix('- '))}</p>" for line in _remarks(comparison)]
    return _PAGE.replace("BODY", "\n".join(body))


def draw_curves(comparison: Comparison) -> bytes | None:
    """PNG of the teachers' AP against step and training time, each run a thin line, their mean a thick one. None: without
    matplotlib, or when no run was evaluated on its way."""
    try:
        figure_of = importlib.import_module("matplotlib.figure").Figure  # the extra "report"; no window and no global state
    except ImportError:
        return None
    if not any(run.curve for row in comparison.rows for run in row.runs):
        return None
    figure = figure_of(figsize=(10, 3.8), layout="constrained")
    against = figure.subplots(1, 2, sharey=True)
    for number, row in enumerate(comparison.rows):
        color = f"C{number % 10}"
        curves = [run.curve for run in row.runs if run.curve]
        alone = len(curves) == 1
        for column, axes in enumerate(against):
            scale = 60 if column else 1
            for curve in curves:
                axes.plot([point[column] / scale for point in curve], [point[2] for point in curve], color=color, marker="o",
                          linewidth=2 if alone else 0.7, alpha=1 if alone else 0.5, markersize=4 if alone else 2)
            if not alone and len({tuple(point[0] for point in curve) for curve in curves}) == 1:
                mean = [tuple(map(statistics.fmean, zip(*points))) for points in zip(*curves)]
                axes.plot([point[column] / scale for point in mean], [point[2] for point in mean], color=color, linewidth=2)
        against[0].plot([], [], color=color, label=row.name)
    for axes, label in zip(against, ("step", "minutes of training")):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
    against[0].set_ylabel("teacher's AP")
    against[0].legend(frameon=False, fontsize="small")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Comparison of runs</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child { text-align: left; }
tr:first-child th { border-bottom: 2px solid #222; }
img { max-width: 100%; margin-top: 1rem; }
p { color: #555; margin: .4rem 0; }
</style></head><body>
<h1>Comparison of runs</h1>
BODY
</body></html>
"""


def _html_line(line: Sequence[str], tag: str) -> str:
    cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line[1:])
    return f"<tr><th>{html.escape(line[0])}</th>{cells}</tr>"


def _read(file: Path, run: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        if not run.is_dir():
            raise UserError(f"{run}: there is no such run folder - give folders that train.py wrote") from None
        what = "not finished" if file.name == "results.json" else "not a run folder"
        raise UserError(f"{run}: {what} (no {file.name}) - give finished runs that have a validation set") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a text file - give a folder that train.py wrote") from error


def _is_stage_paradigm(key: str) -> bool:
    return key.startswith("guidance.stages.") and key.endswith(".paradigm")


def _shared(run: Run, over: Sequence[str]) -> dict[str, Any]:
    """The settings that all runs of a row have in common."""
    kept = {key: value for key, value in run.settings.items() if key not in (SEED, EMBEDDED_FOLD, *over)}
    return kept | {key: _FOLD.sub("*", kept[key]) for key in FOLD_FILES if isinstance(kept.get(key), str)}


def _evaluated_on(run: Run) -> tuple[str, list[str]]:
    """The images, and the classes."""
    val = run.settings.get("data.val")
    images = f"{run.settings.get('data.shapes_val')} embedded images" if val is None else str(val)
    return images, list(run.results["teacher"].get("classes", {}))


def _refuse_copies(runs: Sequence[Run], over: Sequence[str]) -> None:
    seen: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        draw = (*run.draw, *(json.dumps(run.settings.get(key)) for key in over))
        if draw in seen:
            raise UserError(f"{run.path}: has the settings, seed and fold of {seen[draw].path} - a mean over both would "
                            "count one run twice, so give one of them")
        seen[draw] = run


def _differing(groups: Sequence[Sequence[Run]], over: Sequence[str]) -> dict[str, list[str]]:
    """{key: value by row} of the keys to tell the rows apart by; "" where a key has no effect."""
    shared = [_shared(members[0], over) for members in groups]
    names = [members[0].name for members in groups]
    found = {}
    for key in dict.fromkeys(key for settings in shared for key in settings):
        values = [yaml_scalar(settings[key]) if key in settings else "" for settings in shared]
        told = {value for value in values if value}
        # Between rows of one kind also what only one of them knows, as after an update of the program.
        alike = any(a != b and names[i] == names[j] for i, a in enumerate(values) for j, b in enumerate(values))
        if len(told) > 1 or alike:
            found[key] = values
    return found


def _names(groups: Sequence[Sequence[Run]], differing: Mapping[str, Sequence[str]]) -> list[str]:
    """Detector and paradigm; for those that occur more than once, also the settings by which they differ."""
    names = [members[0].name for members in groups]
    full = []
    for row, name in enumerate(names):
        alike = [other for other, its in enumerate(names) if its == name]
        keys = [key for key, values in differing.items() if len({values[other] for other in alike}) > 1]
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


def _difference(row: Row, first: Row) -> str:
    """Of the teachers' mean AP; with its spread where both rows have the same seeds and folds, run by run."""
    if row is first:
        return ""
    ours, theirs = ([value or 0.0 for value in one.values("teacher", "AP")] for one in (row, first))
    paired = sorted(run.draw for run in row.runs) == sorted(run.draw for run in first.runs) and len(ours) > 1
    spread = f" ± {statistics.stdev(a - b for a, b in zip(ours, theirs)):.2f}" if paired else ""
    return f"{statistics.fmean(ours) - statistics.fmean(theirs):+.2f}{spread}"


def _remarks(comparison: Comparison) -> Iterator[str]:
    yield "- AP, AP50, AP75: the teacher's, mean ± standard deviation over seeds and folds; difference: in AP to the first."
    yield from (f"- {note}." for note in comparison.notes)
    for row in comparison.rows:
        yield f"- {row.name}: {', '.join(str(run.path) for run in row.runs)}"
