"""Faults 53 to 60 of configuration and command line, ``--dry-run``, and the user's own data from the command line."""

from __future__ import annotations

import json
import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DETECTORS, full_disk
from runs import TINY, TinyData, command, errors, run, weights, write_coco

from launch import check_devices  # isort: skip
from shared_flags import require_new  # isort: skip

from dtg_core.config import SCHEMA, BackboneConfig, Config, DataConfig, OptimConfig, RunConfig, cross_check
from dtg_core.drafts import require_writable
from dtg_core.engine import dry_run as dry_run_module
from dtg_core.engine.folder import RunFolder
from dtg_core.engine.train_step import Training
from dtg_core.errors import UserError
from dtg_core.models.backbone import build_pyramid
from dtg_core.ranges import check_ranges
from dtg_core.settings import load_config
from dtg_core.structures import LossName


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData.write(tmp_path_factory.mktemp("data"))


def tree(folder: Path) -> dict[str, tuple[int, float]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime) for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", DETECTORS)
def test_dry_run_writes_nothing(data: TinyData, tmp_path: Path, name: str) -> None:
    output = tmp_path / "none" / "run"
    arguments = command(data, name, output)
    before = tree(data.labeled.parent)
    process = run([*arguments, "--dry-run"], tmp_path / "logs")
    assert (process.status, errors(process)) == (0, []), process.err
    for word in ("5 labelled, 9 unlabelled and 3 validation images", "batch: 1 labelled and 2 unlabelled images, over 1 process\n", "s training", "for 6 steps", "of the process at most", "a checkpoint",
                 "nothing was written"):  # fmt: skip
        assert word in process.out
    assert "not finite" not in process.out
    assert not output.parent.exists()
    assert tree(data.labeled.parent) == before


def test_slow_reading_is_told() -> None:
    config = Config(data=DataConfig(workers=2))
    assert dry_run_module.slow_reading(1.0, 1.9, config) == []
    assert dry_run_module.slow_reading(1.0, 0.9, Config(data=DataConfig(workers=0))) == []
    (line,) = dry_run_module.slow_reading(1.0, 2.1, config)
    assert line.startswith("reading is the slower part - raise data.workers if ")
    assert "1333 px (views.long_edge)" in line


@pytest.mark.parametrize(("workers", "accumulate", "parts", "expected"), [
    (0, 1, 1, (2, 3, 50)),  # a step of 2 + 3 s
    (0, 4, 2, (4, 12, 160)),  # two micro-batches were trained on and one was read, of four
    (2, 1, 1, (2, 3, 20)),  # reading takes 1.5 s, while a step trains for 2 s
    (2, 4, 2, (4, 12, 60)),  # reading takes 6 s
])  # fmt: skip
def test_forecast_with_a_pencil(workers: int, accumulate: int, parts: int, expected: tuple[float, float, float]) -> None:
    config = Config(data=DataConfig(workers=workers), optim=OptimConfig(accumulate=accumulate), run=RunConfig(steps=10))
    assert dry_run_module.forecast(2, 3, parts, config) == expected


@pytest.mark.parametrize(("loss", "scaled", "told"), [(1.0, True, False), (1.0, False, True), (float("nan"), True, True)])
def test_dry_run_tells_broken_losses_from_a_scaler_at_its_start(data: TinyData, tmp_path: Path, loss: float, scaled: bool, told: bool) -> None:
    def prepare() -> None:
        def skipped(training: Training, batches: object) -> tuple[dict[LossName, float], dict[str, float]]:
            training.accelerator.scaler = object() if scaled else None  # type: ignore[assignment]
            return {LossName("labeled", "head", "cls"): loss}, {"guidance/head/clusters": 0.0, "skipped": 1.0}

        dry_run_module.train_step = skipped  # type: ignore[assignment]

    process = run([*command(data, "gfl", tmp_path / "run"), "--dry-run"], tmp_path / "logs", prepare=prepare)
    assert process.status == 0, process.err
    assert ("losses were not finite" in process.out) == told


def test_fault_58_folders_that_cannot_be_written(data: TinyData, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        process = run(command(data, "gfl", output), tmp_path / "logs")
        assert process.status == 2
        (line,) = errors(process)
        assert line.startswith(f"error: {output}: ")
        assert "a file" in line


def test_fault_58_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the answer of the system is put in."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=rf"b: cannot be written \(no right to write in {tmp_path}\) - give another --output$"):
        require_writable(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^a/b: cannot be written \(no right to write in \.\) - give another --json$"):
        require_new([Path("a/b/c.json")], False, "--json")


def test_fault_58_disk_nearly_full(data: TinyData, tmp_path: Path) -> None:
    def full() -> None:
        import shutil

        shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000)  # type: ignore[attr-defined, assignment]

    process = run([*command(data, "gfl", tmp_path / "run"), "--dry-run"], tmp_path / "logs", prepare=full)
    assert process.status == 2
    (line,) = errors(process)
    assert "GB left" in line


def test_fault_57_used_folder(data: TinyData, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    before = tree(tmp_path / "run")
    for flags, problem in (
        ([], "holds something already"), (["--overwrite"], "not the folder of a run"), (["--resume", "auto"], "nothing to resume")
    ):  # fmt: skip
        process = run([*command(data, "gfl", tmp_path / "run"), *flags], tmp_path / "logs")
        assert process.status == 2
        (line,) = errors(process)
        assert problem in line
    process = run([*command(data, "gfl", tmp_path / "run"), "--dry-run"], tmp_path / "logs")
    assert (process.status, errors(process)) == (0, [])
    assert f"warning: {tmp_path / 'run'}: holds something already" in process.err
    assert tree(tmp_path / "run") == before


@pytest.mark.parametrize(("names", "refused"), [
    ([], False), ([".lock"], False), ([".lock", "config.yaml", "notes.txt"], False), (["metrics.jsonl", ".lock"], False), (["notes.txt"], True),
    (["metrics.jsonl", "notes.txt"], True),
])  # fmt: skip
def test_folders_that_resume(tmp_path: Path, names: list[str], refused: bool) -> None:
    """A run that was killed before it had written its settings, and one that a study has prepared, go on."""
    for name in names:
        (tmp_path / name).write_text("schema: 1\n")
    with pytest.raises(UserError, match="nothing to resume") if refused else nullcontext():
        RunFolder(tmp_path).require_free(resume=True, overwrite=False)


def test_a_config_of_something_else_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("names: [a]\n")
    before = tree(tmp_path)
    for resume, problem in ((True, "nothing to resume"), (False, "not the folder of a run")):
        with pytest.raises(UserError, match=problem):
            RunFolder(tmp_path).open(resume, not resume)
    with pytest.raises(UserError, match=r"holds something already - use another --output$"):
        RunFolder(tmp_path).open(False, False)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("name", "is_one"), [("step_00000002", True), ("step_00000002_copy1", False), ("step_00000002.tmp", False)])
def test_a_copy_of_a_checkpoint_is_none(tmp_path: Path, name: str, is_one: bool) -> None:
    """Else a run would wait for it with bare weights and start with them."""
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert RunFolder(tmp_path).has_checkpoint == is_one


def test_a_folder_without_room_for_its_lock_is_told(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match=r"run: cannot be written \(File too large\) - give another --output"), full_disk():
        folder.claim()
    assert folder.lock is not None
    folder.lock.close()


def test_overwriting_deletes_what_a_run_has_written_only(tmp_path: Path) -> None:
    run_folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for folder in (run_folder / "weights", elsewhere):
        folder.mkdir(parents=True)
    (run_folder / "config.yaml").write_text("schema: 1\n")
    (elsewhere / "old.pt").write_text("a checkpoint on another disk")
    (run_folder / "checkpoints").symlink_to(elsewhere)
    (run_folder / "photos").mkdir()
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"holds what no run has written \(photos\)"):
        RunFolder(run_folder).open(resume=False, overwrite=True)
    assert tree(tmp_path) == before
    (run_folder / "photos").rmdir()
    for name, told in (
        ("weights/backup.safetensors",) * 2, ("evaluation-mine/notes.txt",) * 2, ("pictures/cat.jpg",) * 2,
        ("abandoned-1/weights/mine.pt",) * 2, ("nonfinite/step_00000003/mine/notes.txt", "nonfinite/step_00000003/mine"),
        ("results.json/mine.txt", "results.json"),
    ):  # fmt: skip
        (run_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (run_folder / name).write_text("the user's own")
        with pytest.raises(UserError, match=rf"holds what no run has written \({told}\)"):
            RunFolder(run_folder).open(resume=False, overwrite=True)
        (run_folder / name).unlink()
        if told != name:
            (run_folder / told).rmdir()
    for name in ("weights/teacher.safetensors", "evaluation-mine/results.json", "pictures/guidance-head-000010.jpg",
                 "trackers/tensorboard/any", "abandoned-1/weights/teacher.safetensors",
                 "nonfinite/step_00000003/state.json"):  # fmt: skip
        (run_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (run_folder / name).write_text("a run's")
    opened = RunFolder(run_folder)
    opened.open(resume=False, overwrite=True)
    assert opened.lock is not None
    opened.lock.close()
    assert [entry.name for entry in run_folder.iterdir()] == [".lock"]
    assert (elsewhere / "old.pt").is_file()


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optim.milestones=[200, 100]", "has to ascend"), ("optim.milestones=[100, 100]", "has to ascend"),
        ("data.unlabeled_per_device=0", "at least 1"), ("data.labeled_per_device=0", "at least 1"), ("optim.momentum=1.5", "less than 1"),
        ("guidance.stages.head.temperature=0", "at least 1e-06"), ("guidance.stages.head.tau=1.2", "less than 1"),
        ("optim.lr=-1", "more than 0"), ("data.rules.max_bad_images=2", "at most 1"), ("data.rules.float_range=[1, 1]", "below the second"),
    ],
)  # fmt: skip
def test_faults_52_53_values_that_cannot_be(override: str, problem: str) -> None:
    config, origins = load_config(Config, None, [override])

    def check() -> None:
        check_ranges(config, origins)
        cross_check(config, origins)

    with pytest.raises(UserError, match=problem) as caught:
        check()
    assert override.split("=")[0] in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["run.steps=100"], "guidance.start_step"), (["run.steps=100000"], "optim.milestones"), (["run.steps=400"], "optim.warmup_steps"),
        (["backbone.pretrained=false"], "drawn at random"),
    ],
)  # fmt: skip
def test_fault_53_values_that_were_hardly_meant(overrides: list[str], warning: str) -> None:
    config, origins = load_config(Config, None, overrides)
    assert any(warning in line for line in cross_check(config, origins))


def test_fault_54_contradictory_flags(data: TinyData, tmp_path: Path) -> None:
    process = run([*command(data, "gfl", tmp_path / "run"), "--paradigm", "supervised"], tmp_path / "logs")
    assert process.status == 2
    (line,) = errors(process)
    assert "--unlabeled" in line


def test_fault_55_an_unknown_backbone_stops_before_the_data(data: TinyData, tmp_path: Path) -> None:
    arguments = [*command(data, "gfl", tmp_path / "run"), "--labeled", str(tmp_path / "none.json"), "--set", "backbone.name=test_resnot"]
    process = run(arguments, tmp_path / "logs")
    assert process.status == 2
    (line,) = errors(process)
    assert "backbone.name: unknown timm model 'test_resnot' - did you mean 'test_resnet'" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["backbone.name=vit_small_patch14_dinov2"], "no feature map of stride 8"), (["backbone.name=levit_128s"], "takes no image of 96 x 64 px"),
        (["backbone.name=inception_v3"], "so its strides are not exact"),
        (["backbone.options.in_chans=1"], "'in_chans' is set by the other keys"), (["backbone.options={drop_rate:0.1}"], "'drop_rate:0.1' is no name"),
        (["backbone.options={act_layer: nope}"], "timm cannot make a feature extractor of it"), (["backbone.freeze_to_stride=5"], "no feature map of stride 5"),
    ],
)  # fmt: skip
def test_fault_55_an_unsuitable_backbone_stops_before_the_data(
    data: TinyData, tmp_path: Path, settings: list[str], problem: str
) -> None:
    arguments = [*command(data, "gfl", tmp_path / "run"), "--labeled", str(tmp_path / "none.json"), "--set", *settings]
    process = run(arguments, tmp_path / "logs")
    assert process.status == 2
    (line,) = errors(process)
    assert line.startswith("error: backbone.")
    assert problem in line
    assert not (tmp_path / "run").exists()


def test_weights_that_cannot_be_had_stop_before_the_data(data: TinyData, tmp_path: Path) -> None:
    """A missing file, and a hub that is out of reach."""

    def prepare() -> None:
        import huggingface_hub

        def no_network(*arguments: object, **options: object) -> None:
            raise OSError

        huggingface_hub.get_hf_file_metadata = no_network  # type: ignore[assignment]
        huggingface_hub.try_to_load_from_cache = lambda *arguments: None  # type: ignore[assignment]

    for words, message in (
        (["backbone.weights=none.safetensors"], "backbone.weights none.safetensors: no such file - give"),
        (["backbone.name=resnet18", "backbone.pretrained=true"], "model.safetensors) are neither cached nor can be fetched"),
    ):
        arguments = [*command(data, "gfl", tmp_path / "run"), "--labeled", str(tmp_path / "none.json"), "--set", *words]
        process = run(arguments, tmp_path / "logs", prepare=prepare)
        assert process.status == 2
        (line,) = errors(process)
        assert message in line
        assert not (tmp_path / "run").exists()


def test_fault_56_weights_of_another_model(tmp_path: Path) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    config = BackboneConfig("test_resnet", weights=str(tmp_path / "vit.safetensors"))
    with pytest.raises(UserError, match=r"does not fit 'test_resnet' \((\d+) of \d+ tensors, first .*,.*,.*,.*,") as caught:
        build_pyramid(config, 8, (8, 16), "conv")
    assert "\n" not in str(caught.value)
    for content in (b"", b"no tensors", (tmp_path / "vit.safetensors").read_bytes()[:1000]):
        for suffix in ("safetensors", "pt"):
            path = tmp_path / f"broken.{suffix}"
            path.write_bytes(content)
            with pytest.raises(UserError, match=rf"broken\.{suffix}: (not a whole safetensors file|holds more than tensors)"):
                build_pyramid(BackboneConfig("test_resnet", weights=str(path)), 8, (8, 16), "conv")
    for odd in (torch.zeros(2), [torch.zeros(1)], {"conv_stem.weight": 3}):
        torch.save(odd, tmp_path / "odd.pt")
        with pytest.raises(UserError, match=r"odd\.pt: no dictionary of tensors"):
            build_pyramid(BackboneConfig("test_resnet", weights=str(tmp_path / "odd.pt")), 8, (8, 16), "conv")
    torch.save({1: torch.zeros(2)}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="does not fit 'test_resnet'"):
        build_pyramid(BackboneConfig("test_resnet", weights=str(tmp_path / "odd.pt")), 8, (8, 16), "conv")
    resnet = build_pyramid(BackboneConfig("test_resnet", pretrained=False), 8, (8, 16), "conv").body.state_dict()
    torch.save({"state_dict": resnet}, tmp_path / "whole.pt")  # as a training program nests them
    build_pyramid(BackboneConfig("test_resnet", weights=str(tmp_path / "whole.pt")), 8, (8, 16), "conv")


def start(data: TinyData, name: str, output: Path, *flags: str) -> list[str]:
    """One step of lr 0 from a weights file."""
    return [*command(data, name, output, "optim.lr=1e-30", "optim.weight_decay=0", steps=1), *flags]


def moved(now: dict[str, bytes], before: dict[str, bytes]) -> list[str]:
    """Tensors of teacher and student that are not the teacher's of an earlier run; of another size, or by more than 1e-6."""
    numbers = {key: (np.frombuffer(value, np.float32), np.frombuffer(before[f"teacher/{key.partition('/')[2]}"], np.float32))
               for key, value in now.items()}
    return [key for key, (one, other) in numbers.items() if one.shape != other.shape or not np.allclose(one, other, 0, 1e-6)]


@pytest.mark.parametrize("name", DETECTORS)
def test_init_starts_teacher_and_student(data: TinyData, tmp_path: Path, name: str) -> None:
    two = command(data, name, tmp_path / "first", "run.seed=5", "data.val=null", steps=2)  # after one, they would be the same
    assert run(two, tmp_path / "logs").status == 0
    first = weights(tmp_path / "first")
    for source in (tmp_path / "first", tmp_path / "first" / "weights" / "teacher.safetensors"):
        process = run(start(data, name, tmp_path / "second", "--init", str(source), "--overwrite"), tmp_path / "logs")
        assert process.status == 0, process.err
        assert not moved(weights(tmp_path / "second"), first)
    again = run(start(data, name, tmp_path / "first", "--init", str(tmp_path / "first" / "weights"), "--overwrite"), tmp_path / "logs")
    assert again.status == 2
    assert again.err.endswith("first, which --overwrite empties - give another --output\n")
    assert weights(tmp_path / "first") == first
    (tmp_path / "first").rename(tmp_path / "gone")  # the checkpoint has all weights
    more = run(start(data, name, tmp_path / "second", "--init", str(source), "--steps", "2", "--resume", "auto"), tmp_path / "logs")
    assert more.status == 0, more.err
    assert not moved(weights(tmp_path / "second"), first)


@pytest.mark.parametrize("name", DETECTORS)
def test_fault_56_head_of_other_classes(data: TinyData, tmp_path: Path, name: str) -> None:
    assert run(command(data, name, tmp_path / "first", "data.val=null", steps=1), tmp_path / "logs").status == 0
    first = weights(tmp_path / "first")
    for number, names in enumerate((["green", "red", "blue"], ["green", "yellow"], ["red", "green"])):
        content = json.loads(data.labeled.read_text())
        content["categories"] = [{"id": id_, "name": word} for id_, word in enumerate(names, 1)]
        for image in content["images"]:
            image["file_name"] = str(data.labeled.parent / "images" / image["file_name"])
        own = tmp_path / f"classes{number}.json"
        own.write_text(json.dumps(content))
        flags = ["--labeled", str(own), "--init", str(tmp_path / "first"), "--set", "data.val=null", "data.rules.allow_outside_root=true"]
        output = tmp_path / f"second{number}"
        process = run(start(data, name, output, *flags), tmp_path / "logs")
        assert process.status == 2
        (line,) = errors(process)
        told = "the same classes in another order - number the categories so that their ids ascend as in ['green', 'red']"
        assert f"made for {told if number == 2 else 'other classes (2: green, red; the data has '}" in line
        assert "--reset-head" in line
        assert not output.exists()
        process = run(start(data, name, output, *flags, "--reset-head"), tmp_path / "logs")
        assert process.status == 0, process.err
        (warning,) = [line for line in process.err.splitlines() if "start at random" in line]
        changed = moved(weights(output), first)
        count = {"gfl": 2, "faster_rcnn": 4}[name]  # weights and biases of the classes, and of Faster R-CNN's boxes
        assert f": {count} of " in warning
        assert 0 < len(changed) <= 2 * count
        assert all(word in key for key in changed for word in (("classification" if name == "gfl" else "rcnn"),))


def test_fault_56_detector_of_another_architecture(data: TinyData, tmp_path: Path) -> None:
    assert run(command(data, "gfl", tmp_path / "first"), tmp_path / "logs").status == 0
    for flags in ([], ["--reset-head"]):
        other = ["--set", "gfl.channels=24", "gfl.tower_depth=2"]
        process = run(start(data, "gfl", tmp_path / "second", "--init", str(tmp_path / "first"), *flags, *other), tmp_path / "logs")
        assert process.status == 2
        (line,) = errors(process)
        assert re.search(r"does not fit the detector \(\d+ of \d+ tensors: (head[\w.]+ \[[\d, ]+\] for \[[\d, ]+\](, )?){5}\)", line), line
    for flags, problem in (
        (["--init", str(tmp_path / "none.pt")], "none.pt: no such weights file"),
        (["--init", str(tmp_path / "logs")], "no weights/teacher.safetensors in it"),
        (["--reset-head"], "run.reset_head: there is no head to reset"),
        (["--init", "x", "--set", "backbone.weights=y"], "backbone.weights: is not read"),
    ):
        process = run(start(data, "gfl", tmp_path / "second", *flags), tmp_path / "logs")
        assert process.status == 2
        (line,) = errors(process)
        assert problem in line
    assert not (tmp_path / "second").exists()


def test_fault_59_no_such_device(data: TinyData, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    env = {"ACCELERATE_USE_CPU": "false", "ACCELERATE_MIXED_PRECISION": "fp8"}
    process = run(command(data, "gfl", tmp_path / "run"), tmp_path / "logs", env)
    assert process.status == 2
    (line,) = errors(process)
    assert line.startswith("error: accelerate: cannot start")


@pytest.mark.parametrize(
    ("environment", "gpus", "problem"),
    [
        ({"CUDA_VISIBLE_DEVICES": "7"}, 0, "CUDA_VISIBLE_DEVICES: torch finds none of these GPUs (found 7)"),
        ({"LOCAL_WORLD_SIZE": "2"}, 0, "2 were started for GPUs, and torch finds none"),
        ({"LOCAL_WORLD_SIZE": "4"}, 2, "4 on this machine, which has fewer GPUs (found 2)"),
        ({"ACCELERATE_USE_FSDP": "true"}, 2, "FSDP splits parameters over processes"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "true"}, 0, "DEEPSPEED splits parameters over processes"),
        ({"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, 2, None),
        ({"LOCAL_WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": "-1"}, 0, None),
        ({}, 0, None),
        ({"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "3", "ACCELERATE_USE_CPU": "true"}, 0, None),
    ],
)  # fmt: skip
def test_fault_59_launchers_that_ask_for_missing_gpus(environment: dict[str, str], gpus: int, problem: str | None) -> None:
    if problem is None:
        check_devices(environment, gpus)
        return
    with pytest.raises(UserError) as caught:
        check_devices(environment, gpus)
    assert problem in str(caught.value)


def test_fault_59_train_stops_where_a_gpu_is_asked_for(data: TinyData, tmp_path: Path) -> None:
    import torch

    if torch.accelerator.is_available():
        pytest.skip("has a GPU")
    env = {"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": "5"}
    process = run(command(data, "gfl", tmp_path / "run"), tmp_path / "logs", env)
    assert process.status == 2
    (line,) = errors(process)
    assert line.startswith("error: CUDA_VISIBLE_DEVICES: ")
    assert not (tmp_path / "run").exists()


def test_fault_60_newer_schema(data: TinyData, tmp_path: Path) -> None:
    (tmp_path / "newer.yaml").write_text(f"schema: {SCHEMA + 1}\nrun:\n  warp_drive: true\n")
    process = run([*command(data, "gfl", tmp_path / "run"), "--config", str(tmp_path / "newer.yaml")], tmp_path / "logs")
    assert process.status == 2
    (line,) = errors(process)
    assert f"newer.yaml:1: schema: made by version {SCHEMA + 1} of the settings" in line


def test_fault_60_config_of_another_version(data: TinyData, tmp_path: Path) -> None:
    (tmp_path / "newer.yaml").write_text("run:\n  steps: 5\n  warp_drive: true\n")
    process = run([*command(data, "gfl", tmp_path / "run"), "--config", str(tmp_path / "newer.yaml")], tmp_path / "logs")
    assert process.status == 2
    (line,) = errors(process)
    assert "newer.yaml:3: run.warp_drive: unknown key" in line


def own(folder: Path, **changes: Any) -> Path:
    """A folder of nine images of which the JSON lists five."""
    path = write_coco(folder, 9, 4)
    content = json.loads(path.read_text())
    content["images"] = content["images"][:5]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] <= 5]
    path.write_text(json.dumps(content | changes))
    return path


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("unlisted", [True, False])
def test_own_data_by_one_command(tmp_path: Path, name: str, unlisted: bool) -> None:
    """A JSON and a folder, no validation set, images in subfolders."""
    labeled = own(tmp_path / "own")
    more = tmp_path / "more" / "deep" / "er"
    more.mkdir(parents=True)
    for number in range(5, 9):
        os.rename(
            labeled.parent / "images" / f"{number}.png", (labeled.parent / "images" if unlisted else more) / f"{number}.png"
        )
    before = tree(tmp_path / "own")
    source = ["data.unlisted=unlabeled"] if unlisted else [f"data.unlabeled={tmp_path / 'more'}"]
    flags = [
        "--detector",
        name,
        "--labeled",
        str(labeled),
        "--steps",
        "3",
        "--output",
        str(tmp_path / "run"),
        "--set",
        *TINY,
        *source,
    ]
    process = run(flags, tmp_path / "logs")
    assert process.status == 0, process.err
    assert (tmp_path / "run" / "weights" / "teacher.safetensors").is_file()
    assert tree(tmp_path / "own") == before


def test_warnings_of_the_data_are_shown_once(tmp_path: Path) -> None:
    labeled = own(tmp_path / "own")
    content = json.loads(labeled.read_text())
    content["annotations"] += [dict(content["annotations"][0])] * 4
    labeled.write_text(json.dumps(content))
    process = run(["--detector", "gfl", "--paradigm", "supervised", "--labeled", str(labeled), "--dry-run", "--output", str(tmp_path / "run"),
                   "--set", *TINY], tmp_path / "logs")  # fmt: skip
    assert process.status == 0, process.err
    assert process.err.count("boxes stand there twice with one class and are kept once (4: annotations[10], annotations[11], "
                             "annotations[12], ...)") == 1  # fmt: skip


def test_a_fault_of_the_data_stops_training(tmp_path: Path) -> None:
    process = run(["--detector", "gfl", "--paradigm", "supervised", "--labeled", str(own(tmp_path / "own", categories=[])), "--output",
                   str(tmp_path / "run"), "--set", *TINY], tmp_path / "logs")  # fmt: skip
    assert process.status == 2
    (line,) = errors(process)
    assert line.startswith(f"error: {tmp_path / 'own' / 'all.json'}: it has no categories")
    assert not (tmp_path / "run").exists()
