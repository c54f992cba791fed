"""YOLO and Pascal VOC become the same boxes as COCO's; fault 32 of both."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "scripts")]

import import_annotations  # noqa: E402
from command_line import main_guard  # noqa: E402

from dtg_core.data.coco import load_coco  # noqa: E402
from dtg_core.data.index import CocoIndex  # noqa: E402
from dtg_core.errors import UserError  # noqa: E402

BOMB = (
    '<?xml version="1.0"?>\n<!DOCTYPE lolz [<!ENTITY lol "lol"><!ENTITY lol2 "&lol;&lol;">]><annotation>&lol2;</annotation>'
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("images/a/1.png", "images/a/2.png", "images/b/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 50)).save(tmp_path / name)
    for name in ("a", "b"):
        (tmp_path / "labels" / name).mkdir(parents=True)
    (tmp_path / "names.txt").write_text("cat\ndog\n\n")
    return tmp_path


def run(folder: Path, kind: str, *more: str) -> CocoIndex:
    output = folder / "own.json"
    names = ["--names", str(folder / "names.txt")] if kind == "yolo" else []
    base = [
        "--format",
        kind,
        "--images",
        str(folder / "images"),
        "--labels",
        str(folder / "labels"),
        "--output",
        str(output),
    ]
    import_annotations.main([*base, *names, *more])
    assert sorted(path.name for path in folder.iterdir()) == ["images", "labels", "names.txt", "own.json"]
    return load_coco(output, folder / "images")


def voc(*objects: tuple[str, int, int, int, int, int]) -> str:
    return (
        "<annotation>"
        + "".join(
            f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax>"
            f"<ymax>{y2}</ymax></bndbox></object>"
            for name, x1, y1, x2, y2, difficult in objects
        )
        + "</annotation>"
    )


def test_yolo(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "labels/a/1.txt").write_text("1 0.5 0.5 0.2 0.4\n\n0 0.1 0.2 0.3 0.2 0.2 0.8\n")
    (folder / "labels/b/1.txt").write_text("0 .25 .5 .5 1\n")
    index = run(folder, "yolo")
    assert index.file_names == ["a/1.png", "a/2.png", "b/1.png"]
    assert index.class_names == ("cat", "dog")
    np.testing.assert_allclose(index.boxes, [[40, 15, 60, 35], [10, 10, 30, 40], [0, 0, 50, 50]], atol=1e-4)
    assert index.labels.tolist() == [1, 0, 0]
    assert "images have no annotation file" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["names: [cat, dog]\n", "names:\n  0: cat\n  1: dog\n"])
def test_yolo_names_in_yaml(folder: Path, text: str) -> None:
    (folder / "labels/a/1.txt").write_text("1 0.5 0.5 0.2 0.4\n")
    (folder / "images" / "data.yaml").write_text(text)
    assert run(folder, "yolo", "--names", str(folder / "images" / "data.yaml")).class_names == ("cat", "dog")


@pytest.mark.parametrize(("zero_based", "first"), [((), 1), (("--zero-based",), 0)])
def test_voc(folder: Path, zero_based: tuple[str, ...], first: int) -> None:
    (folder / "labels/a/1.xml").write_text(voc(("dog", 11, 21, 30, 40, 0), ("cat", 1, 1, 100, 50, 1)))
    (folder / "labels/b/1.xml").write_text(voc(("dog", 5, 6, 7, 8, 0)))
    index = run(folder, "voc", *zero_based)
    assert index.class_names == ("cat", "dog")
    expected = np.array([[11, 21, 30, 40], [1, 1, 100, 50], [5, 6, 7, 8]]) - [first, first, 0, 0]
    np.testing.assert_array_equal(index.boxes, expected)
    assert index.crowd.tolist() == [False, True, False]
    assert index.labels.tolist() == [1, 0, 1]


def test_files_may_share_their_classes(folder: Path) -> None:
    (folder / "names.txt").write_text("dog\nbird\ncat\n")
    (folder / "labels/a/1.xml").write_text(voc(("cat", 1, 1, 5, 5, 0), ("dog", 5, 6, 7, 8, 0)))
    index = run(folder, "voc", "--names", str(folder / "names.txt"))
    assert index.class_names == ("dog", "bird", "cat")
    assert index.labels.tolist() == [2, 0]
    (folder / "names.txt").write_text("cat\n")
    with pytest.raises(UserError, match=r"1\.xml object 2: the class 'dog' is not among the 1 names"):
        run(folder, "voc", "--names", str(folder / "names.txt"), "--overwrite")


def test_voc_tells_the_size_that_boxes_were_drawn_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the stored pixels, of those turned by EXIF, and of neither; where it is missing, of those turned."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    for name in "1234":
        Image.new("RGB", (100, 50)).save(folder / f"images/b/{name}.jpg", exif=exif)
    (folder / "images/b/1.png").unlink()
    for name, size in (("1", (100, 50)), ("2", (50, 100)), ("3", (200, 100)), ("4", None)):
        text = voc(("dog", 1, 1, 40, 40, 0))
        told = "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
        (folder / f"labels/b/{name}.xml").write_text(text.replace("<object>", f"{told}<object>", 1))
    index = run(folder, "voc", "--only-labeled")
    assert index.file_names == [f"b/{name}.jpg" for name in "1234"]
    assert index.sizes.tolist() == [[50, 100], [100, 50], [100, 50], [100, 50]]  # (height, width)
    err = capsys.readouterr().err
    assert "images in a sample of 4 are not turned" in err
    assert "images have another size than the JSON says; the file's is taken, so check that their boxes fit (1: b/3.jpg)" in err
    assert index.image(0).size == (100, 50)
    assert index.image(1).size == (50, 100)


@pytest.mark.parametrize("kind", ["yolo", "voc"])
def test_images_without_a_file_may_stay_out(folder: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """So that they can be unlabelled ones: without the flag they are labelled as empty."""
    text = "1 0.5 0.5 0.2 0.4" if kind == "yolo" else voc(("dog", 1, 1, 5, 5, 0))
    (folder / "labels/a" / ("1.txt" if kind == "yolo" else "1.xml")).write_text(text)
    assert run(folder, kind, "--only-labeled").file_names == ["a/1.png"]
    assert "images have no annotation file and are left out (2: a/2.png, b/1.png)" in capsys.readouterr().err
    assert run(folder, kind, "--overwrite").file_names == ["a/1.png", "a/2.png", "b/1.png"]
    assert "--only-labeled leaves them out" in capsys.readouterr().err


def test_rules_hold_for_the_images_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "labels/a/1.txt").write_text("1 0.5 0.5 0.2 0.4")
    with pytest.raises(UserError, match=r"images cannot be used and are left out \(3: .*no object is left of 0 images"):
        run(folder, "yolo", "--set", "data.rules.max_pixels=4999")
    Image.new("RGB", (100, 51)).save(folder / "images/a/2.png")
    assert run(folder, "yolo", "--set", "data.rules.max_pixels=5000").file_names == ["a/1.png", "b/1.png"]
    told = "images cannot be used and are left out (1: a/2.png: it is too large (100 x 51 px) - shrink it, or raise data.rules.max_pixels)"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "text", "problem"), [
    ("yolo", "1 50 20 10 8\n0 30 20 10 8", r"lines are not 'class x y width height' in 0 to 1 and left out \(2: .*1\.txt:1, .*1\.txt:2\) - "),
    ("voc", "<annotation><object><name>cat</name></object></annotation>", r"objects have no name or no box and are left out \(1: .*1\.xml"),
])  # fmt: skip
def test_if_no_object_is_left_the_reason_is_told(folder: Path, kind: str, text: str, problem: str) -> None:
    (folder / "labels/a" / ("1.txt" if kind == "yolo" else "1.xml")).write_text(text)
    with pytest.raises(UserError, match=problem):
        run(folder, kind)


@pytest.mark.parametrize("text", ["names:\n  1: cat\n  2: dog\n", "names:\n  0: cat\n  2: dog\n"])
def test_yolo_names_with_gaps(folder: Path, text: str) -> None:
    (folder / "labels/a/1.txt").write_text("1 0.5 0.5 0.2 0.4")
    (folder / "names.yaml").write_text(text)
    with pytest.raises(UserError, match=r"names\.yaml: its names have the numbers [01], 2 - number them from 0"):
        import_annotations.main(["--format", "yolo", "--images", str(folder / "images"), "--labels", str(folder / "labels"),
                                 "--names", str(folder / "names.yaml"), "--output", str(folder / "own.json")])  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "text", "problem"),
    [
        ("yolo", "0 0.5 0.5 0.2 0.4\n2 0.5 0.5 0.2 0.4", r"1\.txt:2: the class 2 is not among the 2 names"),
        ("yolo", "-1 0.5 0.5 0.2 0.4", r"1\.txt:1: the class -1"), ("yolo", "0 0.5 0.5 0.2 0.4 0.9", r"1\.txt:1: it has 6 columns"),
        ("yolo", "0,0.5,0.5,0.2,0.4", r"1\.txt:1: it has commas"), ("yolo", "", "no object found"),
        ("yolo", "\n\xff", r"1\.txt:2: not UTF-8"), ("voc", BOMB, r"1\.xml:2: it has DOCTYPE"),
        ("voc", "<annotation>\n<object></annotation>", r"1\.xml:2:\d+: it is not XML"), ("voc", "", r"1\.xml:1:1: it is not XML"),
        ("voc", "<annotation/>", "no object found"), ("voc", "<a>" * 100_000, "not XML|nested"),
    ],
)  # fmt: skip
def test_fault_32_stops(folder: Path, kind: str, text: str, problem: str) -> None:
    (folder / "labels/a" / ("1.txt" if kind == "yolo" else "1.xml")).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=problem) as caught:
        run(folder, kind)
    assert "\n" not in str(caught.value)
    assert not (folder / "own.json").exists()


@pytest.mark.parametrize(("kind", "text", "problem"), [("yolo", "0,0.5,0.5,0.2,0.4", "1.txt:1: it has commas"), ("voc", BOMB, "1.xml:2: it has DOCTYPE")])
def test_fault_32_by_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, text: str, problem: str
) -> None:
    (folder / "labels/a" / ("1.txt" if kind == "yolo" else "1.xml")).write_text(text)
    names = ["--names", str(folder / "names.txt")] if kind == "yolo" else []
    monkeypatch.setattr(sys, "argv", ["import_annotations.py", "--format", kind, "--images", str(folder / "images"), "--labels",
                                      str(folder / "labels"), "--output", str(folder / "own.json"), *names])  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        main_guard(import_annotations.main)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {folder / 'labels/a'}/{problem}")
    assert err.count("\n") == 1


def test_import_follows_the_rules_that_it_names(folder: Path) -> None:
    (folder / "labels/a/1.txt").write_text("0 0.5 0.5 0.2 0.4\n" + "0 0.5 0.5 0 0.4\n" * 9)
    problem = r"labels: boxes without .* left out \(9: .*1\.txt:2, .*1\.txt:3, .*\) - correct the files, or raise data\.rules\.max_bad_ann"
    with pytest.raises(UserError, match=problem):
        run(folder, "yolo")
    assert not (folder / "own.json").exists()
    assert len(run(folder, "yolo", "--set", "data.rules.max_bad_annotations=1").boxes) == 1
    (folder / "labels/a/1.xml").write_text(voc(("dog", 1, 1, 5, 5, 0), ("dog", 9, 9, 2, 20, 0)))
    with pytest.raises(UserError, match=r"labels: boxes without .* are left out \(1: .*1\.xml object 2\) - correct the files"):
        run(folder, "voc", "--overwrite")


def test_classes_of_one_name_are_told_with_their_file(folder: Path) -> None:
    (folder / "names.txt").write_text("cat\ndog\ncat\n")
    with pytest.raises(UserError, match=r"names\.txt: two classes are called 'cat' - join them, or rename one"):
        run(folder, "yolo")


def test_an_unreadable_image_is_told_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "labels/a/1.txt").write_text("1 0.5 0.5 0.2 0.4")
    (folder / "images/a/2.png").write_text("no image")
    run(folder, "yolo")
    shown = capsys.readouterr().err
    assert "images have no annotation file and are taken to show no object - --only-labeled leaves them out (1: b/1.png)" in shown
    assert shown.count("a/2.png") == 1


def test_fault_32_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "0 0.5 0.5 0.2 0.4",
        "0 x 0.5 0.2 0.4",
        "0 0.5 0.5",
        "0 300 200 20 40",
        "0.5 0.5 0.5 0.1 0.1",
        "0 nan 0.5 0.5 0.5",
    ]
    (folder / "labels/a/1.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"lines are not .* \(5: .* - correct the files, or raise data\.rules\.max_bad_annotations"):
        run(folder, "yolo")
    tolerant = "--set", "data.rules.max_bad_annotations=1"
    assert len(run(folder, "yolo", *tolerant).boxes) == 1
    err = capsys.readouterr().err
    assert "lines are not 'class x y width height' in 0 to 1 and left out (5: " in err
    assert "1.txt:2, " in err
    (folder / "own.json").unlink()
    (folder / "labels/a/1.xml").write_text(
        voc(("dog", 1, 1, 5, 5, 0)).replace("</annotation>", "<object/><object><name>x</name></object></annotation>")
    )
    with pytest.raises(UserError, match=r"objects have no name .* \(2: .* - correct the files, or raise data\.rules\.max_bad_annotations"):
        run(folder, "voc")
    assert len(run(folder, "voc", *tolerant).boxes) == 1
    assert "objects have no name or no box and are left out (2: " in capsys.readouterr().err


def test_what_is_lost_is_counted_together(folder: Path) -> None:
    """3 of 23 boxes, of which no kind alone is over 10 %."""
    whole = "".join(f"0 0.5 0.5 0.{number} 0.4\n" for number in range(20, 40))
    (folder / "labels/a/1.txt").write_text(whole + "0 0.5 0.5 0 0.4\n0 0.5\n0 0.5 0.5 0 0.4\n")
    with pytest.raises(UserError, match=r"boxes without .* \(2: .*; .*lines are not .* \(1: .* - correct the files"):
        run(folder, "yolo")
    assert len(run(folder, "yolo", "--set", "data.rules.max_bad_annotations=0.14").boxes) == 20


@pytest.mark.parametrize("kind", ["yolo", "voc"])
def test_label_files_without_an_image_are_told(folder: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    text, suffix = ("1 0.5 0.5 0.2 0.4\n", "txt") if kind == "yolo" else (voc(("dog", 1, 1, 5, 5, 0)), "xml")
    for name in ("a/1", "a/9", "c/1"):
        (folder / "labels" / name).parent.mkdir(exist_ok=True)
        (folder / "labels" / f"{name}.{suffix}").write_text(text)
    for name, other in (("classes.txt", "cat\ndog\n"), ("train.txt", "images/a/1.png\n"), ("empty.txt", ""), ("style.xml", "<a/>")):
        (folder / "labels" / name).write_text(other)
    run(folder, kind)
    told = f"annotation files with objects have no image and are left out (2: a/9.{suffix}, c/1.{suffix})"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "name"), [("yolo", "1.TXT"), ("voc", "1.XML")])
def test_suffixes_of_labels_may_be_in_capitals(folder: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str) -> None:
    (folder / "labels/a" / name).write_text("1 0.5 0.5 0.2 0.4\n" if kind == "yolo" else voc(("dog", 1, 1, 5, 5, 0)))
    assert len(run(folder, kind).boxes) == 1
    assert "have no image" not in capsys.readouterr().err


def test_labels_among_images_are_not_told_as_skipped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "images/a/1.txt").write_text("1 0.5 0.5 0.2 0.4\n")
    (folder / "images/data.yaml").write_text("names: [cat, dog]\n")
    (folder / "images/a/photo.jp2").touch()
    run(folder, "yolo", "--labels", str(folder / "images"))
    assert "files are skipped, as hidden or as no image (1: a/photo.jp2)" in capsys.readouterr().err


def test_files_are_counted_beyond_those_that_a_report_keeps(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dtg_core.data.findings.KEPT", 3)
    for number in range(4):
        (folder / f"images/a/{number}.jp2").write_bytes(b"no image")
    (folder / "labels/a/1.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    run(folder, "yolo")
    assert "files are skipped, as hidden or as no image (4: a/0.jp2, a/1.jp2, a/2.jp2, ...)" in capsys.readouterr().err


def test_xml_of_another_kind_is_named(folder: Path) -> None:
    (folder / "labels/a/1.xml").write_text('<annotations><image id="0" name="1.png"><box label="a" xtl="1"/></image></annotations>')
    with pytest.raises(UserError, match=r"1\.xml: its first element is <annotations>, not Pascal VOC's <annotation> - export it as"):
        run(folder, "voc")


def test_the_names_are_never_overwritten(folder: Path) -> None:
    (folder / "labels/a/1.txt").write_text("1 0.5 0.5 0.2 0.4\n")
    with pytest.raises(UserError, match=r"names\.txt: is read, too, and would be lost - give another --output"):
        run(folder, "yolo", "--output", str(folder / "names.txt"), "--overwrite")
    assert (folder / "names.txt").read_text() == "cat\ndog\n\n"


@pytest.mark.parametrize(("kind", "text"), [("yolo", "1 0.5 0.5 0.2 0.4"), ("voc", voc(("dog", 1, 1, 5, 5, 0)))])
def test_images_that_share_a_file_are_told(folder: Path, capsys: pytest.CaptureFixture[str], kind: str, text: str) -> None:
    (folder / "labels/a" / ("1.txt" if kind == "yolo" else "1.xml")).write_text(text)
    Image.new("RGB", (100, 50)).save(folder / "images/a/1.jpg")
    assert len(run(folder, kind).boxes) == 2
    told = "images have the annotation file of others, as only the suffix tells them apart (2: a/1.jpg, a/1.png)"
    assert told in capsys.readouterr().err


def test_mistakes(folder: Path) -> None:
    (folder / "labels/a/1.txt").write_text("1 0.5 0.5 0.2 0.4\n")
    run(folder, "yolo")
    with pytest.raises(UserError, match="exists - give another --output, or --overwrite"):
        run(folder, "yolo")
    with pytest.raises(UserError, match="x: it cannot be read"):
        run(folder, "voc", "--names", "x", "--overwrite")
    with pytest.raises(UserError, match="--zero-based"):
        run(folder, "yolo", "--zero-based", "--overwrite")
    with pytest.raises(UserError, match="no such folder"):
        run(folder, "voc", "--labels", str(folder / "none"))
    with pytest.raises(UserError, match="is a file, not a folder"):
        run(folder, "voc", "--labels", str(folder / "names.txt"), "--overwrite")


def test_the_file_is_told_by_its_own_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "labels/a/1.txt").write_text("1 0.5 0.5 0.2 0.4\n")
    run(folder, "yolo")
    shown = capsys.readouterr()
    assert f"warning: {folder / 'own.json'}: classes have no box (1: cat)" in shown.err
    assert shown.out == f"{folder / 'own.json'}: 3 images, 1 box of 2 classes\n"
    (folder / "labels/a/1.txt").write_text("1 0.5 0.5 0 0.4\n")
    with pytest.raises(UserError, match=r"labels: boxes without .* \(1: .*1\.txt:1\) - no object is left of 3 images"):
        run(folder, "yolo", "--overwrite")


POSE = "0 0.35 0.3667 0.3 0.3333 0.1 0.1 1 0.9 0.9 {}\n"  # a box and two keypoints, whose last number tells whether they are seen


@pytest.mark.parametrize("seen", ["1", "2"])
def test_yolo_keypoints_are_left_by_the_shape_that_data_yaml_gives(folder: Path, seen: str) -> None:
    (folder / "labels/a/1.txt").write_text(POSE.format(seen) + "1 0.5 0.5 0.2 0.4\n")
    (folder / "images/data.yaml").write_text("kpt_shape: [2, 3]\nnames: [cat, dog]\n")
    index = run(folder, "yolo", "--names", str(folder / "images/data.yaml"))
    np.testing.assert_allclose(index.boxes, [[20, 10, 50, 26.665], [40, 15, 60, 35]], atol=0.01)


@pytest.mark.parametrize("seen", ["0", "1", "2"])
def test_yolo_keypoints_of_unknown_shape_are_not_guessed(folder: Path, seen: str) -> None:
    (folder / "labels/a/1.txt").write_text(POSE.format(seen) + "0 x\n")
    (folder / "labels/b/1.txt").write_text(POSE.format("1.0"))
    told = r"labels: every line has 11 columns, as boxes with 2 keypoints have - give the data\.yaml with their kpt_shape by --names$"
    with pytest.raises(UserError, match=told):
        run(folder, "yolo")
    (folder / "labels/b/1.txt").write_text("0 0.1 0.2 0.3 0.2 0.2 0.8\n")  # a polygon: so all are
    assert len(run(folder, "yolo", "--set", "data.rules.max_bad_annotations=1").boxes) == (1 if seen == "2" else 2)


def test_lines_of_one_length_may_be_polygons(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As oriented boxes are, or boxes with keypoints of two numbers; no line tells."""
    (folder / "labels/a/1.txt").write_text("0 0.1 0.2 0.3 0.2 0.3 0.8 0.1 0.8\n" * 2)
    (folder / "labels/b/1.txt").write_text("1 0.5 0.2 0.7 0.2 0.7 0.8 0.5 0.8\n")
    np.testing.assert_allclose(run(folder, "yolo").boxes, [[10, 10, 30, 40], [50, 10, 70, 40]], atol=1e-4)
    told = f"{folder / 'labels'}: lines of 9 columns are taken for polygons - for boxes with keypoints give the data.yaml with their kpt_shape by --names (3: "
    assert told in capsys.readouterr().err
    (folder / "labels/b/1.txt").write_text("1 0.5 0.2 0.7 0.2 0.7 0.8\n")
    run(folder, "yolo", "--overwrite")
    assert "columns" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ("[2, 2]", r"1\.txt:1: it has 11 columns, but 5, or 9 by kpt_shape, are wanted - fix the line, or kpt_shape"),
        ("[2]", r"data\.yaml: its kpt_shape is \[2\] - write"),
        ("[2, 4]", "write"), ("[0, 3]", "write"), ("[2.5, 2]", "write"), ("x", "write"),
    ],
)  # fmt: skip
def test_shapes_of_keypoints_that_cannot_be(folder: Path, shape: str, problem: str) -> None:
    (folder / "labels/a/1.txt").write_text(POSE.format("1"))
    (folder / "images/data.yaml").write_text(f"kpt_shape: {shape}\nnames: [cat, dog]\n")
    with pytest.raises(UserError, match=problem):
        run(folder, "yolo", "--names", str(folder / "images/data.yaml"))


def test_turned_images_of_yolo_labels_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also mirrored ones and those by half a turn, whose size is the same."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (100, 50)).save(folder / f"images/b/{orientation}.jpg", exif=exif)
        if orientation < 8:  # an image without labels does not matter
            (folder / f"labels/b/{orientation}.txt").write_text("1 0.5 0.5 0.2 0.4\n")
    index = run(folder, "yolo", "--only-labeled")
    assert index.sizes.tolist() == [[50, 100]] * 5 + [[100, 50]] * 3  # 1.png too
    np.testing.assert_allclose(index.boxes[-1], [20, 30, 30, 70])
    assert index.image(6).size == (50, 100)
    told = f"{folder / 'images'}: images have an EXIF orientation, and their labels count as drawn on the turned image - "
    (line,) = (line for line in capsys.readouterr().err.splitlines() if told in line)
    assert line.endswith(" (6: b/2.jpg, b/3.jpg, b/4.jpg, ...)")


def test_parts_of_a_data_set_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All in one JSON, a detector would be trained on the images that it is measured on."""
    both = folder / "images"
    for part in ("train", "valid"):
        for kind in ("images", "labels"):
            (both / part / kind).mkdir(parents=True)
        Image.new("RGB", (100, 50)).save(both / part / "images" / "1.png")
        (both / part / "labels" / "1.txt").write_text("0 0.5 0.5 0.2 0.4\n")
    assert len(run(folder, "yolo", "--images", str(both), "--labels", str(both))) == 3 + 2
    shown = capsys.readouterr().err
    assert f"{both}: folders seem to be parts of a data set that should stay apart" in shown
    assert "(2: train, valid)" in shown
    shutil.rmtree(both / "valid")
    assert len(run(folder, "yolo", "--images", str(both), "--labels", str(both), "--overwrite")) == 3 + 1
    assert "seem to be parts" not in capsys.readouterr().err


def test_labels_beside_images(folder: Path) -> None:
    """As in Ultralytics' trees, where the last folder called images has its labels in one called labels."""
    places = {"train/images/1": "train/labels/1", "images/x/images/images": "images/x/labels/images", "images/2": "labels/2",
              "images/3": "images/3", "my_images/4": "my_images/4"}  # fmt: skip
    lay = folder / "images"
    for number, (image, label) in enumerate(places.items()):
        for path in (lay / image, lay / label):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 50)).save(lay / f"{image}.png")
        (lay / f"{label}.txt").write_text(f"{number % 2} 0.5 0.5 0.{number + 1} 0.4\n")
    (lay / "labels/3.txt").write_text("0 0.5 0.5 0.9 0.4\n")  # the same place comes first
    index = run(folder, "yolo", "--images", str(lay), "--labels", str(lay), "--only-labeled")
    found = dict(zip(index.file_names, (index.boxes[:, 2] - index.boxes[:, 0]).round().tolist()))
    assert found == {f"{name}.png": width for name, width in zip(places, (10, 20, 30, 40, 50))}
