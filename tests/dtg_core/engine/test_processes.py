"""Several processes do what one process with all their images does, stop together, and never wait for each other in vain."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import ROOT, TinyData, checkpoint_state, command, errors, lines, run, start_many, weights
from safetensors.torch import load_file

from dtg_core.data.plan import StepData
from dtg_core.data.views import NO_BOXES, NO_LABELS
from dtg_core.engine.checkpoint import newest_checkpoint
from dtg_core.guidance import thresholds
from dtg_core.structures import LossName, PairBatch, ViewBatch

SGD = ["optim.name=sgd", "optim.lr=0.002", "run.evaluate_batch=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData.write(tmp_path_factory.mktemp("data"))


def without_objects(labeled_from: int, unlabeled_from: int) -> Callable[[], None]:
    """Labelled slots from the one on have no box, and unlabelled ones nothing that the teacher could find."""

    def prepare() -> None:
        from dtg_core.data import plan

        labeled, unlabeled, objects = StepData._labeled_batch, StepData._unlabeled_batch, plan.CocoIndex.objects

        def labeled_batch(self: StepData, step: int) -> ViewBatch:
            share = self._slots(self.labeled_per_device)
            slots = iter(share)
            plan.CocoIndex.objects = lambda index, row: (
                (NO_BOXES, NO_LABELS) if next(slots) >= labeled_from else objects(index, row))
            batch = labeled(self, step)
            plan.CocoIndex.objects = objects
            return batch

        def unlabeled_batch(self: StepData, step: int) -> PairBatch | None:
            pair = unlabeled(self, step)
            if pair is None:
                return None
            empty = torch.tensor([slot >= unlabeled_from for slot in self._slots(self.unlabeled_per_device)])
            sizes = torch.where(empty[:, None], 0.0, pair.teacher.sizes)
            return replace(pair, teacher=replace(pair.teacher, sizes=sizes))

        StepData._labeled_batch, StepData._unlabeled_batch = labeled_batch, unlabeled_batch

    return prepare


def compare(one: Path, other: Path, steps: int) -> tuple[float, float]:
    """Largest differences of the losses, relative, and of the weights."""
    losses = weight = 0.0
    together, apart = lines(one), lines(other)
    assert len(together) == len(apart) == steps + 1
    for line, own in zip(together[:-1], apart[:-1]):
        names = [name for name in line if name.startswith(("labeled/", "unlabeled/"))]
        assert names == [name for name in own if name.startswith(("labeled/", "unlabeled/"))]
        losses = max(losses, *(abs(line[name] - own[name]) / max(abs(line[name]), 0.1) for name in names))
    for which in ("teacher", "student"):
        first, second = (load_file(folder / "weights" / f"{which}.safetensors") for folder in (one, other))
        weight = max(weight, *(float((first[name] - second[name]).abs().max()) for name in first if first[name].numel()))
    return losses, weight


FOLLOWING = [f"guidance.stages.{stage}.tau_rate=0.05" for stage in ("head", "rpn", "rcnn")]


@pytest.mark.parametrize(("name", "paradigm", "empty", "parts"), [
    ("gfl", "dense", False, 1), ("gfl", "dense", True, 1), ("faster_rcnn", "dense", True, 2), ("faster_rcnn", "sparse", True, 1),
])  # fmt: skip
def test_two_processes_are_one(data: TinyData, tmp_path: Path, name: str, paradigm: str, empty: bool, parts: int) -> None:
    """With one or more micro-batches each, against a single batch."""

    def prepare() -> None:
        thresholds.LOWEST = 1e-4  # else those that start at 0.005 could only rise
        if empty:
            without_objects(1, 2)()

    sizes = {
        1: [f"data.labeled_per_device={2 * parts}", "data.unlabeled_per_device=4"],
        2: ["data.labeled_per_device=1", f"data.unlabeled_per_device={2 // parts}", f"optim.accumulate={parts}"],
    }
    arguments = {
        processes: command(data, name, tmp_path / str(processes), *SGD, *FOLLOWING, *sizes[processes], steps=8, paradigm=paradigm)
        for processes in sizes
    }
    assert run(arguments[1], tmp_path / "logs", prepare=prepare).status == 0
    for process in start_many(arguments[2], tmp_path / "logs", 2, prepare):
        assert process.wait().status == 0, process.err
    losses, weight = compare(tmp_path / "1", tmp_path / "2", 8)
    print(f"{name} {paradigm} empty={empty}: losses {losses:.2g}, weights {weight:.2g}")
    assert losses < 1e-5
    assert weight < 1e-4
    one, two = (checkpoint_state(tmp_path / folder / "checkpoints" / "step_00000008")["thresholds"] for folder in ("1", "2"))
    assert set(one) == set(two) == {"gfl": {"head"}, "faster_rcnn": {"rpn", "rcnn"}}[name]
    for stage, followed in one.items():
        assert followed["logits"] == pytest.approx(two[stage]["logits"], abs=1e-5)
        # Without the empty images, GFL's untrained teacher finds one cluster of each class in an image, which is what is wanted.
        assert not empty or max(abs(logit - followed["start"]) for logit in followed["logits"]) > 0.01
    if paradigm == "dense":
        stage = {"gfl": "head", "faster_rcnn": "rcnn"}[name]
        found = [line[f"guidance/{stage}/candidates"] for line in lines(tmp_path / "2")[1:-1]]
        assert np.mean(found) > 0
    assert lines(tmp_path / "1")[-1] == pytest.approx(lines(tmp_path / "2")[-1], abs=0.5)


def test_micro_batches_on_the_command_line(data: TinyData, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    together = command(data, "gfl", one, *SGD, "data.labeled_per_device=2", "data.unlabeled_per_device=4", steps=6)
    apart = command(data, "gfl", two, *SGD, "data.unlabeled_per_device=2", "optim.accumulate=2", steps=6)
    assert run(together, tmp_path / "logs").status == 0
    assert run(apart, tmp_path / "logs").status == 0
    losses, weight = compare(one, two, 6)
    assert losses < 1e-5
    assert weight < 1e-4
    launcher = run(command(data, "gfl", tmp_path / "three", *SGD, steps=6), tmp_path / "logs",
                   env={"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"})  # fmt: skip
    assert launcher.status == 0
    assert weights(tmp_path / "three") == weights(two)
    assert "accumulate: 2" in (tmp_path / "three" / "config.yaml").read_text()


def test_all_processes_stop_when_one_is_told(data: TinyData, tmp_path: Path) -> None:
    def prepare() -> None:
        import dtg_core.engine.trainer as module

        train_step = module.train_step

        def stepping(*arguments: object) -> object:
            if os.environ["RANK"] == "1" and arguments[1][0].step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return train_step(*arguments)

        module.train_step = stepping

    arguments = command(data, "gfl", tmp_path / "run", "run.log_every=3", steps=12)
    stopped = start_many(arguments, tmp_path / "logs", 2, prepare)
    assert [process.wait().status for process in stopped] == [143, 143], stopped[0].err + stopped[1].err
    found = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert checkpoint_state(found)["step"] == 5
    resumed = start_many([*arguments, "--resume", "auto"], tmp_path / "logs", 2)
    assert [process.wait().status for process in resumed] == [0, 0], resumed[0].err
    unbroken = start_many(command(data, "gfl", tmp_path / "other", "run.log_every=3", steps=12), tmp_path / "logs", 2)
    assert [process.wait().status for process in unbroken] == [0, 0]
    assert weights(tmp_path / "run") == weights(tmp_path / "other")


def test_a_mistake_of_the_main_process_ends_all(data: TinyData, tmp_path: Path) -> None:
    """In one line, also where nobody has chosen the number of threads."""

    def prepare() -> None:
        del os.environ["OMP_NUM_THREADS"]

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").write_text("")
    processes = start_many(command(data, "gfl", tmp_path / "run"), tmp_path / "logs", 2, prepare)
    assert [process.wait().status for process in processes] == [2, 2]
    assert len(errors(processes[0])) == 1
    assert "holds something already" in processes[0].err
    assert processes[1].err == ""


def test_a_failing_evaluation_of_the_main_process_ends_all(data: TinyData, tmp_path: Path) -> None:
    def prepare() -> None:
        from dtg_core.engine import evaluator as engine

        def broken(*_: object) -> object:
            raise ValueError("the evaluator is broken")

        engine.metrics_and_curves = broken  # type: ignore[assignment]

    settings = "run.evaluate_every=2"
    processes = start_many(command(data, "gfl", tmp_path / "run", settings, steps=5), tmp_path / "logs", 2, prepare)
    ends = [process.wait() for process in processes]
    assert "the evaluator is broken" in ends[0].err
    assert ends[0].status != 0
    assert ends[1].status == 2


def test_a_step_that_is_not_finite_on_one_process_is_skipped_by_all(data: TinyData, tmp_path: Path) -> None:
    def prepare() -> None:
        from dtg_core.engine import train_step as steps

        forward = steps._forward

        def spoilt(training: steps.Training, student: object, lesson: steps.Lesson) -> object:
            terms = forward(training, student, lesson)
            if lesson.batch.step == 2 and os.environ.get("RANK") == "1":
                name = next(iter(terms))
                terms[name] = replace(terms[name], total=terms[name].total * float("nan"))
            return terms

        steps._forward = spoilt

    processes = start_many(command(data, "gfl", tmp_path / "run", steps=5), tmp_path / "logs", 2, prepare)
    assert [process.wait().status for process in processes] == [0, 0], processes[0].err + processes[1].err
    assert [line["skipped"] for line in lines(tmp_path / "run")[:-1]] == [0, 0, 1, 0, 0]


def test_giving_up_names_the_losses_of_every_process(data: TinyData, tmp_path: Path) -> None:
    """One loss of the second process is not finite, and that loss alone is told, beside the means of the others."""

    def prepare() -> None:
        from dtg_core.engine import train_step as steps

        forward = steps._forward

        def spoilt(training: steps.Training, student: object, lesson: steps.Lesson) -> object:
            terms = forward(training, student, lesson)
            if os.environ.get("RANK") == "1":
                box = LossName("labeled", "head", "box")
                terms[box] = replace(terms[box], total=terms[box].total * float("nan"))
            return terms

        steps._forward = spoilt

    arguments = command(data, "gfl", tmp_path / "run", "run.max_skipped=2", steps=5)
    processes = start_many(arguments, tmp_path / "logs", 2, prepare)
    assert [process.wait().status for process in processes] == [3, 3], processes[0].err + processes[1].err
    assert "not finite 2 times in a row (labeled/head/box) - " in processes[0].err
    losses = json.loads((tmp_path / "run" / "nonfinite" / "step.json").read_text())["losses"]
    assert [name for name, loss in losses.items() if loss == "nan"] == ["labeled/head/box"]


def test_all_processes_have_the_same_teacher_when_batch_statistics_train(data: TinyData, tmp_path: Path) -> None:
    def prepare() -> None:
        import dtg_core.engine.trainer as module

        train_step = module.train_step

        def stepping(*arguments: object) -> object:
            figures = train_step(*arguments)
            torch.save(arguments[0].teacher.state_dict(), tmp_path / f"teacher{os.environ['RANK']}.pt")  # type: ignore[attr-defined]
            return figures

        module.train_step = stepping

    processes = start_many(command(data, "gfl", tmp_path / "run", "backbone.batch_norm=train", steps=4), tmp_path / "logs", 2, prepare)
    assert [process.wait().status for process in processes] == [0, 0], processes[0].err
    first, second = (torch.load(tmp_path / f"teacher{rank}.pt", weights_only=True) for rank in (0, 1))
    assert any(name.endswith("running_var") for name in first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


AT_EXIT = """
import atexit, pathlib, runpy, sys

@atexit.register
def last():
    print("threads at exit:", *(path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")))

sys.argv = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_torchrun(data: TinyData, tmp_path: Path) -> None:
    """The real launcher. None of Gloo's threads outlives the training: seldom, one would abort the process at its end."""
    (tmp_path / "at_exit.py").write_text(AT_EXIT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "at_exit.py")]
    output = tmp_path / "run"
    ended = subprocess.run(
        [*launch, str(ROOT / "scripts" / "train.py"), *command(data, "gfl", output, steps=3)], capture_output=True, text=True,
        timeout=100, env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("step 3/3") == 1
    assert [line["step"] for line in lines(output)] == [1, 2, 3, 3]
    assert "gloo" not in ended.stdout
    assert ended.stdout.count("threads at exit:") == 2
