"""A run that is broken off and resumed ends as if nothing had happened; one with other settings or data does not resume."""
from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DETECTORS, ROOT
from runs import Process, TinyData, checkpoint_state, command, errors, lines, run, start, start_many, weights, write_coco

from dtg_core.config import Config
from dtg_core.data.index import CocoIndex
from dtg_core.engine import checkpoint
from dtg_core.engine.checkpoint import load_weights, newest_checkpoint
from dtg_core.engine.predict import load_detector
from dtg_core.engine.resume import changed_course, check_stamp, digest
from dtg_core.engine.signals import ONE_REQUEST
from dtg_core.errors import UserError
from dtg_core.settings_text import flatten

sys.path[:0] = [str(ROOT / "scripts")]
from read_settings import RunSettings  # noqa: E402

KILLS = int(os.environ.get("DTG_TEST_KILLS", "1"))  # 30 for the whole campaign
TINY_LINES = ["run.log_every=3", "run.checkpoint_every=2", "run.evaluate_every=4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData.write(tmp_path_factory.mktemp("data"))


def die_after(step: int, moment: str) -> Callable[[], None]:
    """Kill the process at a checkpoint's ``moment``: "before", "inside" or "after" it is written at ``step``."""

    def prepare() -> None:
        import dtg_core.engine.checkpointer as module

        save, write = module.save_checkpoint, checkpoint._write

        def half_of_it(path: Path, data: bytes) -> None:
            write(path, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        def saving(folder: Path, done: int, *rest: object) -> Path:
            if done == step and moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if done == step and moment == "inside":
                checkpoint._write = half_of_it
            path = save(folder, done, *rest)
            if done == step and moment == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return path

        module.save_checkpoint = saving

    return prepare


@pytest.mark.parametrize("name", DETECTORS)
def test_same_seed_twice_and_other_workers(data: TinyData, tmp_path: Path, name: str) -> None:
    others = {"two": 0, "three": 1, "four": 4} if name == "gfl" else {"two": 1}
    for output, workers in {"one": 0, **others}.items():
        assert run(command(data, name, tmp_path / output, f"data.workers={workers}"), tmp_path / "logs").status == 0
    first = lines(tmp_path / "one")
    assert [line["step"] for line in first] == [1, 2, 3, 4, 5, 6, 6]
    for other in others:
        assert lines(tmp_path / other) == first
        assert weights(tmp_path / other) == weights(tmp_path / "one")
    if name == "gfl":
        assert run([*command(data, name, tmp_path / "five"), "--seed", "1"], tmp_path / "logs").status == 0
        assert lines(tmp_path / "five") != first


@pytest.mark.parametrize(("name", "moment"), [("faster_rcnn", "before"), ("gfl", "inside"), ("gfl", "after")])
def test_killed_at_a_checkpoint(data: TinyData, tmp_path: Path, name: str, moment: str) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    stages = ["rpn", "rcnn"] if name == "faster_rcnn" else []  # the teacher finds nothing over 0.5 but in the RPN
    following = [f"guidance.stages.{stage}.{key}" for stage in stages for key in ("tau_rate=0.1", "tau=0.5")]
    assert run(command(data, name, unbroken, *TINY_LINES, *following, steps=8), tmp_path / "logs").status == 0
    arguments = command(data, name, broken, *TINY_LINES, *following, steps=8)
    assert run(arguments, tmp_path / "logs", prepare=die_after(4, moment)).status == -signal.SIGKILL
    resumed = run([*arguments, "--resume", "auto"], tmp_path / "logs")
    assert resumed.status == 0, resumed.err
    assert f"at step {4 if moment == 'after' else 2}" in resumed.err
    assert lines(broken) == lines(unbroken)  # a log line of 3 steps spans the checkpoint
    assert weights(broken) == weights(unbroken)
    assert not list(broken.glob("**/*.tmp"))

    kept, expected = load_detector(broken).thresholds, load_detector(unbroken).thresholds  # as the weights tell them
    assert list(kept) == list(expected) == stages
    for stage, scores in kept.items():
        assert torch.equal(scores, expected[stage])
        assert (scores - 0.5).abs().min() > 0.01


@pytest.mark.parametrize("log_every", [2, 4])
def test_what_the_run_watches_for_is_resumed(data: TinyData, tmp_path: Path, log_every: int) -> None:
    """AP before guidance, of an evaluation that came after its checkpoint; and since when the teacher has found nothing, in the
    middle of a log line's steps."""
    settings = [f"run.log_every={log_every}", "run.checkpoint_every=2", "run.evaluate_every=2", "guidance.start_step=2",
                "guidance.ramp_steps=1", "guidance.stages.head.tau=0.99"]  # fmt: skip
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert run(command(data, "gfl", unbroken, *settings, steps=8), tmp_path / "logs").status == 0
    arguments = command(data, "gfl", broken, *settings, steps=8)
    assert run(arguments, tmp_path / "logs", prepare=die_after(4, "before")).status == -signal.SIGKILL
    assert json.loads((broken / "results.json").read_text())["step"] == 2
    resumed = run([*arguments, "--resume", "auto"], tmp_path / "logs")
    assert (resumed.status, "at step 2" in resumed.err) == (0, True)
    assert lines(broken) == lines(unbroken)  # the evaluation is not repeated
    watched = [checkpoint_state(path / "checkpoints" / "step_00000008")["watch"] for path in (unbroken, broken)]
    assert watched[0] == watched[1]
    assert watched[0]["supervised_ap"] is not None
    assert watched[0]["quiet_since"] == {"head": 2 if log_every == 2 else 0}


def test_a_lower_limit_of_skipped_steps_is_kept(data: TinyData, tmp_path: Path) -> None:
    def prepare() -> None:
        from dtg_core.engine import train_step as steps

        forward = steps._forward

        def spoilt(*arguments: object) -> object:
            terms = forward(*arguments)
            return {name: replace(term, total=term.total * float("nan")) for name, term in terms.items()}

        steps._forward = spoilt

    arguments = command(data, "gfl", tmp_path / "run", "run.log_every=1", steps=14)
    ended = run([*arguments, "run.max_skipped=10", "--stop-at", "6"], tmp_path / "logs", prepare=prepare)
    assert ended.status == 0, ended.err
    assert "step 6/14  skipped 1  " in ended.err
    ended = run([*arguments, "run.max_skipped=3", "--resume", "auto"], tmp_path / "logs", prepare=prepare)
    assert ended.status == 3, ended.err
    assert "error: step 6: loss or gradient not finite 3 times in a row" in ended.err  # those before the resume count


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_at_random_moments(data: TinyData, tmp_path: Path, seed: int) -> None:
    """SIGKILL at random moments, every other one while a checkpoint is being written, until the run is through."""
    rng = random.Random(seed)
    name, paradigm = DETECTORS[seed % 2], ["dense", "sparse"][seed // 2 % 2]
    settings = ["run.log_every=3", "run.checkpoint_every=1", "run.evaluate_every=4", f"data.workers={seed % 3}"]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    began = time.monotonic()
    assert run(command(data, name, unbroken, *settings, steps=10, paradigm=paradigm), tmp_path / "logs").status == 0
    usual = time.monotonic() - began
    arguments = command(data, name, broken, *settings, steps=10, paradigm=paradigm)
    kills, writing = 0, 0
    while True:
        process = start([*arguments, "--resume", "auto"], tmp_path / "logs")
        until = time.monotonic() + rng.uniform(0.1, 1.2 * usual)
        in_writing = rng.random() < 0.5
        while process.poll() is None and kills < 8:
            if time.monotonic() > until and (not in_writing or list(broken.glob("checkpoints/*.tmp"))):
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.0005)
        if process.wait().status == 0:
            break
        assert process.status == -signal.SIGKILL, process.err
        kills, writing = kills + 1, writing + bool(list(broken.glob("checkpoints/*.tmp")))
        if list(broken.glob("checkpoints/step_????????")):
            assert newest_checkpoint(broken / "checkpoints", lambda text: pytest.fail(text)) is not None
    print(f"campaign {seed}: {name} {paradigm}, {kills} kills, {writing} of them while writing")
    assert lines(broken) == lines(unbroken)
    assert weights(broken) == weights(unbroken)


@pytest.fixture(scope="module")
def half(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps."""
    folder = tmp_path_factory.mktemp("half")
    settings = ["run.checkpoint_every=2", "data.labeled_per_device=2"]
    assert run(command(data, "gfl", folder / "run", *settings, steps=4), folder / "logs").status == 0
    return folder / "run"


def resume(
    data: TinyData, half: Path, tmp_path: Path, *settings: str, flags: tuple[str, ...] = (), processes: int = 1
) -> list[Process]:
    output = tmp_path / "run"
    if not output.exists():
        shutil.copytree(half, output)
    arguments = [*command(data, "gfl", output, "data.labeled_per_device=2", *settings, steps=6), "--resume", "auto", *flags]
    if processes == 1:
        return [run(arguments, tmp_path / "logs")]
    return [process.wait() for process in start_many(arguments, tmp_path / "logs", processes)]


def test_free_settings_may_change(data: TinyData, half: Path, tmp_path: Path) -> None:
    free = ["run.log_every=2", "run.evaluate_every=5", "data.workers=1", "run.checkpoint_every=1"]
    (ended,) = resume(data, half, tmp_path, *free)
    assert ended.status == 0, ended.err
    assert "changes" not in ended.err


def test_other_settings_stop_with_a_list_unless_insisted(data: TinyData, half: Path, tmp_path: Path) -> None:
    changes = ["optim.lr=0.5", "optim.weight_decay=0.25", "guidance.stages.head.tau=0.25", "optim.milestones=[5]"]
    (ended,) = resume(data, half, tmp_path, *changes)
    assert ended.status == 2
    assert len(errors(ended)) == 1
    for part in ("optim.lr: 0.0005 -> 0.5", "guidance.stages.head.tau: 0.005 -> 0.25", "optim.milestones: [] -> [5]",
                 "--resume-with-changes"):  # fmt: skip
        assert part in ended.err
    assert lines(tmp_path / "run") == lines(half)
    (ended,) = resume(data, half, tmp_path, *changes, flags=("--resume-with-changes",))
    assert ended.status == 0, ended.err
    assert "resuming with changes: optim.lr: 0.0005 -> 0.5" in ended.err
    for folder, decay in ((half, 1e-4), (tmp_path / "run", 0.25)):
        state = json.loads((newest_checkpoint(folder / "checkpoints") / "state.json").read_text())  # type: ignore[operator]
        assert [group["weight_decay"] for group in state["optimizer"]["groups"]] == [decay]
    assert not (tmp_path / "run" / "abandoned-1").exists()  # what there was is of the step resumed at
    (changed,) = json.loads((tmp_path / "run" / "results.json").read_text())["changed"]
    assert changed["step"] == 4
    assert "optim.lr: 0.0005 -> 0.5" in changed["changes"]
    assert json.loads((half / "results.json").read_text())["changed"] == []


def test_layers_that_are_frozen_now_are_the_students(data: TinyData, half: Path, tmp_path: Path) -> None:
    """The teacher averages only what trains, so it takes over what no longer does."""
    changes = ["backbone.freeze_to_stride=8", "optim.ema=0"]
    (ended,) = resume(data, half, tmp_path, *changes, flags=("--resume-with-changes",))
    assert ended.status == 0, ended.err
    teacher, student = (load_weights(tmp_path / "run" / "weights" / f"{which}.safetensors")[0] for which in ("teacher", "student"))
    assert all(torch.equal(tensor, student[name]) for name, tensor in teacher.items())


def test_other_validation_images_are_reported(data: TinyData, half: Path, tmp_path: Path) -> None:
    other = replace(data, val=write_coco(tmp_path / "val", 4, 9))
    (ended,) = resume(other, half, tmp_path)
    assert ended.status == 0, ended.err
    assert "resuming with other validation data" in ended.err
    assert json.loads((tmp_path / "run" / "results.json").read_text())["changed"] == [{"step": 4, "changes": ["validation data"]}]


def test_ap_on_other_validation_images_is_no_measure_of_the_teacher(data: TinyData, tmp_path: Path) -> None:
    """What the teacher reached before it guided is kept for a warning, as long as later AP is of the same images."""
    settings = ["run.checkpoint_every=2", "run.evaluate_every=2", "guidance.start_step=2"]
    assert run(command(data, "gfl", tmp_path / "run", *settings, steps=4), tmp_path / "logs").status == 0
    other = replace(data, val=write_coco(tmp_path / "val", 4, 9))
    for name, given in (("same", data), ("other", other)):
        output = shutil.copytree(tmp_path / "run", tmp_path / name)
        ended = run([*command(given, "gfl", output, *settings, steps=6), "--resume", "auto"], tmp_path / "logs")
        assert ended.status == 0, ended.err
        state = checkpoint_state(output / "checkpoints" / "step_00000006")
        assert (state["watch"]["supervised_ap"] is None) == (name == "other")


def test_what_had_no_effect_yet_has_not_changed_the_course() -> None:
    """As in studies, whose runs share a supervised phase."""
    def stamp_of(paradigm: str, start: int, lr: float = 0.1) -> dict[str, Any]:
        config = {"guidance.stages.head.paradigm": paradigm, "guidance.start_step": start, "optim.lr": lr}
        return {"config": config, "images_of_a_step": {"labeled": 1, "unlabeled": 1}, "mixed_precision": "no",
                "data": {"labeled": None, "unlabeled": {"images": 1, "boxes": 0} if paradigm == "dense" else None, "val": None}}

    assert changed_course(stamp_of("none", 100), stamp_of("dense", 100), 100) == []
    assert len(changed_course(stamp_of("none", 100), stamp_of("dense", 50), 100)) == 3  # it would have guided for 50 steps
    assert len(changed_course(stamp_of("dense", 50), stamp_of("none", 50), 51)) == 2
    assert changed_course(stamp_of("none", 100), stamp_of("dense", 100, lr=0.2), 100) == ["optim.lr: 0.1 -> 0.2"]


def test_another_kind_of_optimizer_stops_even_if_insisted(data: TinyData, half: Path, tmp_path: Path) -> None:
    (ended,) = resume(data, half, tmp_path, "optim.name=sgd", flags=("--resume-with-changes",))
    assert ended.status == 2
    (line,) = errors(ended)
    assert "optim.name=adamw, with which sgd cannot go on" in line


def test_an_unfinished_run_does_not_end_by_fewer_steps(data: TinyData, half: Path, tmp_path: Path) -> None:
    output = shutil.copytree(half, tmp_path / "run")
    for folder in ("weights", "results.json"):
        shutil.rmtree(output / folder) if (output / folder).is_dir() else (output / folder).unlink()
    arguments = [*command(data, "gfl", output, "data.labeled_per_device=2", steps=2), "--resume", "auto"]
    ended = run(arguments, tmp_path / "logs")
    assert ended.status == 2
    (line,) = errors(ended)
    assert "is at step 4 already, and run.steps=2 is less - raise --steps" in line


def test_the_record_of_how_a_run_began_stays(data: TinyData, half: Path, tmp_path: Path) -> None:
    """Otherwise compare.py would take a run from scratch for one from given weights, and the other way round."""
    (ended,) = resume(data, half, tmp_path, flags=("--init", str(half), "--reset-head"))
    assert ended.status == 0, ended.err
    assert f"run.init: stays None, as the run began with it (found {half})" in ended.err
    (weights_file,) = (tmp_path / "run" / "weights").glob("teacher*")
    for text in ((tmp_path / "run" / "config.yaml").read_text(), load_weights(weights_file)[1]["config"]):
        assert "  init: null" in text
        assert "  reset_head: false" in text
    state = json.loads((newest_checkpoint(tmp_path / "run" / "checkpoints") / "state.json").read_text())  # type: ignore[operator]
    assert state["state"]["stamp"]["config"]["run.init"] is None


def test_what_another_course_has_come_to_is_put_away(data: TinyData, half: Path, tmp_path: Path) -> None:
    """From an earlier step: neither figures nor weights of the former settings stand beside the new ones, and none are lost."""
    output, made = shutil.copytree(half, tmp_path / "run"), weights(half)
    arguments = command(data, "gfl", output, "data.labeled_per_device=2", "optim.lr=0.001", steps=4)
    from_step_2 = [*arguments, "--resume", str(output / "checkpoints" / "step_00000002"), "--resume-with-changes", "--stop-at", "3"]
    assert run(from_step_2, tmp_path / "logs").status == 0
    assert not any((output / name).exists() for name in ("results.json", "precision.json", "weights"))
    kept = output / "abandoned-1"
    for name in ("results.json", "precision.json", "config.yaml", "metrics.jsonl"):
        assert (kept / name).read_bytes() == (half / name).read_bytes()
    assert weights(kept) == made
    assert [path.name for path in (kept / "checkpoints").iterdir()] == ["step_00000004"]
    (again,) = resume(data, half, tmp_path, "optim.lr=0.001")
    assert again.status == 0, again.err
    assert [line["step"] for line in lines(output) if "teacher/AP" in line] == [6]
    assert not (output / "abandoned-2").exists()


def test_another_number_of_processes_with_the_same_images_of_a_step(data: TinyData, half: Path, tmp_path: Path) -> None:
    same = ["data.labeled_per_device=1", "data.unlabeled_per_device=1"]
    first, second = resume(data, half, tmp_path, *same, processes=2)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert "2 processes instead of 1" in first.err
    (one,) = resume(data, half, tmp_path / "one", "optim.accumulate=1")
    assert one.status == 0
    for line, other in zip(lines(tmp_path / "run"), lines(tmp_path / "one" / "run")):
        for key in line:
            assert line[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), (line["step"], key)


def test_another_number_of_images_of_a_step_stops(data: TinyData, half: Path, tmp_path: Path) -> None:
    (ended,) = resume(data, half, tmp_path, "data.labeled_per_device=4")
    assert ended.status == 2
    (line,) = errors(ended)
    assert "labeled images of a step: 2 -> 4, where processes x data.labeled_per_device x optim.accumulate has to stay 2" in line


def test_changed_data_stops(data: TinyData, half: Path, tmp_path: Path) -> None:
    more = write_coco(tmp_path / "more", 6, 1)
    changed = TinyData(more, data.unlabeled, data.val)
    (ended,) = resume(changed, half, tmp_path)
    assert ended.status == 2
    (line,) = errors(ended)
    assert "labeled data: 5 images with 10 boxes -> 6 images with 12 boxes" in line
    (ended,) = resume(changed, half, tmp_path, flags=("--resume-with-changes",))
    assert ended.status == 0, ended.err


def test_another_mixed_precision_stops(data: TinyData, half: Path, tmp_path: Path) -> None:
    assert json.loads((half / "results.json").read_text())["mixed_precision"] == "no"
    output = shutil.copytree(half, tmp_path / "run")
    arguments = [*command(data, "gfl", output, "data.labeled_per_device=2", steps=5), "--resume", "auto"]
    ended = run(arguments, tmp_path / "logs", env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert ended.status == 2
    (line,) = errors(ended)
    assert "other settings (--mixed_precision: no -> bf16)" in line


def test_a_checkpoint_of_another_version_is_told_in_one_line() -> None:
    """Whatever its stamp lacks."""
    new = {"config": json.loads(json.dumps(flatten(Config()))), "images_of_a_step": {"labeled": 1, "unlabeled": 1}, "processes": 1,
           "data": {"labeled": None, "unlabeled": None, "val": None}, "torch": "2", "code": "0", "mixed_precision": "no"}  # fmt: skip
    assert check_stamp(new, new, False) == []
    for key in new:
        with pytest.raises(UserError, match=r"^--resume: the checkpoint is of another version of this program - start anew$"):
            check_stamp({name: value for name, value in new.items() if name != key}, new, False)


def test_a_stamp_of_before_a_setting_was_there_is_accepted() -> None:
    """What only one of two versions knows is no difference; what both know is."""
    new = {"config": json.loads(json.dumps(flatten(Config()))), "images_of_a_step": {"labeled": 1, "unlabeled": 1}, "processes": 1,
           "data": {"labeled": None, "unlabeled": None, "val": None}, "torch": "2", "code": "0", "mixed_precision": "no"}  # fmt: skip
    key = "guidance.stages.rcnn.tau_rate"
    other = {**new, "config": {**new["config"], key: 0.05}}
    assert check_stamp({**new, "config": {name: value for name, value in new["config"].items() if name != key}}, other, False) == []
    with pytest.raises(UserError, match=r"rcnn\.tau_rate: 0\.0 -> 0\.05"):
        check_stamp(new, other, False)


def test_just_these_settings_may_change_unasked() -> None:
    """Each of all others changes what is trained, so a resumed run would be neither the old one nor a new one."""
    config = json.loads(json.dumps(flatten(RunSettings())))
    stamp = {"config": config, "images_of_a_step": {"labeled": 1, "unlabeled": 1}, "processes": 1, "torch": "2", "code": "0",
             "data": {"labeled": None, "unlabeled": None, "val": None}, "mixed_precision": "no"}  # fmt: skip
    assert config["detector"] == "gfl"
    free = set()
    for key in config:
        try:
            check_stamp(stamp, {**stamp, "config": {**config, key: "changed"}}, False)
        except UserError as error:
            assert key in str(error)  # noqa: PT017
        else:
            free.add(key)
    of_others = {key for key in free if key.startswith(("faster_rcnn.", "guidance.stages.rpn.", "guidance.stages.rcnn."))}
    names = {
        "run": "checkpoint_every evaluate_batch evaluate_every init log_every max_skipped output reset_head score_threshold steps trackers",
        "data": "images labeled labeled_per_device shapes_labeled shapes_seed shapes_unlabeled shapes_val unlabeled unlabeled_images "
                "unlabeled_per_device unlisted val val_images workers",
        "optim": "accumulate reference_batch", "backbone": "pretrained weights",
    }  # fmt: skip
    assert free - of_others == {"schema"} | {f"{section}.{name}" for section, keys in names.items() for name in keys.split()}


def test_a_digest_tells_data_apart() -> None:
    """By all that is learnt from a list of images, whose own pixels are not read."""
    index = CocoIndex(
        Path(), [1, 2], ["a.png", "b.png"], np.array(((9, 9), (9, 9)), np.int32), np.array(((0, 0, 5, 5), (1, 1, 6, 6)), np.float32),
        np.array((0, 1)), np.array((0, 1, 2)), np.zeros(2, bool), ("cat", "dog"), [1, 2],
    )  # fmt: skip
    others = [
        replace(index, file_names=["a.png", "c.png"]), replace(index, boxes=index.boxes + 1), replace(index, labels=np.array((1, 0))),
        replace(index, box_start=np.array((0, 2, 2))), replace(index, crowd=np.array((False, True))),
        replace(index, class_names=("cat", "cow")),
    ]  # fmt: skip
    assert digest(index) == digest(replace(index, root=Path("/elsewhere")))
    assert len({digest(one)["sha256"] for one in (index, *others)}) == 7  # type: ignore[index]


def test_settings_of_another_detector_are_no_change() -> None:
    """As when a detector is registered after the checkpoint was made, or a default of another one changes."""
    new = {"config": json.loads(json.dumps(flatten(RunSettings()))), "images_of_a_step": {"labeled": 1, "unlabeled": 1}, "processes": 1,
           "data": {"labeled": None, "unlabeled": None, "val": None}, "torch": "2", "code": "0", "mixed_precision": "no"}  # fmt: skip
    others = {"faster_rcnn.channels", "guidance.stages.rcnn.tau", "guidance.stages.rpn.box"}
    added = {"fcos.channels": 64, "guidance.stages.fcos.tau": 0.2}
    old = {**new, "config": {key: value for key, value in new["config"].items() if key not in others}}
    assert check_stamp(old, new, False) == []
    assert check_stamp({**new, "config": new["config"] | added}, new, False) == []
    assert check_stamp(new, {**new, "config": new["config"] | added | {"guidance.stages.rcnn.tau": 0.2}}, False) == []
    other = {**new, "config": new["config"] | {"gfl.channels": 65}}
    with pytest.raises(UserError, match=r"gfl\.channels: 256 -> 65"):
        check_stamp(new, other, False)


def test_moved_data_resumes(data: TinyData, half: Path, tmp_path: Path) -> None:
    """Paths are not part of what a checkpoint was made with."""
    moved = [shutil.copytree(file.parent, tmp_path / file.parent.name) / file.name
             for file in (data.labeled, data.unlabeled, data.val)]  # fmt: skip
    (ended,) = resume(TinyData(*moved), half, tmp_path)
    assert ended.status == 0, ended.err


def test_a_finished_run_says_so(data: TinyData, half: Path, tmp_path: Path) -> None:
    output = shutil.copytree(half, tmp_path / "run")
    ended = run([*command(data, "gfl", output, "data.labeled_per_device=2", steps=4), "--resume", "auto"], tmp_path / "logs")
    assert ended.status == 0
    assert "finished already, at step 4" in ended.err
    assert lines(output) == lines(half)


def test_a_run_that_was_stopped_where_it_ends_by_now_is_finished(data: TinyData, half: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = ["run.checkpoint_every=2", "data.labeled_per_device=2"]
    stopped = run([*command(data, "gfl", output, *settings, steps=9), "--stop-at", "4"], tmp_path / "logs")
    assert stopped.status == 0, stopped.err
    assert not (output / "weights").exists()
    ended = run([*command(data, "gfl", output, *settings, steps=4), "--resume", "auto"], tmp_path / "logs")
    assert ended.status == 0, ended.err
    assert "finished already" not in ended.err
    assert weights(output) == weights(half)
    assert (output / "results.json").read_text() == (half / "results.json").read_text()


def test_killed_in_the_last_evaluation(data: TinyData, half: Path, tmp_path: Path) -> None:
    """The last checkpoint is there, the results are not: resuming evaluates, and nothing stands twice in the metrics."""
    output = shutil.copytree(half, tmp_path / "run")
    (output / "results.json").unlink()
    shutil.rmtree(output / "weights")
    ended = run([*command(data, "gfl", output, "data.labeled_per_device=2", steps=4), "--resume", "auto"], tmp_path / "logs")
    assert ended.status == 0, ended.err
    assert lines(output) == lines(half)
    assert weights(output) == weights(half)
    assert json.loads((output / "results.json").read_text()) == json.loads((half / "results.json").read_text())


def test_other_torch_is_told(data: TinyData, half: Path, tmp_path: Path) -> None:
    def prepare() -> None:
        import torch

        torch.__version__ = "9.9"

    output = shutil.copytree(half, tmp_path / "run")
    arguments = [*command(data, "gfl", output, "data.labeled_per_device=2", steps=5), "--resume", "auto"]
    ended = run(arguments, tmp_path / "logs", prepare=prepare)
    assert ended.status == 0, ended.err
    assert re.search(r"made by torch \S+, this is 9.9", ended.err)


def test_other_code_is_told(data: TinyData, half: Path, tmp_path: Path) -> None:
    def prepare() -> None:
        import dtg_core.engine.resume as module

        module.code_digest = lambda: "0"

    output = shutil.copytree(half, tmp_path / "run")
    arguments = [*command(data, "gfl", output, "data.labeled_per_device=2", steps=5), "--resume", "auto"]
    assert "made by another version" not in run(arguments, tmp_path / "logs").err
    shutil.rmtree(output)
    shutil.copytree(half, output)
    ended = run(arguments, tmp_path / "logs", prepare=prepare)
    assert ended.status == 0, ended.err
    assert ended.err.count("warning: the checkpoint was made by another version of this program") == 1


def test_missing_and_damaged_checkpoints(data: TinyData, half: Path, tmp_path: Path) -> None:
    output = tmp_path / "fresh"
    arguments = command(data, "gfl", output, "data.labeled_per_device=2", steps=2)
    named = run([*arguments, "--resume", str(tmp_path / "step_00000007")], tmp_path / "logs")
    assert named.status == 2
    assert "no such checkpoint" in named.err
    assert len(errors(named)) == 1
    folder = run([*arguments, "--resume", str(half)], tmp_path / "logs")
    assert folder.status == 2
    assert f"--resume {half}: a run's folder - give --resume auto with --output {half}, or a folder in" in folder.err
    auto = run([*arguments, "--resume", "auto"], tmp_path / "logs")
    assert auto.status == 0
    assert "no checkpoint yet - starting at step 0" in auto.err

    shutil.copytree(half, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step_00000004" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (ended,) = resume(data, half, tmp_path)
    assert ended.status == 0, ended.err
    assert "step_00000004/student.safetensors: damaged" in ended.err
    assert "resuming from" in ended.err
    assert "step_00000002 at step 2" in ended.err


def test_first_step_after_a_late_resume_is_not_late(data: TinyData, half: Path, tmp_path: Path) -> None:
    """No step before it is replayed: step 100,000 comes as soon as step 0."""
    output = shutil.copytree(half, tmp_path / "run")
    late = output / "checkpoints" / "step_00100000"
    os.rename(output / "checkpoints" / "step_00000004", late)
    state = json.loads((late / "state.json").read_text())
    (late / "state.json").write_text(json.dumps({**state, "step": 100_000}))
    entries = json.loads((late / "manifest.json").read_text())["files"]
    content = (late / "state.json").read_bytes()
    entries["state.json"] = {"size": len(content), "sha256": checkpoint.hashlib.sha256(content).hexdigest()}
    (late / "manifest.json").write_bytes(checkpoint._manifest(entries))
    assert checkpoint_state(late)["step"] == 100_000

    seconds = {}
    for where, first, flags in ((output, 100_000, ("--resume", "auto")), (tmp_path / "new", 0, ())):
        arguments = command(data, "gfl", where, "data.labeled_per_device=2", steps=first + 2)
        began = time.monotonic()
        ended = run([*arguments, *flags], tmp_path / "logs")
        seconds[first] = time.monotonic() - began
        assert ended.status == 0, ended.err
        assert lines(where)[-2]["step"] == first + 2
    print(f"whole runs of 2 steps: {seconds}")
    assert seconds[100_000] < seconds[0] + 20  # replayed, they would take many minutes


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGINT, 0)])
def test_a_signal_stops_after_the_step_and_can_be_resumed(data: TinyData, tmp_path: Path, number: int, workers: int) -> None:
    settings = ["run.log_every=7", f"data.workers={workers}"]
    arguments = command(data, "gfl", tmp_path / "broken", *settings, steps=20)
    process = start(arguments, tmp_path / "logs", prepare=send_to_group_after(5, number))
    assert process.wait().status == 128 + number, process.err
    state = checkpoint_state(newest_checkpoint(tmp_path / "broken" / "checkpoints"))
    assert state["step"] in (5, 6)
    assert "--resume auto continues" in process.err
    assert process.err.count("stopping after this step, with a checkpoint") == 1  # and not by each worker
    assert "Traceback" not in process.err
    assert run([*arguments, "--resume", "auto"], tmp_path / "logs").status == 0
    assert run(command(data, "gfl", tmp_path / "unbroken", *settings, steps=20), tmp_path / "logs").status == 0
    assert weights(tmp_path / "broken") == weights(tmp_path / "unbroken")
    assert lines(tmp_path / "broken") == lines(tmp_path / "unbroken")


def send_to_group_after(step: int, number: int) -> Callable[[], None]:
    """In a group of its own, send a signal to the training process and its loader's workers, as a terminal does."""

    def prepare() -> None:
        import dtg_core.engine.trainer as module

        os.setpgid(0, 0)
        train_step = module.train_step

        def stepping(*arguments: object) -> object:
            figures = train_step(*arguments)
            if arguments[1][0].step + 1 == step:
                os.killpg(0, number)
            return figures

        module.train_step = stepping

    return prepare


def test_a_signal_breaks_off_an_evaluation(data: TinyData, tmp_path: Path) -> None:
    """The checkpoint says that the evaluation is still due, so the resumed run has the same metrics."""

    def prepare() -> None:
        import dtg_core.engine.evaluator as module

        find = module.find

        def finding(*arguments: object) -> object:
            os.kill(os.getpid(), signal.SIGTERM)
            return find(*arguments)

        module.find = finding

    for steps in (6, 3):  # in the middle and at the end
        settings = ["run.evaluate_every=3", "run.evaluate_batch=1"]
        broken, unbroken = tmp_path / f"broken{steps}", tmp_path / f"unbroken{steps}"
        arguments = command(data, "gfl", broken, *settings, steps=steps)
        stopped = run(arguments, tmp_path / "logs", prepare=prepare)
        assert stopped.status == 143, stopped.err
        assert not (broken / "results.json").exists()
        assert run([*arguments, "--resume", "auto"], tmp_path / "logs").status == 0
        assert run(command(data, "gfl", unbroken, *settings, steps=steps), tmp_path / "logs").status == 0
        assert lines(broken) == lines(unbroken)
        assert weights(broken) == weights(unbroken)


def test_a_second_signal_ends_at_once(data: TinyData, tmp_path: Path) -> None:
    """Unless it comes so soon that it is the same request: schedulers and torchrun signal the same process."""

    def prepare() -> None:
        import dtg_core.engine.trainer as module

        train_step = module.train_step

        def stepping(*arguments: object) -> object:
            figures = train_step(*arguments)
            if arguments[1][0].step == 3:
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.01)
                (tmp_path / "alive").touch()
                time.sleep(ONE_REQUEST)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            return figures

        module.train_step = stepping

    began = time.monotonic()
    ended = run(command(data, "gfl", tmp_path / "run", "run.checkpoint_every=2"), tmp_path / "logs", prepare=prepare)
    assert ended.status == 143
    assert time.monotonic() - began < 30
    assert (tmp_path / "alive").exists()
    assert newest_checkpoint(tmp_path / "run" / "checkpoints", pytest.fail).name == "step_00000002"


def test_a_full_disk_at_a_checkpoint_does_not_stop_training(data: TinyData, tmp_path: Path) -> None:
    def prepare() -> None:
        import dtg_core.engine.checkpointer as module

        save = module.save_checkpoint

        def saving(folder: Path, done: int, *rest: object) -> Path:
            if done == 4:
                raise OSError(28, "No space left on device")
            return save(folder, done, *rest)

        module.save_checkpoint = saving

    ended = run(command(data, "gfl", tmp_path / "run", "run.checkpoint_every=2"), tmp_path / "logs", prepare=prepare)
    assert ended.status == 0
    assert "checkpoint at step 4 not written (No space left on device)" in ended.err
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step_00000002", "step_00000006"}


def test_two_runs_in_one_folder(data: TinyData, tmp_path: Path) -> None:
    first = start(command(data, "gfl", tmp_path / "run", steps=2000), tmp_path / "logs")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    second = run([*command(data, "gfl", tmp_path / "run"), "--resume", "auto"], tmp_path / "more")
    assert second.status == 2
    (line,) = errors(second)
    assert f"another run is using it (process {first.pid} on {os.uname().nodename})" in line
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
