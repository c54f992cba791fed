"""predict.py, show_views.py and show_guidance.py from the command line's end."""
from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, Terminal
from looking import CLASSES, IDS, tiny_settings, write_photos, write_weights
from PIL import Image
from pycocotools.coco import COCO
from runs import TINY, write_coco
from runs import run as train_in_fork
from safetensors.torch import save_file

from dtg_core.config import DataConfig, DataRules
from dtg_core.data.coco import list_folder, load_coco
from dtg_core.data.files import IMAGE_SUFFIXES
from dtg_core.data.findings import Report
from dtg_core.data.index import subset
from dtg_core.data.inputs import find_images, require_apart
from dtg_core.data.video import read_frames
from dtg_core.engine import pictures as drawing
from dtg_core.engine.checkpoint import load_weights
from dtg_core.engine.explain import Tally
from dtg_core.engine.predict import ImageDetections, Predictor
from dtg_core.errors import UserError

sys.path[:0] = [str(ROOT / "scripts")]
import measure_guidance  # noqa: E402
import predict  # noqa: E402
import show_guidance  # noqa: E402
import show_views  # noqa: E402
import try_backbones  # noqa: E402
from hidden_labels import hidden_labels  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("run"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


@pytest.mark.parametrize(
    "script", ["predict.py", "show_views.py", "show_guidance.py", "measure_guidance.py", "compare.py", "export.py"]
)
def test_help_is_fast(script):
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "scripts" / script), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert time.monotonic() - began < 3


def test_predict_keeps_paths_names_and_ids(run, photos, tmp_path, capsys):
    (photos / "trip" / "broken.jpg").write_bytes(b"no image")
    arguments = [str(run), str(photos), "--output", str(tmp_path / "out"), "--score", "0.01", "--batch", "2", "--device", "cpu"]
    assert predict.main(arguments) == 0
    shown = capsys.readouterr()
    assert "in 3 images, 1 could not be read" in shown.out
    assert shown.err.count("skipped: ") == shown.err.count("broken.jpg") == 1
    folder = tmp_path / "out" / "pictures"
    pictures = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    assert pictures == ["a.png", "trip/b.jpg", "trip/day 2/c.tif.png"]

    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    with open(tmp_path / "out" / "detections.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(results) == len(rows) > 0
    for result, row in zip(results, rows):
        assert result["file_name"] == row["file"]
        assert row["class"] == CLASSES[result["category_id"] - 1]
        x, y, width, height = result["bbox"]
        assert 0 <= x <= x + width <= 64
        assert 0 <= y <= y + height <= 48
        assert float(row["x2"]) == pytest.approx(x + width, abs=2e-3)
    assert predict.main([*arguments, "--strict", "--overwrite"]) == 1
    best = max(result["score"] for result in results if result["file_name"] in pictures[:2])  # of the first batch
    capsys.readouterr()
    assert predict.main([*arguments, "--score", "0.999", "--no-pictures", "--overwrite"]) == 0
    assert json.loads((tmp_path / "out" / "detections.json").read_text()) == []
    hint = f"hint: no box over 0.999; the highest score in the first 2 images is {best:.3f} - try a lower --score\n"
    assert capsys.readouterr().err.endswith(hint)


def test_predict_goes_on_after_a_picture_that_cannot_be_saved(run, tmp_path, capsys):
    """WebP is at most 16383 px wide, and the name with .png is longer than a file system allows."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (17000, 20)).save(folder / "a.png")
    (folder / "a.png").rename(folder / "a_wide.webp")
    Image.new("RGB", (40, 40)).save(folder / f"{'b' * 251}.tif")
    Image.new("RGB", (40, 40)).save(folder / "c.png")
    assert predict.main([str(run), str(folder), "--output", str(tmp_path / "out"), "--score", "0", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert "in 3 images" in shown.out
    assert shown.err.count("no picture: ") == 2
    assert "a_wide.webp: cannot be written (" in shown.err
    assert "(File name too long)" in shown.err
    assert [path.name for path in (tmp_path / "out" / "pictures").iterdir()] == ["c.png"]
    assert {row["file_name"][0] for row in json.loads((tmp_path / "out" / "detections.json").read_text())} == {"a", "b", "c"}


def test_predict_reads_by_the_rules_that_it_names(run, tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).random((40, 40), np.float32)).save(tmp_path / "float.tif")
    arguments = [str(run), str(tmp_path / "float.tif"), "--device", "cpu", "--output"]
    assert predict.main([*arguments, str(tmp_path / "one")]) == 1
    assert "set data.rules.float_range=[LOW, HIGH]" in capsys.readouterr().err
    assert predict.main([*arguments, str(tmp_path / "two"), "--set", "data.rules.float_range=[0, 1]"]) == 0
    with pytest.raises(UserError, match=r"--set optim\.lr=1: is not used here"):
        predict.main([*arguments, str(tmp_path / "three"), "--set", "optim.lr=1"])


@pytest.mark.parametrize("name", [*predict.LISTS, "pictures/c.tif.png", "pictures/clip.mp4/000001.jpg"])
def test_predict_writes_over_nothing(run, photos, tmp_path, monkeypatch, name):
    (photos / "trip" / "day 2" / "clip.mp4").touch()
    own = tmp_path / "out" / name
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    (tmp_path / "out" / "detections.json.tmp").touch()  # of a prediction that did not end
    arguments = [str(tmp_path / "none"), str(photos / "trip" / "day 2"), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=f"{name}: exists - give another --output, or --overwrite"):
        predict.main(arguments)  # before the detector is loaded
    assert {path for path in (tmp_path / "out").rglob("*") if path.is_file()} == {own, tmp_path / "out" / "detections.json.tmp"}
    assert own.read_text() == "mine"


@pytest.mark.parametrize("name", ["images.json", "annotations.json"])
def test_predict_does_not_write_over_the_ids_that_it_reads(run, photos, tmp_path, name):
    given = [str(run), str(photos), "--device", "cpu", "--output", str(tmp_path / "out")]
    assert predict.main(given) == 0
    listed = tmp_path / "out" / name
    with pytest.raises(UserError, match=f"{name}: is read, too, and would be lost - give another --output"):
        predict.main([*given, "--annotations", str(listed), "--overwrite"])


def test_every_picture_has_a_place_of_its_own_in_the_output(tmp_path):
    names = ["a.gif", "a.gif.png", "a.gif.png.png", "a.jpg"]
    places = [predict.picture_path(tmp_path, name, frozenset(names)).name for name in names]
    assert places == ["a.gif.png.png.png", "a.gif.png", "a.gif.png.png", "a.jpg"]


def test_predict_leaves_other_folders_alone(run, photos, tmp_path):
    """Pictures with boxes among photos would be taken for more of them."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".DS_Store").touch()
    arguments = [str(run), str(photos / "a.png"), "--output", str(out), "--device", "cpu"]
    assert predict.main(arguments) == 0
    for name in ("photo.jpg", "pictures/old.jpg"):
        (out / name).write_text("mine")
    assert predict.main([*arguments, "--overwrite"]) == 0  # an earlier prediction
    assert all((out / name).read_text() == "mine" for name in ("photo.jpg", "pictures/old.jpg"))
    (out / "detections.json").unlink()
    for extra in ([], ["--overwrite"], ["--no-pictures"]):
        with pytest.raises(UserError) as caught:
            predict.main([*arguments, *extra])
        assert str(caught.value) == f"--output {out}: holds other files - give a new folder"
    assert not (out / "detections.json").exists()


def lists_of(out: Path) -> tuple[set[str], set[str]]:
    """The files that the JSON and the CSV name."""
    with open(out / "detections.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(path.name for path in out.iterdir()) == sorted([*predict.LISTS, "pictures"])
    listed, labelled = (json.loads((out / name).read_text()) for name in ("images.json", "annotations.json"))
    assert {image["file_name"] for image in listed["images"]} == {row["file"] for row in rows}
    assert labelled["images"] == listed["images"]
    assert {box["image_id"] for box in labelled["annotations"]} == {image["id"] for image in listed["images"]}
    return {entry["file_name"] for entry in json.loads((out / "detections.json").read_text())}, {row["file"] for row in rows}


@pytest.mark.parametrize("when", ["between", "while a picture is drawn"])
def test_predict_keeps_what_was_done_before_ctrl_c(run, photos, tmp_path, monkeypatch, capsys, when):
    calls = []

    def interrupted(real, *arguments):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    owner, name = (Predictor, "predict") if when == "between" else (drawing, "draw_found")
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: interrupted(real, *arguments))
    flags = ["--output", str(tmp_path / "out"), "--score", "0.01", "--batch", "1", "--device", "cpu"]
    assert predict.main([str(run), str(photos), *flags]) == 130
    done = ["a.png"] if when == "between" else ["a.png", "trip/b.jpg"]  # the one that is being written is finished
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"interrupted after {len(done)} of 3 images; written to {tmp_path / 'out'}\n")
    assert lists_of(tmp_path / "out") == (set(done), set(done))
    assert len([path for path in (tmp_path / "out" / "pictures").rglob("*") if path.is_file()]) == len(done)


def test_predict_shows_its_progress(run, photos, tmp_path, monkeypatch):
    (photos / "trip" / "broken.jpg").write_bytes(b"no image")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert predict.main([str(run), str(photos), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert "0/4 [" in terminal.getvalue()
    assert re.search(r"\rskipped: .*broken\.jpg.*\n", terminal.getvalue())  # on a line of its own


def test_no_total_where_there_are_videos():
    assert predict.how_far(predict.Done(images=37, failed=1), ["a.jpg"] * 66) == "38 of 66 images"
    assert predict.how_far(predict.Done(images=37), ["a.jpg", "b.mp4"]) == "37 images"


def test_predict_keeps_equal_names_apart(run, photos, tmp_path):
    Image.new("RGB", (32, 32)).save(photos / "trip" / "a.png")
    assert predict.main([str(run), str(photos), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    for name, shape in (("a.png", 64 / 48), ("trip/a.png", 1)):
        with Image.open(tmp_path / "out" / "pictures" / name) as picture:
            assert picture.width / picture.height == shape


def write_video(path: Path, frames: int) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options={"movflags": "faststart"}) as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for seed in range(frames):
            pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            video.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        video.mux(stream.encode())


def test_predict_takes_videos_frame_by_frame(run, photos, tmp_path, capsys):
    write_video(photos / "trip" / "clip.mp4", 7)
    whole = (photos / "trip" / "clip.mp4").read_bytes()
    (photos / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (photos / "none.avi").write_bytes(b"no video")
    flags = ["--output", str(tmp_path / "out"), "--score", "0.01", "--batch", "4", "--device", "cpu"]
    assert predict.main([str(run), str(photos), *flags]) == 0
    shown = capsys.readouterr()
    kept = sorted(path.name for path in (tmp_path / "out" / "pictures" / "cut.mp4").iterdir())
    assert 0 < len(kept) < 7
    assert kept == [f"{number:06d}.jpg" for number in range(1, len(kept) + 1)]
    assert f"in {3 + 7 + len(kept)} images, 2 could not be read" in shown.out
    assert f"cut.mp4: it ends after {len(kept)} of 7 frames" in shown.err
    assert "none.avi: it cannot be read as a video at all" in shown.err
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    frames = {entry["file_name"]: entry["image_id"] for entry in results if "clip.mp4" in entry["file_name"]}
    assert list(frames) == [f"trip/clip.mp4/{number:06d}.jpg" for number in range(1, 8)]
    assert list(frames.values()) == list(range(min(frames.values()), min(frames.values()) + 7))
    assert len({entry["image_id"] for entry in results}) == len({entry["file_name"] for entry in results})
    with Image.open(tmp_path / "out" / "pictures" / "trip" / "clip.mp4" / "000007.jpg") as picture:
        assert picture.width / picture.height == 64 / 48  # enlarged, as all small images


def test_a_trimmed_video_is_whole(tmp_path):
    """Its edit list leaves frames out that are still in the file."""
    av = pytest.importorskip("av")
    write_video(tmp_path / "clip.mp4", 9)
    with av.open(str(tmp_path / "clip.mp4")) as video, \
            av.open(str(tmp_path / "trimmed.mp4"), "w", options={"movflags": "faststart"}) as trimmed:
        stream = video.streams.video[0]
        copy = trimmed.add_stream_from_template(stream)
        for packet in video.demux(stream):
            if packet.dts is not None:
                shift = 3 * packet.duration
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                trimmed.mux(packet)
    assert len(list(read_frames(tmp_path / "trimmed.mp4"))) == 6
    whole = (tmp_path / "trimmed.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) - 4000])
    with pytest.raises(UserError, match=r"it ends after [1-5] of 9 frames"):
        list(read_frames(tmp_path / "cut.mp4"))


def test_frames_are_turned_upright(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    write_video(path, 2)
    upright = [np.asarray(frame) for frame in read_frames(path)]
    real = av.open

    class Turned:
        """A file whose frames say that they are to be turned counterclockwise by 90 degrees."""

        def __init__(self, *arguments):
            self.video = real(*arguments)
            self.streams = self.video.streams

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.video.close()

        def decode(self, stream):
            for frame in self.video.decode(stream):
                yield SimpleNamespace(to_image=frame.to_image, rotation=90)

    monkeypatch.setattr(av, "open", Turned)
    turned = [np.asarray(frame) for frame in read_frames(path)]
    for one, other in zip(upright, turned, strict=True):
        np.testing.assert_array_equal(np.rot90(one), other)


def test_videos_need_an_extra(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "clip.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    flags = [str(run), str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert predict.main(flags) == 1  # nothing could be read
    assert "clip.mp4: videos need the package av - pip install av" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "detections.json").read_text()) == []


def test_predict_writes_into_no_folder_of_images(photos, tmp_path, monkeypatch):
    """Not even deep in it: drawn pictures would be photos of the next training."""
    monkeypatch.chdir(photos)
    (tmp_path / "link").symlink_to(photos)
    told = "lies in the images' folder {} - give an --output beside it"
    for path, output in ((".", "pred"), (".", "trip"), (str(photos), "trip/new/pred"), ("../link", "pred"), ("**/*.jpg", "pred")):
        with pytest.raises(UserError) as caught:
            predict.main([str(tmp_path / "none"), path, "--output", output])  # before the detector is loaded
        assert str(caught.value) == f"--output {output}: {told.format('.' if '*' in path else path)}"
    for path, output in (("trip", "pred"), ("a.png", "pred"), ("*.png", "pred"), (".", "../photos2")):
        require_apart([path], Path(output))


def test_predict_passes_over_earlier_predictions(run, photos, tmp_path, capsys):
    assert predict.main([str(run), str(photos), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    (tmp_path / "out").rename(photos / "trip" / "out")
    (photos / "trip" / "notes.txt").touch()
    capsys.readouterr()
    names, root, warnings = find_images([str(photos)], tmp_path / "out", IMAGE_SUFFIXES)
    assert (names, root) == (["a.png", "trip/b.jpg", "trip/day 2/c.tif"], photos)
    told = f"{photos}: folders are passed over, as this program has written them (1: trip/out)"
    text = f"{photos}: files are skipped, as hidden or as no image (1: trip/notes.txt)"
    assert warnings == [told, text]
    assert capsys.readouterr() == ("", "")
    arguments = [str(run), str(photos), "--output", str(tmp_path / "out"), "--device", "cpu", "--no-pictures"]
    assert predict.main(arguments) == 0
    assert capsys.readouterr().err.startswith(f"warning: {told}\nwarning: {text}\n")
    for which in ("detections.json", "detections.csv"):  # it did not end
        (photos / "trip" / "out" / which).rename(photos / "trip" / "out" / f"{which}.tmp")
    report = Report()
    assert len(list_folder(photos, report=report)) == 3
    assert report.lines() == [told, f"{photos}: files are skipped, as hidden or as no image (1: trip/notes.txt)"]


def test_ids_of_images_can_be_resolved(run, photos, tmp_path):
    """Numbers are places among all images, whether they can be read or not; an image without boxes is listed too."""
    (photos / "trip" / "a_broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (30, 20)).save(photos / "z.png")
    arguments = [str(run), str(photos), "--output", str(tmp_path / "out"), "--device", "cpu", "--score"]
    assert predict.main([*arguments, "0.01"]) == 0
    listed = json.loads((tmp_path / "out" / "images.json").read_text())
    images = [(image["id"], image["file_name"], image["width"], image["height"]) for image in listed["images"]]
    assert images == [(1, "a.png", 64, 48), (3, "trip/b.jpg", 64, 48), (4, "trip/day 2/c.tif", 64, 48), (5, "z.png", 30, 20)]
    assert listed["categories"] == [{"id": number, "name": name} for number, name in zip(IDS, CLASSES)]
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {(entry["image_id"], entry["file_name"]) for entry in results} <= {image[:2] for image in images}
    truth = COCO(str(tmp_path / "out" / "images.json"))
    loaded = truth.loadRes(str(tmp_path / "out" / "detections.json"))
    assert (loaded.getImgIds(), loaded.getCatIds()) == ([1, 3, 4, 5], IDS)
    assert len(loaded.getAnnIds()) == len(results) > 0
    assert predict.main([*arguments, "0.999", "--overwrite"]) == 0
    assert json.loads((tmp_path / "out" / "images.json").read_text()) == listed
    Image.new("RGB", (30, 20)).save(photos / "trip" / "a_broken.jpg")
    assert predict.main([*arguments, "0.999", "--overwrite"]) == 0
    mended = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert [image for image in mended if image["id"] != 2] == listed["images"]


@pytest.mark.parametrize(("place", "above"), [("photos/own.json", ""), ("own.json", "photos/"), ("lists/own.json", "")])
def test_ids_of_images_by_file_name(run, photos, tmp_path, place, above):
    names = {"a.png": 0, "trip/b.jpg": "b", "./trip/day 2/c.tif": 5, "elsewhere.jpg": 9}
    own = tmp_path / place
    own.parent.mkdir(exist_ok=True)
    own.write_text(json.dumps({"images": [{"id": value, "file_name": above + name} for name, value in names.items()]}))
    arguments = [str(run), str(photos), "--output", str(tmp_path / "out"), "--score", "0.01", "--device", "cpu"]
    assert predict.main([*arguments, "--annotations", str(own)]) == 0
    listed = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert [(image["id"], image["file_name"]) for image in listed] == [(0, "a.png"), ("b", "trip/b.jpg"), (5, "trip/day 2/c.tif")]
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {entry["image_id"] for entry in results} == {0, "b", 5}


@pytest.mark.parametrize(("names", "told"), [
    (["a.png"], "2 of 4 files ('trip/clip.mp4', ...)"), (["a.png", "trip/day 2/c.tif"], "1 of 4 files ('trip/clip.mp4')"),
    (["trip/day 2/c.tif", "a.png", "trip/clip.mp4", "z.png"], ""),
])  # fmt: skip
def test_images_that_the_json_does_not_list_are_left_out(run, photos, tmp_path, capsys, names, told):
    """As in COCO's test-dev, which is a part of the images of test2017."""
    (photos / "trip" / "b.jpg").rename(photos / "z.png")
    (photos / "trip" / "clip.mp4").touch()
    names = [*names, "z.png", "elsewhere.jpg"] if told else [*names, "elsewhere.jpg"]
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"images": [{"id": 50 + number, "file_name": name} for number, name in enumerate(names)]}))
    out = tmp_path / "out"
    assert predict.main([str(run), str(photos), "--output", str(out), "--annotations", str(own), "--score", "0", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    warnings = [line for line in shown.err.splitlines() if line.startswith("warning: ")]
    assert warnings == ([f"warning: {own}: does not list {told} - left out"] if told else [])
    assert ("skipped: " in shown.err) == ("trip/clip.mp4" in names)
    taken = [name for name in ("a.png", "trip/day 2/c.tif", "z.png") if name in names]
    assert f" in {len(taken)} images" in shown.out
    pairs = [(50 + names.index(name), name) for name in taken]
    assert [(image["id"], image["file_name"]) for image in json.loads((out / "images.json").read_text())["images"]] == pairs
    found = json.loads((out / "detections.json").read_text())
    assert list(dict.fromkeys((entry["image_id"], entry["file_name"]) for entry in found)) == pairs
    assert len([path for path in (out / "pictures").rglob("*.*")]) == len(taken)


def test_detections_can_be_corrected_and_trained_on(run, photos, tmp_path, monkeypatch, capsys):
    """Also on images without boxes; not on boxes that are cut to nothing, which no reader takes."""
    boxes = np.array([[1, 2, 11.25, 22], [64, 5, 64, 9], [10, 20, 50, 44.0004]], np.float32)
    found = ImageDetections((48, 64), boxes, np.array([0.9, 0.8, 0.75], np.float32), np.array([1, 0, 3]))
    none = ImageDetections((48, 64), boxes[:0], np.zeros(0, np.float32), np.zeros(0, np.int64))
    answers = iter((found, none, found))
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "predict", lambda predictor, images, *rest: [next(answers) for _ in images])
        arguments = [str(run), str(photos), "--output", str(tmp_path / "out"), "--batch", "2", "--device", "cpu"]
        assert predict.main(arguments) == 0
    file = tmp_path / "out" / "annotations.json"
    written, listed = (json.loads((tmp_path / "out" / name).read_text()) for name in ("annotations.json", "images.json"))
    assert (written["images"], written["categories"]) == (listed["images"], listed["categories"])
    assert written["annotations"] == [
        {"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 2, 10.25, 20], "score": 0.9, "area": 205, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 4, "bbox": [10, 20, 40, 24], "score": 0.75, "area": 960, "iscrowd": 0},
        {"id": 3, "image_id": 3, "category_id": 2, "bbox": [1, 2, 10.25, 20], "score": 0.9, "area": 205, "iscrowd": 0},
        {"id": 4, "image_id": 3, "category_id": 4, "bbox": [10, 20, 40, 24], "score": 0.75, "area": 960, "iscrowd": 0},
    ]
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())) == 6
    truth = COCO(str(file))
    assert (truth.getImgIds(), truth.getCatIds(), truth.getAnnIds()) == ([1, 2, 3], IDS, [1, 2, 3, 4])
    report = Report()
    index = load_coco(file, photos, report=report)
    assert not [line for line in report.lines() if re.search(r": \d+ (annotation|box)", line)]  # none is odd
    assert np.diff(index.box_start).tolist() == [2, 0, 2]
    np.testing.assert_allclose(index.boxes[:2], [[1, 2, 11.25, 22], [10, 20, 50, 44]])
    flags = ["--detector", "gfl", "--labeled", str(file), "--images", str(photos), "--paradigm", "supervised", "--steps", "2"]
    trained = train_in_fork([*flags, "--output", str(tmp_path / "trained"), "--set", *TINY], tmp_path / "logs")
    assert trained.status == 0, trained.err


@pytest.mark.parametrize("score", ["0", "0.999"])
def test_annotations_of_any_number_of_boxes_are_a_data_set(run, photos, tmp_path, score):
    Image.new("RGB", (30, 20)).save(photos / "z.png")
    out = tmp_path / "out"
    assert predict.main([str(run), str(photos), "--output", str(out), "--score", score, "--batch", "3", "--device", "cpu"]) == 0
    written, listed, found = (json.loads((out / name).read_text()) for name in ("annotations.json", "images.json", "detections.json"))
    assert (written["images"], written["categories"]) == (listed["images"], listed["categories"])
    assert len(written["images"]) == 4
    assert (len(found) > 4) == (score == "0")
    kept = ("image_id", "category_id", "bbox", "score")
    assert [[box[key] for key in kept] for box in written["annotations"]] == [[box[key] for key in kept] for box in found]
    assert len(load_coco(out / "annotations.json", photos).boxes) <= len(found) == len(COCO(str(out / "annotations.json")).getAnnIds())


def test_boxes_are_in_the_pixels_of_the_json(run, tmp_path, capsys):
    """Of an image that EXIF would turn, but whose size in the JSON is the stored one; another size than the file's stops it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        Image.new("RGB", (60, 40)).save(folder / name, exif=turned)
    sizes = {"a.jpg": {"width": 60, "height": 40}, "b.jpg": {"width": 40, "height": 60}, "c.jpg": {"width": 30, "height": 20}}
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"images": [{"id": name[0], "file_name": name, **size} for name, size in sizes.items()]}))
    arguments = [str(run), str(folder), "--output", str(tmp_path / "out"), "--device", "cpu", "--annotations", str(own)]
    assert predict.main(arguments) == 0
    listed = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert [(image["id"], image["width"], image["height"]) for image in listed] == [("a", 60, 40), ("b", 40, 60)]
    assert "c.jpg: it is 40 x 60 px but its JSON says 30 x 20" in capsys.readouterr().err
    assert predict.main([*arguments, "--overwrite", "--set", "data.rules.resized=keep"]) == 0
    assert len(json.loads((tmp_path / "out" / "images.json").read_text())["images"]) == 3


@pytest.mark.parametrize(("images", "told"), [
    ([{"id": 1, "file_name": "b.png"}], r"does not list 'a\.png' \(3 of 3 files\) - give the folder that its file names are relative to, "
                                        "or leave --annotations out$"),
    ([], "no list of images in it"), ({"id": 1}, "no list of images in it"),
    ([{"id": 1, "file_name": "a.png"}, {"file_name": "b.png"}], r"images\[1\] has no 'id' or no 'file_name' - add it"),
    ([{"id": True, "file_name": "a.png"}], r"images\[0\] has no 'id'"), ([3], r"images\[0\] has no 'id'"),
    ([{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}], "2 images have the id 1 - fix it"),
    ([{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "a.png"}], "2 images have the file_name 'a.png' - fix it"),
])  # fmt: skip
def test_ids_that_are_not_there_or_in_doubt(photos, tmp_path, images, told):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"images": images}))
    with pytest.raises(UserError, match=rf"own\.json: {told}"):
        predict.main([str(tmp_path / "none"), str(photos), "--output", str(tmp_path / "out"), "--annotations", str(own)])
    assert not (tmp_path / "out").exists()


def test_show_views(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DTG_CACHE", str(tmp_path))
    small = ["data.shapes_labeled=3", "data.shapes_unlabeled=1", "data.shapes_val=1"]
    assert show_views.main(["--output", str(tmp_path / "new" / "v.png"), "--count", "2", "--set", *small]) == 0
    assert "images, from the top: labeled/000000.jpg, labeled/000001.jpg\n" in capsys.readouterr().out
    with Image.open(tmp_path / "new" / "v.png") as picture:
        assert picture.width > 1500
    with pytest.raises(UserError, match="not a picture"):
        show_views.main(["--output", str(tmp_path)])
    with pytest.raises(UserError, match=r"data\.images: is of no use without labelled images"):
        show_views.main(["--images", str(tmp_path), "--output", str(tmp_path / "w.png")])
    labeled = write_coco(tmp_path / "labeled", 3, 0)
    unread = ["--set", "data.val=none.json"]
    assert show_views.main(["--labeled", str(labeled), "--output", str(tmp_path / "x.png"), *unread]) == 0
    own = (tmp_path / "new" / "v.png").read_bytes()
    with pytest.raises(UserError, match="exists - give another --output, or --overwrite"):
        show_views.main(["--output", str(tmp_path / "new" / "v.png")])
    assert (tmp_path / "new" / "v.png").read_bytes() == own
    assert show_views.main(["--output", str(tmp_path / "new" / "v.png"), "--count", "1", "--seed", "5", "--overwrite", "--set", *small]) == 0
    assert (tmp_path / "new" / "v.png").read_bytes() != own
    assert not {"--resume", "--replay", "--stop-at", "--dry-run"} & set(show_views.parser()._option_string_actions)


@pytest.mark.parametrize("detector", ["gfl", "faster_rcnn"])
def test_show_guidance(detector, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DTG_CACHE", str(tmp_path / "cache"))
    run = write_weights(tmp_path / "run", detector)
    flags = ["--count", "2", "--measure", "3", "--device", "cpu"]
    assert show_guidance.main([str(run), "--output", str(tmp_path / "out"), *flags]) == 0
    stages = {"gfl": ["head"], "faster_rcnn": ["rcnn", "rpn"]}[detector]
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == stages
    shown = capsys.readouterr().out
    assert "hidden labels of 4 images" in shown
    names = re.search(r"^images, from the top: (\S+\.jpg), (\S+\.jpg)$", shown, re.MULTILINE)
    assert names
    assert names[1] != names[2]
    assert all(f"{stage}, clusters over" in shown for stage in stages)
    assert ("rpn, pseudo boxes over 0.4" in shown) == ("rpn" in stages)
    assert "rpn, clusters over 0.4" not in shown  # its tau is 0.5
    other = "rpn" if detector == "gfl" else "head"
    with pytest.raises(UserError, match="no such stage"):
        show_guidance.main([str(run), "--output", str(tmp_path / "out"), "--stage", other])
    file = run / "weights" / "teacher.safetensors"  # of a run whose thresholds have followed
    tensors, told = load_weights(file)
    limits = {stage: [0.5] if stage == "rpn" else [0.25, *[0.5] * (len(CLASSES) - 1)] for stage in stages}
    save_file(tensors, file, {"dtg_ssod": json.dumps({**told, "thresholds": limits})})
    assert show_guidance.main([str(run), "--output", str(tmp_path / "followed"), *flags]) == 0
    shown = capsys.readouterr().out
    assert shown.index("thresholds that training has come to") < shown.index("hidden labels")  # they need none
    assert f"{stages[0]}, thresholds that training has come to: {CLASSES[0]} 0.25, {CLASSES[1]} 0.50" in shown
    assert ("rpn, thresholds that training has come to: object 0.50" in shown) == ("rpn" in stages)
    assert all(f"{stage}, {kind} over their threshold" in shown for stage in stages for kind in ("clusters", "pseudo boxes"))
    assert show_guidance.main([str(run), "--output", str(tmp_path / "all"), "--count", "2", "--device", "cpu"]) == 0
    assert "hidden labels of 4 images" in capsys.readouterr().out  # there are no more, though it would take 100
    one = tmp_path / "cache" / "one.json"
    one.write_text((next((tmp_path / "cache").glob("shapes*")) / "val.json").read_text().replace("val/", ""))
    with pytest.raises(UserError, match="unlabelled images are not in it"):
        show_guidance.main([str(run), "--output", str(tmp_path / "out"), "--truth", str(one), "--overwrite", *flags])
    for sheet in (tmp_path / "out").iterdir():
        sheet.write_text("mine")
    with pytest.raises(UserError, match=r"\.png: exists - give another --output, or --overwrite"):
        show_guidance.main([str(run), "--output", str(tmp_path / "out"), *flags])
    assert {sheet.read_text() for sheet in (tmp_path / "out").iterdir()} == {"mine"}


def test_the_runs_data_are_looked_for_where_it_was_trained(tmp_path, monkeypatch):
    settings = tiny_settings("gfl")
    data = replace(settings.data, labeled="own.json", unlabeled="folder")
    run = write_weights(tmp_path / "run", settings=replace(settings, data=data))
    monkeypatch.chdir(tmp_path)
    flags = [str(run), "--device", "cpu"]
    problem = f"data.{{}} of {run}: not found from here - run it in the folder where the run was trained{{}}"
    for main, more in ((show_guidance.main, ["--output", str(tmp_path / "out")]), (measure_guidance.main, [])):
        (tmp_path / "own.json").unlink(missing_ok=True)
        with pytest.raises(UserError) as caught:
            main([*flags, *more])
        assert str(caught.value) == problem.format("labeled=own.json", "")
        (tmp_path / "own.json").touch()
        with pytest.raises(UserError) as caught:
            main([*flags, *more])
        assert str(caught.value) == problem.format("unlabeled=folder", ", or give --unlabeled")
        with pytest.raises(UserError, match=r"own\.json: .*(JSON|empty)"):  # --unlabeled is taken
            main([*flags, *more, "--unlabeled", str(run)])


def test_sheets_do_not_lie_among_unlabelled_images(tmp_path):
    """Training would take them for photos."""
    settings = tiny_settings("gfl")
    labeled, photos = write_coco(tmp_path / "labeled", 2, 0), write_coco(tmp_path / "photos", 2, 1).parent
    run = write_weights(tmp_path / "run", settings=replace(settings, data=replace(settings.data, labeled=str(labeled), unlabeled=str(photos))))
    for output in (photos, photos / "sheets"):
        with pytest.raises(UserError, match=f"--output {output}: lies in the images' folder {photos} - give an --output beside it"):
            show_guidance.main([str(run), "--output", str(output), "--device", "cpu"])


def test_no_figure_of_nothing():
    text = show_guidance.line("head", Tally(images=4, objects=3))
    assert "precision     -   recall   0.0   IoU of the right ones -" in text
    text = show_guidance.line("head", Tally(images=4, boxes=2))
    assert "precision   0.0   recall     -" in text
    assert "precision  50.0   recall  50.0   IoU of the right ones 0.800" in show_guidance.line("head", Tally(1, 2, 2, 1, 0.8))


def test_hidden_labels_are_read_by_the_runs_rules(photos, tmp_path):
    content = {
        "images": [{"id": 0, "file_name": "a.png", "width": 64, "height": 48}], "categories": [{"id": 0, "name": CLASSES[0]}],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 0, "bbox": [20, 10, 50, 40]}],
    }  # fmt: skip
    (tmp_path / "truth.json").write_text(json.dumps(content))
    data = DataConfig(labeled="own.json", rules=DataRules(box_format="xyxy"))
    truth = hidden_labels(tmp_path / "truth.json", data, subset(list_folder(photos), [0]), CLASSES[:1])
    assert truth.boxes.tolist() == [[20, 10, 50, 40]]


@pytest.mark.parametrize("detector", ["gfl", "faster_rcnn"])
def test_measure_guidance(detector, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DTG_CACHE", str(tmp_path / "cache"))
    weights, stages = write_weights(tmp_path / "run", detector), {"gfl": ["head"], "faster_rcnn": ["rpn", "rcnn"]}[detector]
    flags = [str(weights), "--batch", "2", "--device", "cpu"]
    assert measure_guidance.main(flags) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^4 images \(all there are\) in 2 batches of 2, with [1-9]\.\d true objects each$", shown, re.MULTILINE)
    assert all(word in shown for word in ("dense", "sparse", "bias: ", *stages))

    settings = ["literal:", f"none over: tau=0.999 {stages[-1]}.rank=false"]
    assert measure_guidance.main([*flags, "--compare", *settings, "--json", str(tmp_path / "found.json")]) == 0
    capsys.readouterr()
    assert measure_guidance.main([*flags, "--compare", *settings, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "found.json").read_text())
    assert list(found["settings"]) == ["literal", "none over"]
    assert 1 <= found["objects"] < 10
    assert set(found["settings"]["literal"]["stages"]) == set(stages)
    literal, empty = (found["settings"][name]["stages"][stages[-1]] for name in ("literal", "none over"))
    assert literal["labels"]["candidates"] > empty["labels"]["candidates"] == 0
    assert "rank" in literal["gradients"]
    assert "rank" not in empty["gradients"]
    assert measure_guidance.main([*flags, "--compare", settings[0], "--set", f"guidance.stages.{stages[-1]}.rank=false", "--json", "-"]) == 0
    assert "rank" not in json.loads(capsys.readouterr().out)["settings"]["literal"]["stages"][stages[-1]]["gradients"]


@pytest.mark.parametrize(
    ("flags", "told", "count"),
    [
        (["--images", "128"], "4 images (all there are) in 1 batch,", 4),
        (["--images", "4", "--batch", "4"], "4 images (all there are) in 1 batch,", 4),
        (["--images", "128", "--batch", "3"], "4 images (all there are) in 2 batches of 2,", 4),
        (["--images", "3", "--batch", "2"], "2 images (of 4) in 2 batches of 1,", 2),
        (["--images", "2"], "2 images (of 4) in 1 batch,", 2),
        (["--images", "1"], "1 image (of 4) in 1 batch,", 1),
        (["--images", "3", "--step", "2"], "3 images (2 different ones of 4) in 1 batch,", 3),
    ],
)
def test_measure_guidance_draws_no_image_twice(run, tmp_path, monkeypatch, capsys, flags, told, count):
    """Otherwise batches are not independent, and standard errors over them too small."""
    monkeypatch.setenv("DTG_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "found.json"
    assert measure_guidance.main([str(run), "--device", "cpu", "--json", str(file), *flags]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(told)
    found = json.loads(file.read_text())
    assert found["images"] == count
    errors = [setting["all"]["error"] for setting in found["settings"].values()]
    assert [error is None for error in errors] == ["1 batch" in told] * 2
    assert ("±" in shown) == ("1 batch" not in told)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--compare", "tau=0.3"], "has no name"),
        (["--compare", ": tau=0.3"], "has no name"),
        (["--compare", "a: tau=0.3", "a: tau=0.4"], "name is taken"),
        (["--compare", "a: tou=0.3"], "did you mean 'guidance.stages.head.tau'"),
        (["--compare", "a: tau"], "not of the form"),
        (["--compare", "a: tau=2"], "out of range"),
        (["--compare", "a: tau=0.3 background_tau=0.4"], "is over tau"),
        (["--compare", "a: paradigm=none"], "no stage is guided"),
        (["--compare", "a: tau_rate=0.05"], "tau_rate acts from step to step"),
        (["--compare", "a: paradigm=dense classification=false box=false rank=false"], "all losses of the stage are off"),
        (["--compare", "a: paradigm=supervised"], "paradigm"),
        (["--set", "guidance.stages.head.tau=high"], "wanted a number"),
        (["--images", "0"], "at least 1"),
        (["--batch", "-1"], "at least 1"),
        (["--step", "-1"], "at least 0"),
        (["--device", "cpu:7"], "--device cpu:7: there is no such device - use cpu"),
        (["--truth", "nowhere.json"], "nowhere.json"),
        (["--json", __file__], "exists - give another --json, or --overwrite"),
        (["--json", "/dev/null/x.json"], "is a file, not a folder"),
    ],
)
def test_measure_guidance_refuses(run, tmp_path, monkeypatch, arguments, problem):
    monkeypatch.setenv("DTG_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=problem):
        measure_guidance.main([str(run), "--batch", "2", "--device", "cpu", *arguments])


def test_measure_guidance_reports_settings_without_effect(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DTG_CACHE", str(tmp_path / "cache"))
    settings = ["a: paradigm=sparse tau=0.3", "b: paradigm=dense rank=false"]
    assert measure_guidance.main([str(run), "--images", "2", "--batch", "2", "--device", "cpu", "--compare", *settings]) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: --compare")]
    assert "paradigm=sparse tau=0.3: tau=0.3 is without effect" in warning


def test_measure_guidance_needs_hidden_labels(photos, run, tmp_path, monkeypatch):
    monkeypatch.setenv("DTG_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="--truth: missing"):
        measure_guidance.main([str(run), "--unlabeled", str(photos), "--device", "cpu"])


def test_a_supervised_run_is_measured_as_dense():
    rules = {name: replace(rule, paradigm="none") for name, rule in tiny_settings("gfl").guidance.stages.items()}
    settings = replace(tiny_settings("gfl"), guidance=replace(tiny_settings("gfl").guidance, stages=rules))
    measured = measure_guidance.guided(settings, ["rpn", "rcnn"]).guidance.stages
    assert {name: rule.paradigm for name, rule in measured.items()} == {"head": "none", "rpn": "dense", "rcnn": "dense"}
    mixed = replace(settings, guidance=replace(settings.guidance, stages=rules | {"rpn": replace(rules["rpn"], paradigm="sparse")}))
    assert measure_guidance.guided(mixed, ["rpn", "rcnn"]) == mixed
    assert measure_guidance.guided(mixed, ["head"]).guidance.stages["head"].paradigm == "dense"  # not that of another detector


def test_the_others_are_tried_beside_a_backbone_that_does_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DTG_CACHE", str(tmp_path / "cache"))
    small = ["views.short_edge=[64,64]", "views.long_edge=64", "data.shapes_labeled=4", "data.shapes_unlabeled=6", "data.shapes_val=3"]
    assert try_backbones.main(["test_rresnet", "test_resnet", "--steps", "1", "--set", *small]) == 2
    shown = capsys.readouterr()
    assert [line.split("|")[2].strip() for line in shown.out.splitlines()[2:]] == ["test_resnet"]
    (error,) = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert "test_rresnet" in error
