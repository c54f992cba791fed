"""Reduced decoding; what image files can be otherwise is in test_faults_images.py."""
from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtg_core.config import ViewsConfig
from dtg_core.data.coco import list_folder
from dtg_core.data.geometry import fitted
from dtg_core.data.images import decode, read_image
from dtg_core.data.plan import StepData
from dtg_core.errors import UserError

WANTED = partial(fitted, short_edge=64, long_edge=96)


def photo(height: int = 600, width: int = 800) -> Image.Image:
    """Smooth, so that it survives being a JPEG."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("turned", [False, True])
def test_a_large_jpeg_is_decoded_reduced(tmp_path: Path, turned: bool) -> None:
    """600 px are 4.7 times 2 * 64, so an eighth would be too small and a quarter is taken."""
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    photo().save(tmp_path / "a.jpg", quality=95, exif=exif)
    whole, reduced = decode(tmp_path / "a.jpg"), decode(tmp_path / "a.jpg", wanted=WANTED)
    assert whole.size == reduced.size == ((800, 600) if turned else (600, 800))
    assert (whole.image.height, whole.image.width) == whole.size
    assert reduced.image.size == ((150, 200) if turned else (200, 150))
    view = (64, 85) if turned else (85, 64)
    first, second = (np.asarray(found.image.resize(view), int) for found in (whole, reduced))
    assert np.abs(first - second).max() <= 3
    assert read_image(tmp_path / "a.jpg").size == whole.image.size


def test_other_images_are_decoded_whole(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.png")
    photo().convert("CMYK").save(tmp_path / "cmyk.jpg")
    photo(255, 340).save(tmp_path / "small.jpg")  # less than four times the view
    for name, size in (("a.png", (600, 800)), ("cmyk.jpg", (600, 800)), ("small.jpg", (255, 340))):
        found = decode(tmp_path / name, wanted=WANTED)
        assert found.size == (found.image.height, found.image.width) == size
        np.testing.assert_array_equal(np.asarray(found.image), np.asarray(read_image(tmp_path / name)))


def test_views_of_reduced_images_are_those_of_whole_ones(tmp_path: Path) -> None:
    """The same photo as a PNG, which is never reduced: boxes, pixels, and matrices from the whole image."""
    made = []
    for suffix in ("png", "jpg"):
        (tmp_path / suffix).mkdir()
        photo().save(tmp_path / suffix / f"a.{suffix}", **({"quality": 95} if suffix == "jpg" else {}))
        index = list_folder(tmp_path / suffix)
        labeled = replace(
            index, boxes=np.array(((80, 60, 400, 500),), np.float32), labels=np.zeros(1, np.int64), box_start=np.array((0, 1)),
            crowd=np.zeros(1, bool), sizes=np.array(((600, 800),), np.int32), class_names=("a",), category_ids=[1],
        )  # fmt: skip
        data = StepData(labeled, index, ViewsConfig(short_edge=(48, 64), long_edge=96, color=False), 0, 1, 1)
        made.append([data[step] for step in range(6)])
    for whole, reduced in zip(*made):
        assert whole.unlabeled is not None
        assert reduced.unlabeled is not None
        for first, second in (
            (whole.labeled, reduced.labeled), (whole.unlabeled.teacher, reduced.unlabeled.teacher),
            (whole.unlabeled.student, reduced.unlabeled.student),
        ):  # fmt: skip
            assert first.sizes.equal(second.sizes)
            np.testing.assert_allclose(second.view_from_image, first.view_from_image, atol=1e-4)
            assert (first.pixels.float() - second.pixels.float()).abs().mean() < 2
        assert len(whole.labeled.targets.boxes) == 1
        np.testing.assert_allclose(reduced.labeled.targets.boxes, whole.labeled.targets.boxes, atol=0.1)
        np.testing.assert_allclose(
            reduced.unlabeled.student_from_teacher, whole.unlabeled.student_from_teacher, atol=1e-2
        )


def test_the_whole_size_is_checked(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.jpg")
    index = replace(list_folder(tmp_path), sizes=np.array(((150, 200),), np.int32))
    with pytest.raises(UserError, match=r"a\.jpg: it is 800 x 600 px but its JSON says 200 x 150 - fix one of them"):
        index.decoded(0, wanted=WANTED)
