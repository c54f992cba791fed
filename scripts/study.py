"""Train a whole grid of runs, a few at a time, and compare them in one table.

    python scripts/study.py configs/studies/quickstart.yaml [--jobs 2] [--output DIR] [--dry-run] [--set run.steps=40 ...]

A study file names detectors, paradigms, folds, seeds and rows of settings; docs/studies.md explains it. Each run is a
``train.py`` process with a log of its own. The same command continues where an earlier one was stopped: finished runs are left
alone, others continue from their checkpoints. A run that fails does not stop the others.

Exit status: 0; 1 when a run has failed; 2 after a mistake, reported in one line; 143 or 130 when a signal has stopped it,
after the runs' checkpoints.
"""
from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import Parser, main_guard, number
from read_settings import DETECTORS, load_settings, train_parser
from shared_flags import RULES

from dtg_core.drafts import write_text, writing
from dtg_core.errors import UserError, nearest
from dtg_core.ranges import Count
from dtg_core.settings_text import dotted, flatten, yaml_scalar

if TYPE_CHECKING:
    from dtg_core.engine.jobs import Job
    from dtg_core.engine.study import Phase, Plan, PlannedRun, Study

#: Keys of a study file that say which runs there are, which --set may change, too.
GRID = ("detectors", "paradigms", "seeds", "data.percents", "data.folds")
TRAIN = Path(__file__).resolve().with_name("train.py")


def parser() -> Parser:
    result = Parser("Train a grid of runs, a few at a time, and compare them.")
    add = result.add_argument
    add("study", type=Path, metavar="STUDY.yaml", help="the study file; see configs/studies and docs/studies.md")
    add("--jobs", type=number(Count), default=1, metavar="N",
        help="runs at a time; each gets cores / N threads (default: 1)")
    add("--output", type=Path, metavar="DIR", help="folder of the study (default: runs/NAME of the study file)")
    add("--launcher", metavar="COMMAND",
        help='command that starts train.py, e.g. "accelerate launch --multi_gpu" (default: this Python)')
    result.add_list("--rows", "NAME", "only these rows of the study file (default: all)")
    add("--dry-run", action="store_true", help="check the study, print the commands of its runs, and exit")
    result.add_list("--set", "dotted.key=value", f"change a setting of all runs, or which runs there are ({', '.join(GRID)})")
    return result


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)

    from dtg_core.engine.study import only_rows, plan, read_study, require_data, require_study_folder

    grid = [text for text in arguments.set if text.partition("=")[0] in GRID]
    overrides = [text for text in arguments.set if text not in grid]
    study = read_study(arguments.study, grid)
    if arguments.rows:
        study = only_rows(study, arguments.study, arguments.rows)
    for detector in study.detectors:
        if detector not in DETECTORS:
            raise UserError(f"{arguments.study}: detectors: unknown value {detector!r}{nearest(detector, DETECTORS)}")
    folder = arguments.output or Path("runs") / arguments.study.stem
    require_study_folder(folder)
    warnings: list[str] = []
    planned = plan(study, arguments.study, folder, overrides, lambda given: settings_of(given, warnings))
    require_data(study, arguments.study, planned.runs)
    for warning in dict.fromkeys(warnings):
        _say(f"warning: {warning}")
    for copy, original in planned.copies.items():
        _say(f"{copy}: left out, as it would be the same as {original}")
    if arguments.dry_run:
        for line in _commands(planned):
            print(line)
        return 0
    launcher = shlex.split(arguments.launcher) if arguments.launcher else [sys.executable]
    return _run(study, arguments.study, planned, folder, arguments.jobs, [*launcher, str(TRAIN)], overrides)


def settings_of(arguments: Sequence[str], warnings: list[str]) -> Mapping[str, Any]:
    """All settings of a train.py command line by dotted key; its warnings go to ``warnings``."""
    settings, _, told = load_settings(train_parser().parse(arguments))
    warnings += told
    return dotted(json.loads(json.dumps(flatten(settings))))


def _commands(planned: Plan) -> list[str]:
    commands = [["--stop-at", str(phase.steps), *phase.arguments] for phase in planned.phases]
    commands += [list(run.arguments) for run in planned.runs if not run.finished]
    done = sum(run.finished for run in planned.runs)
    lines = [shlex.join(["python", os.path.relpath(TRAIN), *command]) for command in commands]
    return [*lines, f"{len(planned.runs)} runs ({done} finished) and {len(planned.phases)} shared supervised phases"]


def _run(
    study: Study, file: Path, planned: Plan, folder: Path, parallel: int, train: Sequence[str], overrides: Sequence[str]
) -> int:
    """Train what is not finished and compare. Returns the exit status."""
    from dtg_core.engine.folder import RunFolder
    from dtg_core.engine.jobs import run_jobs
    from dtg_core.engine.signals import StopSignals
    from dtg_core.engine.study import MARK

    lock = RunFolder(folder)  # held until this process ends
    lock.claim()
    if not (folder / MARK).exists():
        with writing(folder):
            write_text(folder / MARK, file.read_text(encoding="utf-8"))
    if study.data.source:
        _split(study, folder / "splits", overrides)
    todo = _jobs(planned, folder / "logs", train)
    finished = [run for run in planned.runs if run.finished]
    _say(f"{folder}: {len(planned.runs)} runs, {len(finished)} of them finished, and {len(planned.phases)} shared supervised "
         f"phases to train; {parallel} at a time")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // parallel)), **os.environ}
    with StopSignals(patient=True) as signals:
        failed = run_jobs(todo, parallel, environment, _say, signals)
    for name, problem in failed.items():
        _say(f"error: {name}: {problem}")
    if signals.received:
        done = sum(run.finished for run in planned.runs)
        _say(f"stopped by signal {signals.received} with {done} of {len(planned.runs)} runs finished; the same command goes on")
        return 128 + signals.received
    ended = {run.folder: run.row for run in planned.runs if run.finished}
    if ended:
        from compare import show

        show(list(ended), folder, labels=ended)
    return 1 if failed else 0


def _jobs(planned: Plan, logs: Path, train: Sequence[str]) -> list[Job]:
    """What is to be done: the phase of a run just before the first run that needs it."""
    from dtg_core.engine.jobs import Job
    from dtg_core.engine.study import steps_done

    def job(name: str, work: Phase | PlannedRun, start: int, told: Callable[[], str], after: str | None) -> Job:
        return Job(
            name, lambda: [*train, *work.command()], logs / f"{name}.log", work.steps - start,
            lambda: max(steps_done(work.folder) - start, 0), told, after,
        )  # fmt: skip

    phases, jobs = set(planned.phases), dict[str, Job]()
    for run in sorted(planned.runs, key=lambda run: run.draw):  # all paradigms of a seed before the next seed
        if run.finished:
            continue
        phase = run.phase if run.phase in phases else None
        if phase and phase.name not in jobs:
            jobs[phase.name] = job(phase.name, phase, 0, str, None)
        jobs[run.name] = job(run.name, run, run.phase.steps if run.phase else 0, run.told, phase.name if phase else None)
    return list(jobs.values())


def _split(study: Study, folder: Path, overrides: Sequence[str]) -> None:
    """Make the splits of the study's source, or check that existing ones are of the same source."""
    import make_splits

    data = study.data
    manifest = folder / "manifest.json"
    assert data.source is not None
    source = Path(data.source).expanduser()
    if manifest.is_file():
        told = json.loads(manifest.read_text(encoding="utf-8"))
        wanted = {"sha256": make_splits.sha256(source), "min_per_class": data.min_per_class, "group_by": data.group_by}
        odd = [key for key, value in wanted.items() if told.get(key) != value]
        if odd:
            raise UserError(f"{folder}: made of another {data.source} or in another way ({', '.join(odd)}) - give another "
                            "--output, or delete the folder")
        have = {split["name"] for split in told["splits"]}
        if {f"fold{fold}_{percent:g}" for percent in data.percents for fold in data.folds} <= have:
            return
    group = ["--group-by", data.group_by] if data.group_by else []
    settings = [f"{key}={yaml_scalar(value)}" for key, value in dotted(study.set).items()]
    rules = [text for text in (*settings, *overrides) if text.startswith(RULES)]
    make_splits.main([
        "--annotations", str(source), "--output", str(folder), "--percent", *(f"{percent:g}" for percent in data.percents),
        "--folds", f"{min(data.folds)}-{max(data.folds)}", "--min-per-class", str(data.min_per_class), "--overwrite", *group,
        *(["--set", *rules] if rules else []),
    ])  # fmt: skip


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main_guard(main)
