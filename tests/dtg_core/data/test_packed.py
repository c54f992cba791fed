"""Names and ids in one buffer, and reading at a hundredth of COCO's size."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtg_core.data.coco import list_folder, load_coco
from dtg_core.data.packed import Texts, packed


def test_texts_are_a_list_of_strings() -> None:
    plain = ["a.png", "", "é/ü.jpg", os.fsdecode(b"caf\xe9.png"), "z" * 300]
    texts = Texts(plain)
    assert texts == plain
    assert list(texts) == [texts[row] for row in range(5)] == plain
    assert texts[-1] == plain[-1]
    assert texts[1:3] == plain[1:3]
    assert texts != plain[:4]
    with pytest.raises(IndexError):
        texts[5]
    assert len(Texts([])) == 0


@pytest.mark.parametrize("values", [["a", "b"], [1, -(2**62)], [1, "a"], [2**70], [1.5, 2], [True], []])
def test_values_come_back_as_they_were(values: list[object]) -> None:
    found = list(packed(values))
    assert found == values
    assert list(map(type, found)) == list(map(type, values))


def test_reading_takes_no_time(tmp_path: Path) -> None:
    """COCO train2017 has 118,287 images and 860,001 boxes, for which 60 s are the limit; this is a fiftieth of both."""
    images, boxes = 2366, 17_200
    (tmp_path / "images").mkdir()
    Image.new("RGB", (640, 480)).save(tmp_path / "images" / "0.jpg")
    for number in range(1, images):
        os.link(tmp_path / "images" / "0.jpg", tmp_path / "images" / f"{number}.jpg")
    generator = np.random.default_rng(0)
    corners, image = generator.uniform(0, 400, (boxes, 2)).round(2), generator.integers(0, images, boxes).tolist()
    content = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 640, "height": 480} for n in range(images)],
        "annotations": [
            {"id": n + 1, "image_id": image[n], "category_id": n % 80, "bbox": [*xy, 50, 60], "segmentation": [[0.5] * 40]}
            for n, xy in enumerate(corners.tolist())
        ],
        "categories": [{"id": n, "name": f"class {n}"} for n in range(80)],
    }
    (tmp_path / "data.json").write_text(json.dumps(content))
    began = time.process_time()
    index = load_coco(tmp_path / "data.json")
    assert (len(index), len(index.boxes)) == (images, boxes)
    assert len(list_folder(tmp_path)) == images
    assert time.process_time() - began < 3  # about 0.5
