"""Merging two rounds of labelling."""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "scripts"))
import merge_annotations

from dtg_core.data.coco import load_coco
from dtg_core.errors import UserError


def write(folder: Path, name: str, categories: dict[int, str], boxes: dict[str, list[tuple[int, list[int]]]]) -> Path:
    """A JSON beside a folder of its images; ``boxes`` are (category, box) by file name."""
    (folder / name).mkdir(parents=True)
    images, annotations = [], []
    for number, (file, objects) in enumerate(boxes.items()):
        (folder / name / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (100, 50)).save(folder / name / file)
        images.append({"id": f"n{number}", "file_name": file, "width": 100, "height": 50, "city": number})
        annotations += [{"id": len(annotations) + place, "image_id": f"n{number}", "category_id": category, "bbox": box, "area": 12,
                         "iscrowd": 0, "mood": "fine"} for place, (category, box) in enumerate(objects)]  # fmt: skip
    content = {"images": images, "annotations": annotations, "categories": [{"id": number, "name": text} for number, text in categories.items()]}
    (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / f"{name}.json"


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Their ids clash, their classes have other ids and another order, and one file name is in both."""
    first = write(tmp_path, "own", {1: "cat", 2: "dog"}, {"a.png": [(1, [1, 2, 10, 10]), (2, [20, 2, 30, 20])], "sub/b.png": []})
    second = write(tmp_path, "more", {1: "dog", 7: "cat"}, {"a.png": [(7, [3, 4, 11, 12])], "c.png": [(1, [5, 6, 13, 14])]})
    return first, second


def merge(*arguments: Any) -> int:
    return merge_annotations.main([str(argument) for argument in arguments])


def named(path: Path, images: Path) -> dict[str, list[tuple[str, list[float]]]]:
    """Class and box of every object by image file, an oracle that knows no ids."""
    index = load_coco(path, images)
    found = {}
    for row, name in enumerate(index.file_names):
        boxes, labels = index.objects(row)
        found[name] = [(index.class_names[label], box) for label, box in zip(labels, boxes.tolist())]
    return found


def test_objects_keep_their_image_class_and_box(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [path.with_suffix("") for path in two]
    assert merge(*two, "--images", *folders, "--output", tmp_path / "all.json") == 0
    assert "all.json: 4 images, 4 boxes of 2 classes, for --images " in capsys.readouterr().out
    expected = {f"{path.stem}/{name}": objects for path, folder in zip(two, folders) for name, objects in named(path, folder).items()}
    assert named(tmp_path / "all.json", tmp_path) == expected
    content = json.loads((tmp_path / "all.json").read_text())
    for kind in ("images", "annotations", "categories"):
        assert [entry["id"] for entry in content[kind]] == list(range(1, len(content[kind]) + 1))
    assert {image["city"] for image in content["images"]} == {0, 1}
    assert {annotation["mood"] for annotation in content["annotations"]} == {"fine"}


def test_one_folder_and_classes_that_are_lacking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path, "photos", {1: "cat"}, {"a.png": [(1, [1, 2, 10, 10])]})
    second = write(tmp_path / "x", "photos", {4: "cat", 5: "dog"}, {"b.png": [(5, [1, 2, 10, 10])]})
    Image.fromarray(np.zeros((50, 100, 3), np.uint8)).save(tmp_path / "photos" / "b.png")
    assert merge(first, second, "--images", tmp_path / "photos", "--output", tmp_path / "all.json") == 0
    told = f"warning: {first}: classes are in other files but not in this one - if its images show them, what is seen of them is taught as background (1: dog)"
    assert told in capsys.readouterr().err
    assert {name: len(objects) for name, objects in named(tmp_path / "all.json", tmp_path / "photos").items()} == {"a.png": 1, "b.png": 1}


def test_classes_keep_the_order_of_the_first_file(tmp_path: Path) -> None:
    """A second round starts from the weights of the first one, whose classes are in the order of their ids."""
    first = write(tmp_path, "own", {9: "owl", 2: "dog", 5: "cat"}, {"a.png": [(9, [1, 2, 10, 10])]})
    second = write(tmp_path, "more", {4: "bee", 3: "owl"}, {"c.png": [(4, [5, 6, 13, 14])]})
    assert merge(first, second, "--images", tmp_path / "own", tmp_path / "more", "--output", tmp_path / "all.json") == 0
    assert load_coco(first, tmp_path / "own").class_names == ("dog", "cat", "owl")
    assert load_coco(tmp_path / "all.json", tmp_path).class_names == ("dog", "cat", "owl", "bee")


def test_mistakes(two: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = two
    output, folder = ("--output", tmp_path / "all.json"), tmp_path / "own"
    for arguments, problem in (
        ([first, "--images", folder, *output], r"own\.json: it is alone - give two files or more"),
        ([first, first, "--images", folder, *output], r"own\.json: is given twice"),
        ([first, second, "--images", folder, folder, folder, *output], "--images: 3 folders for 2 files - give one for all, or one for each"),
        ([first, second, "--images", folder, "--output", second], "is read, too, and would be lost"),
        ([first, tmp_path / "none.json", "--images", folder, *output], r"none\.json: "),
        ([first, second, "--images", folder, tmp_path / "nowhere", *output], "nowhere"),
    ):
        with pytest.raises(UserError, match=problem):
            merge(*arguments, *(["--overwrite"] if second in arguments[-1:] else []))
    copy = tmp_path / "copy.json"
    copy.write_text(first.read_text())
    with pytest.raises(UserError, match=r"copy\.json: the image 'a\.png' is in .*own\.json, too - take it out of one of the two"):
        merge(first, copy, "--images", folder, *output)
    assert not (tmp_path / "all.json").exists()


def test_annotations_of_unlisted_images_and_classes_are_told(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As by check_data.py: one line for each kind and file."""
    folders = [path.with_suffix("") for path in two]
    expected = {f"{path.stem}/{name}": objects for path, folder in zip(two, folders) for name, objects in named(path, folder).items()}
    for path, stray in zip(two, (["category_id"] * 2, ["category_id", "image_id"])):
        content = json.loads(path.read_text())
        content["annotations"] += [{**content["annotations"][0], "id": 100 + number, key: 77} for number, key in enumerate(stray)]
        path.write_text(json.dumps(content))
    assert merge(*two, "--images", *folders, "--output", tmp_path / "all.json", "--set", "data.rules.max_bad_annotations=0.5") == 0
    assert named(tmp_path / "all.json", tmp_path) == expected
    first, second = two
    told = [line for line in capsys.readouterr().err.splitlines() if "does not list" in line]
    assert told == [
        f"warning: {first}: annotations of categories that it does not list are left out (2: annotations[2], annotations[3])",
        f"warning: {second}: annotations of images that it does not list are left out (1: annotations[3])",
        f"warning: {second}: annotations of categories that it does not list are left out (1: annotations[2])",
    ]
