"""docs/paper_tables.md: each command parses, and sets what its row of the paper's tables means and nothing else."""
from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts")]

from read_settings import RunSettings, load_settings, train_parser  # noqa: E402

from dtg_core.data.sources import open_sources  # noqa: E402
from dtg_core.engine.schedules import scale_lr  # noqa: E402
from dtg_core.settings import load_config  # noqa: E402
from dtg_core.settings_text import flatten  # noqa: E402

TEXT = (ROOT / "docs" / "paper_tables.md").read_text(encoding="utf-8")
ROWS = {(table, row): (figures, command) for table, row, figures, command
        in re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| `(train [^`]+)` \|$", TEXT, re.MULTILINE)}

RULE = "guidance.stages."
FASTER, GFL = {"detector": "faster_rcnn"}, {"detector": "gfl"}


def all_stages(**changes: Any) -> dict[str, Any]:
    return {f"{RULE}{stage}.{key}": value for stage in ("rpn", "rcnn") for key, value in changes.items()}


def paradigm(name: str) -> dict[str, Any]:
    of_stage = "none" if name == "supervised" else name
    return {"paradigm": name} | {f"{RULE}{stage}.paradigm": of_stage for stage in ("head", "rpn", "rcnn")}


SUPERVISED, SPARSE = FASTER | paradigm("supervised"), FASTER | paradigm("sparse")
ONLY_RPN = FASTER | {f"{RULE}rcnn.paradigm": "none"}
HALF = {"run.steps": 90_000, "optim.milestones": (60_000, 80_000)}
HALF_FULL = {"run.steps": 360_000, "optim.milestones": (240_000, 340_000)}

#: Percentage (None: the full setting) and all that a row changes in its config, beside the labelled file and the run folder.
MEANING: dict[tuple[str, str], tuple[int | None, dict[str, Any]]] = {
    **{("1", f"supervised, {percent} %"): (percent, SUPERVISED) for percent in (1, 2, 5, 10)},
    ("1", "supervised, full"): (None, SUPERVISED | {"data.labeled_per_device": 2, "optim.lr": 0.02}),
    **{("1", f"DTG-SSOD, {percent} %"): (percent, FASTER) for percent in (1, 2, 5, 10)},
    ("1", "DTG-SSOD, full"): (None, FASTER),
    ("2(a)", "no guidance"): (10, SUPERVISED),
    ("2(a)", "RPN"): (10, ONLY_RPN),
    ("2(a)", "RPN and R-CNN"): (10, FASTER),
    ("2(b)", "none"): (10, ONLY_RPN),
    ("2(b)", "class labels"): (10, FASTER | {f"{RULE}rcnn.box": False, f"{RULE}rcnn.rank": False}),
    ("2(b)", "and box targets"): (10, FASTER | {f"{RULE}rcnn.rank": False}),
    ("2(b)", "and rank matching"): (10, FASTER),
    ("2(c)", "RPN sparse, R-CNN sparse"): (10, SPARSE),
    ("2(c)", "RPN sparse, R-CNN dense"): (10, FASTER | {f"{RULE}rpn.paradigm": "sparse"}),
    ("2(c)", "RPN dense, R-CNN dense"): (10, FASTER),
    **{("2(d)", f"sparse, {percent} %"): (percent, SPARSE) for percent in (1, 5, 10)},
    **{("2(d)", f"dense, {percent} %"): (percent, FASTER) for percent in (1, 5, 10)},
    ("2(e)", "10 %, 90k"): (10, FASTER | HALF),
    ("2(e)", "10 %, 180k"): (10, FASTER),
    ("2(e)", "full, 360k"): (None, FASTER | HALF_FULL),
    ("2(e)", "full, 720k"): (None, FASTER),
    ("3(a)", "T = 0.5, beta = 1"): (10, FASTER | all_stages(rank_weight=1.0, temperature=0.5)),
    ("3(a)", "T = 1, beta = 1"): (10, FASTER | all_stages(rank_weight=1.0)),
    ("3(a)", "T = 5, beta = 1"): (10, FASTER | all_stages(rank_weight=1.0, temperature=5.0)),
    ("3(b)", "beta = 1"): (10, FASTER | all_stages(rank_weight=1.0)),
    ("3(b)", "beta = 3"): (10, FASTER),
    ("3(b)", "beta = 5"): (10, FASTER | all_stages(rank_weight=5.0)),
    ("3(c)", "GFL, supervised"): (10, GFL | paradigm("supervised")),
    ("3(c)", "GFL, sparse"): (10, GFL | paradigm("sparse")),
    ("3(c)", "GFL, dense"): (10, GFL),
}

#: What Sec. 4.2 says of both settings.
PAPER = {
    "detector": "gfl",  # the one that no command leaves to the default
    f"{RULE}rpn.tau": 0.9, f"{RULE}rcnn.tau": 0.45, f"{RULE}rpn.paradigm": "dense", f"{RULE}rcnn.paradigm": "dense",
    f"{RULE}head.paradigm": "dense", "paradigm": "dense",
    **all_stages(temperature=1.0, rank_weight=3.0, rank=True, box=True, classification=True),
    "optim.name": "sgd", "optim.lr": 0.01, "optim.gamma": 0.1, "data.unlabeled_per_device": 4, "views.box_hull": "corners",
    "guidance.start_step": 2000, "guidance.ramp_steps": 2000,
}
SETTINGS = {
    "coco_partial": {"data.labeled_per_device": 1, "guidance.alpha": 4.0, "run.steps": 180_000,
                     "optim.milestones": (120_000, 160_000)},
    "coco_full": {"data.labeled_per_device": 4, "guidance.alpha": 2.0, "run.steps": 720_000,
                  "optim.milestones": (480_000, 680_000)},
}


def settings_of(command: str) -> tuple[dict[str, Any], list[str]]:
    """All settings of a command of the table, and its warnings."""
    arguments = shlex.split(command.replace("${FOLD}", "1"))
    assert arguments[0] == "train"
    assert not any("$" in argument for argument in arguments)
    options = train_parser().parse(arguments[1:])
    options.config = ROOT / options.config
    settings, _, warnings = load_settings(options)
    return flatten(settings), warnings


def config_of(name: str) -> dict[str, Any]:
    return flatten(load_config(RunSettings, ROOT / "configs" / f"{name}.yaml")[0])


@pytest.mark.parametrize("name", SETTINGS)
def test_both_configs_are_the_papers(name):
    found = config_of(name)
    wanted = PAPER | SETTINGS[name]
    assert {key: found[key] for key in wanted} == wanted
    assert found["backbone.name"].startswith("resnet50")
    assert found["backbone.pretrained"]
    assert found["run.checkpoint_every"] > 0


def test_configs_differ_only_where_the_paper_does():
    one, other = config_of("coco_partial"), config_of("coco_full")
    differing = {key for key in one if one[key] != other[key]}
    assert differing == {
        "data.labeled", "data.unlabeled", "data.labeled_per_device", "data.workers", "optim.milestones",
        "optim.reference_batch", "guidance.alpha",
        "run.steps", "run.evaluate_every",
    }


def test_no_row_is_missing():
    assert set(ROWS) == set(MEANING)
    assert TEXT.count("`train ") == len(ROWS)


@pytest.mark.parametrize("row", MEANING, ids=lambda row: f"{row[0]} {row[1]}")
def test_row_changes_just_what_it_names(row):
    percent, changes = MEANING[row]
    found, warnings = settings_of(ROWS[row][1])
    wanted = config_of("coco_full" if percent is None else "coco_partial") | changes
    if percent is not None:
        wanted["data.labeled"] = f"data/splits/softteacher/fold1_{percent}_labeled.json"
    wanted["run.output"] = found["run.output"]
    assert found == wanted
    assert not warnings


def test_a_run_folder_stands_for_one_command():
    by_folder: dict[str, str] = {}
    for _, command in ROWS.values():
        folder = settings_of(command)[0]["run.output"]
        assert by_folder.setdefault(folder, command) == command
    assert len(set(by_folder.values())) == len(by_folder)


def test_equal_commands_have_equal_figures():
    """One run, one AP; Table 1 gives means of five folds, whose first figure is another one."""
    by_command: dict[str, str] = {}
    for (table, _), (figures, command) in ROWS.items():
        if table != "1" and "full" not in command:
            ap = figures.split(" / ")[0]
            assert by_command.setdefault(command, ap) == ap


def test_figures_are_the_papers(shared):
    facts = (shared / "facts" / "method.md").read_text(encoding="utf-8")
    section = facts[facts.index("**Table 1"):facts.index("**Other anchors**")].replace("±.", "±0.")
    for (table, row), (figures, _) in ROWS.items():
        assert re.search(rf"(?<![\d.]){re.escape(figures.replace(' ', ''))}(?!\d)", section), f"{table} {row}: {figures}"


def test_commands_find_coco_as_it_is_laid_out(tmp_path, monkeypatch):
    """The shell lines under "Before", on a COCO of a few images whose files have its names."""
    monkeypatch.chdir(tmp_path)
    names = {"train2017": range(4), "val2017": range(10, 12), "unlabeled2017": range(20, 23)}
    for folder, numbers in names.items():
        (tmp_path / "data/coco" / folder).mkdir(parents=True)
        for number in numbers:
            Image.new("RGB", (64, 48), (number, 0, 0)).save(tmp_path / "data/coco" / folder / f"{number:012}.jpg")

    def write(file: str, numbers: range) -> None:
        images = [{"id": number, "file_name": f"{number:012}.jpg", "width": 64, "height": 48} for number in numbers]
        boxes = [{"id": number, "image_id": number, "category_id": 1, "bbox": [4, 4, 20, 30], "area": 600, "iscrowd": 0}
                 for number in numbers]
        path = tmp_path / "data" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "person"}]}))

    write("coco/annotations/instances_train2017.json", names["train2017"])
    write("coco/annotations/instances_val2017.json", names["val2017"])
    (before,) = re.findall(r"```bash\n(mkdir.*?)```", TEXT, re.DOTALL)
    subprocess.run(["bash", "-e", "-c", before], check=True)
    write("splits/softteacher/fold1_10_labeled.json", range(1, 2))

    for row, sizes in {("2(e)", "10 %, 180k"): (1, 3, 2), ("2(e)", "full, 720k"): (4, 3, 2)}.items():
        options = train_parser().parse(shlex.split(ROWS[row][1].replace("${FOLD}", "1"))[1:])
        options.config = ROOT / options.config
        sources = open_sources(load_settings(options)[0].data, supervised=False)
        assert sources.unlabeled is not None
        assert sources.val is not None
        assert (len(sources.labeled), len(sources.unlabeled), len(sources.val)) == sizes


@pytest.mark.parametrize("name", ["coco_partial", "coco_full"])
def test_the_papers_eight_processes_keep_the_papers_learning_rate(name: str) -> None:
    config, _ = load_config(RunSettings, ROOT / "configs" / f"{name}.yaml")
    assert scale_lr(config, 8).lr == config.optim.lr == 0.01
    assert scale_lr(config, 4).lr == 0.005
