"""``train.py`` from the command line to a run folder that explains itself, and what it says when it cannot."""
from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from conftest import DETECTORS
from runs import ROOT, TinyData, command, lines, run, start_many, weights
from torch import nn

import dtg_core.engine.evaluator
from dtg_core.engine.checkpoint import load_weights
from dtg_core.engine.predict import load_detector
from dtg_core.structures import LossName, LossTerm

sys.path[:0] = [str(ROOT / "scripts")]
from read_settings import RunSettings  # noqa: E402
from train import default_folder  # noqa: E402

STAGES = {"gfl": ["head"], "faster_rcnn": ["rpn", "rcnn"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData.write(tmp_path_factory.mktemp("data"))


def test_the_best_teacher_is_kept(data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of AP 5, 9, 9, 7, the first 9; on other validation images it starts anew."""
    real, given = dtg_core.engine.evaluator.metrics_and_curves, iter([5, 1, 9, 1, 9, 1, 7, 1, 6, 1])  # of teacher and student in turn

    def metrics(*arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        figures, curves = real(*arguments)
        return {**figures, "AP": float(next(given))}, curves

    monkeypatch.setattr(dtg_core.engine.evaluator, "metrics_and_curves", metrics)
    arguments = command(data, "gfl", tmp_path / "run", "run.evaluate_every=1", "guidance.start_step=0", steps=4)
    assert run(arguments, tmp_path / "logs").status == 0
    folder = tmp_path / "run" / "weights"
    best, last = (load_weights(folder / f"{which}.safetensors") for which in ("best", "teacher"))
    assert [(told["which"], told["step"]) for _, told in (best, last)] == [("teacher", 2), ("teacher", 4)]
    assert best[1]["AP"] == 9
    assert any((value != last[0][name]).any() for name, value in best[0].items())
    fewer = json.loads(data.val.read_text())
    fewer["images"].pop()
    fewer["annotations"] = [note for note in fewer["annotations"] if note["image_id"] in {image["id"] for image in fewer["images"]}]
    other = data.val.with_name("fewer.json")
    other.write_text(json.dumps(fewer))
    again = command(data, "gfl", tmp_path / "run", "run.evaluate_every=9", "guidance.start_step=0", f"data.val={other}", steps=5)
    given = iter([6, 1])
    assert run([*again, "--resume", "auto", "--resume-with-changes"], tmp_path / "logs").status == 0
    told = load_weights(folder / "best.safetensors")[1]
    assert (told["step"], told["AP"]) == (5, 6)
    assert load_detector(tmp_path / "run", "cpu", "best").class_names == ("green", "red")


def test_accelerate_launch(data: TinyData, tmp_path: Path) -> None:
    """The command of the README, the folder it leaves, and evaluate.py on it."""
    output = tmp_path / "run"
    settings = ["run.checkpoint_every=2", "run.evaluate_every=3", "backbone.name=test_efficientnet"]
    arguments = command(data, "gfl", output, *settings)
    launch = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "scripts" / "train.py"), *arguments]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HOME": str(tmp_path)}  # no accelerate config
    ended = subprocess.run(launch, capture_output=True, text=True, timeout=200, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == f"done: {output}"
    assert "step 6/6" in ended.stderr

    names = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    checkpoint = {"student.safetensors", "teacher.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert names == {
        ".lock", "config.yaml", "metrics.jsonl", "results.json", "precision.json", "report.html",
        *(f"pictures/{kind}-{step:06}.jpg" for kind in ("guidance-head", "predictions") for step in (1, 3, 6)),
        *(f"weights/{which}.safetensors" for which in ("teacher", "student", "best")),
        *(f"checkpoints/step_{step:08d}/{name}" for step in (4, 6) for name in checkpoint),
    }  # fmt: skip
    results = json.loads((output / "results.json").read_text())
    assert results["step"] == 6
    assert set(results) == {"teacher", "student", "step", "images_of_a_step", "mixed_precision", "data", "changed"}
    assert results["changed"] == []
    assert {"AP", "AP50", "AP75", "classes"} <= set(results["teacher"])
    found = lines(output, times=True)
    assert [line["step"] for line in found] == [1, 1, 2, 3, 3, 4, 5, 6, 6]  # evaluated before guidance begins, too
    assert {"teacher/AP", "student/AP75"} <= set(found[1]) & set(found[4])
    assert {f"{branch}/head/{kind}" for branch in ("labeled", "unlabeled") for kind in ("cls", "box", "background")} | {
        "unlabeled/head/rank", "guidance/head/candidates", "guidance/head/clusters", "guidance/head/cluster_size",
        "guidance/head/matched", "loss_ratio", "unlabeled_weight", "lr", "step_seconds", "data_seconds", "skipped",
    } <= set(found[-2])  # fmt: skip
    assert found[-2]["step_seconds"] >= found[-2]["data_seconds"] > 0
    beta = {"unlabeled/head/rank": 3.0}
    parts = {branch: sum(value * beta.get(name, 1.0) for name, value in found[-2].items() if name.startswith(f"{branch}/"))
             for branch in ("labeled", "unlabeled")}  # fmt: skip
    assert found[-2]["unlabeled/head/rank"] > 0
    assert {branch: found[-2][f"loss/{branch}"] for branch in parts} == pytest.approx(parts, rel=1e-4)
    assert found[-2]["loss_ratio"] == pytest.approx(parts["unlabeled"] / parts["labeled"], rel=1e-4)
    _, told = load_weights(output / "weights" / "teacher.safetensors")
    assert told["class_names"] == ["green", "red"]
    assert "test_efficientnet" in told["config"]
    evaluated = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "evaluate.py"), str(output), "--annotations", str(data.val)],
        capture_output=True, text=True, timeout=200, env=environment,
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    again = json.loads((output / f"evaluation-{data.val.stem}" / "results.json").read_text())
    assert again["AP50"] == pytest.approx(results["teacher"]["AP50"], abs=1e-6)


def test_the_run_folder_names_its_labelled_file() -> None:
    settings = RunSettings(detector="gfl", paradigm="dense")
    assert default_folder(settings) == Path("runs/gfl-dense-seed0")
    own = replace(settings, data=replace(settings.data, labeled="photos/own.json"))
    assert default_folder(own) == Path("runs/gfl-dense-own-seed0")
    fold = replace(settings, data=replace(settings.data, labeled="instances_train2017.1@10.json"), run=replace(settings.run, seed=3))
    assert default_folder(fold) == Path("runs/gfl-dense-instances_train2017.1@10-seed3")


@pytest.mark.parametrize("paradigm", ["dense", "sparse", "supervised"])
@pytest.mark.parametrize("name", DETECTORS)
def test_every_paradigm(data: TinyData, tmp_path: Path, name: str, paradigm: str) -> None:
    ended = run(command(data, name, tmp_path / "run", paradigm=paradigm, steps=4), tmp_path / "logs")
    assert ended.status == 0, ended.err
    found = lines(tmp_path / "run")
    plain = ("cls", "box", "background")
    kinds = {"dense": (*plain, "rank"), "sparse": plain, "supervised": ()}[paradigm]
    wanted = {f"labeled/{stage}/{kind}" for stage in STAGES[name] for kind in ("cls", "box", "background")}
    wanted |= {f"unlabeled/{stage}/{kind}" for stage in STAGES[name] for kind in kinds}
    assert {key for key in found[-2] if key.startswith(("labeled/", "unlabeled/"))} == wanted
    assert all(found[-2][key] is not None for key in wanted)
    if paradigm != "supervised":
        assert any(found[-2][f"unlabeled/{stage}/box"] > 0 for stage in STAGES[name])


def test_labelled_losses_do_not_depend_on_the_paradigm_before_guidance(data: TinyData, tmp_path: Path) -> None:
    for paradigm in ("dense", "sparse", "supervised"):
        arguments = command(data, "gfl", tmp_path / paradigm, "guidance.start_step=3", paradigm=paradigm, steps=4)
        assert run(arguments, tmp_path / "logs").status == 0
    parts = [
        [{key: value for key, value in line.items() if key.startswith("labeled/")} for line in lines(tmp_path / name)[:4]]
        for name in ("dense", "sparse", "supervised")
    ]
    assert parts[0] == parts[1] == parts[2]


def test_what_guidance_brings_is_seen_against_an_evaluation_before_it(data: TinyData, tmp_path: Path) -> None:
    """At the step where it starts, whatever steps are evaluated besides; not if none but the last is."""
    for every, expected in ((2, [2, 3, 4]), (0, [4])):
        settings = ["guidance.start_step=3", f"run.evaluate_every={every}"]
        ended = run(command(data, "gfl", tmp_path / f"{every}", *settings, steps=4), tmp_path / "logs")
        assert ended.status == 0, ended.err
        assert [line["step"] for line in lines(tmp_path / f"{every}") if "teacher/AP" in line] == expected


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (["optim.lrr=1"], ["optim.lr", "did you mean"]),
        (["optim.lr=fast"], ["optim.lr", "fast"]),
        (["backbone.name=resnet5000"], ["resnet5000", "resnet"]),
        (["backbone.weights=none.safetensors", "backbone.pretrained=true"], ["none.safetensors"]),
        (["data.labeled=nowhere.json"], ["nowhere.json"]),
        (["data.images=nowhere"], ["nowhere"]),
    ],
)
def test_mistakes_are_one_line_and_status_2(data: TinyData, tmp_path: Path, change: list[str], parts: list[str]) -> None:
    ended = run(command(data, "gfl", tmp_path / "run", *change), tmp_path / "logs")
    assert ended.status == 2
    told = [line for line in ended.err.splitlines() if not line.startswith("warning: ")]
    assert len(told) == 1, ended.err
    assert told[0].startswith("error: ")
    assert "Traceback" not in ended.err
    assert all(part in told[0] for part in parts), ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_found_by_a_loader_worker_is_one_line(data: TinyData, tmp_path: Path, workers: int) -> None:
    def prepare() -> None:
        from dtg_core.data.index import CocoIndex
        from dtg_core.errors import UserError

        def unreadable(self: CocoIndex, row: int, **more: Any) -> None:
            raise UserError(f"{row}.png: cannot be read - fix it")

        CocoIndex.decoded = unreadable  # type: ignore[assignment,method-assign]

    ended = run(command(data, "gfl", tmp_path / "run", f"data.workers={workers}"), tmp_path / "logs", prepare=prepare)
    assert ended.status == 2
    errors = [line for line in ended.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, ended.err
    assert "images in a row cannot be used" in errors[0]
    assert "Traceback" not in ended.err


def test_faults_16_boxes_that_no_view_shows_are_counted(data: TinyData, tmp_path: Path) -> None:
    content = json.loads(data.labeled.read_text())
    content["annotations"][0]["bbox"] = [3, 3, 1.5, 20]
    own = data.labeled.with_name("tiny_box.json")
    own.write_text(json.dumps(content))
    small = ["views.short_edge=[32,32]", "views.long_edge=32"]
    ended = run(command(replace(data, labeled=own), "gfl", tmp_path / "run", *small, steps=1), tmp_path / "logs")
    assert ended.status == 0
    assert "tiny_box.json: boxes are under 1 px in every training view and left out there (views.short_edge, views.long_edge) " \
           "(1: in 0.png)" in ended.err


def test_out_of_memory_is_told_and_resumed(data: TinyData, tmp_path: Path) -> None:
    def prepare() -> None:
        import torch

        from dtg_core.engine import trainer as engine

        step = engine.train_step

        def full(*arguments: object) -> object:
            if arguments[1][0].step == 4:  # type: ignore[index]
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.14 GiB")
            return step(*arguments)  # type: ignore[arg-type]

        engine.train_step = full  # type: ignore[assignment]

    told = command(data, "gfl", tmp_path / "run", "run.checkpoint_every=2")
    ended = run(told, tmp_path / "logs", prepare=prepare)
    assert ended.status == 2
    (error,) = [line for line in ended.err.splitlines() if line.startswith("error:")]
    assert "step 4: out of memory on cpu (views of 1x3x" in error
    assert all(key in error for key in ("data.unlabeled_per_device", "views.short_edge", "--mixed_precision"))
    assert error.endswith("; --resume auto continues")
    alone = run(command(data, "gfl", tmp_path / "alone"), tmp_path / "logs", prepare=prepare)
    assert alone.err.splitlines()[-1].endswith("--mixed_precision bf16")  # there is no checkpoint to go on from
    assert "Traceback" not in ended.err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()].count("step_00000004") == 1
    assert run([*told, "--resume", "auto"], tmp_path / "logs").status == 0
    assert run(command(data, "gfl", tmp_path / "other"), tmp_path / "logs").status == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "other")


def test_out_of_memory_in_an_evaluation_costs_no_step(data: TinyData, tmp_path: Path) -> None:
    def prepare() -> None:
        import torch

        from dtg_core.engine import evaluator as engine

        def full(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.14 GiB")

        engine.find = full  # type: ignore[assignment]

    settings = ["run.checkpoint_every=3", "run.evaluate_every=3", "guidance.start_step=0"]  # no evaluation before guidance
    arguments = command(data, "gfl", tmp_path / "run", *settings)
    ended = run(arguments, tmp_path / "logs", prepare=prepare)
    assert ended.status == 2
    error = ended.err.splitlines()[-1]
    assert error.startswith("error: step 2: out of memory on cpu (in the evaluation) - lower run.evaluate_batch")
    assert error.endswith("; --resume auto continues")
    resumed = run([*arguments, "--resume", "auto"], tmp_path / "logs")
    assert (resumed.status, "at step 3" in resumed.err) == (0, True)
    assert run(command(data, "gfl", tmp_path / "other", "run.evaluate_every=3", "guidance.start_step=0"), tmp_path / "logs").status == 0
    assert lines(tmp_path / "run") == lines(tmp_path / "other")


def test_a_compiler_that_fails_is_told(data: TinyData, tmp_path: Path) -> None:
    def prepare() -> None:
        import torch._inductor.config as inductor

        inductor.cpp.cxx = (str(tmp_path / "no_compiler"),)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache")

    ended = run(command(data, "gfl", tmp_path / "run", "run.compile=true"), tmp_path / "logs", prepare=prepare)
    assert ended.status == 2
    (error,) = [line for line in ended.err.splitlines() if line.startswith("error:")]
    assert "run.compile: the backbone was not compiled" in error
    assert "run.compile=false" in error
    assert "Traceback" not in ended.err


def test_a_bare_environment(data: TinyData, tmp_path: Path) -> None:
    """No HOME, no terminal, C locale, a closed stdin, a strange time zone, and a clock that runs backwards."""
    clock = "import itertools, time; time.time = itertools.count(2e9, -60.0).__next__"
    code = f"{clock}; import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = command(data, "gfl", tmp_path / "run", steps=3)
    ended = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "scripts" / "train.py"), *arguments], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=200,
        env={"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}", "OMP_NUM_THREADS": "1", "LC_ALL": "C", "TZ": "Nowhere/None",
             "TERM": "dumb"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = lines(tmp_path / "run", times=True)
    assert all(line["step_seconds"] > 0 for line in found if "step_seconds" in line)
    assert run(command(data, "gfl", tmp_path / "other", steps=3), tmp_path / "logs").status == 0
    assert lines(tmp_path / "run") == lines(tmp_path / "other")


def test_what_is_captured_is_of_the_last_try(data: TinyData, tmp_path: Path) -> None:
    """Two tries from one checkpoint that give up at the same step."""
    settings, captured = ["optim.name=sgd", "run.max_skipped=2"], []
    for lr, flags in (("0.001", ["--stop-at", "2"]), ("1e12", ["--resume", "auto"]), ("2e12", ["--resume", "auto"])):
        arguments = command(data, "gfl", tmp_path / "run", *settings, f"optim.lr={lr}", steps=50)
        ended = run([*arguments, *flags, *(["--resume-with-changes"] if "--resume" in flags else [])], tmp_path / "logs")
        assert ended.status == (3 if "--resume" in flags else 0), ended.err
        captured += [(path.parent.name, path.read_bytes()) for path in (tmp_path / "run/nonfinite").glob("*/student.safetensors")]
    (first, weights_then), (second, weights_now) = captured
    assert first == second
    assert weights_then != weights_now


def test_a_run_that_gives_up_can_be_replayed(data: TinyData, tmp_path: Path) -> None:
    """A loss that is not finite from step 3 on: the step at which the run gives up comes to the same losses again, so with its
    weights, its micro-batches and the thresholds that had followed the teacher until then."""

    def prepare() -> None:
        from dtg_core.engine import train_step as steps

        forward = steps._forward

        def spoilt(training: steps.Training, student: nn.Module, lesson: steps.Lesson) -> dict[LossName, LossTerm]:
            terms = forward(training, student, lesson)
            if lesson.batch.step >= 3:
                box = LossName("labeled", "rpn", "box")
                terms[box] = replace(terms[box], total=terms[box].total * math.nan)
            return terms

        steps._forward = spoilt

    output = tmp_path / "run"
    settings = ["guidance.stages.rpn.tau_rate=0.2", "optim.accumulate=2", "run.max_skipped=3", "data.labeled_per_device=2"]
    ended = run(command(data, "faster_rcnn", output, *settings, steps=50), tmp_path / "logs", prepare=prepare)
    assert ended.status == 3, ended.err
    assert "not finite 3 times in a row" in ended.err
    assert "Traceback" not in ended.err
    told = json.loads((output / "nonfinite" / "step.json").read_text())
    assert {"step", "parts", "losses", "checkpoint"} <= set(told)
    assert [{kind: len(images) for kind, images in part.items()} for part in told["parts"]] == [{"labeled": 2, "unlabeled": 2}] * 2
    assert set(told["parts"][0]["labeled"][0]) == {"image_id", "seed"}
    assert [name for name, loss in told["losses"].items() if loss == "nan"] == ["labeled/rpn/box"]
    assert {name.split("/")[0] for name in told["losses"]} == {"labeled", "unlabeled"}  # no counts of guidance
    assert not (output / "weights").exists()

    replayed = run(["--replay", str(output / "nonfinite" / "step.json")], tmp_path / "logs", prepare=prepare)
    assert replayed.status == 3, replayed.err
    assert "not finite again" in replayed.out
    assert f"step {told['step']}, 2 parts" in replayed.out
    losses = dict(re.findall(r"^(\w+/\w+/\w+) (\S+)$", replayed.out, re.MULTILINE))
    assert losses == {name: f"{float(loss):.6g}" for name, loss in told["losses"].items()}
    other = run(["--replay", str(output / "nonfinite" / "step.json")], tmp_path / "logs", env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert other.status == 2, other.err
    assert "captured with mixed_precision no, this is bf16" in other.err
    several = start_many(["--replay", str(output / "nonfinite" / "step.json")], tmp_path / "logs", 2)
    assert [process.wait().status for process in several] == [2, 2]
    assert "runs the parts of all processes in one - launch it with one process" in several[0].err
    for wrong in (output / "config.yaml", output / "nonfinite" / "stepp.json", output / "nonfinite"):
        odd = run(["--replay", str(wrong)], tmp_path / "logs")
        assert odd.status == 2
        assert odd.err.startswith(f"error: --replay {wrong}: ")
        assert "give nonfinite/step.json" in odd.err
        assert odd.err.count("\n") == 1


def test_stop_at(data: TinyData, tmp_path: Path) -> None:
    """A stop is told as one, not as the end; at the last step it is the end."""
    arguments = command(data, "gfl", tmp_path / "run", steps=2)
    ended = run([*arguments, "--stop-at", "0"], tmp_path / "logs")
    assert (ended.status, ended.out) == (2, "")
    assert ended.err == "error: --stop-at: is out of range (found 0) - use at least 1\n"
    assert not (tmp_path / "run").exists()
    for _ in range(2):  # the second has nothing to do
        ended = run([*arguments, "--stop-at", "1", "--resume", "auto"], tmp_path / "logs")
        assert (ended.status, ended.out) == (0, f"{tmp_path / 'run'}: 1 process, 1 labelled and 2 unlabelled images a step\n"), ended.err
    ended = run([*arguments, "--stop-at", "2", "--resume", "auto"], tmp_path / "logs")
    assert (ended.status, ended.out.splitlines()[-1]) == (0, f"done: {tmp_path / 'run'}"), ended.err


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_micro_batches_are_divided_once(data: TinyData, tmp_path: Path, flags: list[str]) -> None:
    """Accelerate would divide each loss by their number too, which ``train_step`` has done."""

    def prepare() -> None:
        from accelerate import Accelerator

        backward = Accelerator.backward

        def told(self: Accelerator, loss: object, **options: object) -> None:
            print("divided by", self.gradient_accumulation_steps)
            backward(self, loss, **options)

        Accelerator.backward = told  # type: ignore[method-assign]

    ended = run([*command(data, "gfl", tmp_path / "run", "optim.accumulate=2", steps=2), *flags], tmp_path / "logs", prepare=prepare)
    assert ended.status == 0, ended.err
    assert set(re.findall("divided by .*", ended.out)) == {"divided by 1"}
    assert ("batch: 2 labelled and 4 unlabelled images, over 1 process" in ended.out) == bool(flags)


def test_weights_that_overflow_are_not_saved(data: TinyData, tmp_path: Path) -> None:
    """No later step could fix them, so the run ends at once and its checkpoints stay good."""
    from safetensors.torch import load_file

    def prepare() -> None:
        from dtg_core.engine import train_step as steps

        steps.learning_rate = lambda step, config: 3e38 if step == 3 else 0.001

    output = tmp_path / "run"
    ended = run(command(data, "gfl", output, "optim.name=sgd", "run.checkpoint_every=1", steps=9), tmp_path / "logs", prepare=prepare)
    assert ended.status == 3
    (error,) = [line for line in ended.err.splitlines() if line.startswith("error:")]
    assert "step 3: the update has overflowed the weights - lower optim.lr" in error
    newest = max((output / "checkpoints").glob("step_*"))
    assert newest.name == "step_00000003"
    for file in newest.glob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) and float(tensor.abs().amax()) < 1e6
                   for tensor in load_file(file).values() if tensor.is_floating_point() and tensor.numel()), file  # fmt: skip
    again = run([*command(data, "gfl", output, "optim.name=sgd", steps=9), "--resume", "auto"], tmp_path / "logs")
    assert again.status == 0, again.err


@pytest.mark.parametrize("name", DETECTORS)
def test_bfloat16_trains(data: TinyData, tmp_path: Path, name: str) -> None:
    ended = run(command(data, name, tmp_path / "run", steps=4), tmp_path / "logs", env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert ended.status == 0, ended.err
    found = lines(tmp_path / "run")[:-1]
    assert all(value is not None for line in found for value in line.values())
    assert found[-1]["skipped"] == 0


def test_scale_lr(data: TinyData, tmp_path: Path) -> None:
    settings = ["optim.reference_batch=12", "optim.lr=0.001", "optim.accumulate=2"]
    arguments = command(data, "gfl", tmp_path / "run", *settings, steps=1)
    ended = run([*arguments, "--scale-lr"], tmp_path / "logs")  # 2 x (1 + 2) images
    assert ended.status == 0, ended.err
    assert "optim.lr 0.001 -> 0.0005" in ended.out
    assert lines(tmp_path / "run")[0]["lr"] == 0.0005


def failing_tracker(moment: str) -> Callable[[], None]:
    def prepare() -> None:
        from accelerate import tracking

        class Tracker:
            requires_logging_directory = True

            def __init__(self, name: str, logging_dir: Path) -> None:
                self.folder = logging_dir
                input() if moment == "asking" else self.act("starting")

            def act(self, now: str, text: str = "") -> None:
                if now == moment:
                    raise ConnectionError(f"offline while {now}")
                self.folder.mkdir(exist_ok=True)
                with open(self.folder / "log", "a") as file:
                    file.write(f"{now} {text}\n")

            def store_init_configuration(self, values: dict) -> None:
                self.act("storing", values["detector"])

            def log(self, values: dict, step: int) -> None:
                self.act("logging", str(step))

            def finish(self) -> None:
                self.act("finishing")

        tracking.LOGGER_TYPE_TO_CLASS["wandb"] = Tracker

    return prepare


@pytest.mark.parametrize("moment", ["never", "starting", "asking", "logging", "finishing"])
def test_trackers_never_stop_training(data: TinyData, tmp_path: Path, moment: str) -> None:
    arguments = command(data, "gfl", tmp_path / "run", "run.trackers=[wandb]", steps=3)
    ended = run(arguments, tmp_path / "logs", prepare=failing_tracker(moment))
    assert ended.status == 0, ended.err
    assert ended.err.count("warning: tracker wandb: given up") == (moment != "never")
    if moment == "never":
        log = (tmp_path / "run" / "trackers" / "log").read_text().split("\n")
        assert log == ["starting ", "storing gfl", "logging 1", "logging 2", "logging 3", "logging 3", "finishing ", ""]


def test_trackers_are_off_unless_asked_and_unknown_ones_are_told(data: TinyData, tmp_path: Path) -> None:
    ended = run(command(data, "gfl", tmp_path / "run", "run.trackers=[tensorbord]", steps=1), tmp_path / "logs")
    assert ended.status == 0
    assert "tracker tensorbord" in ended.err
    assert "did you mean 'tensorboard'" in ended.err
    plain = run(command(data, "gfl", tmp_path / "plain", steps=1), tmp_path / "logs")
    assert "tracker" not in plain.err
    assert weights(tmp_path / "plain") == weights(tmp_path / "run")
