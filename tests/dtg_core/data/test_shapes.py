"""The built-in data set."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtg_core.data import shapes
from dtg_core.data.coco import list_folder, load_coco
from dtg_core.data.shapes import CLASS_NAMES, draw_scene, make_shapes
from dtg_core.errors import UserError


def test_on_disk(tmp_path: Path) -> None:
    paths = make_shapes(tmp_path, 3, 4, 2, seed=1)
    labeled, val = load_coco(paths.labeled), load_coco(paths.val)
    unlabeled, truth = list_folder(paths.unlabeled), load_coco(paths.unlabeled_truth, paths.unlabeled)
    assert (len(labeled), len(unlabeled), len(val)) == (3, 4, 2)
    assert labeled.class_names == CLASS_NAMES
    assert truth.file_names == unlabeled.file_names
    assert labeled.root == paths.images
    for index in (labeled, val, truth):
        assert (np.diff(index.box_start) >= 1).all()
        for row in range(len(index)):
            assert index.image(row).size == (160, 160)
    assert [path.name for path in tmp_path.iterdir()] == [paths.labeled.parent.name]  # no draft is left behind


def test_made_once_and_again_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_shapes(tmp_path / "one", 3, 2, 1)
    again = make_shapes(tmp_path / "two", 3, 2, 1)
    for path in sorted(first.labeled.parent.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (again.labeled.parent / path.relative_to(first.labeled.parent)).read_bytes()
    monkeypatch.setattr(shapes, "draw_scene", lambda *_: pytest.fail("drawn twice"))
    assert make_shapes(tmp_path / "one", 3, 2, 1) == first


def test_larger_splits_keep_their_images(tmp_path: Path) -> None:
    small, large = make_shapes(tmp_path, 2, 1, 1), make_shapes(tmp_path, 3, 2, 1)
    for name in ("labeled/000000.jpg", "labeled/000001.jpg", "unlabeled/000000.jpg", "val/000000.jpg"):
        assert (small.images / name).read_bytes() == (large.images / name).read_bytes()
    before, after = (json.loads(path.read_text()) for path in (small.labeled, large.labeled))
    assert after["annotations"][: len(before["annotations"])] == before["annotations"]


def test_seeds_and_splits_differ() -> None:
    images = [draw_scene(seed, split, 0).image.tobytes() for seed, split in ((0, "labeled"), (1, "labeled"), (0, "val"))]
    assert len(set(images)) == 3


def test_stopped_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "_rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_shapes(tmp_path, 1, 1, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_faster_process_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = shapes._rename

    def late(draft: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "from the other").touch()
        rename(draft, folder)

    monkeypatch.setattr(shapes, "_rename", late)
    paths = make_shapes(tmp_path, 1, 1, 1)
    assert (paths.labeled.parent / "from the other").is_file()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DTG_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"file/cache: cannot be written \(Not a directory\) - set DTG_CACHE to a folder with room"):
        make_shapes(None, 1, 1, 1)


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("DTG_CACHE", raising=False)
    assert make_shapes(None, 1, 1, 1).labeled.is_relative_to(tmp_path / "xdg" / "dtg-ssod")
    monkeypatch.setenv("DTG_CACHE", str(tmp_path / "own"))
    assert make_shapes(None, 1, 1, 1).labeled.is_relative_to(tmp_path / "own")


def test_statistics() -> None:
    """What the module promises of its scenes: how many objects, which, how large, and all of them in the image."""
    scenes = [draw_scene(0, "labeled", number) for number in range(80)]
    counts = np.array([len(scene.labels) for scene in scenes])
    assert 1 <= counts.min() <= counts.max() <= 6
    assert 2.9 < counts.mean() < 3.9
    labels = np.bincount([label for scene in scenes for label in scene.labels], minlength=7)
    assert labels.min() > 15
    boxes = np.array([box for scene in scenes for box in scene.boxes])
    assert boxes.min() >= 0
    assert boxes.max() <= 160
    longer = (boxes[:, 2:] - boxes[:, :2]).max(1)
    assert longer.min() > 7
    assert longer.max() < 120
    assert np.ptp(longer) > 60


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_box_is_tight(name: str) -> None:
    """A single object fills its box from edge to edge."""
    for seed in range(5):
        generator = np.random.default_rng(seed)
        placed = shapes._place(shapes.OUTLINES[name], [], [], generator)
        assert placed is not None
        alpha, box = placed
        extent = Image.fromarray(((alpha > 100) * 255).astype(np.uint8)).getbbox()
        assert extent is not None
        np.testing.assert_allclose(box, extent, atol=1.01)
