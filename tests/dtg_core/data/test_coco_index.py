"""Reading COCO files, folders and odd images."""
from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dtg_core.config import DataRules
from dtg_core.data.coco import list_folder, load_coco
from dtg_core.data.images import EXIF_ORIENTATION, decode, read_image
from dtg_core.data.index import subset, without
from dtg_core.errors import UserError


def content() -> dict[str, Any]:
    """Three images of 20 x 10 px; ids, categories and annotations are out of order on purpose."""
    images = [{"id": name, "file_name": f"{name}.png", "width": 20, "height": 10} for name in ("b", "a", "c")]
    boxes = [("a", 9, [1, 2, 3, 4], 0), ("b", 3, [0, 0, 5, 5], 0), ("a", 3, [15, 5, 10, 10], 0), ("b", 9, [2, 2, 8, 3], 1)]
    return {
        "images": images,
        "annotations": [
            {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "iscrowd": crowd, "segmentation": []}
            for number, (image, category, bbox, crowd) in enumerate(boxes)
        ],
        "categories": [{"id": 9, "name": "nine"}, {"id": 3, "name": "three"}],
    }


def write(folder: Path, value: Any, images: str = "images") -> Path:
    (folder / images).mkdir(parents=True, exist_ok=True)
    for name in ("a", "b", "c"):
        Image.new("RGB", (20, 10), (10, 20, 30)).save(folder / images / f"{name}.png")
    path = folder / "data.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_load(tmp_path: Path) -> None:
    index = load_coco(write(tmp_path, content()))
    assert index.image_ids == ["b", "a", "c"]
    assert index.class_names == ("three", "nine")
    assert index.category_ids == [3, 9]
    np.testing.assert_array_equal(index.box_start, [0, 2, 4, 4])
    np.testing.assert_array_equal(index.boxes, [[0, 0, 5, 5], [2, 2, 10, 5], [1, 2, 4, 6], [15, 5, 20, 10]])
    np.testing.assert_array_equal(index.labels, [0, 1, 1, 0])
    np.testing.assert_array_equal(index.crowd, [False, True, False, False])
    np.testing.assert_allclose(index.objects_per_image(), [2 / 3, 1 / 3])  # without the crowd
    np.testing.assert_array_equal(index.sizes, [[10, 20]] * 3)
    boxes, labels = index.objects(0)
    np.testing.assert_array_equal(boxes, [[0, 0, 5, 5]])  # the crowd is no target
    np.testing.assert_array_equal(labels, [0])
    assert index.objects(2)[0].shape == (0, 4)
    assert index.image(1).size == (20, 10)


@pytest.mark.parametrize("images", ["images", "."])
def test_finds_the_images(tmp_path: Path, images: str) -> None:
    path = write(tmp_path, content(), images)
    assert load_coco(path).path(0).is_file()
    assert load_coco(path, tmp_path / images).path(0).is_file()


def test_the_folder_is_found_though_the_first_image_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path, content())
    (tmp_path / "images" / "b.png").unlink()
    index = load_coco(path, rules=DataRules(max_bad_images=0.5))
    assert (index.root, index.file_names) == (tmp_path / "images", ["a.png", "c.png"])
    with pytest.raises(UserError, match=r"'b\.png' is not in .*images.* \(1 of 3 are missing\) - restore them"):
        load_coco(path)


def test_names_that_differ_in_their_unicode_form(tmp_path: Path) -> None:
    """As between macOS and others: the two look the same, so the message writes them out."""
    value = content()
    value["images"][1]["file_name"] = "M\u00fcller.png"
    path = write(tmp_path, value)
    Image.new("RGB", (20, 10)).save(tmp_path / "images" / "Mu\u0308ller.png")
    with pytest.raises(UserError, match=r"images\[1\] is 'M\\xfcller\.png', but the file is called 'Mu\\u0308ller\.png', which looks"):
        load_coco(path)


def test_a_given_folder_without_the_images_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, other = write(tmp_path, content()), tmp_path / "photos"
    other.mkdir()
    assert load_coco(path, other).root == tmp_path / "images"
    assert f"images are not in {other}, and {tmp_path / 'images'} is used instead" in caplog.text
    caplog.clear()
    load_coco(path, tmp_path / "images")
    assert "used instead" not in caplog.text


def test_finds_the_images_beside_the_folder_of_annotations(tmp_path: Path) -> None:
    path = write(tmp_path, content())
    (tmp_path / "annotations").mkdir()
    moved = path.rename(tmp_path / "annotations" / path.name)
    assert load_coco(moved).root == tmp_path / "images"


def test_images_of_one_name_in_several_folders_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, path = tmp_path / "train", write(tmp_path / "val", content(), ".")
    write(train, content(), ".")
    assert load_coco(path, train).root == train
    assert caplog.messages[0].startswith(f"{path}: folders have different images called 'b.png', and {train} is used - ")
    caplog.clear()
    (train / "b.png").unlink()
    (train / "b.png").symlink_to(tmp_path / "val" / "b.png")  # one image: nothing is in doubt
    load_coco(path, train, rules=DataRules(allow_outside_root=True))
    assert "different images" not in caplog.text


def test_boxes_that_cannot_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    value = content()
    nan = float("nan")
    bad = ([0, 0, 0.9, 5], [30, 0, 5, 5], [19.5, 0, 9, 9], [1, 2, 3], None, [0, 0, -5, 5], [nan, 0, 5, 5], [0, 0, "5", 5])
    value["annotations"] += [{"image_id": "c", "category_id": 3, "bbox": bbox} for bbox in bad]
    value["annotations"] += [{"image_id": "elsewhere", "category_id": 3, "bbox": [0, 0, 5, 5]}]
    path = write(tmp_path, value)
    with pytest.raises(UserError, match=r"7 of 13 annotations cannot be used \(annotations whose bbox is not 4 numbers of pixels: 4, first "
                                        r"annotations\[7\]\) - fix them"):
        load_coco(path)
    with caplog.at_level(logging.WARNING):
        index = load_coco(path, rules=DataRules(max_bad_annotations=1))
    np.testing.assert_array_equal(index.box_start, [0, 2, 4, 4])
    for kind, places in (("annotations whose bbox is not 4 numbers of pixels are", r"4: annotations\[7\], annotations\[8\], annotations\[10\], \.\.\."),
                         ("boxes without a positive", r"1: annotations\[9\]"), ("boxes wholly outside their image", r"1: annotations\[5\]"),
                         ("boxes without a side", r"2: annotations\[4\], annotations\[6\]"),
                         ("annotations of images that it does not list are left out", r"1: annotations\[12\]")):  # fmt: skip
        assert re.search(rf"{kind}.* \({places}\)$", caplog.text, re.MULTILINE), kind


def test_no_annotations(tmp_path: Path) -> None:
    index = load_coco(write(tmp_path, content() | {"annotations": []}))
    assert index.boxes.shape == (0, 4)
    np.testing.assert_array_equal(index.box_start, [0, 0, 0, 0])


def test_list_of_images_alone(tmp_path: Path) -> None:
    path = write(tmp_path, {"images": [{"id": 1, "file_name": "a.png"}]})
    assert load_coco(path, need_labels=False).file_names == ["a.png"]
    with pytest.raises(UserError, match="'annotations' is missing"):
        load_coco(path)


def broken(change: str) -> Any:
    value = content()
    if change == "not json":
        return '{"images": [\n  1,,]}'
    if change == "list":
        return [value]
    if change == "no images":
        value["images"] = []
    if change == "no key":
        del value["annotations"]
    if change == "no categories":
        value["categories"] = []
    if change == "image id twice":
        value["images"][1]["id"] = "b"
    if change == "category id twice":
        value["categories"][1]["id"] = 9
    if change == "no file name":
        del value["images"][2]["file_name"]
    if change == "no file":
        value["images"][2]["file_name"] = "d.png"
    if change == "category":
        value["annotations"][2]["category_id"] = 77
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("not json", "line 2, column 5"), ("list", "found a list"), ("no images", "lists no images"),
        ("no key", "'annotations' is missing"), ("no categories", "no categories"), ("image id twice", "'b' twice"),
        ("category id twice", "9 twice"), ("no file name", r"images\[2\] has no 'file_name'"),
        ("no file", "'d.png' is not in"), ("category", r"\(annotations of categories that it does not list: 1, first annotations\[2\]\)"),
    ],
)  # fmt: skip
def test_faults(tmp_path: Path, change: str, message: str) -> None:
    path = write(tmp_path, broken(change))
    with pytest.raises(UserError, match=message) as caught:
        load_coco(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_coco(tmp_path / "none.json")


def test_image_of_another_size(tmp_path: Path) -> None:
    index = load_coco(write(tmp_path, content()))
    Image.new("RGB", (40, 20)).save(index.path(0))
    with pytest.raises(UserError, match="40 x 20 px but its JSON says 20 x 10"):
        index.image(0)


def test_subset_and_without(tmp_path: Path) -> None:
    index = load_coco(write(tmp_path, content()))
    part = subset(index, [2, 1])
    assert part.image_ids == ["c", "a"]
    assert part.class_names == index.class_names
    for row, whole in enumerate([2, 1]):
        for found, expected in zip(part.objects(row), index.objects(whole)):
            np.testing.assert_array_equal(found, expected)
    assert len(subset(index, [])) == 0
    rest = without(index, part)
    assert rest.image_ids == ["b"]
    np.testing.assert_array_equal(rest.boxes, index.boxes[:2])
    assert without(list_folder(tmp_path), part).file_names == ["images/b.png"]  # the same files under another root
    links = tmp_path / "more" / "links"
    links.mkdir(parents=True)
    for name in ("a", "b"):
        (links / f"{name}_too.png").symlink_to(tmp_path / "images" / f"{name}.png")
    (tmp_path / "more" / "all").symlink_to(tmp_path / "images")
    assert without(list_folder(tmp_path / "more"), part).file_names == ["all/b.png", "links/b_too.png"]
    assert len(without(subset(list_folder(links), [0]), index)) == 0


def test_list_folder(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "sub/c.webp", ".hidden.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    index = list_folder(tmp_path)
    assert index.file_names == ["a.jpg", "b.PNG", "sub/c.webp"]
    assert index.objects(1)[0].shape == (0, 4)
    with pytest.raises(UserError, match="no such folder"):
        list_folder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        list_folder(tmp_path / "empty")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif(tmp_path: Path, orientation: int) -> None:
    """Pixels of the upright image are stored by hand as each of the eight orientations."""
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0], upright[0, 5], upright[3, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    path = tmp_path / "image.png"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(path)), upright)
    np.testing.assert_array_equal(np.asarray(read_image(path, (4, 6))), upright)
    if orientation >= 5:  # boxes drawn on the stored pixels: their size tells
        np.testing.assert_array_equal(np.asarray(read_image(path, (6, 4))), stored)


def test_dark_images_are_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("dtg_core.data.images._said", set())
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((2, 2), 2048, np.uint16)).save(tmp_path / name)
        decode(tmp_path / name, odd=set())  # as for a report
    assert not caplog.messages
    for name in ("b.png", "a.png"):
        read_image(tmp_path / name)
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path / 'b.png'}: images of 16 bits have no value over 4095 and are nearly black - set ")


def test_pixel_formats(tmp_path: Path) -> None:
    def pixel(image: Image.Image, name: str = "image.png") -> tuple[int, ...]:
        image.save(tmp_path / name)
        found = read_image(tmp_path / name)
        assert found.mode == "RGB"
        return tuple(np.asarray(found)[0, 0].tolist())

    assert pixel(Image.new("L", (2, 2), 77)) == (77, 77, 77)
    assert pixel(Image.new("1", (2, 2), 1)) == (255, 255, 255)
    assert pixel(Image.fromarray(np.full((2, 2), 200 * 257, np.uint16))) == (200, 200, 200)
    odd: set[str] = set()
    Image.fromarray(np.full((2, 2), 2048, np.uint16)).save(tmp_path / "deep.png")  # 12 bits
    assert np.asarray(decode(tmp_path / "deep.png", odd=odd).image).max() == 8
    assert any("nearly black" in kind for kind in odd)
    wide = decode(tmp_path / "deep.png", rules=DataRules(float_range=(0, 4095)), odd=(odd := set())).image
    assert np.asarray(wide).max() == 128
    assert not any("nearly black" in kind for kind in odd)
    assert pixel(Image.new("RGBA", (2, 2), (255, 0, 0, 0))) == (255, 255, 255)
    assert pixel(Image.new("RGBA", (2, 2), (255, 0, 0, 255))) == (255, 0, 0)
    assert pixel(Image.new("LA", (2, 2), (0, 0))) == (255, 255, 255)
    assert pixel(Image.new("RGB", (2, 2), (10, 200, 30)).quantize(4)) == (10, 200, 30)
    assert pixel(Image.new("CMYK", (2, 2), (0, 0, 0, 0)), "image.tif") == (255, 255, 255)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.info["transparency"] = bytes([255, 0])
    assert pixel(palette) == (255, 255, 255)


def test_unreadable_images(tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8)).save(whole)
    cut, text = tmp_path / "cut.png", tmp_path / "text.jpg"
    cut.write_bytes(whole.read_bytes()[:2000])
    text.write_text("no image")
    for path in (cut, text, tmp_path / "none.jpg"):
        with pytest.raises(UserError, match=path.name):
            read_image(path)
