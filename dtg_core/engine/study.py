"""A study: a grid of training runs, which of them still have to be done, and what they can share.

Before ``guidance.start_step`` all paradigms train alike: no unlabelled image is used, and every draw depends on the seed and the
step. So runs that differ only in what takes effect later can start from one checkpoint, the *phase*, bit for bit as if each had
been trained from its first step. A phase's folder name contains a hash of all settings that take effect in it.

    STUDY/study.yaml the study file, as it was at first
    STUDY/splits/    labelled and unlabelled lists, when the study names a source
    STUDY/phases/    shared supervised phases
    STUDY/runs/      the run folders
    STUDY/logs/      the output of each process
    STUDY/compare.*  the table
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from dtg_core.config import RENAMED, Config
from dtg_core.data.files import no_folder
from dtg_core.data.findings import Report
from dtg_core.data.sources import open_sources
from dtg_core.engine.checkpoint import STATE, checkpoint_name
from dtg_core.engine.effective import BATCH, INPUTS, effective, stage_paradigms
from dtg_core.engine.folder import RunFolder
from dtg_core.engine.metrics import read_metrics
from dtg_core.engine.resume import digest
from dtg_core.errors import UserError, nearest
from dtg_core.ranges import Percent, Seed, Whole, check_ranges
from dtg_core.settings import load_config, overridden, plain_yaml, refuse
from dtg_core.settings_text import dotted, yaml_scalar

STAGES = "guidance.stages."
MARK = "study.yaml"  # in a study's folder
SPLITS = {"data.labeled", "data.unlabeled"}  # a study with a source makes them itself


@dataclass(frozen=True)
class StudyData:
    """Which images. With neither ``source`` nor ``labeled`` they are those of the config; a fold is then
    ``data.shapes_seed``, another drawing of the built-in synthetic data set. Paths are relative to the working folder."""

    source: str | None = None  # COCO JSON, shares of which keep their labels; the splits go into the study's folder
    labeled: str | None = None  # instead: existing splits, e.g. splits/fold{fold}_{percent}_labeled.json
    unlabeled: str | None = None  # with ``labeled``; {fold} and {percent} too. None: the config's
    val: str | None = None  # None: the config's
    images: str | None = None  # folder that file names in the JSONs are relative to
    percents: tuple[Percent, ...] = ()
    folds: tuple[Seed, ...] = ()
    min_per_class: Whole = 0  # add images to a share until each class has this many boxes
    group_by: str | None = None  # keep images together, like ``make_splits.py --group-by``


@dataclass(frozen=True)
class Study:
    """What a study file says."""

    config: str | None = None  # for all runs, relative to the study file; None: configs/quickstart.yaml
    detectors: tuple[str, ...] = ("gfl",)
    paradigms: tuple[Literal["dense", "sparse", "supervised"], ...] = ("supervised", "sparse", "dense")
    seeds: tuple[Seed, ...] = (0,)
    data: StudyData = field(default_factory=StudyData)
    set: dict[str, Any] = field(default_factory=dict)  # settings of all runs, besides the config
    rows: dict[str, Any] = field(default_factory=dict)  # name: settings of a row, besides those; none: one row without any
    share_supervised_phase: bool = True


@dataclass(frozen=True)
class Cell:
    """A cell of the grid."""

    detector: str
    paradigm: str
    row: str
    percent: float | None
    fold: int | None
    seed: int

    @property
    def name(self) -> str:
        share = "" if self.percent is None else f"{self.percent:g}percent"
        fold = "" if self.fold is None else f"fold{self.fold}"
        parts = (self.detector, self.paradigm, _plain_name(self.row), share, fold, f"seed{self.seed}")
        return "-".join(part for part in parts if part)


@dataclass(frozen=True)
class Phase:
    """Supervised training up to ``steps``, shared by several runs."""

    name: str
    folder: Path
    arguments: tuple[str, ...]
    steps: int

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / checkpoint_name(self.steps)

    @property
    def finished(self) -> bool:
        return self.checkpoint.is_dir()

    def read(self) -> Mapping[str, Any]:
        """Digest of the labelled images that it has learnt from, as in a run's results; empty if it is not recorded. Its validation
        images do not matter to the runs that go on from it."""
        try:
            state = json.loads((self.checkpoint / STATE).read_text(encoding="utf-8"))
            return {"labeled": state["state"]["stamp"]["data"]["labeled"]}
        except (OSError, ValueError, KeyError, TypeError):  # a damaged one is reported by train.py
            return {}

    def command(self) -> list[str]:
        """Arguments of train.py."""
        return [*self.arguments, "--stop-at", str(self.steps), "--resume", "auto"]


@dataclass(frozen=True)
class PlannedRun:
    """A run of the study; ``settings`` are those with an effect."""

    name: str
    row: str  # its name in the study file
    folder: Path
    arguments: tuple[str, ...]
    settings: Mapping[str, Any]
    steps: int
    draw: tuple[int, int]  # fold and seed
    phase: Phase | None = None

    @property
    def finished(self) -> bool:
        """Trained and evaluated to its last step."""
        return RunFolder(self.folder).evaluated == self.steps

    @property
    def started(self) -> bool:
        """It has a checkpoint of its own."""
        return RunFolder(self.folder).has_checkpoint

    def told(self) -> str:
        """The teacher's AP as text; empty if there is none."""
        results = RunFolder(self.folder).results()
        ap = results["teacher"]["AP"] if results else None  # None, too, without an object in the validation set
        return "" if ap is None else f"AP {ap:.2f}"

    def command(self) -> list[str]:
        """Arguments of train.py, to continue from what exists. A run that starts from a phase takes over its log lines and
        best weights."""
        if self.phase is None or self.started:
            return [*self.arguments, "--resume", "auto"]
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.phase.folder / "metrics.jsonl", self.folder / "metrics.jsonl")
        best = self.phase.folder / "weights" / "best.safetensors"
        if best.is_file():
            (self.folder / "weights").mkdir(exist_ok=True)
            shutil.copyfile(best, self.folder / "weights" / best.name)
        return [*self.arguments, "--resume", str(self.phase.checkpoint), "--resume-with-changes"]


@dataclass(frozen=True)
class Plan:
    """Runs in the order of the table; ``copies`` are cells of the grid that are left out: {name: the run they equal}."""

    runs: list[PlannedRun]
    copies: dict[str, str]

    @property
    def phases(self) -> list[Phase]:
        """Those that unfinished runs still need."""
        needed = [run.phase for run in self.runs if run.phase and not run.finished and not run.started]
        return [phase for phase in dict.fromkeys(needed) if not phase.finished]


def require_study_folder(folder: Path) -> None:
    """UserError unless a study may write into ``folder``: it is missing, empty or already a study's."""
    if not folder.is_dir():
        if os.path.lexists(folder):
            raise UserError(f"{folder}: is a file, not a folder - give another --output")
        return
    names = {entry.name for entry in folder.iterdir()} - {".lock"}
    if names and MARK not in names:
        raise UserError(f"{folder}: holds something that is not a study's (no {MARK}) - give another --output")


def read_study(file: Path, changes: Sequence[str] = ()) -> Study:
    """Read a study file; ``changes`` "dotted.key=value" replace what it says. Raises UserError naming the file, line and key."""
    study, origins = load_config(Study, file, changes)
    check_ranges(study, origins)
    for key in ("detectors", "paradigms", "seeds"):
        if not getattr(study, key):
            refuse(key, "is empty - give at least one", origins)
    for key in ("detectors", "paradigms", "seeds", "data.percents", "data.folds"):
        owner: Any = study.data if key.startswith("data.") else study
        values = getattr(owner, key.removeprefix("data."))
        if len(set(values)) < len(values):
            refuse(key, f"names a value twice (found {list(values)}) - give each once", origins)
    data = study.data
    if len({f"{percent:g}" for percent in data.percents}) < len(data.percents):
        refuse("data.percents", f"two are too near for the files' names (found {list(data.percents)}) - give each once", origins)
    if data.source and data.labeled:
        refuse("data.labeled", "data.source makes the labelled files by itself - leave one of the two out", origins)
    if data.source and not (data.percents and data.folds):
        refuse("data.source", "it is split by data.percents and data.folds - give both, e.g. [10] and [1, 2, 3]", origins)
    if data.source and not data.images:
        refuse("data.images", "is not given, and data.source needs it - give the folder of the source's images", origins)
    if data.unlabeled and not data.labeled:
        refuse("data.unlabeled", "belongs to data.labeled - leave it out, or give both", origins)
    for key, values in (("percent", data.percents), ("fold", data.folds)):
        if data.labeled and values and f"{{{key}}}" not in data.labeled:
            refuse("data.labeled", f"has no {{{key}}} although data.{key}s are given (found {data.labeled}) - name the files "
                   f"by {{{key}}}, or leave data.{key}s out", origins)
        if data.labeled and not values and f"{{{key}}}" in data.labeled:
            refuse("data.labeled", f"has {{{key}}}, but data.{key}s are not given - give them", origins)
    if data.percents and not (data.source or data.labeled):
        refuse("data.percents", "is of data.source or data.labeled, and neither is given - give one of them", origins)
    names: dict[str, str] = {}
    for row, changes in study.rows.items():
        if not isinstance(changes, dict | None):
            refuse(f"rows.{row}", f"wanted settings (found {changes!r}) - e.g. {{optim.lr: 0.01}}, or {{}}", origins)
        plain = _plain_name(row)
        if plain in names:
            refuse("rows", f"{names[plain]!r} and {row!r} give the same folder names - rename one", origins)
        names[plain] = row
    return study


def only_rows(study: Study, file: Path, names: Sequence[str]) -> Study:
    """The same study with the named rows only. Raises UserError for a name that its file does not have."""
    for name in names:
        if name not in study.rows:
            remedy = nearest(name, study.rows, "" if study.rows else "the file has none: leave --rows out")
            raise UserError(f"{file}: --rows: there is no row {name!r}{remedy}")
    return replace(study, rows={name: changes for name, changes in study.rows.items() if name in names})


def cells(study: Study) -> Iterator[Cell]:
    """The grid in the order of the table: what is compared directly is adjacent."""
    rows, percents, folds = study.rows or {"": None}, study.data.percents or (None,), study.data.folds or (None,)
    for detector, percent, row, paradigm in product(study.detectors, percents, rows, study.paradigms):
        for fold, seed in product(folds, study.seeds):
            yield Cell(detector, paradigm, row, percent, fold, seed)


def arguments_of(study: Study, cell: Cell, config: Path | None, folder: Path, output: Path, overrides: Sequence[str]) -> list[str]:
    """Arguments of train.py for a cell, without those of resuming.

    Args:
        config: the file, None: train.py's default. folder: the study's. output: the run's. overrides: win over all else.
    """
    data = study.data
    flags: dict[str, Any] = {"--detector": cell.detector, "--config": config, "--paradigm": cell.paradigm, "--seed": cell.seed}
    supervised = cell.paradigm == "supervised"
    if data.source:
        name = f"fold{cell.fold}_{cell.percent:g}"
        flags["--labeled"] = folder / "splits" / f"{name}_labeled.json"
        flags["--unlabeled"] = None if supervised else folder / "splits" / f"{name}_unlabeled.json"
    elif data.labeled:
        flags["--labeled"] = _filled(data.labeled, cell)
        flags["--unlabeled"] = None if supervised or data.unlabeled is None else _filled(data.unlabeled, cell)
    flags |= {"--val": data.val, "--images": data.images, "--output": output}
    settings = {**dotted(study.set), **dotted(study.rows.get(cell.row) or {})}
    if supervised:  # a row that changes how stages are guided leaves it as it is
        settings = {key: value for key, value in settings.items() if not key.startswith(STAGES)}
        overrides = [text for text in overrides if not text.startswith(STAGES)]
    if cell.fold is not None and not (data.source or data.labeled):
        settings = {"data.shapes_seed": cell.fold, **settings}
    changes = [*(f"{key}={yaml_scalar(value)}" for key, value in settings.items() if key), *overrides]
    given = [part for flag, value in flags.items() if value is not None for part in (flag, str(value))]
    return [*given, *(["--set", *changes] if changes else [])]


def plan(
    study: Study, file: Path, folder: Path, overrides: Sequence[str], parse: Callable[[Sequence[str]], Mapping[str, Any]]
) -> Plan:
    """Every run of a study, each once, with the phase that it shares.

    Args:
        file: the study's. folder: for its runs. overrides: "dotted.key=value" for all runs.
        parse: arguments of train.py to all settings, {dotted key: JSON value}.

    Raises:
        UserError: naming the run whose settings cannot be used, or whose folder was made with other ones or other labels.
    """
    config = None if study.config is None else Path(os.path.relpath(file.parent / study.config))
    unique: dict[str, tuple[Cell, PlannedRun, str]] = {}
    copies: dict[str, str] = {}
    sharing: dict[str, list[tuple[Cell, PlannedRun]]] = {}
    now: dict[str, dict[str, Any]] = {}
    for cell in cells(study):
        output = folder / "runs" / cell.name
        arguments = arguments_of(study, cell, config, folder, output, overrides)
        try:
            settings = parse(arguments)
        except UserError as error:
            raise UserError(f"{file}: {cell.name}: {error}") from error
        acting = acting_settings(settings)
        if problem := _problem_of_data(settings, guided=not set(stage_paradigms(acting).values()) <= {"none"}):
            raise UserError(f"{file}: {cell.name}: {problem}")
        run = PlannedRun(cell.name, cell.row, output, tuple(arguments), acting, settings["run.steps"], (cell.fold or 0, cell.seed))
        key = json.dumps(acting, sort_keys=True)
        if key in unique:
            copies[cell.name] = unique[key][1].name
            continue
        _refuse_other_settings(run)
        if run.finished:
            _refuse_other_data(run.folder, RunFolder(run.folder).results().get("data") or {}, acting, now)
        unique[key] = cell, run, phase_key(settings)
        if study.share_supervised_phase and 0 < settings["guidance.start_step"] < run.steps:
            sharing.setdefault(unique[key][2], []).append((cell, run))

    phases = {}
    for key, members in sharing.items():
        cell, run = members[0]
        if len(members) > 1:
            mark = hashlib.sha256(key.encode()).hexdigest()[:8]
            name = f"{replace(cell, paradigm='phase', row='').name}-{mark}"
            output = folder / "phases" / name
            arguments = arguments_of(study, replace(cell, paradigm="supervised"), config, folder, output, overrides)
            phases[key] = Phase(name, output, tuple(arguments), json.loads(key)["guidance.start_step"])
            if not all(run.finished or run.started for _, run in members):
                _refuse_other_data(output, phases[key].read(), run.settings, now)
    return Plan([replace(run, phase=phases.get(key)) for _, run, key in unique.values()], copies)


def require_data(study: Study, file: Path, runs: Sequence[PlannedRun]) -> None:
    """UserError naming the key and path of a file or folder that an unfinished run will read, maybe after hours of other runs, and
    that is missing. The splits of a source are made later."""
    if study.data.source:
        _require(f"{file}: data.source", Path(study.data.source).expanduser(), "file")
    for run in runs:
        for key in () if run.finished else INPUTS:
            path = run.settings.get(key)
            if path is not None and not (study.data.source and key in SPLITS):
                _require(f"{file}: {run.name}: {key}", Path(path), INPUTS[key])


def phase_key(settings: Mapping[str, Any]) -> str:
    """All settings that take effect before ``guidance.start_step``, and this step, as a text. Runs with the same text train alike
    until then."""
    unguided = {key: "none" if key.startswith(STAGES) and key.endswith(".paradigm") else value for key, value in settings.items()}
    return json.dumps({**acting_settings(unguided), "guidance.start_step": settings["guidance.start_step"]}, sort_keys=True)


def acting_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``effective`` with the images and the number of micro-batches, whose sums round differently."""
    parts = settings.get("optim.accumulate")
    batch = {f"{BATCH}.{kind}": [settings.get(f"data.{kind}_per_device"), parts] for kind in ("labeled", "unlabeled")}
    return effective({**settings, **batch})


def steps_done(folder: Path) -> int:
    """The last step in a run folder's log."""
    return max((line.get("step", 0) for line in read_metrics(folder / "metrics.jsonl")), default=0)


def _refuse_other_settings(run: PlannedRun) -> None:
    """Raise UserError when the run's folder holds a finished run with other settings, which would be taken for this one.

    Keys that only one side has, as after an update of the program, are ignored. Unfinished runs are left to train.py to check.
    """
    file = run.folder / "config.yaml"
    if not file.is_file():
        return
    there = acting_settings(dotted(plain_yaml(file.read_text(encoding="utf-8"), str(file), RENAMED)))
    if RunFolder(run.folder).evaluated < min(run.steps, there.get("run.steps", run.steps)):
        return
    changes = [f"{key}: {yaml_scalar(there[key])} -> {yaml_scalar(value)}"
               for key, value in run.settings.items() if key in there and there[key] != value]  # fmt: skip
    if changes:
        raise UserError(f"{run.folder}: was made with other settings ({'; '.join(changes[:3])}) - give another --output, or "
                        "delete this folder")


def _refuse_other_data(folder: Path, read: Mapping[str, Any], settings: Mapping[str, Any], now: dict[str, dict[str, Any]]) -> None:
    """Raise UserError when the files of a finished run, or phase, no longer hold what it has read from them. Files that are gone or
    cannot be read are left to the runs that still need them.

    Args:
        folder: the run's. settings: its own. read: the digests that it has recorded.
        now: digests of the files as they are, by their settings; filled here for the next call.
    """
    named = {key: value for key, value in settings.items()
             if (key in INPUTS and "unlabeled" not in key) or key.startswith("data.rules.")}  # fmt: skip
    if not read or named["data.labeled"] is None:
        return
    key = json.dumps(named, sort_keys=True)
    if key not in now:
        data = overridden(Config(), [f"{name}={yaml_scalar(value)}" for name, value in named.items()]).data
        now[key] = {}
        with contextlib.suppress(UserError):
            sources = open_sources(data, supervised=True, report=Report())
            now[key] = {"labeled": digest(sources.labeled), "val": digest(sources.val)}
    for which, found in now[key].items():
        if found and (read.get(which) or found)["sha256"] != found["sha256"]:
            raise UserError(f"{folder}: has read other images, boxes or classes from {named[f'data.{which}']} than are in it now - "
                            "give another --output, or delete this folder")


def _problem_of_data(settings: Mapping[str, Any], guided: bool) -> str | None:
    """What is wrong with the choice of data; None: nothing."""
    if settings["data.labeled"] is None:
        return None
    if settings["data.val"] is None:
        return "data.val: is not given, and a study compares AP - give a COCO JSON"
    others, unlisted = settings["data.unlabeled"], settings["data.unlisted"]
    if guided and others is None and unlisted == "ignore":
        return ("data.unlabeled: is not given, and this run learns from unlabelled images - give a folder or COCO JSON, or set "
                "data.unlisted: unlabeled")
    if guided and others is not None and unlisted == "unlabeled":
        return f"data.unlisted: is of no use beside data.unlabeled (found {others}) - leave one of the two out"
    return None


def _require(what: str, path: Path, kind: str) -> None:
    """UserError unless ``path``, the value of ``what``, is there; ``kind`` is one of ``INPUTS``."""
    if (path.is_file() and "file" in kind) or (path.is_dir() and "folder" in kind):
        return
    found = no_folder(path) if kind == "folder" else "is a folder, not a file" if path.is_dir() else f"there is no such {kind}"
    raise UserError(f"{what}: {found} ({path.absolute()}) - correct the path, or put the data there")


def _filled(pattern: str, cell: Cell) -> str:
    percent = "" if cell.percent is None else f"{cell.percent:g}"
    return pattern.replace("{fold}", str(cell.fold)).replace("{percent}", percent)


def _plain_name(name: str) -> str:
    """A row's name as part of a folder's."""
    return re.sub(r"[^\w.+=]+", "_", name).strip("_")
