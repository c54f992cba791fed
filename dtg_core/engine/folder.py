"""A run's folder.

    config.yaml             every setting
    metrics.jsonl           one object per line: losses and guidance figures, means since the previous line
    results.json            teacher's and student's COCO metrics at the last evaluation
    precision.json          the teacher's precision-recall curves at the last evaluation
    pictures/               what the teacher taught and found at each evaluation
    report.html             all of this to look at, one file
    weights/*.safetensors   teacher and student at the last evaluation, and the teacher at its best one; self-contained
    checkpoints/            where ``--resume`` continues
    trackers/, evaluation*/  TensorBoard's files, if any; what evaluate.py has written
    nonfinite/              the step at which a run gave up, for ``--replay``
    abandoned-N/            results, weights and checkpoints that were set aside when the run was resumed from an earlier step
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

from dtg_core.data.files import holds_run
from dtg_core.drafts import reading, writing
from dtg_core.errors import UserError

log = logging.getLogger(__name__)

#: What a folder may hold before its run has written config.yaml: a lock, half of that file, and what a study puts in.
BEFORE_CONFIG = {".lock", "config.yaml.tmp", "metrics.jsonl", "weights"}
#: The name of a checkpoint's folder, by the number of steps before it.
CHECKPOINT = re.compile(r"step_(\d{8,})")
#: All names used by a run and the scripts that look at it; ``--overwrite`` deletes nothing else.
WRITTEN = re.compile(
    r"\.lock|(config\.yaml|metrics\.jsonl|results\.json|precision\.json|report\.html)(\.tmp)?"
    r"|pictures|weights|checkpoints|nonfinite|trackers|evaluation(-.*)?|abandoned-\d+"
)
#: What some of these folders hold, by the first word of their name. ``trackers`` are Accelerate's, which choose their own names.
WITHIN = {
    "pictures": re.compile(r"(guidance-\w+|predictions)-\d+\.jpg(\.tmp)?"),
    "weights": re.compile(r"(teacher|student|best)\.safetensors(\.tmp)?"),
    "checkpoints": re.compile(r"step_\d{8,}(\.tmp)?"),
    "nonfinite": re.compile(r"step_\d{8,}(\.tmp)?|step\.json"),
    "evaluation": re.compile(r"(results|detections)\.json(\.tmp)?"),
    "abandoned": WRITTEN,
    "step": re.compile(r"(student|teacher|optimizer)\.safetensors|(state|manifest)\.json"),
}


@dataclass
class RunFolder:
    """The folder of one run, locked against a second process that would write into it."""

    path: Path
    lock: IO[str] | None = field(default=None, repr=False)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is one, complete or not."""
        with reading(self.checkpoints), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return any(CHECKPOINT.fullmatch(name) for name in os.listdir(self.checkpoints))
        return False

    @property
    def how_to_continue(self) -> str:
        """The end of a message if there is a checkpoint to continue from."""
        return "; --resume auto continues" if self.has_checkpoint else ""

    @property
    def nonfinite(self) -> Path:
        return self.path / "nonfinite"

    @property
    def evaluated(self) -> int:
        """The step of its last evaluation, 0: none."""
        return self.results().get("step", 0)

    def results(self) -> dict[str, Any]:
        """What the last evaluation has found; empty: there was none, or its file is damaged."""
        try:
            found = json.loads((self.path / "results.json").read_text(encoding="utf-8"))
            return found if type(found["step"]) is int and "AP" in found["teacher"] else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def require_free(self, resume: bool, overwrite: bool) -> None:
        """Raises UserError when the folder holds something that neither flag allows. Nothing is written."""
        if self.path.is_file():
            raise UserError(f"{self.path}: is a file - give a folder with --output")
        with reading(self.path):
            names = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        used = bool(names - {".lock"})
        if used and not (resume or overwrite):
            way = "--resume auto, --overwrite or another --output" if holds_run(self.path) else "another --output"
            raise UserError(f"{self.path}: holds something already - use {way}")
        if used and overwrite:
            if not holds_run(self.path):
                raise UserError(f"{self.path}: not the folder of a run (no config.yaml of one), so --overwrite will not empty it - "
                                "give another --output")
            foreign = sorted(_foreign(self.path, WRITTEN))
            if foreign:
                raise UserError(f"{self.path}: holds what no run has written ({', '.join(foreign[:3])}), so --overwrite will not "
                                "empty it - move that away, or give another --output")
        if resume and not holds_run(self.path) and not names <= BEFORE_CONFIG:
            raise UserError(f"{self.path}: not the folder of a run (no config.yaml of one), so there is nothing to resume - give "
                            "another --output")

    def open(self, resume: bool, overwrite: bool) -> None:
        """Make or re-open the folder. Raises UserError as ``require_free`` does, and when the folder is in use."""
        self.require_free(resume, overwrite)
        self.claim()
        with writing(self.path):
            for entry in self.path.iterdir() if overwrite else ():
                if entry.name != ".lock":
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def claim(self) -> None:
        """Make the folder and hold its lock. Raises UserError when the folder is in use or cannot be written."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "a+")  # noqa: SIM115 - held until the process ends
        try:
            # Not flock, which the loader's workers would inherit and hold for some seconds after this process was killed.
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # some network file systems have no locks at all
                log.warning(f"{self.path}: cannot be locked ({error.strerror}), so a second run in it would not be noticed")
                return
            self.lock.seek(0)
            owner = self.lock.read().strip() or "unknown"
            self.lock.close()
            raise UserError(f"{self.path}: another run is using it (process {owner}) - wait for it, or give another "
                            "--output") from error
        with writing(self.path):
            self.lock.truncate(0)
            self.lock.write(f"{os.getpid()} on {os.uname().nodename}")
            self.lock.flush()

    def set_aside(self, names: Iterable[str]) -> Path:
        """Move files and folders into a new ``abandoned-N``, next to copies of the settings and the log. Raises OSError."""
        place = next(place for number in count(1) if not (place := self.path / f"abandoned-{number}").exists())
        place.mkdir()
        for name in ("config.yaml", "metrics.jsonl"):
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, place / name)
        for name in names:
            if (self.path / name).exists():
                (place / name).parent.mkdir(exist_ok=True)
                os.rename(self.path / name, place / name)
        return place


def _foreign(folder: Path, written: re.Pattern[str]) -> Iterator[str]:
    """Names, relative to ``folder``, of what no run has written into it and its subfolders."""
    for entry in folder.iterdir():
        within, folds = WITHIN.get(re.split("[-_]", entry.name)[0]), entry.is_dir() and not entry.is_symlink()
        if not written.fullmatch(entry.name) or (folds and entry.suffix not in ("", ".tmp")):
            yield entry.name
        elif within is not None and folds:
            yield from (f"{entry.name}/{name}" for name in _foreign(entry, within))
