"""Labelled and unlabelled splits: the published protocols' own numbers, whole groups, enough of each class."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import full_disk

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "scripts")]

import make_splits  # noqa: E402

from dtg_core.data.coco import load_coco  # noqa: E402
from dtg_core.data.splits import draw, group_images  # noqa: E402
from dtg_core.errors import UserError  # noqa: E402

COCO = 118_287  # images of train2017


def coco(folder: Path, images: int, rare: bool = False) -> Path:
    """Ids with gaps and out of order, file names of scenes of four views, every seventh image without a box."""
    generator = np.random.default_rng(0)
    ids = generator.choice(images * 5, images, replace=False).tolist()
    classes = generator.integers(1, 4, images).tolist()
    annotations = [{"id": n + 1, "image_id": ids[n], "category_id": classes[n], "bbox": [1, 2, 30, 40], "area": 1200, "iscrowd": n % 5 == 0,
                    "segmentation": [[1, 2, 3, 4, 5, 6]]} for n in range(images) if n % 7]  # fmt: skip
    if rare:
        annotations += [
            {"id": 10**6 + n, "image_id": ids[n], "category_id": 4, "bbox": [5, 6, 7, 8]}
            for n in range(1, images, images // 5)
        ]
    content = {
        "images": [{"id": ids[n], "file_name": f"scene{n // 4}_view{n % 4}.jpg", "width": 640, "height": 480, "city": n // 10}
                   for n in range(images)],
        "annotations": annotations,
        "categories": [{"id": n, "name": name} for n, name in ((3, "c"), (1, "a"), (2, "b"), (4, "rare"))],
    }  # fmt: skip
    path = folder / "source.json"
    path.write_text(json.dumps(content))
    return path


def split(source: Path, *arguments: Any) -> dict[str, Any]:
    folder = source.parent / "splits"
    make_splits.main(["--annotations", str(source), "--output", str(folder), "--overwrite", *map(str, arguments)])
    return json.loads((folder / "manifest.json").read_text())


def ids_of(source: Path, name: str) -> list[int]:
    return [image["id"] for image in json.loads((source.parent / "splits" / name).read_text())["images"]]


@pytest.mark.parametrize(
    ("percent", "softteacher", "stac"),
    [
        (1, 1182, [1174, 1175, 1174, 1174, 1175]), (2, 2365, [2329, 2346, 2342, 2337, 2343]),
        (5, 5914, [5764, 5772, 5756, 5766, 5762]), (10, 11828, [11285, 11261, 11234, 11262, 11235]),
    ],
)  # fmt: skip
def test_published_counts(percent: int, softteacher: int, stac: list[int]) -> None:
    wanted = int(percent / 100 * COCO)
    assert [len(draw("softteacher", COCO, wanted, fold)) for fold in range(1, 6)] == [softteacher] * 5
    assert [len(draw("stac", COCO, wanted, fold)) for fold in range(1, 6)] == stac


def test_a_validation_set_is_set_aside_with_its_labels(tmp_path: Path) -> None:
    source = coco(tmp_path, 400)
    whole = json.loads(source.read_text())
    manifest = split(source, "--val", 20, "--percent", 10, "--folds", "1-2", "--group-by", r"scene(\d+)")
    held = ids_of(source, "val.json")
    assert len(held) == 80
    for fold in (1, 2):
        labeled, others = (ids_of(source, f"fold{fold}_10_{part}.json") for part in ("labeled", "unlabeled"))
        assert sorted([*held, *labeled, *others]) == sorted(image["id"] for image in whole["images"])
        assert len(labeled) == 32  # of the other 320
    scenes = {image["id"]: image["file_name"].partition("_")[0] for image in whole["images"]}
    assert {scenes[one] for one in held}.isdisjoint({scenes[one] for one in scenes.keys() - set(held)})
    val = json.loads((tmp_path / "splits" / "val.json").read_text())
    assert val["categories"] == whole["categories"]
    assert [one["id"] for one in val["annotations"]] == [one["id"] for one in whole["annotations"] if one["image_id"] in set(held)]
    assert (manifest["set_aside"], manifest["images"]) == (20, 320)


def test_boxes_are_counted_in_what_a_validation_set_leaves(tmp_path: Path) -> None:
    source = coco(tmp_path, 200)
    (_, made) = split(source, "--val", 25, "--percent", 10, "--folds", 1)["splits"]
    labeled = json.loads((tmp_path / "splits" / "fold1_10_labeled.json").read_text())
    counts = Counter(one["category_id"] for one in labeled["annotations"] if not one["iscrowd"])
    assert made["boxes"] == {one["name"]: counts[one["id"]] for one in labeled["categories"]}


def test_a_validation_set_alone_leaves_all_others_labelled(tmp_path: Path) -> None:
    source = coco(tmp_path, 40)
    split(source, "--val", 25)
    assert sorted(path.name for path in (tmp_path / "splits").iterdir()) == ["labeled.json", "manifest.json", "val.json"]
    held, others = (json.loads((tmp_path / "splits" / name).read_text()) for name in ("val.json", "labeled.json"))
    assert (len(held["images"]), len(others["images"])) == (10, 30)
    assert len(held["annotations"]) + len(others["annotations"]) == len(json.loads(source.read_text())["annotations"])


def test_a_validation_set_can_be_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And classes that it lacks are told."""
    source = coco(tmp_path, 60)
    content = json.loads(source.read_text())
    first = content["images"][0]["id"]
    content["annotations"].append({"id": 10**6, "image_id": first, "category_id": 4, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0})
    source.write_text(json.dumps(content))
    seen, told = set(), []
    for seed in range(8):
        split(source, "--val", 25, "--val-seed", seed)
        drawn = tuple(ids_of(source, "val.json"))
        part = "the other images" if first in drawn else "val.json"
        told.append(part)
        assert f"warning: {part}: no box of 1 class ('rare') - try another --val-seed" in capsys.readouterr().err
        seen.add(drawn)
    assert len(seen) == 8
    assert set(told) == {"val.json", "the other images"}
    with pytest.raises(UserError, match="--val-seed: it is of the draw of --val - give both"):
        split(source, "--percent", 10, "--val-seed", 1)


def test_published_first_draws() -> None:
    assert draw("softteacher", COCO, 11828, 1)[:3].tolist() == [105285, 107335, 49358]


def test_one_command_makes_all_folds_of_coco(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a JSON with COCO's number of images: two shares here, of the default four."""
    source = coco(tmp_path, COCO)
    content = json.loads(source.read_text())
    stored = [image["id"] for image in content["images"]]
    manifest = split(source, "--percent", 1, 10, "--folds", "1-2")
    assert [made["images"] for made in manifest["splits"]] == [1182, 1182, 11828, 11828]
    assert "fold1_10: 11828 labelled and 106459 other images" in capsys.readouterr().out
    labeled, rest = ids_of(source, "fold1_10_labeled.json"), ids_of(source, "fold1_10_unlabeled.json")
    assert set(labeled) == {stored[position] for position in draw("softteacher", COCO, 11828, 1)}
    assert {stored[105285], stored[107335], stored[49358]} <= set(labeled)
    assert sorted(labeled + rest) == sorted(stored)
    assert set(ids_of(source, "fold2_10_labeled.json")) != set(labeled)


def test_images_without_a_group_are_each_on_their_own() -> None:
    records = [{"file_name": "s7_a.jpg", "city": 3}, {"file_name": "b.jpg"}, {"file_name": "s7_c.jpg", "city": 3}, {"file_name": "d.jpg", "city": None}]
    for by in ("city", r"s(\d)_"):
        assert group_images(records, by).tolist() == [0, 1, 0, 2]


def test_files_load_and_the_manifest_is_true(tmp_path: Path) -> None:
    source = coco(tmp_path, 400)
    before = source.read_bytes()
    manifest = split(source, "--count", 40, "--folds", 3)
    folder = tmp_path / "splits"
    assert sorted(path.name for path in folder.iterdir()) == [
        "fold3_40images_labeled.json",
        "fold3_40images_unlabeled.json",
        "manifest.json",
    ]
    (made,) = manifest["splits"]
    import hashlib

    assert manifest["sha256"] == hashlib.sha256(before).hexdigest()
    assert source.read_bytes() == before
    for name, digest in made["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    images = tmp_path / "images"
    images.mkdir()
    for image in json.loads(before)["images"]:
        (images / image["file_name"]).touch()
    labeled = load_coco(folder / "fold3_40images_labeled.json", images)
    unlabeled = load_coco(folder / "fold3_40images_unlabeled.json", images, need_labels=False)
    assert (len(labeled), len(unlabeled)) == (40, 360)
    counts = Counter(labeled.class_names[label] for label in labeled.labels[~labeled.crowd])
    assert made["boxes"] == {name: counts[name] for name in ("c", "a", "b", "rare")}
    assert labeled.crowd.any()
    whole = {image["id"]: image for image in json.loads(before)["images"]}
    for record in json.loads((folder / "fold3_40images_labeled.json").read_text())["images"]:
        assert record == whole[record["id"]]


@pytest.mark.parametrize("polygon", [[[1, 2]], [[1, 2, float("nan"), 4, 5, 6]], "x"])
def test_broken_polygons_are_written_as_json(tmp_path: Path, polygon: Any) -> None:
    source = coco(tmp_path, 400)
    content = json.loads(source.read_text())
    for annotation in content["annotations"][:20]:
        del annotation["bbox"]
        annotation["segmentation"] = polygon
    source.write_text(json.dumps(content))
    split(source, "--count", 399)
    made = json.loads((tmp_path / "splits" / "fold1_399images_labeled.json").read_text(), parse_constant=pytest.fail)
    assert any("bbox" not in annotation for annotation in made["annotations"])


def test_stac_and_ubteacher(tmp_path: Path) -> None:
    source = coco(tmp_path, 400)
    content = json.loads(source.read_text())
    manifest = split(source, "--protocol", "stac", "--percent", 10, "--folds", 1)
    expected = np.unique(np.random.RandomState(1).choice(range(400), size=40))
    assert manifest["splits"][0]["images"] == len(expected)
    labeled = ids_of(source, "fold1_10_labeled.json")
    assert labeled == [content["images"][position]["id"] for position in expected]

    small, *others = content["annotations"]
    small["bbox"][2:] = [0.5, 0.5]  # all that is left of its image: nothing to train on, but detectron2 counts it
    content["annotations"] = [small, *(a for a in others if a["image_id"] != small["image_id"])]
    source.write_text(json.dumps(content))
    boxed = sorted({a["image_id"] for a in content["annotations"] if not a["iscrowd"]})
    indices = tmp_path / "supervision.txt"
    indices.write_text(json.dumps({"10.0": {"0": [0, 5, len(boxed) - 1]}}))
    split(source, "--protocol", "ubteacher", "--percent", 10, "--folds", 0, "--indices", indices)
    assert sorted(ids_of(source, "fold0_10_labeled.json")) == [boxed[0], boxed[5], boxed[-1]]
    for fold, text, problem in (
        (7, None, "no fold 7"),
        (0, {"10": {"0": [4000]}}, "another data set"),
        (0, [1], "another format"),
    ):
        if text is not None:
            indices.write_text(json.dumps(text))
        with pytest.raises(UserError, match=problem):
            split(source, "--protocol", "ubteacher", "--percent", 10, "--folds", fold, "--indices", indices)


@pytest.mark.parametrize(("by", "size"), [("city", 10), (r"scene\d+", 4), (r"^(scene\d+)_view", 4)])
def test_groups_stay_together(tmp_path: Path, by: str, size: int) -> None:
    source = coco(tmp_path, 400)
    manifest = split(source, "--count", 50, "--folds", 1, "--group-by", by)
    assert 50 <= manifest["splits"][0]["images"] < 50 + size
    labeled = set(ids_of(source, "fold1_50images_labeled.json"))
    groups = Counter(n // size for n, image in enumerate(json.loads(source.read_text())["images"]) if image["id"] in labeled)
    assert set(groups.values()) == {size}


def test_each_class_gets_its_boxes(tmp_path: Path) -> None:
    source = coco(tmp_path, 400, rare=True)
    plain = split(source, "--count", 20, "--folds", 1)["splits"][0]
    filled = split(source, "--count", 20, "--folds", 1, "--min-per-class", 4)["splits"][0]
    assert plain["boxes"]["rare"] < 4
    assert min(filled["boxes"].values()) >= 4
    assert filled["images"] <= 24
    grouped = split(source, "--count", 20, "--folds", 1, "--min-per-class", 4, "--group-by", "city")["splits"][0]
    assert min(grouped["boxes"].values()) >= 4
    assert grouped["images"] % 10 == 0
    with pytest.raises(UserError, match="'rare' has only 5 boxes in all"):
        split(source, "--count", 20, "--min-per-class", 6)


def test_a_class_without_boxes_and_a_file_of_two_images_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = coco(tmp_path, 40)  # no box of "rare"
    assert split(source, "--count", 10, "--folds", 1)["images"] == 40
    assert f"warning: {source}: classes have no box (1: rare)" in capsys.readouterr().err
    with pytest.raises(UserError, match="'rare' has only 0 boxes in all - take it out of the JSON's categories"):
        split(source, "--count", 10, "--min-per-class", 1)
    for flags in (("--min-per-class", 1), ("--folds", 2), ("--protocol", "stac")):
        with pytest.raises(UserError, match=f"{flags[0]}: it is of labelled shares, and --val alone makes none"):
            split(source, "--val", 25, *flags)
    content = json.loads(source.read_text())
    content["images"][7]["file_name"] = content["images"][3]["file_name"]
    source.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"source\.json: lists the file 'scene0_view3\.jpg' 2 times, and the splits could share it"):
        split(source, "--val", 25)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--percent", 1, "--count", 3], "--percent and --count"), (["--percent", 0.1], "^--percent 0.1: 0 of .*: a share has at least 1"),
        (["--percent", 100], "not all"), (["--percent", "nan"], "^--percent: is not a finite number"), (["--percent", "inf"], "^--percent: is not"),
        (["--val", 100], "^--val: .* less than 100"), (["--val", 99.9], "^--val 99.9: all .* would be set aside"),
        (["--percent", 0], "^--percent: .* use more than 0"), (["--count", 0], "^--count: .* use at least 1"),
        (["--percent", 10, "10.0000001"], "--percent: 10 stands there twice"), (["--count", 5, 5], "--count: 5 stands there twice"),
        (["--min-per-class", -1], "^--min-per-class: .* use at least 0"), (["--folds", "1-"], "--folds"),
        (["--set", "optim.lr=1"], "optim.lr=1: is not used here"), (["--folds", "5-1"], "--folds"), (["--folds", "x"], "--folds"),
        (["--protocol", "ubteacher"], "--indices"), (["--indices", "x"], "--indices"), (["--group-by", "("], "--group-by"),
        (["--group-by", "town"], "--group-by"), (["--protocol", "stack"], "did you mean 'stac'"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path: Path, arguments: list[Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        split(coco(tmp_path, 400), *arguments)


def test_rules_are_those_of_training(tmp_path: Path) -> None:
    source = coco(tmp_path, 40)
    content = json.loads(source.read_text())
    for annotation in content["annotations"][::3]:
        annotation["bbox"][2] = 0
    source.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"cannot be used .* raise data\.rules\.max_bad_annotations"):
        split(source, "--percent", 10, "--folds", 1)
    split(source, "--percent", 10, "--folds", 1, "--set", "data.rules.max_bad_annotations=0.5")


def test_annotations_of_unlisted_classes_stay_out_as_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = coco(tmp_path, 40)
    content = json.loads(source.read_text())
    for number in (0, 5):
        content["annotations"][number]["category_id"] = 77
    source.write_text(json.dumps(content))
    split(source, "--val", 25, "--set", "data.rules.max_bad_annotations=0.5")
    told = f"warning: {source}: annotations of categories that it does not list are left out (2: annotations[0], annotations[5])"
    assert told in capsys.readouterr().err.splitlines()
    parts = [json.loads((tmp_path / "splits" / name).read_text())["annotations"] for name in ("val.json", "labeled.json")]
    assert sorted(one["id"] for part in parts for one in part) == [one["id"] for one in content["annotations"] if one["category_id"] != 77]


def test_splits_are_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, folder = coco(tmp_path, 40), tmp_path / "own"
    folder.mkdir()
    arguments = ["--annotations", str(source), "--output", str(folder), "--percent", "10", "--folds", "1-2"]
    for name in ("manifest.json", "fold2_10_unlabeled.json"):
        (folder / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name}: exists - give another --output, or --overwrite"):
            make_splits.main(arguments)
        assert [path.name for path in folder.iterdir()] == [name]
        (folder / name).unlink()
    (folder / "notes.txt").write_text("mine")
    make_splits.main(arguments)
    make_splits.main([*arguments, "--overwrite"])
    assert (folder / "notes.txt").read_text() == "mine"


def test_what_is_split_is_never_written_over(tmp_path: Path) -> None:
    """Splitting in place, where the whole data set has the name of a part."""
    source = coco(tmp_path, 40)
    for name in ("labeled.json", "val.json"):
        own = source.rename(tmp_path / name)
        before = own.read_bytes()
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(own)
        for given in (own, tmp_path / "link"):
            with pytest.raises(UserError, match=f"{name}: is read, too, and would be lost - give another --output"):
                make_splits.main(["--annotations", str(given), "--output", str(tmp_path), "--val", "25", "--overwrite"])
        assert own.read_bytes() == before
        source = own


def test_a_full_disk_leaves_no_half_of_the_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = coco(tmp_path, 40)
    with pytest.raises(UserError, match=r"splits: cannot be written \(File too large\) - give another --output"), full_disk(2000):
        split(source, "--percent", 10, "--folds", "1-2")  # the first file fits
    assert not list((tmp_path / "splits").iterdir())


def test_groups_that_leave_no_other_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = coco(tmp_path, 40, rare=True)
    with pytest.raises(UserError, match=r"--group-by '\^\(scene\)': makes 1 group of all 40 images"):
        split(source, "--percent", 10, "--group-by", "^(scene)")
    with pytest.raises(UserError, match=r"fold1_90: all 40 images would be labelled .*'city' makes 4 groups\) - ask for fewer"):
        split(source, "--percent", 90, "--folds", 1, "--group-by", "city")
    assert not (tmp_path / "splits").exists()
    capsys.readouterr()
    split(source, "--count", 4, "--folds", 1, "--group-by", "city")
    split(source, "--count", 9, "--folds", 1, "--group-by", "city")  # not much more than asked for
    told = [line for line in capsys.readouterr().err.splitlines() if "images have no annotation" not in line]
    assert told == ["warning: fold1_4images: 10 labelled images instead of 4 (--group-by 'city' makes 4 groups)"]
