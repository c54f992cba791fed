"""The commands of README and docs, run: with small networks and a few steps, on stand-ins for the data that they speak of.

Each runs in a folder of its own that has the places of the pages: ``configs``, ``own.json``, ``photos``, a miniature COCO, finished
runs. What is added to a command to make it short is in ``SHORT``; the launcher in front of it is left out. Installations are not here.
"""
from __future__ import annotations

import glob
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from runs import ROOT, TINY, Process, run, write_coco
from test_docs import COMMANDS, INLINE

FEW = ["data.shapes_labeled=4", "data.shapes_unlabeled=6", "data.shapes_val=3"]
SMALL = ["backbone.name=test_resnet", "backbone.pretrained=false", "views.short_edge=[64,64]", "views.long_edge=64"]
#: What is added to the arguments of a script, and where.
SHORT = {
    "train.py": ["--set", *TINY, *FEW, "run.steps=3", "run.evaluate_every=0"],
    "measure_guidance.py": ["--images", "4", "--batch", "2"],
    "show_views.py": ["--count", "2", "--set", *FEW],
    "show_guidance.py": ["--count", "2", "--measure", "4"],
    "benchmark.py": ["--backbone", "test_resnet", "--size", "64", "--repeats", "1", "--set", *FEW],
    "export.py": ["--score", "0.001", "--format", "torch_export"],
    "try_backbones.py": ["--set", *FEW],
    "study.py": ["--dry-run"],
    "retinanet.py": ["run.steps=2", "run.log_every=1", *SMALL, *FEW],
}
BEFORE = {"try_backbones.py": ["test_resnet", "--steps", "2"]}
#: Installations, and what other tests run.
SKIPPED = re.compile(r"(.*/)?(pip|python3?) (-m|install)|pdoc ")
OWN, BCCD = "--labeled own.json --images photos/ --val val.json", "--labeled splits/fold1_10_labeled.json --images data/bccd/images"
RUNS = {  # folder in runs/: flags of its training
    "gfl-dense-seed0": "--paradigm dense", "gfl-sparse-seed0": "--paradigm sparse", "screen": "--paradigm supervised",
    "screen-rcnn": "--paradigm supervised --detector faster_rcnn",
    "faster_rcnn-supervised-own-seed0": f"--paradigm supervised --detector faster_rcnn {OWN}",
    "faster_rcnn-dense-own-seed0": f"--paradigm dense --detector faster_rcnn {OWN} --unlabeled folder",
    "bccd_coarse/runs/gfl-supervised-adaptive-10percent-fold1-seed0": f"--paradigm supervised {BCCD}",
    "bccd_coarse/runs/faster_rcnn-supervised-adaptive-10percent-fold4-seed0": f"--paradigm supervised --detector faster_rcnn {BCCD}",
}  # fmt: skip
RUN_HERE = [command for _, command in COMMANDS if not SKIPPED.match(command)]
RUN_HERE += [command for _, command in INLINE if re.match(r"\S+ torchrun|python scripts/make_splits", command)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the commands find: files of a reader, data sets and runs."""
    folder = tmp_path_factory.mktemp("base")
    for name in ("configs", "scripts", "examples"):
        (folder / name).symlink_to(ROOT / name)
    places = {  # annotation files of a reader and of the data sets, by their folder, with the number of images
        ".": ("own.json", 9), "data/coco/train2017": ("instances_train2017.json", 120),
        "data/coco/val2017": ("instances_val2017.json", 3), "data/bccd": ("annotations/train.json", 30),
        "elsewhere": ("val.json", 3), "more_photos": ("list.json", 5),
        "data/cards": ("annotations/train.json", 30),
    }  # fmt: skip
    for seed, (place, (name, count)) in enumerate(places.items()):
        made = folder / place / name
        made.parent.mkdir(parents=True, exist_ok=True)
        write_coco(folder / place, count, seed).rename(made)
    for name, target in {"photos": "images", "folder": "more_photos/images"}.items():
        (folder / name).symlink_to(folder / target)
    content = json.loads((folder / "own.json").read_text())
    for name, rows in (("own.json", slice(6)), ("val.json", slice(6, None))):
        kept = [image["id"] for image in content["images"][rows]]
        boxes = [box for box in content["annotations"] if box["image_id"] in kept]
        (folder / name).write_text(json.dumps({**content, "images": content["images"][rows], "annotations": boxes}))
    (folder / "all.json").symlink_to("data/coco/train2017/instances_train2017.json")
    for name in ("bccd", "cards"):
        (folder / "data" / name / "annotations" / "val.json").symlink_to(folder / "elsewhere/val.json")
    splits = "scripts/make_splits.py --annotations {} --output {} --percent 10"
    for source, output in (("data/coco/train2017/instances_train2017.json", "data/splits/softteacher"),
                           ("data/bccd/annotations/train.json", "splits")):  # fmt: skip
        made = in_fork(splits.format(source, output), folder, folder / "logs")
        assert made.status == 0, made.err
    (folder / "data/splits/softteacher/images").symlink_to(folder / "data/coco/train2017/images")
    for name, flags in RUNS.items():
        made = in_fork(f"scripts/train.py --detector gfl {flags} --output runs/{name}", folder, folder / "logs")
        assert made.status == 0, made.err
    shutil.copytree(folder / "splits", folder / "runs/bccd_coarse/splits")
    return folder


def in_fork(command: str, folder: Path, logs: Path) -> Process:
    """Run a command line there, without the launcher in front of its script; it has SHORT's additions."""
    words = shlex.split(command)
    place = next(index for index, word in enumerate(words) if word.endswith(".py"))
    name = Path(words[place]).name
    found = [sorted(glob.glob(word, root_dir=folder)) if "*" in word else [word] for word in words[place + 1 :]]
    arguments = [*BEFORE.get(name, []), *(word for group in found for word in group), *SHORT.get(name, [])]
    main = example if name == "retinanet.py" else importlib.import_module(Path(name).stem).main
    return run(arguments, logs, {"DTG_CACHE": str(logs.parent / "cache")}, lambda: os.chdir(folder), main)


def example(arguments: Sequence[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "retinanet.py"), run_name="__main__")


@pytest.mark.parametrize("command", dict.fromkeys(RUN_HERE))
def test_commands_run(command: str, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    (folder / "runs").mkdir(parents=True)
    for entry in base.iterdir():
        if entry.name not in ("runs", "logs"):
            (folder / entry.name).symlink_to(entry)
    if "train.py" not in command and "study.py" not in command:  # trainings make their own
        shutil.copytree(base / "runs", folder / "runs", dirs_exist_ok=True)
    if "make_splits.py" in command:
        command = re.sub(r"--output \S+", "--output made", command)
    ended = in_fork(command, folder, tmp_path / "logs")
    assert ended.status == 0, ended.err
    assert ended.out


def test_commands_are_found() -> None:
    assert {re.search(r"(\w+)\.py", command)[1] for command in RUN_HERE} >= {  # type: ignore[index]
        "train", "evaluate", "predict", "compare", "show_guidance", "show_views", "measure_guidance", "study", "export",
        "make_splits", "check_data", "benchmark", "try_backbones", "retinanet",
    }  # fmt: skip
