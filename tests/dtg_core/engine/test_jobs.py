"""Processes side by side: order, failures, stops and what is told, with processes of a line of shell."""
from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from dtg_core.engine.jobs import Job, last_line, run_jobs
from dtg_core.engine.signals import StopSignals


def shell(folder: Path, name: str, line: str, after: str | None = None) -> Job:
    """A job of one unit of work, done when its file is there."""
    file = folder / name
    return Job(name, lambda: ["bash", "-c", f"{line} && touch {file}"], folder / "logs" / f"{name}.log", 1,
               lambda: int(file.exists()), lambda: f"result of {name}", after)  # fmt: skip


def run(jobs: list[Job], parallel: int = 2, signals: StopSignals | None = None) -> tuple[dict[str, str], list[str]]:
    told: list[str] = []
    failed = run_jobs(jobs, parallel, os.environ, told.append, signals or StopSignals())
    return failed, told


def test_a_failure_stops_only_what_waits_for_it(tmp_path):
    jobs = [shell(tmp_path, "phase", "echo bad luck; echo; exit 3"), shell(tmp_path, "run", "true", after="phase"),
            shell(tmp_path, "other", "true"), shell(tmp_path, "next", "echo out; echo err >&2", after="other"),
            shell(tmp_path, "late", "true", after="run")]  # fmt: skip
    failed, told = run(jobs)
    assert failed == {
        "phase": f"status 3: bad luck (log: {tmp_path / 'logs' / 'phase.log'})",
        "run": "not started, since phase failed", "late": "not started, since run failed",
    }  # fmt: skip
    assert (tmp_path / "other").exists()
    assert (tmp_path / "next").exists()
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "logs" / "next.log").read_text().splitlines()[1:] == ["out", "err"]
    (line,) = [line for line in told if "done next" in line]
    assert line.startswith("[2/5 done")
    assert line.endswith(": result of next")
    assert any(" failed, " in line for line in told)


def test_so_many_at_a_time_and_a_free_place_is_taken_at_once(tmp_path):
    jobs = [shell(tmp_path, "long", "sleep 2"), *(shell(tmp_path, f"short{number}", "sleep 0.1") for number in range(4))]
    began = time.monotonic()
    failed, told = run(jobs, parallel=2)
    assert not failed
    assert time.monotonic() - began < 20
    for line in told:
        names = line.partition("running: ")[2].partition("]")[0].partition(", about")[0]
        assert len(names.split(", ")) <= 2
    assert ["done long" in line for line in told].index(True) > ["done short1" in line for line in told].index(True)
    assert any(", about 00:0" in line for line in told)


def test_a_signal_stops_all_in_order(tmp_path):
    """Each gets one SIGTERM, is waited for, and nothing is started any more; more signals change nothing."""
    patient = "trap 'sleep 0.5; echo saved; exit 143' TERM; touch {0}/ready; while true; do sleep 0.05; done"
    jobs = [shell(tmp_path, "one", patient.format(tmp_path)), shell(tmp_path, "two", "true")]
    with StopSignals(patient=True) as signals:
        def interrupt() -> None:
            while not (tmp_path / "ready").exists():
                time.sleep(0.05)
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.15)

        thread = threading.Thread(target=interrupt)
        thread.start()
        failed, told = run(jobs, parallel=1, signals=signals)
        thread.join()
        assert signals.received == signal.SIGINT
    assert not failed
    assert (tmp_path / "logs" / "one.log").read_text().count("saved\n") == 1
    assert not (tmp_path / "two").exists()
    assert "stopped one" in told[-1]


def test_the_first_signal_is_answered_at_once(capfd):
    with StopSignals(patient=True, note="wait") as signals:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
    assert capfd.readouterr().err == "\nwait\n"


def test_children_of_a_launcher_are_waited_for(tmp_path):
    child = f"trap 'sleep 1; touch {tmp_path}/saved; exit 0' TERM; touch {tmp_path}/ready; while true; do sleep 0.05; done"
    job = Job("one", lambda: ["bash", "-c", f'bash -c "{child}" & wait'], tmp_path / "log", 1, lambda: 0, str)
    with StopSignals(patient=True) as signals:
        def interrupt() -> None:
            while not (tmp_path / "ready").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=interrupt)
        thread.start()
        run([job], signals=signals)
        thread.join()
    assert (tmp_path / "saved").exists()


def test_an_error_of_ours_leaves_no_process_behind(tmp_path):
    def fail() -> list[str]:
        raise RuntimeError("a mistake of ours")

    waits = shell(tmp_path, "waits", f"trap 'touch {tmp_path}/asked; exit' TERM; touch {tmp_path}/ready; while true; do sleep 0.05; done")
    broken = Job("broken", fail, tmp_path / "log", 1, lambda: 0, str)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run([waits, shell(tmp_path, "first", f"until [ -e {tmp_path}/ready ]; do sleep 0.05; done"), broken])
    assert (tmp_path / "asked").exists()


def test_what_cannot_be_started_fails_alone(tmp_path):
    broken = Job("broken", lambda: ["no-such-program"], tmp_path / "log", 1, lambda: 0, str)
    failed, _ = run([broken, shell(tmp_path, "next", "true")], parallel=1)
    assert failed == {"broken": "cannot be started (No such file or directory: no-such-program)"}
    assert (tmp_path / "next").exists()


def test_last_line(tmp_path):
    (tmp_path / "log").write_text("$ train\n")
    assert last_line(tmp_path / "log") == ""
    (tmp_path / "log").write_text("$ train\none\nerror: two\n\n")
    assert last_line(tmp_path / "log") == "error: two"
