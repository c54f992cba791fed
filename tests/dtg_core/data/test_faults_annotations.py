"""Faults 1 to 32 of a user's annotations: one line and status 2, or a counted warning; through the command that users run."""

from __future__ import annotations

import codecs
import copy
import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "scripts")]

import check_data  # noqa: E402
from command_line import main_guard  # noqa: E402

from dtg_core.config import DataConfig, DataRules, ViewsConfig  # noqa: E402
from dtg_core.data import strict_json  # noqa: E402
from dtg_core.data.coco import load_coco  # noqa: E402
from dtg_core.data.findings import Report  # noqa: E402
from dtg_core.data.index import subset  # noqa: E402
from dtg_core.data.plan import StepData, steps_loader  # noqa: E402
from dtg_core.data.sources import open_sources  # noqa: E402
from dtg_core.engine.evaluate import SetDetections, coco_metrics, coco_results  # noqa: E402
from dtg_core.errors import UserError  # noqa: E402

Json = dict[str, Any]
Change = Callable[[Json], None]
IMAGES = 12
BOXES = 24


def clean() -> Json:
    """Twelve images of 64 x 48 px with two boxes each, of three classes."""
    return {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 48} for n in range(1, IMAGES + 1)],
        "annotations": [
            {
                "id": n + 1,
                "image_id": n // 2 + 1,
                "category_id": n % 3 + 1,
                "bbox": [n, 5, 12, 10 + n % 2],
                "area": 120,
                "iscrowd": 0,
            }
            for n in range(BOXES)
        ],
        "categories": [{"id": n, "name": name} for n, name in enumerate(("cat", "dog", "cow"), 1)],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for n in range(1, IMAGES + 1):
        Image.fromarray(generator.integers(0, 255, (48, 64, 3), np.uint8)).save(tmp_path / f"{n}.png")
    return tmp_path


def write(folder: Path, content: Any, name: str = "data.json") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(status, stdout, stderr) of ``check_data.py``."""
    monkeypatch.setattr(sys, "argv", ["check_data.py", "--workers", "0", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main_guard(check_data.main)
    shown = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, shown.out, shown.err


def changed(*path: Any, to: Any) -> Change:
    """A change that sets content[path[0]][path[1]]... = to."""

    def change(content: Json) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


def removed(*path: Any) -> Change:
    def change(content: Json) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def every(key: str, update: Callable[[Json], Json]) -> Change:
    def change(content: Json) -> None:
        for record in content[key]:
            record.update(update(record))

    return change


def extra(**values: Any) -> Change:
    """One more annotation, like the first but for ``values``."""

    def change(content: Json) -> None:
        content["annotations"].append({**content["annotations"][0], "id": 999, **values})

    return change


def both(*changes: Change) -> Change:
    def change(content: Json) -> None:
        for one in changes:
            one(content)

    return change


TEXT = json.dumps(clean(), indent=1)
STOPS: list[tuple[int, str, bytes | Change, list[str]]] = [
    (2, "zero bytes", b"", ["is empty", "line 1, column 1"]),
    (2, "not JSON", b"id,name\n1,cat", ["not JSON", "line 1, column 1"]),
    (2, "cut", TEXT[:300].encode(), ["not JSON", "line ", "column "]),
    (3, "UTF-16 with mark", codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"), ["UTF-16"]),
    (3, "UTF-16 without", '{"é": 1}'.encode("utf-16-le"), ["UTF-16"]),
    (3, "gzip", gzip.compress(TEXT.encode()), ["compressed", "gunzip"]),
    (3, "Latin-1", '{"info": "caf\xe9"}'.encode("latin-1"), ["not UTF-8", "0xe9"]),
    (4, "results file", b'[{"image_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]', ["list", "results"]),
    (4, "string", b'"text"', ["found a str"]),
    (5, "infinite width", changed("images", 3, "width", to=float("inf")), ["images[3].width"]),
    (5, "NaN id", changed("images", 3, "id", to=float("nan")), ["images[3].id", "nan"]),
    (5, "1e999", TEXT.replace('"height": 48', '"height": 1e999', 1).encode(), ["images[0].height"]),
    (5, "5000 digits", TEXT.replace('"id": 3', '"id": ' + "9" * 5000, 1).encode(), ["4300 digits", "line ", "column "]),
    (5, "nesting", b'{"images": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ["nested too deeply"]),
    (6, "key twice", TEXT.replace('"iscrowd"', '"area"', 1).encode(), ["'area'", "twice", "id 1"]),
    (7, "no images", removed("images"), ["'images' is missing"]),
    (7, "no annotations", removed("annotations"), ["'annotations' is missing"]),
    (7, "no categories", removed("categories"), ["'categories' is missing"]),
    (7, "not a list", changed("annotations", to={}), ["'annotations' is a dict"]),
    (7, "not an object", changed("images", 2, to=7), ["images[2] is 7"]),
    (8, "empty categories", changed("categories", to=[]), ["no categories"]),
    (8, "empty name", changed("categories", 1, "name", to=" "), ["categories[1].name"]),
    (8, "id twice", changed("categories", 1, "id", to=1), ["categories", "id 1 twice"]),
    (8, "half a character", changed("categories", 1, "name", to="d\ud800g"), ["categories[1].name", "cannot be shown"]),
    (8, "line break", changed("categories", 1, "name", to="dog\n"), ["categories[1].name", "cannot be shown"]),
    (8, "name twice", changed("categories", 1, "name", to="cat"), ["'cat'"]),
    (9, "fraction", changed("categories", 1, "id", to=2.5), ["categories[1].id is 2.5"]),
    (9, "null", changed("categories", 1, "id", to=None), ["categories[1].id is None"]),
    (9, "true", changed("categories", 1, "id", to=True), ["categories[1].id is True"]),
    (10, "image id twice", changed("images", 1, "id", to=1), ["images", "id 1 twice"]),
    (10, "no id", removed("images", 4, "id"), ["images[4] has no 'id'"]),
    (10, "no file name", removed("images", 4, "file_name"), ["images[4] has no 'file_name'"]),
    (10, "file name 7", changed("images", 4, "file_name", to=7), ["images[4].file_name is 7"]),
    (11, "mixed ids", changed("images", 4, "id", to="1"), ["numbers and text"]),
    (11, "other type in annotations", every("annotations", lambda a: {"image_id": str(a["image_id"])}), ["image_id", "'1'", "str"]),
    (14, "all of unknown images", every("annotations", lambda a: {"image_id": a["image_id"] + 500}), ["no image_id", "501"]),
    (14, "all of unknown classes", every("annotations", lambda a: {"category_id": 77}), ["no category_id", "77"]),
    (14, "over the limit", both(*[extra(image_id=99)] * 9), ["9 of 33 annotations", "annotations[24]"]),
    (18, "shares of the image", every("annotations", lambda a: {"bbox": [0.2, 0.3, 0.1, 0.2]}), ["0 to 1", "box_format"]),
    (18, "shares of the image but one", both(every("annotations", lambda a: {"bbox": [0.2, 0.3, 0.1, 0.2]}),
                                             changed("annotations", 5, "bbox", to=[5, 5, 20, 20])), ["0 to 1", "box_format"]),
    (18, "corners", every("annotations", lambda a: {"bbox": [20 + a["id"], 20, 60, 45]}), ["corners", "box_format=xyxy"]),
    (18, "corners but one", both(every("annotations", lambda a: {"bbox": [20 + a["id"], 20, 60, 45]}),
                                 changed("annotations", 5, "bbox", to=[20, 20, 20, 45])), ["corners", "box_format=xyxy"]),
    (22, "mask only", changed("annotations", 3, to={"image_id": 1, "category_id": 1, "segmentation": {"counts": "x", "size": [1, 1]}}),
     ["annotations[3]", "mask", "toBbox"]),
    (26, "no box", changed("annotations", to=[]), ["no usable box"]),
    (29, "traversal", changed("images", 0, "file_name", to="../../etc/passwd"), ["images[0].file_name leads out", "allow_outside_root"]),
    (29, "absolute", changed("images", 0, "file_name", to="/etc/passwd"), ["images[0].file_name leads out"]),
    (29, "NUL", changed("images", 0, "file_name", to="a\0.png"), ["images[0].file_name", "\\x00"]),
    (29, "long", changed("images", 0, "file_name", to="a" * 5000), ["images[0].file_name", "longer than"]),
    (29, "backslash", changed("images", 0, "file_name", to="train\\1.png"), ["images[0].file_name has backslashes"]),
    (29, "no text", changed("images", 0, "file_name", to="\ud800.png"), ["images[0].file_name is no text"]),
    (30, "case", changed("images", 0, "file_name", to="1.PNG"), ["'1.PNG'", "'1.png'"]),
    (30, "URL", changed("images", 0, "file_name", to="http://host/1.png"), ["images[0].file_name is an address"]),
    (30, "nearest", changed("images", 0, "file_name", to="1.pgn"), ["'1.pgn'", "nearest name is '1.png'"]),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "name", "change", "parts"), STOPS, ids=[f"{fault}-{name}" for fault, name, *_ in STOPS])
def test_stops(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: int,
    name: str,
    change: bytes | Change,
    parts: list[str],
) -> None:
    content: Any = change
    if callable(change):
        content = clean()
        change(content)
    path = write(folder, content)
    before = sorted(os.listdir(folder))
    status, _, err = check(monkeypatch, capsys, "--annotations", path)
    assert status == 2
    assert err.startswith(f"error: {path}: ")
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    for part in parts:
        assert part in err
    assert sorted(os.listdir(folder)) == before  # a user's folder is never written


# (fault, name, change, kind of the warning, its count, images and boxes that remain)
WARNS: list[tuple[int, str, Change, str, int, int, int]] = [
    (9, "text", both(every("categories", lambda c: {"id": str(c["id"])}), every("annotations", lambda a: {"category_id": str(a["category_id"])})),
     "categories have an id that is text", 3, 12, 24),
    (9, "floats", every("categories", lambda c: {"id": float(c["id"])}), "text or a decimal", 3, 12, 24),
    (10, "file twice", changed("images", 1, "file_name", to="1.png"), "more than once", 1, 12, 24),
    (12, "no width", removed("images", 2, "width"), "no usable width", 1, 12, 24),
    (12, "zero", changed("images", 2, "height", to=0), "no usable width", 1, 12, 24),
    (12, "text", changed("images", 2, "height", to="48"), "no usable width", 1, 12, 24),
    (12, "another size", changed("images", 2, "height", to=480), "another size", 1, 12, 24),
    (13, "no ids", every("annotations", lambda a: {"id": None}), "numbered anew", 24, 12, 24),
    (13, "one id", every("annotations", lambda a: {"id": 5}), "numbered anew", 24, 12, 24),
    (13, "from 0", every("annotations", lambda a: {"id": a["id"] - 1}), "numbered anew", 1, 12, 24),
    (14, "unknown image", extra(image_id=99), "of images that it does not list", 1, 12, 24),
    (14, "unknown class", extra(category_id=99), "of categories that it does not list", 1, 12, 24),
    (15, "three numbers", extra(bbox=[1, 2, 3]), "not 4 numbers", 1, 12, 24),
    (15, "text", extra(bbox=["1", 2, 3, 4]), "not 4 numbers", 1, 12, 24),
    (15, "null", extra(bbox=None), "not 4 numbers", 1, 12, 24),
    (15, "NaN", extra(bbox=[float("nan"), 2, 3, 4]), "not 4 numbers", 1, 12, 24),
    (15, "huge", extra(bbox=[1, 2, 3, 10**400]), "not 4 numbers", 1, 12, 24),
    (16, "no width", extra(bbox=[1, 2, 0, 4]), "without a positive width", 1, 12, 24),
    (16, "negative", extra(bbox=[9, 9, -5, 4]), "without a positive width", 1, 12, 24),
    (16, "under a pixel", extra(bbox=[1, 2, 0.5, 4]), "without a side of 1 px", 1, 12, 24),
    (17, "partly outside", extra(bbox=[60, 2, 20, 20]), "partly outside", 1, 12, 25),
    (17, "wholly outside", extra(bbox=[100, 2, 20, 20]), "wholly outside", 1, 12, 24),
    (19, "box twice", extra(), "kept once", 1, 12, 24),
    (19, "two classes", extra(category_id=2), "kept in both", 1, 12, 25),
    (20, "ignore", changed("annotations", 3, "ignore", to=1), "treated as crowds", 1, 12, 24),
    (22, "polygon", changed("annotations", 3, to={"id": 4, "image_id": 2, "category_id": 1, "segmentation": [[5, 6, 25, 6, 9, 30]]}),
     "from their polygon", 1, 12, 24),
    (25, "class twice", lambda content: content["categories"].append({"id": 9, "name": " " + content["categories"][0]["name"].upper()}), "classes are like another one but for case or spaces", 2, 12, 24),
    (25, "class without a box", lambda content: content["categories"].append({"id": 9, "name": "yak"}), "classes have no box", 1, 12, 24),
    (25, "images not labelled yet", lambda content: content.update(annotations=content["annotations"][:-4]), "images have no annotation", 2, 12, 20),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "name", "change", "kind", "count", "images", "boxes"),
    WARNS,
    ids=[f"{fault}-{name}" for fault, name, *_ in WARNS],
)
def test_warns(folder: Path, fault: int, name: str, change: Change, kind: str, count: int, images: int, boxes: int) -> None:
    content = clean()
    change(content)
    report = Report()
    index = load_coco(write(folder, content), report=report)
    assert [finding.count for finding in report.findings.values() if kind in finding.kind] == [count]
    assert len(report.findings) <= 2  # nothing else but what follows from it
    assert (len(index), len(index.boxes)) == (images, boxes)
    for row in range(len(index)):
        boxes_here, _ = index.objects(row)
        assert (boxes_here[:, 2:] - boxes_here[:, :2] >= 1).all()


@pytest.mark.parametrize("crowd", [0, 23])
def test_fault_19_a_crowd_is_no_copy_of_an_object(folder: Path, crowd: int) -> None:
    content, report = clean(), Report()
    content["annotations"][23] = {**content["annotations"][0], "id": 24}
    content["annotations"][crowd]["iscrowd"] = 1
    index = load_coco(write(folder, content), report=report)
    assert not report.findings
    assert (len(index.boxes), index.crowd.sum()) == (24, 1)


def test_clean_file_has_no_findings(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(folder, codecs.BOM_UTF8 + json.dumps(clean()).encode())  # fault 3: a UTF-8 mark is fine
    status, out, err = check(monkeypatch, capsys, "--annotations", path)
    assert (status, err) == (0, "")
    assert "12 images, 24 objects and 0 crowds of 3 classes: cat 8, dog 8, cow 8" in out
    assert "usable, nothing found" in out


def test_fault_1_no_such_file(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    os.mkfifo(folder / "pipe.json")
    for name, found in (("none.json", "no such file"), (".", "a folder"), ("pipe.json", "not a regular file")):
        status, _, err = check(monkeypatch, capsys, "--annotations", name)
        assert status == 2
        assert err.startswith(f"error: {name}: ")
        assert found in err
        assert str(folder) in err  # as given, and as resolved


def test_class_names_of_any_script_are_fine(folder: Path) -> None:
    names, content = ("stop\xa0sign", "\u4ea4\u901a\u3000\u6a19\u8b58", "\u0645\u06cc\u0648\u0647\u200c\u0647\u0627"), clean()
    for category, name in zip(content["categories"], names):
        category["name"] = name
    assert load_coco(write(folder, content)).class_names == names


@pytest.mark.parametrize(
    "ids", [(0, 1, 2), (5, 50, 500), (-3, 2, 7), (2**40, 2**41, 2**70), ("b", "a", "c"), (3.0, 1.0, 2.0)]
)
def test_fault_9_category_ids_come_back(folder: Path, ids: tuple[Any, ...]) -> None:
    content = clean()
    every("annotations", lambda a: {"category_id": ids[a["category_id"] - 1]})(content)
    every("categories", lambda c: {"id": ids[c["id"] - 1]})(content)
    index = load_coco(write(folder, content))
    name_of = dict(zip(ids, ("cat", "dog", "cow")))
    assert index.category_ids == sorted(ids)
    assert index.class_names == tuple(name_of[value] for value in sorted(ids))
    assert [index.class_names[label] for label in index.labels[:3]] == ["cat", "dog", "cow"]
    found = coco_results(index, SetDetections([np.arange(12)], [np.array([[1, 2, 3, 4, 0.5, 1, 0]])]))
    assert found[0]["category_id"] == sorted(ids)[1]
    json.dumps(found)


@pytest.mark.parametrize(
    "convert", [str, float, lambda n: f"img_{n}", lambda n: n + 2**62, lambda n: n + 2**80, lambda n: -n]
)
def test_fault_11_image_ids_come_back(folder: Path, convert: Callable[[int], Any]) -> None:
    content = clean()
    every("images", lambda i: {"id": convert(i["id"])})(content)
    every("annotations", lambda a: {"image_id": convert(a["image_id"])})(content)
    index = load_coco(write(folder, content))
    assert list(index.image_ids) == [convert(n) for n in range(1, 13)]
    assert len(index.boxes) == BOXES
    found = coco_results(index, SetDetections([np.arange(12)], [np.array([[1, 2, 3, 4, 0.5, 1, 4]])]))
    assert found[0]["image_id"] == convert(5)


def test_fault_12_size_swapped_by_exif(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 64)).save(folder / "1.png", exif=exif)  # upright it is 64 x 48
    report = Report()
    index = load_coco(write(folder, clean()), report=report)
    assert index.image(0).size == (64, 48)
    assert not report.findings
    content = clean()
    changed("images", 0, "width", to=48)(content)
    changed("images", 0, "height", to=64)(content)
    index = load_coco(write(folder, content), report=report)
    assert index.image(0).size == (48, 64)  # boxes were drawn on the stored pixels
    (line,) = report.lines()
    assert "images in a sample of 12 are not turned by their EXIF orientation, as their size in the JSON is the stored one" in line
    assert line.endswith(" (1: 1.png)")


def test_fault_12_images_on_their_side_may_differ(folder: Path) -> None:
    """Two files made by different tools and joined: each such image follows its own size in the JSON."""
    exif, content = Image.Exif(), clean()
    exif[0x0112] = 6
    for name in ("1.png", "2.png"):
        Image.new("RGB", (48, 64)).save(folder / name, exif=exif)  # upright it is 64 x 48
    changed("images", 0, "width", to=48)(content)
    changed("images", 0, "height", to=64)(content)
    index = load_coco(write(folder, content), report=Report())
    assert [index.image(row).size for row in (0, 1)] == [(48, 64), (64, 48)]


@pytest.mark.parametrize("as_stored", [False, True])
def test_fault_12_half_turns_follow_the_other_images(folder: Path, as_stored: bool) -> None:
    """The size of an image that lies on its side tells in which frame a file's boxes were drawn; that of one upside down does not."""
    turned, content = np.zeros((2, 48, 64, 3), np.uint8), clean()
    turned[:, 0, 0] = 255
    for name, orientation, pixels in (("1.png", 3, turned[0]), ("2.png", 6, turned[1])):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(folder / name, exif=exif)
    if not as_stored:
        changed("images", 1, "width", to=48)(content)
        changed("images", 1, "height", to=64)(content)
    else:  # one that says no size follows the others too
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (64, 48)).save(folder / "3.png", exif=exif)
        changed("images", 2, "width", to=0)(content)
    index = load_coco(write(folder, content), report=Report())
    corner = (0, 0) if as_stored else (47, 63)
    assert np.asarray(index.image(0))[corner].tolist() == [255, 255, 255]
    assert index.image(1).size == ((64, 48) if as_stored else (48, 64))
    assert index.image(2).size == (64, 48)


def resized(content: Json, factor: float) -> None:
    """The JSON of the same images when they were ``factor`` times as large."""
    every("images", lambda i: {"width": round(i["width"] * factor), "height": round(i["height"] * factor)})(content)
    every("annotations", lambda a: {"bbox": [value * factor for value in a["bbox"]], "area": a["area"] * factor**2})(content)


@pytest.mark.parametrize("factor", [0.5, 3])
def test_images_that_were_resized_after_labelling(folder: Path, factor: float) -> None:
    wanted = load_coco(write(folder, clean()), rules=DataRules(use_json_area=True))
    content = clean()
    resized(content, factor)
    path = write(folder, content)
    with pytest.raises(UserError, match=r"data\.json: images are not of the size.*12 of 12 looked at.*data\.rules\.resized=scale"):
        load_coco(path)
    report = Report()
    index = load_coco(path, rules=DataRules(resized="scale", use_json_area=True), report=report)
    np.testing.assert_allclose(index.boxes, wanted.boxes, atol=1e-4)
    np.testing.assert_allclose(index.areas, wanted.areas)
    np.testing.assert_array_equal(index.sizes, wanted.sizes)
    assert "images have another size than the JSON says; boxes will be scaled with them (12: 1.png, " in report.lines()[0]
    last = subset(index, [3, 11])  # what is found there is told in the JSON's pixels
    found = coco_results(last, SetDetections([np.arange(2)], [np.array([[10.0, 20, 30, 50, 0.5, 1, 1]])]))
    assert found[0]["bbox"] == [round(value * factor, 3) for value in (10, 20, 20, 30)]
    every("annotations", lambda a: {"bbox": [value / factor for value in a["bbox"]]})(content)
    kept = load_coco(write(folder, content), rules=DataRules(resized="keep"), report=Report())
    np.testing.assert_allclose(kept.boxes, wanted.boxes, atol=1e-4)


def test_each_side_of_a_resized_image_has_its_own_factor(folder: Path) -> None:
    """13 x 10 px were enlarged to 64 x 48, by 4.92 and 4.8; what is found comes back to the JSON's pixels in the same way."""
    content = clean()
    every("images", lambda _: {"width": 13, "height": 10})(content)
    every("annotations", lambda _: {"bbox": [0, 0, 13, 10], "area": 130})(content)
    index = load_coco(write(folder, content), rules=DataRules(resized="scale", use_json_area=True), report=Report())
    np.testing.assert_allclose(index.boxes, [[0, 0, 64, 48]] * BOXES, rtol=1e-6)
    np.testing.assert_allclose(index.areas, 64 * 48)
    found = coco_results(index, SetDetections([np.arange(1)], [np.array([[0.0, 0, 64, 48, 0.5, 1, 0]])]))
    assert found[0]["bbox"] == [0, 0, 13, 10]


def test_fault_12_a_wrong_size_is_replaced(folder: Path) -> None:
    content = clean()
    changed("images", 2, "height", to=480)(content)
    index = load_coco(write(folder, content))
    assert index.sizes[2].tolist() == [48, 64]
    assert index.image(2).size == (64, 48)


def test_fault_18_box_format(folder: Path) -> None:
    content = clean()
    every("annotations", lambda a: {"bbox": [20 + a["id"], 20, 60, 45]})(content)
    path = write(folder, content)
    as_corners = load_coco(path, rules=DataRules(box_format="xyxy"))
    np.testing.assert_array_equal(as_corners.boxes[0], [21, 20, 60, 45])
    insisted = load_coco(path, rules=DataRules(box_format="xywh"))
    np.testing.assert_array_equal(insisted.boxes[0], [21, 20, 64, 48])


def test_fault_20_crowds(folder: Path) -> None:
    content = clean()
    every("annotations", lambda a: {"iscrowd": [0, 1, "0", "1"][a["id"] % 4]})(content)
    removed("annotations", 0, "iscrowd")(content)
    index = load_coco(write(folder, content))
    assert int(index.crowd.sum()) == 11
    assert sum(len(index.objects(row)[0]) for row in range(12)) == 13


def test_crowds_alone_are_nothing_to_learn_or_to_find(folder: Path) -> None:
    content = clean()
    every("annotations", lambda _: {"iscrowd": 1})(content)
    own, crowds = str(write(folder, clean(), "own.json")), str(write(folder, content, "crowds.json"))
    with pytest.raises(UserError, match=r"crowds\.json: no usable box in any of its 12 images - label some objects"):
        open_sources(DataConfig(labeled=crowds), supervised=True)
    with pytest.raises(UserError, match=r"crowds\.json: no usable box to evaluate against - give a labelled set"):
        open_sources(DataConfig(labeled=own, val=crowds), supervised=True)


def test_fault_21_areas(folder: Path) -> None:
    """By default of the boxes; with ``use_json_area`` the file's, so that a large box with a small mask is a small object."""
    content = clean()
    every("annotations", lambda a: {"bbox": [0, 0, 40, 40], "area": 100, "image_id": (a["id"] + 1) // 2})(content)
    changed("annotations", 0, "area", to=1e5)(content)  # no object is larger than its box
    removed("annotations", 1, "area")(content)
    path = write(folder, content)
    for rules, small, medium in ((DataRules(), None, 100.0), (DataRules(use_json_area=True), 100.0, 100.0)):
        index = load_coco(path, rules=rules)
        image = np.repeat(np.arange(12), np.diff(index.box_start))
        rows = np.column_stack((index.boxes, np.full(len(image), 0.9), index.labels, image))
        metrics = coco_metrics(index, SetDetections([np.arange(12)], [rows]))
        assert metrics["APs"] == (None if small is None else pytest.approx(small))
        assert metrics["APm"] == pytest.approx(medium)
        assert metrics["APl"] is None


def test_fault_22_polygon_box(folder: Path) -> None:
    content = clean()
    content["annotations"] = [{"image_id": 1, "category_id": 1, "segmentation": [[5, 6, 25, 6, 9, 30], [2, 8, 3, 9, 2, 9]]}]
    np.testing.assert_array_equal(load_coco(write(folder, content)).boxes, [[2, 6, 25, 30]])


def sets(folder: Path, **values: Any) -> tuple[Any, Report]:
    report = Report()
    sources = open_sources(DataConfig(**{key: str(value) if isinstance(value, Path) else value for key, value in values.items()}),
                           supervised=False, report=report)  # fmt: skip
    return sources, report


def part(folder: Path, numbers: range, name: str, change: Change | None = None) -> Path:
    content = clean()
    content["images"] = [image for image in content["images"] if image["id"] in numbers]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in numbers]
    if change:
        change(content)
    return write(folder, content, name)


def test_fault_23_sets_share_images(folder: Path) -> None:
    labeled, val = part(folder, range(1, 5), "labeled.json"), part(folder, range(4, 9), "val.json")
    sources, report = sets(folder, labeled=labeled, val=val, unlabeled=folder)
    assert list(sources.unlabeled.file_names) == ["10.png", "11.png", "12.png", "9.png"]
    counts = {finding.kind: finding.count for finding in report.findings.values()}
    assert counts["images are labelled too and not used as unlabelled"] == 4
    assert counts["UNLABELLED IMAGES ARE ALSO IN THE VALIDATION SET AND NOT USED"] == 4
    (shared,) = [kind for kind in counts if kind.startswith("IMAGES ARE ALSO IN")]
    assert counts[shared] == 1


def test_fault_23_copies_under_other_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(1)
    smooth = Image.fromarray(generator.integers(0, 255, (6, 8, 3), np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)
    smooth.save(folder / "1.png")
    smooth.point(lambda value: value * 0.95).save(folder / "9.png")  # a near copy
    (folder / "10.png").write_bytes((folder / "2.png").read_bytes())
    labeled, val = part(folder, range(1, 5), "labeled.json"), part(folder, range(9, 13), "val.json")
    status, out, _ = check(monkeypatch, capsys, "--annotations", labeled, "--val", val, "--output", folder / "check.json")
    assert status == 0
    assert "IMAGES ARE ALSO IN" in out
    assert "10.png = 2.png" in out
    assert "IMAGES LOOK LIKE ONES OF" in out
    assert "9.png ~ 1.png" in out
    written = json.loads((folder / "check.json").read_text())
    assert written["usable"] is True
    own = (folder / "check.json").read_bytes()
    monkeypatch.setattr("dtg_core.data.check.check_images", None)  # refused before an image is decoded
    for output, problem in (("check.json", "exists - give another --output, or --overwrite"), (".", "is a folder"), ("1.png/x", "is a file")):
        status, _, err = check(monkeypatch, capsys, "--annotations", labeled, "--output", folder / output)
        assert status == 2
        assert problem in err
    assert (folder / "check.json").read_bytes() == own
    assert [finding["count"] for finding in written["findings"]] == [1, 1]


def test_fault_23_unlabelled_copies(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    labeled, val = part(folder, range(1, 5), "labeled.json"), part(folder, range(9, 13), "val.json")
    more = folder / "more"
    more.mkdir()
    for name, content in (("a", (folder / "2.png").read_bytes()), ("b", (folder / "9.png").read_bytes()), ("c", b"")):
        (more / f"{name}.png").write_bytes(content)
    (folder / "10.png").write_bytes(b"\0")  # two unreadable images are no copies
    rules = ["--set", "data.rules.max_bad_images=0.5"]
    status, out, _ = check(monkeypatch, capsys, "--annotations", labeled, "--val", val, "--unlabeled", more, *rules)
    assert status == 0
    assert f"{more}: IMAGES ARE ALSO IN {labeled}, BYTE FOR BYTE (1: a.png = 2.png)" in out
    assert f"{more}: IMAGES ARE ALSO IN {val}, BYTE FOR BYTE (1: b.png = 9.png)" in out
    assert out.count("BYTE FOR BYTE") == 2


def test_fault_24_classes_are_matched_by_name(folder: Path) -> None:
    renumber = {1: 30, 2: 10, 3: 20}
    change = both(every("categories", lambda c: {"id": renumber[c["id"]]}),
                  every("annotations", lambda a: {"category_id": renumber[a["category_id"]]}))  # fmt: skip
    labeled, val = part(folder, range(1, 5), "labeled.json"), part(folder, range(5, 9), "val.json", change)
    straight = part(folder, range(5, 9), "straight.json")
    sources, report = sets(folder, labeled=labeled, val=val, unlabeled=folder)
    assert sources.val.class_names == sources.labeled.class_names
    np.testing.assert_array_equal(sources.val.labels, load_coco(straight).labels)
    assert sources.val.category_ids == [30, 10, 20]
    assert any("matched by name" in finding.kind for finding in report.findings.values())
    wrong = part(folder, range(5, 9), "wrong.json", changed("categories", 0, "name", to="kitten"))
    with pytest.raises(UserError, match="'cat', 'kitten'"):
        sets(folder, labeled=labeled, val=wrong, unlabeled=folder)


def test_fault_25_one_class_and_a_thousand(folder: Path) -> None:
    content = clean()
    content["categories"] = [{"id": n, "name": f"class {n}"} for n in range(1, 1201)]
    report = Report()
    assert len(load_coco(write(folder, content), report=report).class_names) == 1200
    assert [finding.count for finding in report.findings.values()] == [1197]
    content["categories"] = [{"id": 1, "name": "thing"}]
    every("annotations", lambda a: {"category_id": 1})(content)
    assert load_coco(write(folder, content)).class_names == ("thing",)


def test_fault_27_fewer_images_than_a_batch(folder: Path) -> None:
    labeled = part(folder, range(1, 2), "labeled.json")
    sources, report = sets(folder, labeled=labeled, unlabeled=folder, labeled_per_device=4)
    assert len(sources.labeled) == 1
    assert any("a batch repeats them" in finding.kind for finding in report.findings.values())


def test_fault_28_val_without_annotations(folder: Path) -> None:
    labeled = part(folder, range(1, 5), "labeled.json")
    for change in (removed("annotations"), changed("annotations", to=[])):
        val = part(folder, range(5, 9), "val.json", change)
        with pytest.raises(UserError, match=r"val\.json: .*annotations|leave --val out"):
            sets(folder, labeled=labeled, val=val, unlabeled=folder)


def test_fault_29_links_and_pipes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    Image.new("RGB", (64, 48)).save(outside)
    path = write(folder, clean())
    (folder / "1.png").unlink()
    os.mkfifo(folder / "1.png")
    with pytest.raises(UserError, match=r"images\[0\] '1\.png' .* not a regular file"):
        load_coco(path)
    (folder / "1.png").unlink()
    (folder / "1.png").symlink_to(folder / "2.png")  # inside the folder: fine
    assert load_coco(path).image(0).size == (64, 48)
    (folder / "1.png").unlink()
    (folder / "1.png").symlink_to(outside)
    with pytest.raises(UserError, match=r"images\[0\] .* link out of"):
        load_coco(path)
    assert load_coco(path, rules=DataRules(allow_outside_root=True)).image(0).size == (64, 48)
    (folder / "sub").symlink_to(outside.parent)
    content = clean()
    changed("images", 0, "file_name", to="sub/secret.png")(content)
    with pytest.raises(UserError, match="'sub' leads out of"):
        load_coco(write(folder, content))


def test_fault_33_missing_images(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(folder, clean())
    (folder / "5.png").unlink()
    status, _, err = check(monkeypatch, capsys, "--annotations", path)
    assert status == 2
    assert "'5.png' is not in" in err
    assert "1 of 12 are missing) - restore them, take them out of the JSON, or raise data.rules.max_bad_images" in err
    status, out, err = check(monkeypatch, capsys, "--annotations", path, "--set", "data.rules.max_bad_images=0.1")
    assert (status, err) == (0, "")
    assert "images are not in their folder and left out (1: 5.png)" in out
    assert "11 images, 22 objects" in out


def test_validation_images_in_a_folder_of_their_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The layout of COCO itself: annotations, train2017 and val2017 beside each other."""
    for part in ("annotations", "train", "val"):
        (folder / part).mkdir()
    content = clean()
    for n in range(1, IMAGES + 1):
        (folder / f"{n}.png").rename(folder / ("train" if n <= 6 else "val") / f"{n}.png")
    paths = []
    for part, ids in (("train", range(1, 7)), ("val", range(7, IMAGES + 1))):
        images = [image for image in content["images"] if image["id"] in ids]
        own = [entry for entry in content["annotations"] if entry["image_id"] in ids]
        paths.append(write(folder / "annotations", {**content, "images": images, "annotations": own}, f"{part}.json"))
    arguments = ["--annotations", paths[0], "--images", folder / "train", "--val", paths[1]]
    status, _, err = check(monkeypatch, capsys, *arguments)
    assert status == 2
    assert "6 of 6 are missing) - give the images' folder by --images (data.images), that of --val by --val-images" in err
    status, _, err = check(monkeypatch, capsys, *arguments, "--val-images", folder / "val")
    assert (status, err) == (0, "")


def test_input_is_not_changed(folder: Path) -> None:
    content = clean()
    before = copy.deepcopy(content)
    load_coco(write(folder, content))
    assert content == before


def one_line(path: object, result: tuple[int, str, str], *parts: str) -> None:
    """Status 2 and one line that names the file."""
    status, _, err = result
    assert status == 2
    assert err.startswith(f"error: {path}: ")
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    for part in parts:
        assert part in err


def test_fault_1_no_right_to_read(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Root may read everything, so the answer of the system is put in."""
    path, read = write(folder, clean()), Path.read_bytes

    def refused(self: Path) -> bytes:
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", refused)
    one_line(path, check(monkeypatch, capsys, "--annotations", path), "cannot be read", "Permission denied")


def test_faults_24_28_of_the_validation_set_by_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labeled = part(folder, range(1, 5), "labeled.json")
    for change, parts in (
        (changed("categories", 0, "name", to="kitten"), ["'cat', 'kitten'", "use the same categories"]),
        (removed("annotations"), ["'annotations' is missing"]),
        (changed("annotations", to=[]), ["no usable box to evaluate against", "leave --val out"]),
    ):
        val = part(folder, range(5, 9), "val.json", change)
        one_line(val, check(monkeypatch, capsys, "--annotations", labeled, "--val", val), *parts)


def test_fault_27_a_batch_of_one_image_repeats_it(folder: Path) -> None:
    labeled = part(folder, range(1, 2), "labeled.json")
    sources, report = sets(folder, labeled=labeled, unlabeled=folder, labeled_per_device=4)
    assert [finding.count for finding in report.findings.values() if "a batch repeats them" in finding.kind] == [1]
    views = ViewsConfig(short_edge=(32, 48), long_edge=64)
    for batch in steps_loader(StepData(sources.labeled, sources.unlabeled, views, 0, 4, 2), 0, 3, 0):
        assert batch.labeled.image_ids == (1,) * 4
        assert torch.bincount(batch.labeled.targets.image).tolist() == [2] * 4


def test_fault_29_links_and_pipes_by_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    (folder / "2.png").rename(outside)
    (folder / "2.png").symlink_to(outside)
    path = write(folder, clean())
    one_line(path, check(monkeypatch, capsys, "--annotations", path), "images[1] '2.png'", "link out of", "allow_outside_root")
    (folder / "2.png").unlink()
    os.mkfifo(folder / "2.png")
    one_line(path, check(monkeypatch, capsys, "--annotations", path), "images[1] '2.png'", "not a regular file")


def test_fault_31_large_files_are_announced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(folder, clean())
    monkeypatch.setattr(strict_json, "LARGE", path.stat().st_size - 1)
    status, out, err = check(monkeypatch, capsys, "--annotations", path)
    assert (status, err) == (0, "reading data.json (0 MB)\n")
    assert "12 images, 24 objects" in out


def test_check_data_takes_what_it_uses(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    content = clean()
    content["categories"].append({"id": 9, "name": "yak"})
    path = write(folder, content)
    for flags, problem in (
        (["--workers", "-1"], "--workers: is out of range (found -1) - use at least 0"), (["--set", "optim.lr=1"], "--set optim.lr=1: is not used here"),
        (["--set", "data.images=x"], "--set data.images=x: is not used here"), (["--set", "data.rules.max_pixls=1"], "data.rules.max_pixels"),
        (["--images", path], "data.json: is a file, not a folder - give the images' folder by --images"),
        (["--unlabeled", folder / "1.png"], "1.png: is a file, not a folder"),
    ):  # fmt: skip
        status, _, err = check(monkeypatch, capsys, "--annotations", path, *flags)
        assert (status, err.count("\n")) == (2, 1)
        assert problem in err
    status, out, _ = check(monkeypatch, capsys, "--annotations", path, "--output", folder / "new" / "check.json")
    assert (status, (folder / "new" / "check.json").is_file()) == (0, True)
    assert "classes have no box (1: yak)" in out
    assert out.endswith("usable, with 1 kind of warnings\n")
    (folder / "elsewhere").mkdir()
    status, _, err = check(monkeypatch, capsys, "--annotations", path.rename(folder / "elsewhere" / "data.json"))
    assert status == 2
    assert "give the images' folder by --images" in err
