"""The scripts' command lines: one line and status 2 for every mistake, and evaluation of a weights file."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from conftest import Terminal, full_disk
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts")]

import benchmark  # noqa: E402
import check_data  # noqa: E402
import command_line  # noqa: E402
import evaluate  # noqa: E402
import predict  # noqa: E402
import read_settings  # noqa: E402
from command_line import main_guard  # noqa: E402
from read_settings import DETECTORS, RunSettings, build_detector, is_supervised, load_settings, train_parser  # noqa: E402

from dtg_core.config import paper_stages  # noqa: E402
from dtg_core.detectors import KNOWN  # noqa: E402
from dtg_core.engine.checkpoint import load_weights, save_weights  # noqa: E402
from dtg_core.engine.folder import RunFolder  # noqa: E402
from dtg_core.engine.predict import find_weights, load_detector  # noqa: E402
from dtg_core.errors import UserError  # noqa: E402
from dtg_core.settings import load_config  # noqa: E402
from dtg_core.settings_text import to_yaml  # noqa: E402

TINY = [
    "run.steps=5",
    "optim.milestones=[]",
    "backbone.name=resnet10t",
    "backbone.pretrained=false",
    "gfl.channels=16",
    "gfl.tower_depth=1",
    "faster_rcnn.channels=16",
    "faster_rcnn.rcnn.hidden=16",
]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    )


def settings_of(*arguments: str) -> tuple[RunSettings, dict[str, str], list[str]]:
    return load_settings(train_parser().parse(arguments))


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_parsing_needs_no_torch(script: str) -> None:
    module = script.removesuffix(".py")
    folders = [str(ROOT), str(ROOT / "scripts")]
    code = f"import sys; sys.path[:0] = {folders!r}; import {module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("arguments", [["--print-config"], ["--set", "optim.lrr=1"]])
def test_reading_settings_needs_no_torch(arguments: list[str], tmp_path: Path) -> None:
    """Importing it takes seconds."""
    folders = [str(ROOT), str(ROOT / "scripts")]
    code = (f"import sys; sys.path[:0] = {folders!r}; import train\ntry: train.main(['--detector', 'gfl', *{arguments!r}])\n"
            "except Exception as error: assert 'did you mean' in str(error)\nassert 'torch' not in sys.modules")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, cwd=tmp_path)


def test_a_mistake_is_one_line_and_status_2() -> None:
    shown = run("train.py", "--detector", "gfk")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr == "error: --detector: unknown value 'gfk' - did you mean 'gfl'?\n"
    shown = run("train.py", "--detector", "gfk", "--debug")
    assert shown.returncode == 1
    assert "Traceback" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--detectr", "gfl"], ["--detectr", "did you mean '--detector'"]),
        (["--stepz=3"], ["--stepz=3", "did you mean '--steps'"]),
        (["gfl"], ["gfl: unknown argument"]),
        ([], ["--detector: missing", "gfl, faster_rcnn"]),
        (["--steps", "x"], ["--steps: wanted a whole number (found 'x')"]),
        (["--stop-at", "0"], ["--stop-at: is out of range (found 0) - use at least 1"]),
        (["--steps", "0"], ["--steps: is out of range (found 0) - use at least 1"]),
        (["--seed", "-1"], ["--seed: is out of range (found -1) - use at least 0 and less than 4294967296"]),
        (["--detector", "gfl", "--set", "run.steps=0"], ["command line: run.steps", "at least 1"]),
        (["--detector"], ["--detector", "one argument"]),
        (["--detector", "gfl", "--paradigm", "danse"], ["--paradigm", "did you mean 'dense'"]),
        (["--detector", "gfl", "--set", "optim.lrr=1"], ["--set optim.lrr=1", "did you mean 'optim.lr'"]),
        (["--detector", "gfl", "--config", "configs/quikstart.yaml"], ["quikstart.yaml", "cannot read"]),
        (["--detector", "gfl", "--resume", "auto", "--overwrite"], ["--resume and --overwrite"]),
        (["--detector", "gfl", "--paradigm", "supervised", "--labeled", "y", "--unlabeled", "x"], ["found --unlabeled"]),
        (
            ["--detector", "gfl", "--paradigm", "supervised", "--set", "guidance.stages.head.paradigm=dense"],
            ["guidance.stages.head.paradigm", "supervised", "dense"],
        ),
        (["--detector", "faster_rcnn", "--set", "faster_rcnn.rpn.nms_iou=0"], ["faster_rcnn.rpn.nms_iou", "out of range"]),
        (["--detector", "faster_rcnn", "--set", "faster_rcnn.ratios=[]"], ["faster_rcnn.ratios", "is empty"]),
        (["--detector", "gfl", "--set", "gfl.strides=[]"], ["gfl.strides", "is empty"]),
        (["--detector", "gfl", "--set", "gfl.channels=1"], ["gfl.channels", "out of range"]),
    ],
)
def test_wrong_command_lines(arguments: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        settings_of(*arguments)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "interval", "text", "told"),
    [
        (int, "[1, inf)", "1", 1),
        (int, "[1, inf)", "0", "is out of range (found 0) - use at least 1"),
        (int, "[1, inf)", "9" * 400, int("9" * 400)),
        (int, "[1, inf)", "1.5", "wanted a whole number (found '1.5')"),
        (int, "[1, inf)", "inf", "wanted a whole number (found 'inf')"),
        (int, "[32, 8192]", "8192", 8192),
        (int, "[32, 8192]", "8193", "is out of range (found 8193) - use at least 32 and at most 8192"),
        (int, "[0, inf)", "-1", "is out of range (found -1) - use at least 0"),
        (float, "[0, 1)", "0", 0.0),
        (float, "[0, 1)", "-0.5", "is out of range (found -0.5) - use at least 0 and less than 1"),
        (float, "[0, 1)", "1", "is out of range (found 1.0) - use at least 0 and less than 1"),
        (float, "[0, 1)", "high", "wanted a number (found 'high')"),
        (float, "(0, inf)", "1e-3", 0.001),
        (float, "(0, inf)", "0", "is out of range (found 0.0) - use more than 0"),
        (float, "(0, inf)", "inf", "is not a finite number (found inf)"),
        (float, "(0, inf)", "nan", "is not a finite number (found nan)"),
        (float, "(-inf, 0]", "0", 0.0),
        (float, "(-inf, 0]", "0.5", "is out of range (found 0.5) - use at most 0"),
    ],
)
def test_numbers_of_flags(kind: type, interval: str, text: str, told: float | str) -> None:
    parser = command_line.Parser("A script.")
    parser.add_argument("--flag", type=command_line.number(Annotated[kind, interval]))
    if not isinstance(told, str):
        assert (value := parser.parse(["--flag", text]).flag) == told
        assert type(value) is kind
        return
    with pytest.raises(UserError) as caught:
        parser.parse(["--flag", text])
    assert str(caught.value) == f"--flag: {told}"


@pytest.mark.parametrize(("paradigms", "problem"), [
    (("sparse", "sparse"), "is the paradigm itself"), (("supervised", "dense"), "has other images"),
    (("dense", "supervised"), "unknown value 'supervised'"),
])  # fmt: skip
def test_steps_are_timed_against_steps_on_the_same_images(paradigms: tuple[str, str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        benchmark.main(["--detector", "gfl", "--paradigm", paradigms[0], "--against", paradigms[1]])


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_every_flag_of_the_contract_is_there(script: str) -> None:
    wanted = {
        "train.py": "detector config paradigm backbone steps seed labeled unlabeled val images output resume overwrite set "
        "print-config dry-run debug",
        "evaluate.py": "which annotations images output debug",
    }[script]
    parser = train_parser() if script == "train.py" else evaluate.parser()
    assert {f"--{name}" for name in wanted.split()} <= set(parser._option_string_actions)


def test_flags_set_their_keys() -> None:
    settings, origins, _ = settings_of(
        "--detector",
        "faster_rcnn",
        "--backbone",
        "resnet18",
        "--steps",
        "70",
        "--seed",
        "3",
        "--labeled",
        "a b: [1].json",
        "--unlabeled",
        "u",
        "--val",
        "#v",
        "--images",
        "null",
        "--output",
        "o",
        "--set",
        "optim.lr=1",
        "optim.gamma=1",
        "--set",
        "run.log_every=7",
    )
    data, config = settings.data, settings
    assert (config.detector, config.backbone.name, config.run.steps, config.run.seed) == ("faster_rcnn", "resnet18", 70, 3)
    assert (data.labeled, data.unlabeled, data.val, data.images) == ("a b: [1].json", "u", "#v", "null")
    assert (config.run.output, config.optim.lr, config.optim.gamma, config.run.log_every) == ("o", 1.0, 1.0, 7)
    assert origins["run.steps"] == "command line"
    assert origins["guidance.alpha"].startswith(str(read_settings._shortest(read_settings.QUICKSTART)))


@pytest.mark.parametrize(("paradigm", "stage"), [("dense", "dense"), ("sparse", "sparse"), ("supervised", "none")])
def test_the_paradigm_reaches_every_stage(tmp_path: Path, paradigm: str, stage: str) -> None:
    file = tmp_path / "c.yaml"
    for text, flags in (
        (f"paradigm: {paradigm}\n", []),
        ("paradigm: dense\nguidance: {stages: {rpn: {paradigm: dense}}}", ["--paradigm", paradigm]),
        ("paradigm: dense\nguidance: {stages: {rpn: {paradigm: dense}}}", ["--set", f"paradigm={paradigm}"]),
    ):
        file.write_text(text)
        settings, _, _ = settings_of("--config", str(file), "--detector", "faster_rcnn", *flags)
        assert settings.paradigm == paradigm
        assert [rule.paradigm for rule in settings.guidance.stages.values()] == [stage] * 3
        assert is_supervised(settings) == (paradigm == "supervised")
        saved = tmp_path / "saved.yaml"  # what a run writes down means the same run
        saved.write_text(to_yaml(settings))
        assert settings_of("--config", str(saved))[0] == settings


def test_stages_may_differ() -> None:
    settings, _, _ = settings_of(
        "--detector", "faster_rcnn", "--paradigm", "dense", "--set", "guidance.stages.rpn.paradigm=sparse"
    )
    assert [settings.guidance.stages[name].paradigm for name in ("rpn", "rcnn")] == ["sparse", "dense"]
    settings, _, _ = settings_of("--detector", "faster_rcnn", "--set", "guidance.stages.rpn.paradigm=dense", "paradigm=sparse")
    assert [settings.guidance.stages[name].paradigm for name in ("rpn", "rcnn")] == ["dense", "sparse"]
    settings, _, _ = settings_of("--detector", "gfl", "--set", "guidance.stages.head.paradigm=none")
    assert is_supervised(settings)


@pytest.mark.parametrize(("flags", "stages"), [
    ([], ["sparse", "dense"]), (["--paradigm", "dense"], ["sparse", "dense"]), (["--paradigm", "sparse"], ["sparse", "sparse"]),
    (["--paradigm", "supervised"], ["none", "none"]),
    (["--paradigm", "dense", "--set", "guidance.stages.rpn.paradigm=none"], ["none", "dense"]),
])  # fmt: skip
def test_a_stage_of_a_file_yields_to_another_paradigm_only(tmp_path: Path, flags: list[str], stages: list[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("guidance: {stages: {rpn: {paradigm: sparse}}}")
    settings, _, _ = settings_of("--config", str(file), "--detector", "faster_rcnn", *flags)
    assert [settings.guidance.stages[name].paradigm for name in ("rpn", "rcnn")] == stages


def test_guidance_that_teaches_nothing_is_told() -> None:
    _, _, warnings = settings_of("--detector", "gfl", "--set", "guidance.alpha=0")
    assert ["guidance.alpha: 0, so nothing is learnt from unlabelled images" in text for text in warnings] == [True]
    _, _, warnings = settings_of("--detector", "gfl", "--paradigm", "supervised", "--set", "guidance.alpha=0")
    assert warnings == []
    off = [f"guidance.stages.head.{name}=false" for name in ("classification", "box", "rank")]
    with pytest.raises(UserError, match=r"head.classification: all losses of the stage are off .*head\.paradigm=none"):
        settings_of("--detector", "gfl", "--set", *off)
    settings_of("--detector", "gfl", "--set", *off[:2])


def test_what_the_core_logs_is_told_as_a_warning(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    record = {"id": 1, "file_name": "a.png", "width": 40, "height": 40}
    thing = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 30]}
    content = {"images": [record], "annotations": [thing, {**thing, "id": 2}], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    shown = run("show_views.py", "--output", str(tmp_path / "v.png"), "--set", f"data.labeled={tmp_path / 'a.json'}")
    assert shown.returncode == 0, shown.stderr
    assert f"warning: {tmp_path / 'a.json'}: boxes stand there twice" in shown.stderr


@pytest.mark.parametrize(
    ("flags", "given", "idle"),
    [
        (["--detector", "gfl"], ["guidance.stages.rpn.tau=0.5", "guidance.stages.head.tau=0.5"], "guidance.stages.rpn.tau"),
        (["--detector", "gfl"], ["faster_rcnn.rpn.post_nms=9", "gfl.channels=8", "run.log_every=3"], "faster_rcnn.rpn.post_nms"),
        (["--detector", "gfl", "--paradigm", "sparse"], ["guidance.stages.head.tau=0.5"], "guidance.stages.head.tau"),
        (["--detector", "gfl"], ["guidance.stages.head.pseudo_score=0.5"], "guidance.stages.head.pseudo_score"),
        (["--detector", "faster_rcnn"], ["guidance.stages.rcnn.tau=0.5", "data.workers=0", "paradigm=dense"], None),
        (["--detector", "faster_rcnn"],
         ["guidance.stages.rpn.paradigm=dense", "guidance.stages.rcnn.min_iou=0.5", "guidance.stages.rpn.min_iou=0.5"],
         "guidance.stages.rcnn.min_iou"),
        (["--detector", "gfl"], ["optim.name=adamw", "optim.momentum=0.5"], "optim.momentum"),
        (["--detector", "gfl"], ["optim.name=sgd", "optim.momentum=0.5"], None),
        (["--detector", "gfl", "--paradigm", "sparse"], ["guidance.stages.head.proposals=student"], "guidance.stages.head.proposals"),
        (["--detector", "faster_rcnn", "--paradigm", "sparse"], ["guidance.stages.rcnn.proposals=student"], None),
    ],
)
def test_settings_without_effect_are_told(flags: list[str], given: list[str], idle: str | None) -> None:
    settings, _, _ = settings_of(*flags, "--set", *given)
    notes = read_settings.without_effect(given, settings)
    assert notes == ([f"--set {idle}: without effect, as this detector and paradigm do not read it"] if idle else [])


def test_a_flag_and_a_setting_do_not_contradict_each_other() -> None:
    """As the grid of a study, whose rows are settings."""
    with pytest.raises(UserError, match=r"--set paradigm=sparse: --paradigm says supervised - leave one of the two out"):
        settings_of("--detector", "gfl", "--paradigm", "supervised", "--set", "paradigm=sparse")
    with pytest.raises(UserError, match=r"--set detector=gfl: --detector says faster_rcnn"):
        settings_of("--detector", "faster_rcnn", "--set", "detector=gfl")
    assert settings_of("--detector", "gfl", "--steps", "3", "--set", "run.steps=5", "detector=gfl")[0].run.steps == 5


def test_a_setting_of_unlabelled_images_may_stay_in_a_supervised_run() -> None:
    """As in a study, whose settings are those of all paradigms."""
    for value in ("x", ""):
        settings_of("--detector", "gfl", "--paradigm", "supervised", "--labeled", "y", "--set", f"data.unlabeled={value}")


def test_a_stage_without_a_rule_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KNOWN, "gfl", replace(KNOWN["gfl"], stages=("head", "mask")))
    with pytest.raises(UserError, match=r"guidance\.stages\.mask: is missing - add its StageRule to paper_stages"):
        settings_of("--detector", "gfl")


def test_stages_of_the_other_detector_are_not_checked_among_each_other() -> None:
    off = [f"guidance.stages.rpn.{loss}=false" for loss in ("classification", "box", "rank")]
    off.append("guidance.stages.rpn.paradigm=dense")
    settings_of("--detector", "gfl", "--set", *off)
    with pytest.raises(UserError, match=r"rpn\.classification: all losses of the stage are off"):
        settings_of("--detector", "faster_rcnn", "--set", *off)


def test_a_benchmark_reads_settings_as_training_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"views\.short_edge: the lower limit is over the upper one"):
        benchmark.main(["--data", "--set", "views.short_edge=[80,40]"])
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"{tmp_path}/none.json: there is no such file"):
        benchmark.main(["--data", "--set", "data.labeled=~/none.json"])


def test_tables_are_complete() -> None:
    assert {stage for known in KNOWN.values() for stage in known.stages} == set(paper_stages())


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
@pytest.mark.parametrize("detector", DETECTORS)
def test_committed_configs_load(file: Path, detector: str) -> None:
    labeled = ["--labeled", "own.json"] if file.stem == "coco_partial" else []  # which it leaves to the command line
    _, _, warnings = settings_of("--config", str(file), "--detector", detector, *labeled)
    assert warnings == []


@pytest.mark.parametrize(
    ("failure", "status", "line"),
    [
        (UserError("FILE:\n  wrong"), 2, "error: FILE: wrong\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (None, 0, ""),
    ],
)
def test_guard(
    failure: Any, status: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: Any) -> None:
        assert argv == ["a"]
        if failure is not None:
            raise failure

    monkeypatch.setattr(sys, "argv", ["script", "a"])
    with pytest.raises(SystemExit) as caught:
        main_guard(main)
    assert caught.value.code == status
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("text", "arguments", "parts"),
    [
        ("optim:\n  lr: 1\n  lrr: 2\n", [], ["c.yaml:3: optim.lrr: unknown key", "did you mean 'optim.lr'"]),
        ("optim:\n  lr: fast\n", [], ["c.yaml:2: optim.lr: wanted a number (found 'fast')"]),
        ("optim:\n  lr: 1\n  lr: 2\n", [], ["c.yaml:3: optim.lr: set twice"]),
        ("optim:\n\tlr: 1\n", [], ["c.yaml:2:", "indent with spaces"]),
        ("optim: &a {lr: *a}\n", [], ["c.yaml:1:", "anchors"]),
        ("run: !!python/object/apply:os.system [id]\n", [], ["c.yaml:1:", "tag"]),
        ("optim:\n  momentum: 1.5\n", [], ["c.yaml:2: optim.momentum: is out of range (found 1.5) - use at least 0 and less than 1"]),
        ("optim:\n  milestones: [3, 2]\n", [], ["c.yaml:2: optim.milestones: has to ascend"]),
        ("", ["--set", "guidance.stages.head.temperature=0"], ["command line: guidance.stages.head.temperature", "at least 1e-06"]),
        ("", ["--set", "optim.lr=nan"], ["optim.lr", "finite"]),
        ("", ["--set", "data.labeled_per_device=0"], ["command line: data.labeled_per_device", "at least 1"]),
        ("", ["--resume", "auto", "--overwrite"], ["--resume and --overwrite"]),
    ],
)
def test_faults_49_to_54_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, arguments: list[str],
    parts: list[str],
) -> None:
    import train

    (tmp_path / "c.yaml").write_text(text)
    command = ["--detector", "gfl", "--config", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "run"), *arguments]
    monkeypatch.setattr(sys, "argv", ["train.py", *command])
    with pytest.raises(SystemExit) as caught:
        main_guard(train.main)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err
    assert not (tmp_path / "run").exists()


# Evaluation of a weights file ----------------------------------------------------------------------------------------------


def run_folder(folder: Path, name: str = "gfl", **metadata: Any) -> Path:
    settings, _ = load_config(
        RunSettings, None, [*TINY, f"detector={name}", "views.test_short_edge=64", "views.long_edge=64"]
    )
    torch.manual_seed(0)
    detector = build_detector(settings, 2)
    told = {"detector": name, "class_names": ["a", "b"], "category_ids": [7, 3], "config": to_yaml(settings)}
    save_weights(folder / "weights" / "teacher.safetensors", detector, {**told, **metadata})
    return folder


def data_set(folder: Path) -> Path:
    folder.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (80, 100, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    content = {
        "images": [{"id": f"n{number}", "file_name": f"{number}.png", "width": 100, "height": 80} for number in range(3)],
        "categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}],
        "annotations": [{"id": 0, "image_id": "n1", "category_id": 7, "bbox": [10, 10, 40, 40], "area": 1, "iscrowd": 0}],
    }
    (folder / "val.json").write_text(json.dumps(content))
    return folder / "val.json"


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_is_rebuilt_from_its_weights_alone(tmp_path: Path, name: str) -> None:
    path = find_weights(run_folder(tmp_path, name))
    loaded = load_detector(path, "cpu")
    assert not loaded.detector.training
    assert (loaded.class_names, loaded.category_ids) == (("a", "b"), [7, 3])
    tensors = load_weights(path)[0]
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in loaded.detector.state_dict().items())


def test_wrong_weights_files(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    with pytest.raises(UserError, match=r"no weights/student\.safetensors"):
        find_weights(folder, "student")
    for metadata, problem in (
        ({"detector": "yolo"}, "does not say which detector"),
        ({"config": "optim: {lrr: 1}"}, "another version.*optim.lr"),
        ({"class_names": ["a"]}, "does not fit the detector"),
    ):
        with pytest.raises(UserError, match=problem):
            load_detector(run_folder(tmp_path / "run", **metadata))


def test_spellings_of_a_path_are_one() -> None:
    """Otherwise compare.py would take the runs for those of other data."""
    first = settings_of("--detector", "gfl", "--labeled", "a/b.json", "--images", "photos", "--unlabeled", "c")[0]
    other = settings_of("--detector", "gfl", "--labeled", "./a//b.json", "--images", "photos/", "--set", "data.unlabeled=./c/")[0]
    assert first == other


def test_a_flag_that_is_given_twice_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    parse = train_parser().parse
    assert parse(["--labeled", "a.json", "--labeled=b.json", "--set", "a=1", "--set", "b=2"]).labeled == "b.json"
    assert capsys.readouterr().err == "warning: --labeled: is given twice, and only the last counts\n"
    parse(["--labeled", "a.json", "--unlabeled", "a.json", "--overwrite"])
    assert capsys.readouterr().err == ""


def test_evaluating_on_training_images_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As far as the run's labelled file can be read."""
    annotations = data_set(tmp_path / "data")
    for number, (labeled, told) in enumerate(((annotations, True), (tmp_path / "gone.json", False))):
        settings, _ = load_config(
            RunSettings, None, [*TINY, "detector=gfl", "views.test_short_edge=64", "views.long_edge=64", f"data.labeled={labeled}"]
        )
        config = to_yaml(settings)
        folder = run_folder(tmp_path / f"run{number}", config=config)
        assert evaluate.main([str(folder), "--annotations", str(annotations)]) == 0
        warning = f"warning: {annotations}: THE RUN HAS LEARNT FROM 3 OF ITS 3 IMAGES, SO THE FIGURES SAY NOTHING OF NEW IMAGES"
        assert (warning in capsys.readouterr().err) == told


def test_evaluate_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, annotations = run_folder(tmp_path / "run"), data_set(tmp_path / "data")
    arguments = [str(folder), "--annotations", str(annotations), "--batch", "2"]
    assert evaluate.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "AP50" in shown
    assert "AR100" in shown
    results = json.loads((folder / "evaluation-val" / "results.json").read_text())
    assert evaluate.main([*arguments, "--score", "0.9999", "--output", str(tmp_path / "none")]) == 0
    assert json.loads((tmp_path / "none" / "detections.json").read_text()) == []
    assert (json.loads((tmp_path / "none" / "results.json").read_text())["score"], results["score"]) == (0.9999, 0.05)
    assert evaluate.main([*arguments, "--score", "0", "--output", str(tmp_path / "every")]) == 0  # not the run's
    assert json.loads((tmp_path / "every" / "results.json").read_text())["score"] == 0
    assert (results["run"], results["annotations"], results["data"]["images"]) == (str(folder), str(annotations), 3)
    assert results["images"] == 3
    assert results["AP"] is not None
    assert results["classes"]["a"] is None
    for row in json.loads((folder / "evaluation-val" / "detections.json").read_text()):
        assert row["image_id"] in ("n0", "n1", "n2")
        assert row["category_id"] in (3, 7)
    with pytest.raises(UserError, match=r"full: cannot be written \(File too large\) - give another --output"), full_disk(1):
        evaluate.main([*arguments, "--workers", "0", "--output", str(tmp_path / "full")])
    assert not list((tmp_path / "full").iterdir())
    with pytest.raises(UserError, match=r"evaluation-val/results\.json: exists - give another --output, or --overwrite"):
        evaluate.main(arguments)
    assert json.loads((folder / "evaluation-val" / "results.json").read_text()) == results
    assert evaluate.main([*arguments, "--overwrite"]) == 0
    for name in ("results.json", "detections.json"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name}: exists - give another --output, or --overwrite"):
            evaluate.main([*arguments, "--output", str(tmp_path)])
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    content = json.loads(annotations.read_text())
    broken = [{**content["annotations"][0], "bbox": [1, 2, 3]}] * len(content["annotations"])
    annotations.write_text(json.dumps({**content, "annotations": [*content["annotations"], *broken]}))
    (tmp_path / "results.json").write_text("old")
    arguments += ["--output", str(tmp_path), "--overwrite"]
    with pytest.raises(UserError, match=r"raise data\.rules\.max_bad_annotations"):
        evaluate.main(arguments)
    assert evaluate.main([*arguments, "--set", "data.rules.max_bad_annotations=0.5"]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["images"] == 3


def test_evaluate_does_not_count_images_that_cannot_be_read(tmp_path: Path) -> None:
    folder, annotations = run_folder(tmp_path / "run"), data_set(tmp_path / "data")
    content = json.loads(annotations.read_text())
    next(annotations.parent.rglob(content["images"][1]["file_name"])).write_bytes(b"")
    arguments = [str(folder), "--annotations", str(annotations), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"1 of 3 images cannot be read \(first .*\) - .*raise data\.rules\.max_bad_images"):
        evaluate.main(arguments)
    assert not (tmp_path / "out" / "results.json").exists()
    assert evaluate.main([*arguments, "--set", "data.rules.max_bad_images=0.5"]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["images"] == 2


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        (["--images", "x"], "--images"),
        (["--batch", "0"], "^--batch: is out of range"),
        (["--workers", "-1"], "^--workers: is out of range"),
        (["--which", "techer"], "did you mean 'teacher'"),
        (["--device", "cudda"], "--device cudda: there is no such device - use cpu"),
        (["--device", "cpu:7"], "--device cpu:7"),
        (["--annotations", "none.json"], r"none\.json"),
        (["--set", "run.seed=1"], "run.seed=1: is not used here"),
        (["--set", "data.rules.max_bad_annotations=2"], "out of range"),
    ],
)
def test_evaluate_mistakes(tmp_path: Path, extra: list[str], problem: str) -> None:
    arguments = [str(run_folder(tmp_path / "run")), "--annotations", str(data_set(tmp_path / "data"))]
    if extra[0] in ("--images", "--annotations"):
        arguments = arguments[:1]
    with pytest.raises(UserError, match=problem):
        evaluate.main([*arguments, *extra])


def test_evaluate_matches_classes_by_name_and_keeps_the_runs_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ids in another order, boxes as corners: the figures are those of the same boxes as COCO writes them."""
    folder, annotations = run_folder(tmp_path / "run"), data_set(tmp_path / "data")
    content = json.loads(annotations.read_text())
    content["annotations"] += [{**content["annotations"][0], "id": 1, "bbox": [30, 20, 50, 45], "category_id": 3, "image_id": "n2"}]
    annotations.write_text(json.dumps(content))
    assert evaluate.main([str(folder), "--annotations", str(annotations)]) == 0
    expected = json.loads((folder / "evaluation-val" / "results.json").read_text())
    assert expected["AP"] is not None

    other = {3: 7, 7: 3}
    content["categories"] = [{**category, "id": other[category["id"]]} for category in content["categories"]]
    for row in content["annotations"]:
        x, y, width, height = row["bbox"]
        row.update(category_id=other[row["category_id"]], bbox=[x, y, x + width, y + height])
    annotations.write_text(json.dumps(content))
    settings, _ = load_config(RunSettings, None, [
        *TINY, "detector=gfl", "views.test_short_edge=64", "views.long_edge=64", "data.rules.box_format=xyxy"])
    run_folder(tmp_path / "run", config=to_yaml(settings))
    assert evaluate.main([str(folder), "--annotations", str(annotations), "--overwrite"]) == 0
    assert json.loads((folder / "evaluation-val" / "results.json").read_text()) == expected
    ids = {row["category_id"] for row in json.loads((folder / "evaluation-val" / "detections.json").read_text())}
    assert ids <= {3, 7}


def test_evaluate_shows_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, annotations = run_folder(tmp_path / "run"), data_set(tmp_path / "data")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert evaluate.main([str(folder), "--annotations", str(annotations), "--batch", "2", "--workers", "0"]) == 0
    assert "0/2 [" in terminal.getvalue()


@pytest.mark.parametrize("given", ["run/weights/teacher.safetensors", "teacher.safetensors"])
def test_a_weights_file_of_a_run_is_evaluated_as_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """In ``weights``, figures would keep ``train.py --overwrite`` from emptying the folder."""
    annotations, folder = data_set(tmp_path / "data"), run_folder(tmp_path / "run")
    (folder / "config.yaml").write_text("schema: 1\n")
    monkeypatch.chdir(tmp_path if "/" in given else folder / "weights")
    assert evaluate.main([given, "--annotations", str(annotations), "--batch", "2"]) == 0
    assert {path.name for path in (folder / "evaluation-val").iterdir()} == {"results.json", "detections.json"}
    RunFolder(folder).require_free(resume=False, overwrite=True)


def test_evaluate_needs_the_folder_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's data are named relative to the folder that it was trained in."""
    annotations = data_set(tmp_path / "data")
    content = json.loads(annotations.read_text())
    (tmp_path / "data" / "own.json").write_text(json.dumps(content))
    relative = ["data.labeled=own.json", "data.val=val.json", "data.workers=0"]
    settings, _ = load_config(RunSettings, None, [*TINY, "detector=gfl", "views.test_short_edge=64", "views.long_edge=64", *relative])
    folder = run_folder(tmp_path / "run", config=to_yaml(settings))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        evaluate.main([str(folder)])
    assert str(caught.value) == (
        f"data.val=val.json of {folder}: not found from here - run it in the folder where the run was trained, or give "
        "--annotations and --images"
    )
    assert evaluate.main([str(folder), "--annotations", str(annotations)]) == 0
    monkeypatch.chdir(tmp_path / "data")
    assert evaluate.main([str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {"weights", "evaluation", "evaluation-val"}
    with pytest.raises(UserError, match=r"evaluation/results\.json: exists - give another --output, or --overwrite"):
        evaluate.main([str(folder)])


def test_evaluate_refuses_other_classes(tmp_path: Path) -> None:
    annotations = data_set(tmp_path / "data")
    annotations.write_text(annotations.read_text().replace('"b"', '"c"'))
    with pytest.raises(UserError, match=r"val\.json: its classes are not the detector's \(only one of them has 'b', 'c'\)"):
        evaluate.main([str(run_folder(tmp_path / "run")), "--annotations", str(annotations)])


def test_a_reader_that_has_gone_is_no_error() -> None:
    """As in ``train.py --print-config | head -1``."""
    script = [sys.executable, str(ROOT / "scripts" / "train.py"), "--detector", "gfl", "--print-config"]
    with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_tilde_is_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no shell has expanded it: in --flag=~/file, after --set key=, and in YAML."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("data: {labeled: ~/own.json, val: ~/val.json}\nbackbone: {weights: ~/w.safetensors}\n")
    given = ["--detector", "gfl", "--config=~/own.yaml", "--output=~/run", "--set", "data.val=~/other.json"]
    settings, _, _ = load_settings(train_parser().parse(given))
    found = settings.data.labeled, settings.data.val, settings.backbone.weights, settings.run.output
    assert found == tuple(str(tmp_path / name) for name in ("own.json", "other.json", "w.safetensors", "run"))
    with pytest.raises(UserError, match=f"^{tmp_path}/none.json: there is no such file"):
        check_data.main(["--annotations=~/none.json"])
    with pytest.raises(UserError, match=f"^{tmp_path}/none: no image there"):
        predict.main(["run", "~/none", "--output", str(tmp_path / "out")])
