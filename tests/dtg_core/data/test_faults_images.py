"""Faults 33 to 48 of a user's image files and folders."""

from __future__ import annotations

import json
import logging
import os
import re
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Terminal
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "scripts")]

import check_data  # noqa: E402
from command_line import main_guard  # noqa: E402
from hidden_labels import unlabeled_data  # noqa: E402

from dtg_core.config import DataConfig, DataRules, ViewsConfig  # noqa: E402
from dtg_core.data import images as images_module  # noqa: E402
from dtg_core.data.check import check_images, require_images  # noqa: E402
from dtg_core.data.coco import list_folder, load_coco  # noqa: E402
from dtg_core.data.findings import Report  # noqa: E402
from dtg_core.data.images import image_size, read_image  # noqa: E402
from dtg_core.data.plan import EvalData, StepData, steps_loader  # noqa: E402
from dtg_core.data.sources import open_sources  # noqa: E402
from dtg_core.data.views import strong_view, weak_view  # noqa: E402
from dtg_core.errors import UserError, printable  # noqa: E402

VIEWS = ViewsConfig(short_edge=(32, 48), long_edge=64, test_short_edge=32)


def noise(height: int = 40, width: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))


def find(folder: Path, **rules: Any) -> tuple[Report, list[str | None]]:
    """Check all images of a folder."""
    report = Report()
    index = list_folder(folder, DataRules(**rules), report)
    return report, [look.problem for look in check_images(index, folder, report).looks]


def counts(report: Report) -> dict[str, int]:
    return {finding.kind: finding.count for finding in report.findings.values()}


def png_head(width: int, height: int) -> bytes:
    """A PNG that says its size and has no pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (b"IHDR" + head, b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks
    )


def test_fault_34_files_that_are_no_images(tmp_path: Path) -> None:
    noise().save(tmp_path / "whole.png")
    noise().save(tmp_path / "wrong_suffix.jpg", format="PNG")  # read by what it holds
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "page.jpeg").write_text("<!DOCTYPE html><html>404</html>")
    report, problems = find(tmp_path)
    assert counts(report) == {"images cannot be used": 3}
    assert problems.count(None) == 2
    index = list_folder(tmp_path)
    checked = check_images(index, tmp_path, report)
    with pytest.raises(UserError, match="3 of 5 images cannot be used"):
        require_images(checked)


def test_fault_35_truncated_files(tmp_path: Path) -> None:
    for suffix in ("jpg", "png"):
        noise().save(tmp_path / f"whole.{suffix}")
        raw = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"half.{suffix}").write_bytes(raw[: len(raw) // 2])
    raw = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "no_end.jpg").write_bytes(raw[:-2])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    report, _ = find(tmp_path)
    assert counts(report) == {"images cannot be used": 3}
    try:
        report, _ = find(tmp_path, truncated="use")
        assert not counts(report)
    finally:
        images_module.ImageFile.LOAD_TRUNCATED_IMAGES = False
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("workers", [0, 1])
def test_fault_35_truncated_files_stop_where_asked(tmp_path: Path, workers: int) -> None:
    path = labeled(tmp_path)
    raw = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(raw[: len(raw) // 2])
    index = load_coco(path, rules=DataRules(truncated="error"))
    with pytest.raises(UserError, match=r"2\.png: it is cut off") as caught:
        list(steps_loader(StepData(index, None, VIEWS, 0, 2, 0), 0, 4, workers))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"2\.png: it is cut off"):
        check_images(index, tmp_path, Report())
    with pytest.raises(UserError, match=r"2\.png: it is cut off"):
        [EvalData(index, VIEWS, 1, 0, 1)[row] for row in range(4)]
    raw = noise().save(tmp_path / "whole.jpg") or (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(raw[:-2])
    with pytest.raises(UserError, match=r"cut\.jpg: it is cut off"):
        read_image(tmp_path / "cut.jpg", rules=DataRules(truncated="error"))
    (tmp_path / "2.png").write_bytes(b"")  # damaged in another way: another image takes its place
    assert len(list(steps_loader(StepData(index, None, VIEWS, 0, 2, 0), 0, 4, workers))) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_fault_37_no_image_takes_the_place_of_one_that_needs_a_setting(tmp_path: Path, workers: int) -> None:
    path = labeled(tmp_path)
    Image.fromarray(np.zeros((40, 60), np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "float.tif").replace(tmp_path / "2.png")
    index = load_coco(path)
    with pytest.raises(UserError, match=r"/2\.png: its pixels are floats.* data\.rules\.float_range"):
        list(steps_loader(StepData(index, None, VIEWS, 0, 2, 0), 0, 4, workers))
    with pytest.raises(UserError, match="its pixels are floats"):
        [EvalData(index, VIEWS, 1, 0, 1)[row] for row in range(4)]


def test_fault_36_noise_of_decoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    noise().save(tmp_path / "a.png")
    decode = images_module.to_rgb

    def loud(*arguments: Any) -> Image.Image:
        os.write(2, b"Premature end of JPEG file\n")
        return decode(*arguments)

    monkeypatch.setattr(images_module, "to_rgb", loud)
    report, _ = find(tmp_path)
    assert counts(report) == {"images make the decoder complain": 1}
    assert capfd.readouterr().err == ""


def test_fault_37_deep_images(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "deep.png"))[..., 0], np.arange(256).reshape(16, 16))
    Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match="float_range"):
        read_image(tmp_path / "float.tif")
    found = np.asarray(read_image(tmp_path / "float.tif", rules=DataRules(float_range=(0, 1))))
    np.testing.assert_array_equal(found[..., 1], np.arange(256).reshape(16, 16))
    wide = ramp.astype(np.int32)
    Image.fromarray(wide).save(tmp_path / "wide.tif")  # 16 bits in a file of 32
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "wide.tif"))[..., 0], np.arange(256).reshape(16, 16))
    wide[0, 0] = 70_000  # one pixel does not make the others dark
    Image.fromarray(wide).save(tmp_path / "wide.tif")
    with pytest.raises(UserError, match=r"wide\.tif: its pixels are whole numbers beyond 16 bits.*float_range"):
        read_image(tmp_path / "wide.tif")
    found = np.asarray(read_image(tmp_path / "wide.tif", rules=DataRules(float_range=(0, 65535))))
    np.testing.assert_array_equal(found[..., 0].ravel(), [255, *range(1, 256)])
    report, _ = find(tmp_path, float_range=(0, 1))
    assert counts(report)[images_module.DEEP] == 3


def test_faults_38_39_41_formats_are_counted(tmp_path: Path) -> None:
    size = (40, 40)
    Image.new("RGBA", size, (255, 0, 0, 0)).save(tmp_path / "alpha.png")
    Image.new("LA", size).save(tmp_path / "gray_alpha.png")
    Image.new("L", size, 77).save(tmp_path / "gray.png")
    Image.new("CMYK", size).save(tmp_path / "print.jpg")
    noise(40, 40).quantize(8).save(tmp_path / "palette.png")
    frames = [Image.new("RGB", size, color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "pages.tiff", save_all=True, append_images=frames[1:])
    report, problems = find(tmp_path)
    assert problems == [None] * 7
    assert counts(report) == {images_module.ALPHA: 2, images_module.FRAMES: 2}
    assert read_image(tmp_path / "moving.gif").getpixel((0, 0))[0] > 250  # the first frame
    assert read_image(tmp_path / "pages.tiff").getpixel((0, 0)) == (255, 0, 0)


def test_fault_40_broken_exif(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0" * 3)
    noise().save(tmp_path / "b.jpg", exif=b"Exif\0\0nonsense")
    exif = Image.Exif()
    exif[0x0112] = 77
    noise().save(tmp_path / "c.jpg", exif=exif)
    report, problems = find(tmp_path)
    assert problems == [None] * 3
    assert counts(report) == {images_module.BAD_EXIF: 3}
    for name in "abc":
        assert read_image(tmp_path / f"{name}.jpg").size == (60, 40)


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (8, 8)])
def test_fault_42_tiny_and_long_images(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")
    report, problems = find(tmp_path)
    assert problems == [None]
    assert counts(report) == {"images have a side under 32 px": 1}
    generator, nothing = np.random.default_rng(0), (np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    for view in (weak_view, strong_view):
        assert min(view(read_image(tmp_path / "a.png"), *nothing, VIEWS, generator).size) >= 1


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_fault_43_huge_heads_allocate_nothing(
    tmp_path: Path, width: int, height: int, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "bomb.png").write_bytes(png_head(width, height))
    with pytest.raises(UserError, match=r"bomb\.png") as caught:
        read_image(tmp_path / "bomb.png")
    assert re.search(rf"it is too large \(({width} x {height}|over \d+) px\).* data\.rules\.max_pixels", str(caught.value))
    assert not recwarn.list
    noise().save(tmp_path / "a.png")
    with pytest.raises(UserError, match="60 x 40 px"):
        read_image(tmp_path / "a.png", rules=DataRules(max_pixels=2399))
    assert image_size(tmp_path / "bomb.png", DataRules(max_pixels=2**62))[0] == (height, width)  # beyond Pillow's own limit too


def test_fault_44_errors_of_a_network_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise().save(tmp_path / "a.png")
    opened, calls = Image.open, []

    def stalls(path: Path) -> Image.Image:
        calls.append(path)
        if len(calls) % 3:
            raise OSError(5, "Input/output error")
        return opened(path)

    monkeypatch.setattr(images_module.Image, "open", stalls)
    monkeypatch.setattr(images_module, "RETRIES", (0, 0))
    assert read_image(tmp_path / "a.png").size == (60, 40)
    assert len(calls) == 3
    monkeypatch.setattr(images_module, "RETRIES", (0,))
    with pytest.raises(UserError, match="Input/output error"):
        read_image(tmp_path / "a.png")


def labeled(folder: Path, images: int = 4) -> Path:
    for n in range(images):
        noise().save(folder / f"{n}.png")
    path = folder / "data.json"
    path.write_text(json.dumps({
        "images": [{"id": n, "file_name": f"{n}.png", "width": 60, "height": 40} for n in range(images)],
        "annotations": [{"image_id": n, "category_id": 1, "bbox": [5, 5, 20, 20]} for n in range(images)],
        "categories": [{"id": 1, "name": "thing"}],
    }))  # fmt: skip
    return path


def test_faults_33_44_45_images_vanish_during_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = load_coco(labeled(tmp_path))
    (tmp_path / "2.png").unlink()
    (tmp_path / "3.png").write_bytes(b"")
    seen = []
    for _ in range(2):  # the same stand-in every time
        data = StepData(index, None, VIEWS, 0, 2, 0)
        with caplog.at_level(logging.WARNING):
            seen.append([image_id for step in range(8) for image_id in data[step].labeled.image_ids])
        assert data.substituted >= 8
    assert seen[0] == seen[1]
    assert set(seen[0]) == {0, 1}
    assert "another image takes its place" in caplog.text
    for n in range(2):
        (tmp_path / f"{n}.png").unlink()
    with pytest.raises(UserError, match=r"10 images in a row cannot be used \(step 0; .*png: (there is no such|.*no known).*\) - check"):
        StepData(index, None, VIEWS, 0, 2, 0)[0]


def test_fault_46_nothing_unlabeled(tmp_path: Path) -> None:
    path = labeled(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").touch()
    for given, problem in (
        (str(empty), "no images"),
        (None, "no unlabelled images"),
        (str(tmp_path), "not labelled already"),
    ):
        with pytest.raises(UserError, match=f"{problem}.*--paradigm supervised"):
            open_sources(DataConfig(labeled=str(path), unlabeled=given), supervised=False)


def test_fault_47_junk_and_links_in_folders(tmp_path: Path) -> None:
    for name in ("b/2.png", "a.jpg", ".hidden.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "Thumbs.db", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "circle").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    report = Report()
    assert list_folder(tmp_path, report=report).file_names == ["a.jpg", "b/2.png"]
    assert list(counts(report).values()) == [6]


def test_fault_48_names_that_are_no_text(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9 \x1b[31m.png"
    noise().save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", raw)
    index = list_folder(tmp_path)
    assert index.image(0).size == (60, 40)
    Path(os.fsdecode(raw)).write_bytes(b"")
    report, _ = find(tmp_path)
    (line,) = report.lines()
    assert line.isprintable()
    assert "caf\\udce9 \\x1b[31m.png" in line
    json.dumps(report.as_json()).encode()
    with pytest.raises(UserError) as caught:
        read_image(index.path(0))
    assert printable(str(caught.value)).isprintable()


def test_unlisted_images_are_used_only_when_asked(tmp_path: Path) -> None:
    path = labeled(tmp_path)
    content = json.loads(path.read_text())
    content["images"], content["annotations"] = content["images"][:2], content["annotations"][:2]
    path.write_text(json.dumps(content))
    config = DataConfig(labeled=str(path), unlisted="unlabeled")
    assert open_sources(config, supervised=False).unlabeled.file_names == ["2.png", "3.png"]
    with pytest.raises(UserError, match="give one of the two"):
        open_sources(DataConfig(labeled=str(path), unlisted="unlabeled", unlabeled=str(tmp_path)), supervised=False)


def test_unlabeled_json_needs_no_categories(tmp_path: Path) -> None:
    """As COCO's image_info_unlabeled2017.json."""
    path = labeled(tmp_path, 4)
    content = json.loads(path.read_text())
    (tmp_path / "rest.json").write_text(json.dumps({"info": {}, "images": content["images"]}))
    content["images"], content["annotations"] = content["images"][:1], content["annotations"][:1]
    path.write_text(json.dumps(content))
    config = DataConfig(labeled=str(path), unlabeled=str(tmp_path / "rest.json"))
    assert open_sources(config, supervised=False).unlabeled.file_names == ["1.png", "2.png", "3.png"]


def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(status, stdout, stderr) of ``check_data.py``."""
    monkeypatch.setattr(sys, "argv", ["check_data.py", "--workers", "0", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main_guard(check_data.main)
    shown = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, shown.out, shown.err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_the_check_shows_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert check_data.main(["--annotations", str(labeled(tmp_path)), "--workers", workers]) == 0
    assert "0/4 [" in terminal.getvalue()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("empty", "no known image format"), ("page", "no known image format"), ("cut", "truncated"), ("bomb", "30000 x 30000 px|over ")],
)
def test_faults_34_35_43_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str, reason: str
) -> None:
    """Over the limit of bad images one line and status 2; below it a count and status 0. The file stays as it is."""
    path, image = labeled(tmp_path), tmp_path / "2.png"
    whole = image.read_bytes()
    content = {"empty": b"", "page": b"<!DOCTYPE html><html>404</html>", "cut": whole[: len(whole) // 2],
               "bomb": png_head(30_000, 30_000)}[fault]  # fmt: skip
    image.write_bytes(content)
    status, out, err = check(monkeypatch, capsys, "--annotations", path)
    assert status == 2
    assert re.fullmatch(rf"error: {path}: 1 of 4 images cannot be used \(first 2\.png: .*({reason}).*\n", err), err
    status, out, err = check(monkeypatch, capsys, "--annotations", path, "--set", "data.rules.max_bad_images=0.25")
    assert (status, err) == (0, "")
    assert "images cannot be used (1: 2.png: " in out
    assert image.read_bytes() == content


def test_fault_37_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What training stops at is not usable, however few there are."""
    path = labeled(tmp_path)
    Image.fromarray(np.zeros((40, 60), np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "float.tif").replace(tmp_path / "2.png")
    status, _, err = check(monkeypatch, capsys, "--annotations", path, "--set", "data.rules.max_bad_images=1")
    assert status == 2
    assert re.fullmatch(rf"error: {tmp_path}/2\.png: its pixels are floats.* data\.rules\.float_range.*\n", err), err


def test_fault_46_nothing_unlabeled_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, empty = labeled(tmp_path), tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").touch()
    for given, problem in ((empty, "it has no images"), (tmp_path, "no image that is not labelled already (4 found)")):
        status, _, err = check(monkeypatch, capsys, "--annotations", path, "--unlabeled", given)
        assert status == 2
        assert err.startswith(f"error: {given}: {problem}")
        assert err.endswith("use --paradigm supervised\n")
        assert err.count("\n") == 1


def test_fault_48_names_in_messages_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, odd = labeled(tmp_path), "a\x1b[31m\udce9.png"
    content = json.loads(path.read_text())
    content["images"][2]["file_name"] = odd
    path.write_text(json.dumps(content))
    (tmp_path / odd).write_bytes(b"")
    status, out, err = check(monkeypatch, capsys, "--annotations", path)
    assert status == 2
    assert err.startswith(f"error: {path}: 1 of 4 images cannot be used (first a\\x1b[31m\\udce9.png: ")
    assert all(line.isprintable() for line in [*out.splitlines(), *err.splitlines()])
    assert err.count("\n") == 1


@pytest.mark.parametrize("which", ["val", "other"])
def test_a_list_of_unlabelled_images_may_have_a_folder_of_its_own(tmp_path: Path, which: str) -> None:
    """Also the validation set, whose folder is known, as the scripts that look at guidance take it."""
    (tmp_path / "train").mkdir()
    path, run = labeled(tmp_path / "train"), tmp_path / "run"
    photos = tmp_path / "deep" / "photos"
    photos.mkdir(parents=True)
    noise().save(photos / "new.png")
    content = json.loads(path.read_text())
    content["images"], content["annotations"] = [{"id": 7, "file_name": "new.png"}], []
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps(content))
    config = DataConfig(labeled=str(path), unlabeled=str(listed))
    with pytest.raises(UserError, match=r"new\.png.*data\.unlabeled_images=DIR"):
        open_sources(config, supervised=False)
    assert open_sources(replace(config, unlabeled_images=str(photos)), supervised=False).unlabeled.root == photos
    known = {"val": {"val": str(listed), "val_images": str(photos)}, "other": {"unlabeled_images": str(photos)}}[which]
    data = unlabeled_data(DataConfig(labeled=str(path), **known), os.path.relpath(listed), run)
    assert open_sources(data, supervised=False).unlabeled.file_names == ["new.png"]
