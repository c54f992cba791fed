"""Reports of runs: what is in them, that they stand alone, and that a failure costs the pictures and nothing else."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import runs
from pages import read_page, stands_alone
from PIL import Image
from runs import TinyData

from dtg_core.data.coco import load_coco
from dtg_core.engine import recorder, report
from dtg_core.engine.evaluate import SetDetections
from dtg_core.engine.pictures import GAP, TILE, predictions_sheet
from dtg_core.engine.report import found_in, sample_rows, write_report
from dtg_core.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TinyData:
    return TinyData.write(tmp_path_factory.mktemp("data"))


EVALUATED = ("run.evaluate_every=3", "run.checkpoint_every=3", "guidance.start_step=0")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A run of GFL that was evaluated at steps 3 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    assert runs.run(runs.command(data, "gfl", folder / "run", *EVALUATED), folder / "logs").status == 0
    return folder / "run"


def test_a_run_writes_pictures_at_evaluations_and_its_report(finished):
    names = sorted(path.name for path in (finished / "pictures").iterdir())
    assert names == [f"{kind}-{step:06}.jpg" for kind in ("guidance-head", "predictions") for step in (3, 6)]
    with Image.open(finished / "pictures" / "guidance-head-000006.jpg") as sheet:
        assert sheet.width > 1500  # five tiles
        assert sheet.height > report.TAUGHT * 290
    text = (finished / "report.html").read_text()
    assert stands_alone(text)
    assert text.count("data:image/jpeg") == 2
    words = " ".join(read_page(text).text)
    for wanted in ("COCO figures", "Losses on labelled images", "Losses on unlabelled images", "Candidates in an image", "head",
                   "Mean over all classes", "green, AP", "red, AP", "Step 6: the teacher's boxes", "config.yaml", "max_skipped"):  # fmt: skip
        assert wanted in words, wanted
    assert "Step 3:" not in words
    curves = json.loads((finished / "precision.json").read_text())
    assert {iou: sorted(classes) for iou, classes in curves.items()} == {iou: ["green", "red"] for iou in ("0.50", "0.75")}
    told = json.loads((finished / "results.json").read_text())
    assert told["images_of_a_step"] == {"labeled": 1, "unlabeled": 2}
    assert {name: told["data"][name]["images"] for name in told["data"]} == {"labeled": 5, "unlabeled": 9, "val": 3}


@pytest.mark.parametrize(("paradigm", "kinds"), [
    ("dense", ["guidance-rcnn", "guidance-rpn", "predictions"]), ("supervised", ["predictions"]),
])  # fmt: skip
def test_stages_that_are_guided_have_a_picture(data, tmp_path, paradigm, kinds):
    arguments = runs.command(data, "faster_rcnn", tmp_path / "run", steps=3, paradigm=paradigm)
    assert runs.run(arguments, tmp_path / "logs").status == 0
    assert sorted(path.name for path in (tmp_path / "run" / "pictures").iterdir()) == [f"{kind}-000003.jpg" for kind in kinds]
    assert (tmp_path / "run" / "report.html").read_text().count("data:image/jpeg") == len(kinds)


def test_the_title_tells_how_each_stage_is_guided():
    """What stages were told counts, not the run's paradigm, which they may all have left; other detectors' are not told."""
    stages = {f"guidance.stages.{stage}.paradigm": kind for stage, kind in (("head", "dense"), ("rpn", "none"), ("rcnn", "none"))}
    lines = [{"step": 1, "labeled/rpn/cls": 1.0, "labeled/rcnn/cls": 1.0}]
    assert report._paradigms({"paradigm": "dense", **stages}, lines) == "supervised"
    assert report._paradigms({"paradigm": "dense", **stages}, [{"step": 1, "labeled/head/cls": 1.0}]) == "dense guidance"
    stages["guidance.stages.rcnn.paradigm"] = "sparse"
    assert report._paradigms({"paradigm": "dense", **stages}, lines) == "rpn none, rcnn sparse guidance"


def test_without_a_validation_set_there_are_curves_and_guidance(data, tmp_path):
    arguments = runs.command(data, "gfl", tmp_path / "run", steps=3)
    place = arguments.index("--val")
    assert runs.run([*arguments[:place], *arguments[place + 2 :]], tmp_path / "logs").status == 0
    words = " ".join(read_page((tmp_path / "run" / "report.html").read_text()).text)
    assert "Losses on labelled images" in words
    assert "what the teacher teaches" in words
    assert "COCO figures" not in words


def refuse(*_: object) -> None:
    raise OSError(28, "No space\nleft on device")


def fill_the_disk() -> None:
    recorder.save_pictures = refuse


def test_a_failure_is_one_warning_and_changes_nothing(data, finished, tmp_path):
    process = runs.run(runs.command(data, "gfl", tmp_path / "run", *EVALUATED), tmp_path / "logs", prepare=fill_the_disk)
    assert process.status == 0
    told = [line for line in process.err.splitlines() if "given up" in line]
    assert len(told) == 1  # of two evaluations
    assert told[0].startswith("warning: ")
    assert told[0].endswith("pictures: given up ([Errno 28] No space left on device) - training goes on")
    assert stands_alone((tmp_path / "run" / "report.html").read_text())  # curves and figures without pictures
    assert runs.lines(tmp_path / "run") == runs.lines(finished)  # drawing has no part in the training
    assert (tmp_path / "run" / "results.json").read_text() == (finished / "results.json").read_text()


def test_a_report_takes_what_there_is(finished, tmp_path):
    with pytest.raises(OSError, match="config"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "labeled/head/cls": null, "lr": 0.1}\n{"step": 8, "lr": 0.2}\n')
    (tmp_path / "pictures").mkdir()
    for name in ("predictions-000004.jpg", "predictions-000008.jpg", "predictions-000012.jpg", "guidance-head.jpg", "mine.jpg"):
        (tmp_path / "pictures" / name).write_bytes(b"x")
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert stands_alone(text)
    assert "Learning rate" in text
    assert "Warnings" not in text
    assert "Step 8:" in text  # 12 is of a time before the run went back to step 8
    assert text.count("data:image/") == 1
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(2 * '{"step": 8, "warning": "the teacher sleeps"}\n')  # once more after resuming
    write_report(tmp_path)
    words = " ".join(read_page((tmp_path / "report.html").read_text()).text)
    assert "Warnings" in words
    assert words.count("step 8: the teacher sleeps") == 1
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(UserError):
        write_report(tmp_path)


def test_unreadable_images_are_left_out_of_the_sheet(data, tmp_path):
    folder = shutil.copytree(data.val.parent, tmp_path / "val")
    index = load_coco(folder / data.val.name)
    nothing = found_in(SetDetections([np.arange(3)], [np.zeros((0, 7))]), 0, index)
    (folder / "images" / "1.png").write_bytes(b"broken")
    three, none = (predictions_sheet(index, rows, [nothing] * len(rows), index.class_names) for rows in ([0, 1, 2], [1]))
    assert three.size == (2 * TILE + 3 * GAP, TILE + 2 * GAP)
    assert none.size == (GAP, GAP)


def test_predictions_are_those_of_the_image(data):
    index = load_coco(data.val)
    rows = [[0, 0, 9, 9, 0.9, 1, 2], [1, 1, 5, 5, 0.95, 0, 2], [0, 0, 8, 8, 0.2, 1, 2], [3, 3, 7, 7, 0.9, 0, 0]]
    found = SetDetections([np.arange(3)], [np.array(rows, np.float64)])
    own = found_in(found, 2, index)
    assert own.boxes.tolist() == [[1, 1, 5, 5], [0, 0, 9, 9]]  # best first, and none under the threshold
    assert own.labels.tolist() == [0, 1]
    assert len(found_in(found, 1, index).boxes) == 0
    assert sample_rows(index, 2) == [0, 2]
    assert sample_rows(index, 9) == [0, 1, 2]
