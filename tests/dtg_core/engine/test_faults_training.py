"""Faults 61 to 94 that end or hinder a run: one line and a status, or a warning and a whole run."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from runs import TinyData, checkpoint_state, command, lines, run, start_many, weights, write_coco

from dtg_core.engine.checkpoint import newest_checkpoint
from dtg_core.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData.write(tmp_path_factory.mktemp("data"))


def at_batch(step: int, action: Callable[[], None]) -> Callable[[], None]:
    """Do something while the batch of a step is being made, in whichever process makes it."""

    def prepare() -> None:
        from dtg_core.data.plan import StepData

        make = StepData.__getitem__

        def making(self: StepData, number: int) -> object:
            if number == step:
                action()
            return make(self, number)

        StepData.__getitem__ = making  # type: ignore[assignment,method-assign]

    return prepare


@pytest.mark.parametrize("workers", [0, 1])
def test_fault_62_a_signal_while_waiting_for_data(data: TinyData, tmp_path: Path, workers: int) -> None:
    def told() -> None:
        os.kill(os.getppid() if workers else os.getpid(), signal.SIGTERM)
        time.sleep(0.3)

    arguments = command(data, "gfl", tmp_path / "run", f"data.workers={workers}", steps=40)
    stopped = run(arguments, tmp_path / "logs", prepare=at_batch(9, told))
    assert stopped.status == 143, stopped.err
    assert "Traceback" not in stopped.err
    found = newest_checkpoint(tmp_path / "run" / "checkpoints", pytest.fail)
    assert found is not None
    assert checkpoint_state(found)["step"] <= 10


def test_validation_images_that_cannot_be_read_are_counted(data: TinyData, tmp_path: Path) -> None:
    """They spoil no figure, and the end of a long run is no place to stop. But where there are more of them than allowed, as with a
    disk that is gone, an AP over the rest does not become the best for good."""
    val = write_coco(tmp_path / "val", 3, 3)
    (tmp_path / "val" / "images" / "1.png").write_bytes(b"")
    for allowed, kept in (("0.5", True), ("0.3", False)):
        output = tmp_path / allowed
        ended = run(command(replace(data, val=val), "gfl", output, f"data.rules.max_bad_images={allowed}", steps=1), tmp_path / "logs")
        assert ended.status == 0, ended.err
        assert "it is not evaluated" in ended.err
        assert json.loads((output / "results.json").read_text())["unread"] == 1
        assert (output / "weights" / "best.safetensors").exists() == kept
        warned = [line["warning"] for line in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()) if "warning" in line]
        told = (f"{tmp_path / 'val' / 'images'}: 1 of 3 images cannot be read (first 1.png) - fix them, take them out, or raise "
                "data.rules.max_bad_images; until then no teacher is kept as the best")
        assert warned == ([] if kept else [told])
        assert ended.err.count(f"warning: {told}\n") == len(warned)


def full_disk(first: int) -> Callable[[], None]:
    def prepare() -> None:
        import dtg_core.engine.checkpointer as module

        save = module.save_checkpoint

        def saving(folder: Path, done: int, *rest: object) -> Path:
            if done >= first:
                raise OSError(errno.ENOSPC, "No space left on device")
            return save(folder, done, *rest)

        module.save_checkpoint = saving

    return prepare


def test_fault_63_a_disk_that_stays_full_stops(data: TinyData, tmp_path: Path) -> None:
    ended = run(command(data, "gfl", tmp_path / "run", "run.checkpoint_every=1", steps=20), tmp_path / "logs", prepare=full_disk(3))
    assert ended.status == 2, ended.err
    assert ended.err.count("not written (No space left on device) - training goes on, the older one stays") == 2  # of steps 3 and 4
    (error,) = [line for line in ended.err.splitlines() if line.startswith("error:")]
    assert error.startswith(f"error: {tmp_path / 'run' / 'checkpoints'}: not written 3 times in a row (No space left on device)")
    assert "Traceback" not in ended.err
    found = newest_checkpoint(tmp_path / "run" / "checkpoints", pytest.fail)
    assert found is not None
    assert found.name == "step_00000002"


def test_fault_63_a_full_disk_at_the_end_does_not_keep_the_weights_back(data: TinyData, tmp_path: Path) -> None:
    ended = run(command(data, "gfl", tmp_path / "run", "run.checkpoint_every=1", steps=3), tmp_path / "logs", prepare=full_disk(1))
    assert ended.status == 0, ended.err
    assert ended.err.count("not written (No space left on device) - training goes on\n") == 2
    assert "checkpoint at step 3 not written (No space left on device) - evaluation follows\n" in ended.err
    assert {path.stem for path in (tmp_path / "run" / "weights").iterdir()} == {"teacher", "student", "best"}
    assert json.loads((tmp_path / "run" / "results.json").read_text())["step"] == 3


def test_fault_63_no_room_for_weights(data: TinyData, tmp_path: Path) -> None:
    def prepare() -> None:
        import dtg_core.engine.evaluator as module

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        module.save_weights = full

    for processes in (1, 2):
        output = tmp_path / str(processes)
        ends = [process.wait(60) for process in start_many(command(data, "gfl", output, steps=2), tmp_path / "logs", processes, prepare)]
        assert [end.status for end in ends] == [2] * processes, ends[-1].err
        told = [line for end in ends for line in end.err.splitlines() if line.startswith("error:")]
        assert told == [f"error: {output / 'weights' / 'teacher.safetensors'}: not written (No space left on device) - make room; --resume auto continues"]
        assert not any("Traceback" in end.err for end in ends)


def test_fault_72_more_processes_than_images(tmp_path: Path) -> None:
    one = TinyData(*(write_coco(tmp_path / name, count, seed) for name, count, seed in (("l", 1, 1), ("u", 3, 2), ("v", 1, 3))))
    ends = [process.wait() for process in start_many(command(one, "gfl", tmp_path / "run", steps=3), tmp_path / "logs", 2)]
    assert [end.status for end in ends] == [0, 0], ends[0].err + ends[1].err
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 3]


def test_fault_72_one_process_ends_early(data: TinyData, tmp_path: Path) -> None:
    def prepare() -> None:
        def told() -> None:
            from dtg_core.errors import UserError

            if os.environ["RANK"] == "1":
                raise UserError("images: the disk is gone - mount it")

        at_batch(3, told)()

    ends = [process.wait(60) for process in start_many(command(data, "gfl", tmp_path / "run", steps=8), tmp_path / "logs", 2, prepare)]
    assert [end.status for end in ends] == [2, 2], ends[0].err + ends[1].err
    (first,), (second,) = ([line for line in end.err.splitlines() if line.startswith("error:")] for end in ends)
    assert first.startswith("error: process 0 of 2: step 3: another process has ended or does not answer (")
    assert second == "error: images: the disk is gone - mount it"
    assert not any("Traceback" in end.err for end in ends)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_fail_cost_no_step(data: TinyData, tmp_path: Path, workers: int) -> None:
    """Without any checkpoint on the way the finished steps are kept, and the run goes on as if nothing had happened."""
    def told() -> None:
        raise UserError("images: the disk is gone - mount it")

    settings = [f"data.workers={workers}", "run.evaluate_every=3", "run.log_every=2"]
    arguments = command(data, "gfl", tmp_path / "run", *settings)
    first = run(arguments, tmp_path / "logs", prepare=at_batch(0, told))
    assert (first.status, first.err.splitlines()[-1]) == (2, "error: images: the disk is gone - mount it")
    at_5 = run([*arguments, "--resume", "auto"], tmp_path / "logs", prepare=at_batch(5, told))
    assert (at_5.status, at_5.err.splitlines()[-1]) == (2, "error: images: the disk is gone - mount it; --resume auto --resume-with-changes continues")
    assert run([*arguments, "--resume", "auto"], tmp_path / "logs").status == 0
    assert run(command(data, "gfl", tmp_path / "unbroken", *settings), tmp_path / "logs").status == 0
    assert lines(tmp_path / "run") == lines(tmp_path / "unbroken")
    assert weights(tmp_path / "run") == weights(tmp_path / "unbroken")


def test_an_evaluation_that_fails_costs_no_step(data: TinyData, tmp_path: Path) -> None:
    def prepare() -> None:
        import dtg_core.engine.evaluator as module

        def broken(*_: object) -> None:
            raise UserError("val.png: cannot be read - fix it")

        module.find = broken  # type: ignore[assignment]

    arguments = command(data, "gfl", tmp_path / "run", "run.evaluate_every=3", "guidance.start_step=0", steps=5)
    ended = run(arguments, tmp_path / "logs", prepare=prepare)
    assert (ended.status, ended.err.splitlines()[-1]) == (2, "error: val.png: cannot be read - fix it; --resume auto --resume-with-changes continues")
    assert run([*arguments, "--resume", "auto"], tmp_path / "logs").status == 0
    assert [line["step"] for line in lines(tmp_path / "run") if "teacher/AP" in line] == [3, 5]


@pytest.mark.parametrize("number", [signal.SIGBUS, signal.SIGKILL])
def test_faults_73_74_killed_workers(data: TinyData, tmp_path: Path, number: int) -> None:
    ended = run(command(data, "gfl", tmp_path / "run", "data.workers=1"), tmp_path / "logs",
                prepare=at_batch(3, lambda: os.kill(os.getpid(), number)))  # fmt: skip
    assert ended.status == 2
    (line,) = [line for line in ended.err.splitlines() if "error: data.workers" in line]  # PyTorch's own line ends in a NUL
    assert "data.workers=1: a worker that makes batches has died" in line
    assert "/dev/shm" in line
    assert "Traceback" not in ended.err


def test_faults_74_no_room_in_shared_memory(data: TinyData, tmp_path: Path) -> None:
    def full() -> None:
        raise RuntimeError("unable to write to file </torch_12_34_5>: No space left on device (28)")

    ended = run(command(data, "gfl", tmp_path / "run", "data.workers=1"), tmp_path / "logs", prepare=at_batch(3, full))
    assert ended.status == 2
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error:")]
    assert "No space left on device" in line
    assert "/dev/shm" in line
    assert "Traceback" not in ended.err
