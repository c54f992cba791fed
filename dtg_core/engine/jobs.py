"""Processes run a few at a time: each has its own log file and fails alone, and all of them are stopped in an orderly way."""
from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from dtg_core.engine.signals import StopSignals

POLL = 0.1  # seconds between two checks of the processes
GRACE = 60.0  # seconds that the children of a process may take longer to stop than itself
LOOK = 300.0  # seconds between two status lines about all of them


@dataclass(frozen=True)
class Job:
    """One process to be run.

    Args:
        command: returns its arguments at the moment it starts.
        log: gets its output, appended to that of earlier attempts.
        work: of the whole job, in any unit that is the same for all jobs. done: how much of it is done already.
        result: a few words about a job that has succeeded.
        after: name of the job that has to succeed first.
    """

    name: str
    command: Callable[[], Sequence[str]]
    log: Path
    work: int
    done: Callable[[], int]
    result: Callable[[], str]
    after: str | None = None


@dataclass
class Running:
    """A job's process."""

    job: Job
    process: subprocess.Popen[bytes]
    began: float = field(default_factory=time.monotonic)
    asked: float | None = None  # when it was asked to stop

    def stop(self) -> None:
        """Ask it to stop, with the processes that it has started, which are a group of their own."""
        self.asked = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)

    def ended(self) -> bool:
        """Whether it has ended; a launcher that was asked to stop may be gone before the processes that it has started."""
        if self.process.poll() is None:
            return False
        if self.asked is None or time.monotonic() - self.asked > GRACE:
            return True
        try:
            os.killpg(self.process.pid, 0)
        except (ProcessLookupError, PermissionError):
            return True
        return False


def run_jobs(
    jobs: Sequence[Job], parallel: int, environment: Mapping[str, str], say: Callable[[str], None], signals: StopSignals
) -> dict[str, str]:
    """Run all jobs, ``parallel`` of them at a time, in their order as far as ``after`` allows.

    Args:
        jobs: what is to be done; names are unique, and an ``after`` that is not among them counts as done.
        environment: the processes'. say: shows a line. signals: a received one stops all processes and starts no more.

    Returns:
        {name: what went wrong} for the jobs that failed, and those that waited for them. A job that was stopped or not
        started because of a signal is not included.
    """
    board = _Board(list(jobs), say)
    try:
        while board.waiting or board.running:
            if signals.received and not board.stopping:
                board.stop()
            board.collect()
            while not signals.received and len(board.running) < parallel and (job := board.next_ready()):
                board.start(job, environment)
            if board.running and not _wait(board.running, signals):
                board.tell("still running")
    finally:
        if board.running:  # an error of ours must not leave them behind
            board.stop()
            for one in board.running:
                one.process.wait()
    return board.failed


def _wait(running: Sequence[Running], signals: StopSignals) -> bool:
    """Wait until one has ended or a signal has come. False: neither happened for some minutes."""
    asked, began = signals.received, time.monotonic()
    while not any(one.ended() for one in running) and signals.received == asked:
        time.sleep(POLL)
        if time.monotonic() - began > LOOK:
            return False
    return True


class _Board:
    """Which jobs wait, run and have ended."""

    def __init__(self, jobs: list[Job], say: Callable[[str], None]) -> None:
        self.jobs, self.say = jobs, say
        self.waiting, self.running = list(jobs), list[Running]()
        self.failed: dict[str, str] = {}
        self.ended, self.stopping = 0, False
        self.began, self.before = time.monotonic(), sum(job.done() for job in jobs)

    def next_ready(self) -> Job | None:
        """Take the first waiting job whose ``after`` is done; drop those whose ``after`` has failed."""
        for job in list(self.waiting):  # a job comes after the one that it waits for, so chains fail as well
            if job.after in self.failed:
                self.waiting.remove(job)
                self.failed[job.name] = f"not started, since {job.after} failed"
        open_ = {job.name for job in self.waiting} | {one.job.name for one in self.running}
        ready = next((job for job in self.waiting if job.after not in open_), None)
        if ready is not None:
            self.waiting.remove(ready)
        return ready

    def start(self, job: Job, environment: Mapping[str, str]) -> None:
        try:
            self.running.append(Running(job, _process(job, environment)))
            self.tell(f"started {job.name}")
        except OSError as error:
            self.fail(job, f"cannot be started ({error.strerror}: {error.filename})")

    def fail(self, job: Job, problem: str) -> None:
        self.failed[job.name] = problem
        self.tell(f"FAILED {job.name}: {problem}")

    def stop(self) -> None:
        """Start nothing more, and ask all processes to end, once: a second signal would end them without a checkpoint."""
        self.stopping = True
        self.waiting.clear()
        for one in self.running:
            one.stop()
        if self.running:
            self.tell("waiting until they have stopped, after a checkpoint")

    def collect(self) -> None:
        """Record the jobs that have ended since the last call."""
        for one in [one for one in self.running if one.ended()]:
            self.running.remove(one)
            status, job = one.process.returncode, one.job
            took = tqdm.format_interval(int(time.monotonic() - one.began))
            if status == 0:
                self.ended += 1
                self.tell(f"done {job.name} in {took}{_after_colon(job.result())}")
            elif self.stopping:
                self.tell(f"stopped {job.name}")
            else:
                self.fail(job, f"status {status}{_after_colon(last_line(job.log))} (log: {job.log})")

    def tell(self, event: str) -> None:
        names = ", ".join(one.job.name for one in self.running) or "none"
        failed = f", {len(self.failed)} failed" if self.failed else ""
        self.say(f"[{self.ended}/{len(self.jobs)} done{failed}, {len(self.waiting)} waiting, running: {names}"
                 f"{self.left()}]  {event}")

    def left(self) -> str:
        """The time left at the pace since the beginning, for all processes together."""
        done = sum(job.done() for job in self.jobs)
        if not (self.running or self.waiting):
            return ""
        rest = sum(max(job.work - job.done(), 0) for job in self.jobs if job.name not in self.failed)
        pace = (time.monotonic() - self.began) / max(done - self.before, 1)
        return f", about {tqdm.format_interval(int(rest * pace))} left" if done > self.before and rest else ""


def _process(job: Job, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    command = list(job.command())
    with open(job.log, "a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=dict(environment),
            start_new_session=True,  # so that Ctrl-C reaches it through us, once
        )


def last_line(log: Path) -> str:
    """The last line of a log with any content, "" if there is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith("$ ")), "")


def _after_colon(text: str) -> str:
    return f": {text}" if text else ""
