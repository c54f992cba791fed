"""Comparison of runs: grouping, means against pencil cases, refusals, and pages that stand alone."""
from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from pages import stands_alone

from dtg_core.engine.compare import COMPARED, compare, draw_curves, tables, to_html, to_markdown
from dtg_core.errors import UserError
from dtg_core.settings_text import to_yaml

sys.path[:0] = [str(ROOT / "scripts")]
import compare as compare_script  # noqa: E402
from read_settings import RunSettings  # noqa: E402


def write_run(
    folder: Path, ap: float, *, paradigm: str = "dense", seed: int = 0, fold: int = 0, labeled: str | None = None,
    alpha: float = 2.0, tau: float = 0.4, step: int | None = 100, output: str = "",
    classes: tuple[str, ...] = ("cat", "dog"), made: dict[str, Any] | None = None, per_device: int = 1,
) -> Path:
    settings = RunSettings()
    stages = {
        name: replace(rule, paradigm="none" if paradigm == "supervised" else paradigm, tau=tau)
        for name, rule in settings.guidance.stages.items()
    }
    settings = replace(
        settings, detector="gfl", paradigm=paradigm,
        run=replace(settings.run, steps=100, seed=seed, output=output or str(folder)),
        guidance=replace(settings.guidance, alpha=alpha, stages=stages),
        data=replace(settings.data, shapes_seed=fold, labeled=labeled, labeled_per_device=per_device),
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(settings))
    told = {name: ap + number for number, name in enumerate(COMPARED)} | {"classes": {name: ap for name in classes}}
    made = dict(made or {})
    read = {"labeled": f"{labeled}-{fold}", "unlabeled": "all", "val": "all"} | made.pop("read", {})
    recorded = {
        "images_of_a_step": {"labeled": per_device, "unlabeled": 4}, "mixed_precision": "no", "changed": [],
        "data": {name: {"sha256": digest} for name, digest in read.items()}, **made,
    }  # fmt: skip
    if step is not None:
        (folder / "results.json").write_text(json.dumps({"step": step, "teacher": told, "student": told, **recorded}))
    lines = [{"step": 50, "step_seconds": 0.6, "data_seconds": 0.3}, {"step": 50, "teacher/AP": ap / 2},
             {"step": 100, "step_seconds": 1.8, "data_seconds": 0.3}, {"step": 100, "teacher/AP": ap}]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def results(*paths: Path) -> list[list[str]]:
    return tables(compare(paths))["Results"]


def read_from(**data: str) -> dict[str, Any]:
    """What a run tells of the data that it has read: here a digest for each."""
    return {"read": data}


def test_warnings_of_training_are_told(tmp_path):
    run = write_run(tmp_path / "run", 30)
    assert "warned" not in to_markdown(compare([run]))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "warning": "the teacher sleeps"}\n')
    assert f"- {run}: warned at step 60: the teacher sleeps" in to_markdown(compare([run]))


def test_means_spreads_and_differences(tmp_path):
    sparse = [write_run(tmp_path / f"s{seed}", ap, paradigm="sparse", seed=seed) for seed, ap in enumerate((30, 32, 34))]
    dense = [write_run(tmp_path / f"d{seed}", ap, seed=seed) for seed, ap in enumerate((31, 33.5, 34.5))]
    header, first, second = results(*sparse, *dense)
    assert header == ["", "AP", "AP50", "AP75", "AP - baseline", "AP50 - baseline", "AP75 - baseline", "runs"]
    assert first == ["gfl, sparse", "32.00 ± 2.00", "33.00 ± 2.00", "34.00 ± 2.00", "", "", "", "3"]
    assert second[:2] == ["gfl, dense", "33.00 ± 1.80"]
    assert second[4:7] == ["+1.00 ± 0.50"] * 3  # of 1.0, 1.5 and 0.5, seed by seed
    whole = tables(compare([*sparse, *dense]))
    # 50 steps of 0.6 s and 50 of 1.8 s, of which each waits 0.3 s; defaults of one process
    assert whole["Cost"][1] == ["gfl, sparse", "2.0", "1.200", "25%", "100", "1 + 4"]
    assert whole["Teacher's AP on the way"][1:] == [["50", "16.00 ± 1.00", "16.50 ± 0.90"], ["100", "32.00 ± 2.00", "33.00 ± 1.80"]]
    assert whole["Classes"][1] == ["cat", "32.00 ± 2.00", "33.00 ± 1.80"]


def test_runs_are_paired_by_what_may_differ_in_a_row(tmp_path):
    """In whatever order they are given: 30 and 50 of alpha 1 and 2 to 31 and 51."""
    low = [write_run(tmp_path / f"s{alpha}", ap, paradigm="sparse", alpha=alpha) for alpha, ap in ((1.0, 30), (2.0, 50))]
    high = [write_run(tmp_path / f"d{alpha}", ap, alpha=alpha) for alpha, ap in ((1.0, 31), (2.0, 51))]
    for order in ([*low, *high], [*low, *high[::-1]]):
        assert tables(compare(order, ["guidance.alpha"]))["Results"][2][4] == "+1.00 ± 0.00"


def test_a_fold_is_a_word(tmp_path):
    runs = [write_run(tmp_path / name, 30, labeled=f"data/{name}.json") for name in ("fold1", "fold2", "scaffold1", "scaffold2")]
    assert [len(row.runs) for row in compare(runs).rows] == [2, 1, 1]


def test_other_seeds_have_no_paired_spread(tmp_path):
    runs = [write_run(tmp_path / "a", 30, paradigm="sparse", seed=0),
            write_run(tmp_path / "b", 31, paradigm="sparse", seed=1),
            write_run(tmp_path / "c", 33, seed=0), write_run(tmp_path / "d", 34, seed=2)]  # fmt: skip
    comparison = compare(runs)
    assert tables(comparison)["Results"][2][4] == "+3.00"
    assert any("its seeds or folds are not those of gfl, sparse" in note for note in comparison.notes)


def test_rows_are_measured_by_the_first_of_their_kind(tmp_path):
    """Of their detector and labelled images, paired by fold also where only one side has unlabelled images."""
    runs = []
    for share, base in ((5, 10), (10, 20)):
        for paradigm, more in (("supervised", (0, 0)), ("dense", (4, 6))):
            for fold in (1, 2):
                folder = tmp_path / f"{share}-{paradigm}-{fold}"
                ap = base + fold + more[fold - 1]
                runs.append(write_run(folder, ap, paradigm=paradigm, labeled=f"fold{fold}_{share}_labeled.json"))
                config = folder / "config.yaml"
                unlabeled = "null" if paradigm == "supervised" else f"fold{fold}_{share}_unlabeled.json"
                config.write_text(config.read_text().replace("unlabeled: null", f"unlabeled: {unlabeled}", 1))
    differences = [row[4] for row in results(*runs)[1:]]
    assert differences == ["", "+5.00 ± 1.41", "", "+5.00 ± 1.41"]
    assert not compare(runs).notes


def test_folds_are_one_row_and_shares_are_not(tmp_path):
    files = ["fold1_1_labeled.json", "fold2_1_labeled.json", "fold1_10_labeled.json"]
    runs = [write_run(tmp_path / str(number), 20, labeled=name) for number, name in enumerate(files)]
    assert [row[-1] for row in results(*runs)[1:]] == ["2", "1"]
    runs = [write_run(tmp_path / f"e{number}", 20, fold=number) for number in range(3)]
    assert [row[-1] for row in results(*runs)[1:]] == ["3"]
    runs = [write_run(tmp_path / f"s{n}", 20, labeled=f"x/instances_train2017.{n}@10.json") for n in (1, 2)]
    assert len(results(*runs)) == 2


def test_settings_without_effect_do_not_part_runs(tmp_path):
    runs = [write_run(tmp_path / "a", 20, paradigm="sparse", seed=0, tau=0.4),
            write_run(tmp_path / "b", 22, paradigm="sparse", seed=1, tau=0.3)]  # fmt: skip
    assert [row[:2] for row in results(*runs)[1:]] == [["gfl, sparse", "21.00 ± 1.41"]]
    runs = [write_run(tmp_path / "c", 20, tau=0.4), write_run(tmp_path / "d", 22, seed=1, tau=0.3)]
    assert [row[0] for row in results(*runs)[1:]] == ["gfl, dense, head.tau=0.4", "gfl, dense, head.tau=0.3"]
    # Without unlabelled images alpha means nothing.
    runs = [write_run(tmp_path / "e", 20, paradigm="supervised"),
            write_run(tmp_path / "f", 20, paradigm="supervised", seed=1, alpha=9.0)]  # fmt: skip
    assert len(results(*runs)) == 2


def test_rows_of_an_ablation_are_named_by_what_they_change(tmp_path):
    """Each differs in one of four settings from the first, whose names would fill a line."""
    runs = [write_run(tmp_path / "a", 20), write_run(tmp_path / "b", 21, alpha=4.0), write_run(tmp_path / "c", 21, tau=0.3),
            write_run(tmp_path / "d", 21, per_device=2), write_run(tmp_path / "e", 21, made={"mixed_precision": "bf16"})]  # fmt: skip
    assert [row.name.removeprefix("gfl, dense") for row in compare(runs).rows] == [
        "", ", guidance.alpha=4.0", ", head.tau=0.3", ", images_of_a_step.labeled=2", ", mixed_precision=bf16",
    ]  # fmt: skip


def test_it_says_which_settings_differ(tmp_path):
    runs = [write_run(tmp_path / "a", 20), write_run(tmp_path / "b", 21, alpha=4.0),
            write_run(tmp_path / "c", 21, paradigm="sparse")]  # fmt: skip
    comparison = compare(runs)
    assert comparison.differing == {
        "guidance.alpha": ["2.0", "4.0", "2.0"], "guidance.stages.head.paradigm": ["dense", "dense", "sparse"],
    }  # fmt: skip
    names = [row.name for row in comparison.rows]
    assert names == ["gfl, dense, guidance.alpha=2.0", "gfl, dense, guidance.alpha=4.0", "gfl, sparse"]
    labels = dict(zip(runs, ("low", "high", "")))
    assert [row.name for row in compare(runs, labels=labels).rows] == ["gfl, dense, low", "gfl, dense, high", "gfl, sparse"]
    over = compare(runs[:2], ["guidance.alpha"])
    assert len(over.rows) == 1
    with pytest.raises(UserError, match="alfa"):
        compare(runs, ["guidance.alfa"])


def test_refusals(tmp_path):
    good = write_run(tmp_path / "good", 20)
    for folder, words in (
        (write_run(tmp_path / "unfinished", 20, seed=1, step=50), "not finished .evaluated at step 50 of 100"),
        (write_run(tmp_path / "silent", 20, seed=1, step=None), "no results.json"),
        (write_run(tmp_path / "twice", 20, output="elsewhere"), "count one run twice"),
        (write_run(tmp_path / "other", 20, classes=("cat", "cow")), "other images or classes"),
        (tmp_path / "nowhere", "no such run folder"),
    ):
        with pytest.raises(UserError, match=words):
            compare([good, folder])
    found = json.loads((good / "results.json").read_text())
    damaged = [{name: value for name, value in found.items() if name != key}
               for key in ("step", "teacher", "student", "images_of_a_step", "mixed_precision", "data")]  # fmt: skip
    for content in ([1], *damaged):
        (tmp_path / "other" / "results.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="not the results"):
            compare([tmp_path / "other"])


def test_images_of_a_step_part_runs_and_processes_do_not(tmp_path):
    def batch(labeled: int) -> dict[str, Any]:
        return {"images_of_a_step": {"labeled": labeled, "unlabeled": 4}}

    runs = [write_run(tmp_path / "a", 20, per_device=2, made=batch(2)),
            write_run(tmp_path / "b", 21, per_device=1, seed=1, made=batch(2)),  # two processes
            write_run(tmp_path / "c", 22, per_device=1, seed=2, made=batch(1))]  # fmt: skip
    assert [row[-1] for row in results(*runs)[1:]] == ["2", "1"]
    assert compare(runs).differing == {"images_of_a_step.labeled": ["2", "1"]}


def test_a_course_with_several_settings_is_reported(tmp_path):
    plain = write_run(tmp_path / "a", 40)
    changed = write_run(tmp_path / "b", 50, paradigm="sparse", made={"changed": [{"step": 12, "changes": ["optim.lr: 1 -> 2"]}]})
    text = to_markdown(compare([plain, changed]))
    assert f"{changed}: had other settings or data until step 12 (optim.lr: 1 -> 2)" in text
    assert f"{plain}: had" not in text


def test_mixed_precision_parts_runs(tmp_path):
    runs = [write_run(tmp_path / "old", 20, seed=1), write_run(tmp_path / "a", 20, made={"mixed_precision": "no"}),
            write_run(tmp_path / "b", 21, made={"mixed_precision": "bf16"})]  # fmt: skip
    comparison = compare(runs)
    assert [row.name for row in comparison.rows] == ['gfl, dense, mixed_precision="no"', "gfl, dense, mixed_precision=bf16"]
    assert [len(row.runs) for row in comparison.rows] == [2, 1]


def test_data_are_judged_by_what_was_read(tmp_path):
    first = write_run(tmp_path / "first", 20, labeled="a.json", made=read_from(labeled="1", val="1"))
    same = write_run(tmp_path / "same", 21, seed=1, labeled="a.json", made=read_from(labeled="1", val="1"))
    assert len(results(first, same)) == 2
    changed = write_run(tmp_path / "changed", 21, seed=2, labeled="a.json", made=read_from(labeled="2", val="1"))
    with pytest.raises(UserError, match=r"its labeled data are not those of .*first"):
        compare([first, same, changed])
    elsewhere = write_run(tmp_path / "elsewhere", 21, seed=3, labeled="a.json", made=read_from(labeled="1", val="2"))
    with pytest.raises(UserError, match="same name, but with other images or boxes"):
        compare([first, elsewhere])


def test_rows_that_learnt_from_other_labels_are_told(tmp_path):
    """A baseline, trained before the labels of the same file were corrected; once for each file."""
    def run(name: str, digest: str, labeled: str | None = "a.json", **more: Any) -> Path:
        return write_run(tmp_path / name, 20, labeled=labeled, made=read_from(labeled=digest, val="1"), **more)

    before = [run(f"before{seed}", "1", paradigm="supervised", seed=seed) for seed in (0, 1)]
    after = [run(f"after{seed}", "2", seed=seed, labeled="./a.json") for seed in (0, 1)]
    note = (f"{before[0]} and {after[0]}: their labels differ, though both are of ./a.json, so differences in AP may be due to that - "
            "train the older again")
    assert compare([*before, *after]).notes == [note]
    assert f"- {note}.\n" in to_markdown(compare([*before, *after]))
    assert "their labels differ" in to_html(compare([*before, *after]))
    same = run("same", "1", paradigm="sparse")
    other = run("other", "3", labeled="b.json", paradigm="sparse", seed=1)
    assert not [note for note in compare([before[0], same, other]).notes if "labels" in note]


def test_rows_that_learnt_from_other_drawings_are_told(tmp_path):
    """The built-in data as another version of the program draws them; other folds and sizes are other data."""
    runs = [write_run(tmp_path / f"{paradigm}{fold}", 20, paradigm=paradigm, fold=fold, made=read_from(labeled=f"{digest}{fold}"))
            for paradigm, digest in (("sparse", "a"), ("dense", "b")) for fold in (0, 1)]
    notes = compare(runs).notes
    assert [note.split(":")[0] for note in notes] == [f"{runs[0]} and {runs[2]}", f"{runs[1]} and {runs[3]}"]
    assert "both are of the built-in data, so" in notes[0]
    assert not compare(runs[:2]).notes
    for run in runs[2:]:
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("shapes_labeled: 80", "shapes_labeled: 20"))
    assert not compare(runs).notes


def test_folds_of_the_built_in_data_have_their_own_validation_images(tmp_path):
    dense, sparse = ([write_run(tmp_path / f"{paradigm}{fold}", ap + 10 * fold, paradigm=paradigm, fold=fold, made=read_from(val=str(fold)))
                      for fold in range(2)] for paradigm, ap in (("dense", 22), ("sparse", 20)))  # fmt: skip
    comparison = compare([*sparse, *dense])
    assert [len(row.runs) for row in comparison.rows] == [2, 2]
    assert "+2.00 ± 0.00" in to_markdown(comparison)
    assert "-8.00" not in to_markdown(compare([sparse[1], dense[0]]))  # of other images, so no difference is told
    redrawn = write_run(tmp_path / "redrawn", 20, paradigm="supervised", made=read_from(val="another version"))
    with pytest.raises(UserError, match="other images or classes"):
        compare([sparse[0], redrawn])


def test_pages(tmp_path):
    runs = [write_run(tmp_path / f"<b>{seed}", 20 + seed, seed=seed) for seed in range(2)]
    comparison = compare(runs)
    widths = {len(line) for line in to_markdown(comparison).splitlines() if line.startswith("| ")}
    assert len(widths) <= len(tables(comparison))  # columns are aligned
    page = to_html(comparison)
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert stands_alone(page)


def test_curves(tmp_path):
    runs = [write_run(tmp_path / str(seed), 20 + seed, seed=seed) for seed in range(2)]
    comparison = compare(runs)
    assert comparison.rows[0].runs[0].curve == [(50, pytest.approx(30.0), 10.0), (100, pytest.approx(120.0), 20.0)]
    curves = draw_curves(comparison)
    assert (curves.count("<polyline"), curves.count("class=thin")) == (6, 4)  # two runs and their mean, twice
    assert "2 at 50" not in curves
    assert "10.25 at 50" in curves  # the mean of 10 and 10.5
    (tmp_path / "0" / "metrics.jsonl").unlink()
    assert draw_curves(compare(runs[:1])) == ""


def test_command_line(tmp_path, capsys):
    run = write_run(tmp_path / "run", 20)
    assert compare_script.main([str(run), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "compare.md").read_text() in capsys.readouterr().out
    assert stands_alone((tmp_path / "out" / "compare.html").read_text())
    assert len(list((tmp_path / "out").iterdir())) == 2
    for path, problem in ((run / "results.json", "is a file, not a folder"), (tmp_path / "out", "exists - give another --output")):
        with pytest.raises(UserError, match=problem):
            compare_script.main([str(tmp_path / "none"), "--output", str(path)])  # before the runs are read
    assert compare_script.main([str(run), "--output", str(tmp_path / "out"), "--overwrite"]) == 0
    with pytest.raises(UserError, match=r"is a file, not a folder - give folders that train\.py wrote"):
        compare_script.main([str(run / "results.json")])
