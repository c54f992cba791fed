"""Randomly damaged annotations and images end in data or in a UserError of one line, and soon.

``DTG_FUZZ=full`` runs 2,000 annotation files, 500 images and 500 YOLO and VOC files; the default is a tenth of them.
"""

from __future__ import annotations

import copy
import io
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dtg_core.config import DataRules
from dtg_core.data.coco import load_coco
from dtg_core.data.findings import Report
from dtg_core.data.images import read_image
from dtg_core.data.importers import import_voc, import_yolo
from dtg_core.engine.evaluate import SetDetections, coco_metrics
from dtg_core.errors import UserError, printable

SHARE = 1 if os.environ.get("DTG_FUZZ") == "full" else 10
SECONDS = 5.0

JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2, 0.5, 3.0, 2**31, -(2**63), 2**70, 10**400, 1e308, float("nan"), float("inf"), -float("inf"), "", "1",
    "x", "\0", "\ud800", "../../x.png", "/dev/zero", "/dev/stdin", ".", "a" * 5000, "é\x1b[31m", [], {}, [[]], {"id": 1}, [1, 2, 3, 4],
    [0, 0, 0, 0], [1, 2], ["1", 2, 3, 4], [None] * 4, [1e308] * 4, [-5, -5, 10**30, 10**30], {"counts": [1], "size": [2, 2]},
]  # fmt: skip


def clean() -> dict[str, Any]:
    return {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 40, "height": 30} for n in range(1, 7)],
        "annotations": [{"id": n + 1, "image_id": n % 6 + 1, "category_id": n % 2 + 1, "bbox": [n, 2, 9, 8], "area": 72, "iscrowd": 0,
                         "segmentation": [[1, 2, 3, 4, 5, 6]]} for n in range(12)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }  # fmt: skip


def mutated(content: Any, generator: np.random.Generator) -> Any:
    """Replace, delete, copy or swap values at random places."""
    content = copy.deepcopy(content)
    for _ in range(int(generator.integers(1, 4))):
        node, parent, key = content, None, None
        while isinstance(node, (dict, list)) and node and (parent is None or generator.random() < 0.85):
            parent, key = (
                node,
                (list(node) if isinstance(node, dict) else range(len(node)))[int(generator.integers(len(node)))],
            )
            node = parent[key]
        if parent is None:
            return JUNK[int(generator.integers(len(JUNK)))]
        junk = JUNK[int(generator.integers(len(JUNK)))]
        action = generator.integers(5)
        if action == 0:
            del parent[key]
        elif action == 1 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[int(generator.integers(len(parent)))]))
        elif action == 2 and isinstance(parent, dict) and isinstance(junk, str):
            parent[junk] = parent.pop(key)
        else:
            parent[key] = copy.deepcopy(junk)
    return content


def damaged(raw: bytes, generator: np.random.Generator) -> bytes:
    """Flip, cut, insert or repeat bytes."""
    data = bytearray(raw)
    for _ in range(int(generator.integers(1, 6))):
        if not data:
            break
        place, action = int(generator.integers(len(data))), generator.integers(5)
        if action <= 1:
            data[place] = int(generator.integers(256))
        elif action == 2:
            del data[place : place + int(generator.integers(1, 64))]
        elif action == 3:
            data[place:place] = generator.bytes(int(generator.integers(1, 16)))
        else:
            data = data[: max(place, 1)] if generator.random() < 0.3 else data + data[place : place + 64]
    return bytes(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n in range(1, 7):
        Image.new("RGB", (40, 30), (n, n, n)).save(tmp_path / f"{n}.png")
    return tmp_path


def survives(work: Any) -> Any:
    """The result of ``work``, or None after a sound UserError."""
    began = time.monotonic()
    result, problem = None, ""
    try:
        result = work()
    except UserError as error:
        problem = str(error)
    assert printable(problem).isprintable()
    assert result is not None or problem
    assert time.monotonic() - began < SECONDS
    return result


def test_annotations(folder: Path) -> None:
    generator = np.random.default_rng(0)
    text, path, accepted, files = (
        json.dumps(clean()).encode(),
        folder / "data.json",
        0,
        {"data.json", *(f"{n}.png" for n in range(1, 7))},
    )
    for number in range(2000 // SHARE):
        if number % 4:
            try:
                path.write_text(json.dumps(mutated(clean(), generator)), encoding="utf-8")
            except ValueError:  # an integer that Python does not write
                continue
        else:
            path.write_bytes(damaged(text, generator))
        report = Report()
        index = survives(
            lambda report=report: load_coco(
                path, rules=DataRules(max_bad_annotations=0.5, max_bad_images=0.5), report=report
            )
        )
        assert all(line.isprintable() for line in report.lines())
        if index is None:
            continue
        accepted += 1
        assert len(index.image_ids) == len(index) == len(index.sizes) == len(index.box_start) - 1 > 0
        assert index.box_start[-1] == len(index.boxes) == len(index.labels) == len(index.crowd)
        assert np.isfinite(index.boxes).all()
        assert ((index.boxes[:, 2:] - index.boxes[:, :2]) >= 0.99).all()
        assert ((index.labels >= 0) & (index.labels < len(index.class_names))).all()
        limits = np.repeat(index.sizes[:, [1, 0]], np.diff(index.box_start), axis=0)
        assert (index.boxes[:, 2:] <= limits).all()
        for row in range(len(index)):
            survives(lambda index=index, row=row: index.image(row))
        if accepted % 10 == 0:
            image = np.repeat(np.arange(len(index)), np.diff(index.box_start))
            rows = np.column_stack((index.boxes, np.full(len(image), 0.5), index.labels, image))
            metrics = coco_metrics(index, SetDetections([np.arange(len(index))], [rows]))
            assert metrics["AP"] is None or 0 < metrics["AP"] <= 100 + 1e-9
    assert {entry.name for entry in folder.iterdir()} == files
    assert accepted > 200 // SHARE  # else the mutations are too wild to test anything


def test_images(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    picture = Image.fromarray(generator.integers(0, 255, (40, 50, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    originals = []
    for kind, mode, options in (
        ("JPEG", "RGB", {"exif": exif}), ("JPEG", "CMYK", {}), ("PNG", "RGBA", {}), ("PNG", "P", {}), ("PNG", "I;16", {}), ("WEBP", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("TIFF", "F", {}), ("GIF", "P", {}), ("BMP", "RGB", {}),
    ):  # fmt: skip
        buffer = io.BytesIO()
        image = (
            Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
            if mode == "I;16"
            else picture.convert(mode)
        )
        image.save(buffer, kind, **options)
        originals.append(buffer.getvalue())
    read = 0
    for number in range(500 // SHARE):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(damaged(originals[number % len(originals)], generator))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            image = survives(lambda path=path: read_image(path, rules=DataRules(float_range=(0, 255), max_pixels=10**7)))
        if image is not None:
            read += 1
            assert image.mode == "RGB"
            assert np.asarray(image).dtype == np.uint8
    assert read > 50 // SHARE


def test_yolo_and_voc(folder: Path) -> None:
    generator = np.random.default_rng(2)
    labels = folder / "labels"
    labels.mkdir()
    (folder / "names.txt").write_text("cat\ndog\n")
    xml = ("<annotation><object><name>cat</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>20</xmax><ymax>22</ymax>"
           "</bndbox></object></annotation>")  # fmt: skip
    for _ in range(250 // SHARE):
        (labels / "1.txt").write_bytes(damaged(b"0 0.5 0.5 0.2 0.4\n1 0.25 0.75 0.1 0.1\n" * 3, generator))
        survives(lambda: json.dumps(import_yolo(folder, labels, folder / "names.txt", Report())))
        (labels / "1.xml").write_bytes(damaged(xml.encode(), generator))
        survives(lambda: json.dumps(import_voc(folder, labels, None, Report())))
