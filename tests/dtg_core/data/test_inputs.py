"""Which images a command line means, and what it is told of paths without any."""
from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from looking import write_photos

from dtg_core.data.files import IMAGE_SUFFIXES
from dtg_core.data.inputs import find_images
from dtg_core.errors import UserError

find = partial(find_images, suffixes=IMAGE_SUFFIXES)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


def test_files_folders_and_patterns(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    whole = ["a.png", "trip/b.jpg", "trip/day 2/c.tif"]
    assert find([str(photos)], out) == (whole, photos, [])
    assert find([str(photos / "trip" / "b.jpg")], out) == (["b.jpg"], photos / "trip", [])
    assert find([str(photos / "**" / "*.jpg")], out) == (["trip/b.jpg"], photos, [])
    assert find([str(photos / "a.png"), str(photos / "trip")], out)[0] == whole
    assert find([str(photos), str(photos / "a.png")], out)[0] == whole  # once each
    (tmp_path / "other").mkdir()
    (photos / "a.png").rename(tmp_path / "other" / "a.png")
    assert find([f"{photos}/*/../../other/*.png"], out) == (["other/a.png"], tmp_path, [])  # not ../other/a.png
    monkeypatch.chdir(photos)
    with pytest.raises(UserError, match="no image there"):
        find(["*.gif"], out)


def test_a_json_is_no_image(photos, tmp_path):
    (tmp_path / "own.json").write_text("{}")
    with pytest.raises(UserError, match=r"own\.json: a JSON, not an image - give its images, or their folder"):
        find_images([str(photos), str(tmp_path / "own.json")], tmp_path / "out", IMAGE_SUFFIXES)


def test_empty_folders_beside_others_give_a_warning(photos, tmp_path):
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").touch()
    names, root, warnings = find([str(tmp_path / "empty"), str(photos / "trip")], tmp_path / "out")
    assert (names, root) == (["b.jpg", "day 2/c.tif"], photos / "trip")
    assert warnings == [f"{tmp_path / 'empty'}: no image there, only .txt files"]
    (tmp_path / "empty" / "notes.txt").unlink()
    (tmp_path / "empty" / "._hidden.doc").touch()
    with pytest.raises(UserError, match="empty: no image there - give images"):
        find([str(tmp_path / "empty")], tmp_path / "out")
    for name in ("1.HEIC", "sub/2.heic", "3.heif"):
        (tmp_path / "empty" / name).touch()
    with pytest.raises(UserError, match=r"empty: no image there, only \.heic, \.heif files - convert HEIC to JPEG"):
        find([str(tmp_path / "empty")], tmp_path / "out")
    (tmp_path / "empty" / "a.mp4").touch()  # where no videos are taken, as by export.py
    with pytest.raises(UserError, match=r"only \.heic, \.heif, \.mp4 files - extract frames, e\.g\. .*, and convert HEIC to JPEG"):
        find([str(tmp_path / "empty")], tmp_path / "out")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.dng").touch()
    with pytest.raises(UserError, match=r"raw: no image there, only \.dng files - convert them to JPEG or PNG, or give images"):
        find([str(tmp_path / "raw")], tmp_path / "out")
    with pytest.raises(UserError, match="absent: no image there"):  # mistyped
        find([str(photos), str(tmp_path / "absent")], tmp_path / "out")


@pytest.mark.parametrize("output", [".", "trip", "trip/../../photos", ".."])
def test_the_output_is_no_folder_of_images(photos, monkeypatch, output):
    monkeypatch.chdir(photos)
    with pytest.raises(UserError, match="holds the images"):
        find(["trip" if output == "trip" else "."], Path(output))
