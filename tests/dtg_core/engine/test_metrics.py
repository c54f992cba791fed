"""Metrics lines and the console: stable, resumable, and never a reason to stop."""

from __future__ import annotations

import errno
import io
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Terminal

from dtg_core.engine import metrics
from dtg_core.engine.metrics import Clock, MetricsWriter, Progress, Trackers, guidance_figures, read_metrics


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write(1, {"b": 0.1 + 0.2, "a": 2.5, "n": 3, "bad": float("nan"), "worse": np.float64("-inf")})
    assert path.read_text() == '{"step": 1, "a": 2.5, "b": 0.30000000000000004, "bad": null, "n": 3, "worse": null}\n'
    writer.write(2, {"warning": "é", "none": None})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    MetricsWriter(path)
    assert path.read_text() == ""


def test_resume_drops_later_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for step in (10, 20, 30):
        writer.write(step, {"loss": step / 7})
    before = path.read_text().splitlines()
    path.write_text(path.read_text() + '{"step": 35, "lo')
    MetricsWriter(path, 20).write(30, {"loss": 30 / 7})
    assert path.read_text().splitlines() == before
    assert [line["step"] for line in read_metrics(path)] == [10, 20, 30]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_is_told_once_and_lines_stay_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write(1, {"a": 1})

    def full(*arguments: Any, **options: Any) -> Any:
        with open(path, "a") as file:
            file.write('{"step": 2, "a')
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "open", full, raising=False)
        writer.write(2, {"a": 2})
        writer.write(3, {"a": 2})
    writer.write(4, {"a": 4})
    assert [line["step"] for line in read_metrics(path)] == [1, 4]
    error = capsys.readouterr().err
    assert error.count("warning") == 1
    assert "No space left" in error
    MetricsWriter(tmp_path / "metrics.jsonl" / "below").write(1, {})


def test_plain_lines_without_a_terminal() -> None:
    stream = io.StringIO()
    with closing(Progress(100, 40, stream)) as progress:
        progress.advance()
        progress.report({"loss": 1.23456, "AP": 40.0})
        progress.say("checkpoint")
    first, second = stream.getvalue().splitlines()
    assert first.startswith("step 41/100  loss 1.235  AP 40  ")
    assert first.endswith(" left")
    assert second == "checkpoint"


def test_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    with closing(Progress(10, 4, stream)) as progress:
        for _ in range(6):
            progress.advance()
        progress.report({"loss": 2.0})
        progress.say("saved")
    assert "10/10" in stream.getvalue()
    assert "loss 2" in stream.getvalue()
    assert "saved\n" in stream.getvalue()


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_closed_stream_stops_nothing(kind: type[io.StringIO]) -> None:
    stream = kind()
    with closing(Progress(10, 0, stream)) as progress:
        stream.close()
        progress.advance()
        progress.report({"loss": 2.0})
        progress.say("saved")


class Hands:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for name in ("monotonic", "perf_counter"):
            monkeypatch.setattr(metrics.time, name, lambda: self.now)


def test_the_time_left_counts_this_runs_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed at step 40 of 100, with 3 seconds a step."""
    hands, stream = Hands(monkeypatch), io.StringIO()
    progress = Progress(100, 40, stream)
    for _ in range(20):
        hands.now += 3
        progress.advance()
    progress.report({})
    assert stream.getvalue().split("  ")[-2:] == ["3.00 s/step", "02:00 left\n"]


def test_steps_are_timed_without_pauses_and_apart_from_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two laps of 4 and 2 steps; a step takes 3 seconds, of which 1 is spent waiting for its batch."""
    hands = Hands(monkeypatch)

    def batches() -> Any:
        for number in range(6):
            hands.now += 1
            yield number

    clock = Clock(10)
    for number in clock.waiting(batches()):
        hands.now += 2
        if number in (3, 5):
            with clock.paused():  # an evaluation
                hands.now += 500
            assert clock.lap(11 + number) == {"step_seconds": 3.0, "data_seconds": 1.0}


def test_figures_of_guidance_are_named_by_stage() -> None:
    means = {"guidance/rpn/candidates": 9.0, "guidance/rcnn/clusters": 2.0, "guidance/rcnn/background": 1.0, "unlabeled/rpn/box": 0.5}
    assert guidance_figures(means) == {"rpn candidates": 9.0, "rcnn clusters": 2.0}


def test_a_tracker_that_fails_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told of once and not asked again; the others go on, and none of them may read the terminal."""
    from accelerate import tracking

    log: list[Any] = []

    class Good:
        requires_logging_directory = False

        def __init__(self, run: str) -> None:
            log.append((run, sys.stdin.read()))

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            log.append(values)

        def log(self, values: dict[str, float], step: int) -> None:
            log.append((step, values))

        def finish(self) -> None:
            log.append("finished")

    class Bad(Good):
        def log(self, values: dict[str, float], step: int) -> None:
            log.append("bad")
            raise ConnectionError("gone")

    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", {"good": Good, "bad": Bad})
    before = sys.stdin
    trackers = Trackers(["bad", "good"], tmp_path / "mine", {"optim.lr": 0.1})
    assert sys.stdin is before
    assert log == [("mine", ""), {"optim.lr": "0.1"}] * 2
    log.clear()
    for step in (1, 2):
        trackers.write(step, {"loss": 2.0})
    trackers.close()
    trackers.close()
    assert log == ["bad", (1, {"loss": 2.0}), (2, {"loss": 2.0}), "finished"]
    assert capsys.readouterr().err.count("tracker bad: given up (gone)") == 1
