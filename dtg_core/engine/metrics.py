"""What a run reports: one JSON object per line in ``metrics.jsonl``, and a progress bar or plain lines on the terminal.

Neither ever stops training: what cannot be written is given up with one warning. Only one process of a run makes them.
"""
from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from tqdm import tqdm

from dtg_core.drafts import write_text
from dtg_core.errors import nearest, one_line
from dtg_core.settings_text import yaml_scalar

T = TypeVar("T")


class MetricsWriter:
    """Appends lines to ``metrics.jsonl``.

    Args:
        path: the file; its folder is created if missing.
        resume_step: lines of later steps and torn lines are dropped from an existing file.
        drop: key of lines of ``resume_step`` itself that are dropped as well, because they will be written again.
    """

    def __init__(self, path: Path, resume_step: int = 0, drop: str | None = None) -> None:
        self.path = path
        self._torn = self._warned = False
        try:
            kept = [line for line in read_metrics(path) if line.get("step", 0) <= resume_step]
            kept = [line for line in kept if line.get("step") != resume_step or drop not in line]
            write_text(path, "".join(map(_line, kept)))
        except OSError as error:
            self._give_up(error)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append {"step": step, ...values in the order of their names}: texts, numbers, of which those that are not finite become
        null, and None."""
        line = _line({"step": step, **{key: values[key] for key in sorted(values) if key != "step"}})
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"\n{line}" if self._torn else line)
            self._torn = False
        except OSError as error:
            self._torn = True
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            _print(f"warning: {self.path}: cannot be written ({error.strerror}) - training goes on, its lines are lost")


def logged_warnings(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """The warnings among the lines of a metrics file, each once."""
    return list(dict.fromkeys(f"step {line['step']}: {line['warning']}" for line in lines if "warning" in line))


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, without torn ones; none if there is no such file."""
    text = ""
    with contextlib.suppress(FileNotFoundError):
        text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict):
            yield values


class Trackers:
    """Dashboards such as TensorBoard and Weights & Biases, by Accelerate's names. One that fails is given up with a warning.

    Args:
        names: of Accelerate's trackers. folder: the run's. settings: flat, shown with the run.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> None:
        self._live: dict[str, Any] = {}
        for name in names:
            self._try(name, partial(self._start, name, folder, settings))

    def _start(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"unknown tracker{nearest(name, map(str, LOGGER_TYPE_TO_CLASS))}")
        kind = LOGGER_TYPE_TO_CLASS[name]
        where = {"logging_dir": folder / "trackers"} if kind.requires_logging_directory else {}
        with open(os.devnull) as nobody, _stdin(nobody):  # a tracker must not wait for a password
            tracker = kind(folder.resolve().name, **where)
            getattr(tracker, "start", lambda: None)()  # older versions have started already
            tracker.store_init_configuration({key: yaml_scalar(value) for key, value in settings.items()})
        self._live[name] = tracker

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, tracker in list(self._live.items()):
            self._try(name, partial(tracker.log, dict(values), step=step))

    def close(self) -> None:
        for name, tracker in list(self._live.items()):
            self._try(name, tracker.finish)
        self._live = {}

    def _try(self, name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # whatever an external service may raise
            self._live.pop(name, None)
            _print(f"warning: tracker {name}: given up ({one_line(error)}) - training goes on; metrics.jsonl holds everything")


@contextlib.contextmanager
def _stdin(stream: TextIO) -> Iterator[None]:
    before, sys.stdin = sys.stdin, stream
    try:
        yield
    finally:
        sys.stdin = before


class Progress:
    """A bar with the time left on a terminal, elsewhere a plain line for each report; on stderr.

    Args:
        total: steps of the run.
        start: steps that an earlier part of the run has done.
        stream: stderr, or another text stream.
    """

    def __init__(self, total: int, start: int = 0, stream: TextIO | None = None) -> None:
        self.total, self.start, self.done = total, start, start
        self.stream = stream or sys.stderr
        self.began = time.monotonic()
        self.bar: Any = None  # tqdm's, on a terminal
        with contextlib.suppress(OSError, ValueError):
            if self.stream.isatty():
                self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, file=self.stream)

    def advance(self) -> None:
        """One step is done."""
        self.done += 1
        if self.bar is not None:
            _never_fail(self.bar.update)

    def report(self, values: Mapping[str, float]) -> None:
        """Show figures of the last step."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self.bar is not None:
            _never_fail(lambda: self.bar.set_postfix_str(shown))
            return
        pace = (time.monotonic() - self.began) / max(self.done - self.start, 1)
        left = tqdm.format_interval(int(pace * (self.total - self.done)))
        _print(f"step {self.done}/{self.total}  {shown}  {pace:.2f} s/step  {left} left", self.stream)

    def say(self, message: str) -> None:
        """Show one line without breaking the bar."""
        if self.bar is not None:
            _never_fail(lambda: tqdm.write(message, file=self.stream))
        else:
            _print(message, self.stream)

    def close(self) -> None:
        if self.bar is not None:
            _never_fail(self.bar.close)


class Clock:
    """Time per step, and the part of it that was spent waiting for data, between log lines."""

    def __init__(self, start: int) -> None:
        self.done, self.since, self.data = start, time.perf_counter(), 0.0

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """``batches``, recording the time that they take."""
        iterator, nothing = iter(batches), object()
        while True:
            began = time.perf_counter()
            batch = next(iterator, nothing)
            self.data += time.perf_counter() - began
            if batch is nothing:
                return
            yield cast(T, batch)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count as step time."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def lap(self, done: int) -> dict[str, float]:
        """Mean times in seconds of the steps since the last lap."""
        now, steps = time.perf_counter(), done - self.done
        times = {"step_seconds": (now - self.since) / max(steps, 1), "data_seconds": self.data / max(steps, 1)}
        self.done, self.since, self.data = done, now, 0.0
        return times


def guidance_figures(means: Mapping[str, float]) -> dict[str, float]:
    """The guidance figures that are shown on the terminal, named like "head candidates"."""
    kinds = ("candidates", "clusters", "pseudo_boxes")
    names = [name for name in means if name.startswith("guidance/") and name.endswith(kinds)]
    return {" ".join(name.split("/")[1:]): means[name] for name in names}


def _line(values: Mapping[str, Any]) -> str:
    plain = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


def _never_fail(action: Callable[[], Any]) -> None:
    with contextlib.suppress(OSError, ValueError):  # a closed pipe or a vanished terminal
        action()


def _print(message: str, stream: TextIO | None = None) -> None:
    _never_fail(lambda: print(message, file=stream or sys.stderr, flush=True))
