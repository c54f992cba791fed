"""What is taken from a folder of images, and what is said of the rest."""
from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from dtg_core.config import DataConfig
from dtg_core.data.coco import list_folder
from dtg_core.data.files import list_images
from dtg_core.data.findings import Report
from dtg_core.data.sources import open_sources
from dtg_core.engine.folder import RunFolder
from dtg_core.engine.study import MARK
from dtg_core.errors import UserError
from dtg_core.settings_text import to_yaml

sys.path[:0] = [str(ROOT / "scripts")]
from read_settings import RunSettings  # noqa: E402

FRAMES = r"extract frames, e\.g\. mkdir frames && ffmpeg -i a\.mp4 -vf fps=1 frames/%06d\.jpg"


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write_run(folder: Path) -> None:
    """As far as its pictures."""
    run = RunFolder(folder)
    run.claim()
    assert run.lock is not None
    run.lock.close()
    (folder / "config.yaml").write_text(to_yaml(RunSettings()))
    touch(folder / "metrics.jsonl", folder / "pictures" / "predictions-000004.jpg")


@pytest.mark.parametrize("chosen", ["run", "run/pictures", "prediction", "prediction/pictures"])
def test_pictures_with_boxes_drawn_on_them_are_no_photos(tmp_path: Path, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run")
    touch(*(tmp_path / "prediction" / name for name in ("detections.json", "detections.csv", "pictures/a.jpg")))
    touch(tmp_path / "trip" / "pictures" / "a.jpg")
    with pytest.raises(UserError, match="boxes of a run or a prediction are drawn on its images"):
        list_folder(tmp_path / chosen)
    monkeypatch.chdir(tmp_path / chosen)
    with pytest.raises(UserError, match="are drawn on its images"):
        list_folder(Path())
    assert list_folder(tmp_path / "trip" / "pictures").file_names == ["a.jpg"]


def test_what_this_program_has_written_is_passed_over(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a")
    write_run(tmp_path / "runs" / "a" / "abandoned-1")  # in a run, so not counted
    write_run(tmp_path / "copy")
    (tmp_path / "copy" / ".lock").unlink()
    study, prediction, began = tmp_path / "study", tmp_path / "trip" / "pred", tmp_path / "trip" / "began"
    touch(study / MARK, study / "logs" / "a.log", study / "compare.png")
    write_run(study / "runs" / "b")
    touch(*(prediction / name for name in ("detections.json", "detections.csv", "pictures/a.jpg")))
    touch(*(began / name for name in ("detections.json.tmp", "detections.csv.tmp", "pictures/a.jpg")))
    touch(tmp_path / "a.jpg", tmp_path / "trip" / "b.jpg", tmp_path / "runs" / "c.jpg")
    report = Report()
    assert list_images(tmp_path, report) == ["a.jpg", "runs/c.jpg", "trip/b.jpg"]
    assert report.lines() == [
        f"{tmp_path}: folders are passed over, as this program has written them (5: copy, runs/a, study, ...)"
    ]
    assert list_images(prediction, Report()) == ["pictures/a.jpg"]  # where it is meant


def test_folders_that_only_look_like_this_programs_are_read(tmp_path: Path) -> None:
    for name, files in {
        "yaml": ["config.yaml", "metrics.jsonl"], "mark": ["config.yaml"], "study": ["study.yaml", "runs/x.txt"],
        "json": ["detections.json", "results.json"], "folder": ["config.yaml/x", ".lock"],
    }.items():
        touch(*(tmp_path / name / file for file in files), tmp_path / name / "a.jpg")
    (tmp_path / "yaml" / "config.yaml").write_text("data:\n  schema: 1\n")
    (tmp_path / "mark" / "config.yaml").write_text("schema: 1\n")
    assert list_images(tmp_path, Report()) == [f"{name}/a.jpg" for name in ("folder", "json", "mark", "study", "yaml")]


def test_pictures_of_runs_beside_the_labelled_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The names of the JSON begin at the folder that ``runs`` is in."""
    for name in ("a", "b"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "photos" / f"{name}.jpg")
    (tmp_path / "own.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "photos/a.jpg", "width": 40, "height": 40}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20]}], "categories": [{"id": 1, "name": "thing"}],
    }))  # fmt: skip
    write_run(tmp_path / "runs" / "gfl-dense-own-seed0")
    config = DataConfig(labeled=str(tmp_path / "own.json"), unlisted="unlabeled")
    with caplog.at_level(logging.WARNING):
        assert open_sources(config, supervised=False).unlabeled.file_names == ["photos/b.jpg"]
    told = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert told == [f"{tmp_path}: folders are passed over, as this program has written them (1: runs/gfl-dense-own-seed0)"]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["a.mp4", "b/C.MOV"], rf"only \.mov, \.mp4 files - {FRAMES}"),
        (["a.heic"], r"only \.heic files - convert HEIC to JPEG"),
        (["a.heif", "a.avi"], rf"only \.avi, \.heif files - {FRAMES}, and convert HEIC to JPEG"),
        (["a.dng", "Thumbs.db", ".x.mp4"], r"only \.dng files - give a folder of images, or use --paradigm supervised"),
        ([f"a.{suffix}" for suffix in "bcdefg"], r"only \.b, \.c, \.d, \.e, \.f, \.\.\. files - give a folder of images"),
    ],
)
def test_what_a_folder_has_instead_of_images_is_named(tmp_path: Path, files: list[str], told: str) -> None:
    touch(*(tmp_path / file for file in files))
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}: it has no images, {told}"):
        list_folder(tmp_path)


def test_other_places_without_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no images - give a folder of images, or use --paradigm supervised$"):
        list_folder(tmp_path)
    write_run(tmp_path / "a")
    with pytest.raises(UserError, match=r"it has no images, only what this program has written - give a folder of images"):
        list_folder(tmp_path)
    touch(tmp_path / "clip.mp4", tmp_path / "notes.txt")
    with pytest.raises(UserError, match=rf"clip\.mp4: is a file, not a folder - {FRAMES}$"):
        list_folder(tmp_path / "clip.mp4")
    with pytest.raises(UserError, match=r"notes\.txt: is a file, not a folder - give a folder of images$"):
        list_folder(tmp_path / "notes.txt")
    with pytest.raises(UserError, match=r"none\.mp4: there is no such folder - give a folder of images$"):
        list_folder(tmp_path / "none.mp4")


def test_videos_among_images_are_counted_as_such(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a.jpg", "b.mp4", "c.MOV", "d.heic", "e.txt", ".f.mp4")))
    report = Report()
    assert list_images(tmp_path, report) == ["a.jpg"]
    assert report.lines() == [
        f"{tmp_path}: files are skipped, as video instead of frames (2: b.mp4, c.MOV)",
        f"{tmp_path}: files are skipped, as HEIC instead of JPEG (1: d.heic)",
        f"{tmp_path}: files are skipped, as hidden or as no image (2: e.txt, .f.mp4)",
    ]
