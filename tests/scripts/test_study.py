"""study.py: grids, what runs share, interruptions and failures, on tiny runs of a few steps."""
from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT, TINY, TinyData, lines, weights, write_coco
from runs import run as fork

sys.path[:0] = [str(ROOT / "scripts")]
import study as script  # noqa: E402
from read_settings import train_parser  # noqa: E402

from dtg_core.engine.study import Plan, acting_settings, plan, read_study  # noqa: E402
from dtg_core.errors import UserError  # noqa: E402

STEPS, START = 6, 3
SETTINGS = [*TINY, f"run.steps={STEPS}", f"guidance.start_step={START}", "guidance.ramp_steps=1", "run.log_every=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData.write(tmp_path_factory.mktemp("data"))


def write_study(folder: Path, text: str, data: TinyData | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "empty.yaml").touch()
    files = ""
    if data is not None:
        files = f"data: {{labeled: {data.labeled}, unlabeled: {data.unlabeled}, val: {data.val}}}\n"
    (folder / "study.yaml").write_text(f"config: empty.yaml\n{files}{text}")
    return folder / "study.yaml"


def planned(file: Path, *overrides: str, folder: str = "out") -> Plan:
    def parse(arguments: Sequence[str]) -> Mapping[str, Any]:
        return script.settings_of(arguments, [])

    return plan(read_study(file), file, file.parent / folder, overrides, parse)


def train(plan_: Plan, logs: Path) -> None:
    """What the study starts, one after another, in forks of this process."""
    for work in [*plan_.phases, *plan_.runs]:
        ended = fork(work.command(), logs)
        assert ended.status == 0, ended.err


@pytest.mark.parametrize("every", [1, 100])
def test_shared_supervised_phases_change_nothing(data: TinyData, tmp_path: Path, every: int) -> None:
    """Every weight and every figure of the log, as if each run had been trained from its first step."""
    file = write_study(tmp_path, "detectors: [gfl]\nparadigms: [supervised, dense, sparse]\n", data)
    evaluated = f"run.evaluate_every={every}"
    shared = planned(file, *SETTINGS, evaluated)
    file.write_text(file.read_text() + "share_supervised_phase: false\n")
    alone = planned(file, *SETTINGS, evaluated, folder="alone")
    assert (len(shared.phases), len(alone.phases)) == (1, 0)
    train(shared, tmp_path / "logs")
    train(alone, tmp_path / "logs")
    assert not shared.phases
    final = []
    for one, other in zip(shared.runs, alone.runs):
        assert one.phase is not None
        assert weights(one.folder) == weights(other.folder)
        assert lines(one.folder) == lines(other.folder)
        assert (one.folder / "results.json").read_text() == (other.folder / "results.json").read_text()
        assert not (one.folder / "checkpoints" / "step_00000003").exists()  # it went on from the phase's
        evaluations = [line["step"] for line in lines(one.folder) if "teacher/AP" in line]
        assert evaluations == [*range(1, STEPS + 1)] if every == 1 else [START, STEPS]
        final.append(weights(one.folder))
    assert final[0] != final[1] != final[2]


# Study files -----------------------------------------------------------------------------------------------------------


STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_study_files(file: Path, tmp_path: Path) -> None:
    """Each opens with its command and cost, and its grid parses to command lines of train.py that are all different."""
    head = file.read_text()
    assert f"#   python scripts/study.py configs/studies/{file.name} --" in head
    assert re.search(r"^# Cost +(\d+) runs", head, re.MULTILINE)
    study = read_study(file)
    found = plan(study, file, tmp_path, [], lambda given: script.settings_of(given, []))
    assert int(re.search(r"^# Cost +(\d+) runs", head, re.MULTILINE)[1]) == len(found.runs)  # type: ignore[index]
    assert len({run.name for run in found.runs}) == len({json.dumps(run.settings) for run in found.runs}) == len(found.runs)
    assert {run.settings["detector"] for run in found.runs} == set(study.detectors)
    assert not any("{fold}" in argument or "{percent}" in argument for run in found.runs for argument in run.arguments)


@pytest.mark.parametrize("table", ["1", "2", "2d", "3", "3c"])
def test_studies_of_the_papers_tables_are_its_commands(table: str, tmp_path: Path) -> None:
    """Each run is a row of docs/paper_tables.md, and each row of these tables but those of all of COCO is a run."""
    text = (ROOT / "docs" / "paper_tables.md").read_text(encoding="utf-8")
    wanted = {}
    for number, row, command in re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]+ \| `train ([^`]+)` \|$", text, re.MULTILINE):
        short = re.sub(r"\W", "", number)
        mine = {"1": ["1"], "2": ["2a", "2b", "2c", "2e"], "2d": ["2d"], "3": ["3a", "3b"], "3c": ["3c"]}[table]
        if short in mine and "full" not in row:
            for fold in range(1, 6 if table == "1" else 2):
                arguments = shlex.split(command.replace("${FOLD}", str(fold)))
                arguments[arguments.index("--config") + 1] = str(ROOT / "configs" / "coco_partial.yaml")
                settings = acting_settings(script.settings_of(arguments, []))
                wanted[json.dumps(settings, sort_keys=True)] = row
    file = ROOT / "configs" / "studies" / f"coco_table{table}.yaml"
    found = plan(read_study(file), file, tmp_path, [], lambda given: script.settings_of(given, []))
    assert {json.dumps(run.settings, sort_keys=True) for run in found.runs} == set(wanted)


def test_rows_without_an_effect_are_left_out(tmp_path: Path) -> None:
    rows = "rows: {default: {}, tau: {guidance.stages.head.tau: 0.6}, sure: {guidance.stages.head.pseudo_score: 0.7}}"
    found = planned(write_study(tmp_path, f"detectors: [gfl, faster_rcnn]\nseeds: [3]\n{rows}\n"), "guidance.start_step=5")
    assert [run.name for run in found.runs] == [
        "gfl-supervised-default-seed3", "gfl-sparse-default-seed3", "gfl-dense-default-seed3", "gfl-dense-tau-seed3",
        "gfl-sparse-sure-seed3", "faster_rcnn-supervised-default-seed3", "faster_rcnn-sparse-default-seed3",
        "faster_rcnn-dense-default-seed3",
    ]  # fmt: skip
    assert found.copies["gfl-sparse-tau-seed3"] == "gfl-sparse-default-seed3"


def test_what_acts_before_guidance_is_not_shared(tmp_path: Path) -> None:
    """The same phase for what acts later, another one for each setting that acts in it, none where there is nothing to share."""
    rows = ["base: {}", "alpha: {guidance.alpha: 3}", "rotate: {views.rotate: 3}", "lr: {optim.lr: 0.5}", "ema: {optim.ema: 0.5}",
            "start: {guidance.start_step: 9}", "none: {guidance.start_step: 0}", "flip: {views.flip: 0.1}",
            "late: {guidance.start_step: 90}", "images: {data.unlabeled_per_device: 7}", "labelled: {data.labeled_per_device: 7}"]
    file = write_study(tmp_path, f"paradigms: [dense, sparse]\nset: {{guidance.start_step: 5, run.steps: 20}}\nrows: {{{', '.join(rows)}}}\n")
    phases = {run.name.split("-")[2]: run.phase for run in planned(file).runs if "dense" in run.name}
    alike = {name for name, phase in phases.items() if phase == phases["base"]}
    assert alike == {"base", "alpha", "rotate", "images"}
    assert phases["none"] is phases["late"] is None
    others = [phases[name] for name in ("base", "lr", "ema", "start", "flip", "labelled")]
    assert len({phase.folder for phase in others if phase}) == 6
    assert phases["start"] is not None
    assert phases["start"].steps == 9
    by_seed = [run.phase for run in planned(write_study(tmp_path, "seeds: [0, 1]\nparadigms: [dense]\n")).runs]
    assert by_seed == [None, None]  # alone in it


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("seed: [1]", ["study.yaml:2", "seed", "did you mean 'seeds'"]),
        ("detectors: [gfll]", ["detectors", "'gfll'", "did you mean 'gfl'"]),
        ("paradigms: [denze]", ["study.yaml:2", "denze", "did you mean 'dense'"]),
        ("seeds: []", ["seeds", "is empty"]),
        ("seeds: [1, 1]", ["seeds", "twice"]),
        ("seeds: [-1]", ["seeds", "out of range"]),
        ("set: {optim.lrr: 1}", ["gfl-supervised-seed0", "optim.lrr", "did you mean 'optim.lr'"]),
        ("rows: {a b: {optim.lr: fast}}", ["gfl-supervised-a_b-seed0", "optim.lr", "a number"]),
        ("rows: {a b: {}, a_b: {}}", ["'a b' and 'a_b'", "rename one"]),
        ("rows: {a: 3}", ["rows.a", "wanted settings"]),
        ("config: none.yaml", ["none.yaml", "no such file"]),
        ("data: {percents: [10]}", ["data.percents", "neither is given"]),
        ("data: {source: a.json}", ["data.source", "data.percents and data.folds"]),
        ("data: {source: a.json, percents: [10], folds: [1]}", ["data.images", "data.source needs it"]),
        ("data: {source: a.json, labeled: b.json}", ["data.labeled", "leave one of the two out"]),
        ("data: {unlabeled: a.json}", ["data.unlabeled", "belongs to data.labeled"]),
        ("data: {val: a.json}", ["gfl-supervised-seed0", "data.val", "is of no use without labelled images"]),
        ("data: {labeled: 'a{fold}.json'}", ["data.labeled", "data.folds are not given"]),
        ("data: {labeled: a.json, folds: [1, 2]}", ["data.labeled", "has no {fold}"]),
        ("data: {labeled: a, percents: [100]}", ["data.percents", "out of range"]),
        ("data: {labeled: a.json, unlabeled: b}", ["gfl-supervised-seed0", "data.val", "a study compares AP"]),
        ("seeds: [0\n", ["study.yaml:", "not plain YAML"]),
    ],
)
def test_bad_study_files_are_one_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = write_study(tmp_path, text)
    if text.startswith("config:"):
        file.write_text(text)
    with pytest.raises(UserError) as error:
        script.main([str(file), "--dry-run", "--output", str(tmp_path / "out")])
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("missing", "text", "problem"),
    [
        ("labeled_1.json", "", "gfl-supervised-fold1-seed0: data.labeled: there is no such file"),
        ("val.json", "", "gfl-supervised-fold1-seed0: data.val: there is no such file"),
        ("pictures", "", "gfl-supervised-fold1-seed0: data.images: there is no such folder"),
        ("val_pictures", "set: {data.val_images: DIR/val_pictures}", "gfl-supervised-fold1-seed0: data.val_images: there is no such folder"),
        ("others.json", "", "gfl-sparse-fold1-seed0: data.unlabeled: there is no such file or folder"),  # not of the supervised run
        ("labeled_1.json", "paradigms: [dense]", "gfl-dense-fold1-seed0: data.labeled: there is no such file"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_missing_files_are_told_before_hours_of_training(tmp_path: Path, missing: str, text: str, problem: str, dry: list[str]) -> None:
    for name in {"labeled_1.json", "val.json", "others.json"} - {missing}:
        (tmp_path / name).touch()
    if missing != "pictures":
        (tmp_path / "pictures").mkdir()
    files = f"labeled: '{tmp_path}/labeled_{{fold}}.json', unlabeled: {tmp_path}/others.json, val: {tmp_path}/val.json"
    file = write_study(tmp_path, f"data: {{{files}, images: {tmp_path}/pictures, folds: [1]}}\n{text.replace('DIR', str(tmp_path))}\n")
    with pytest.raises(UserError) as error:
        script.main([str(file), "--output", str(tmp_path / "out"), *dry])
    assert str(error.value) == f"{file}: {problem} ({tmp_path / missing}) - correct the path, or put the data there"
    assert not (tmp_path / "out").exists()


def test_a_source_and_what_it_needs_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before its splits are made. Ready-made studies say so, too, on a machine without their data."""
    names = {"source": "all.json", "val": "val.json", "images": "pictures"}
    places = ", ".join(f"{key}: {tmp_path / name}" for key, name in names.items())
    file = write_study(tmp_path, f"data: {{{places}, percents: [10], folds: [1]}}\n")
    arguments = [str(file), "--dry-run", "--output", str(tmp_path / "out")]
    for key, name in names.items():
        with pytest.raises(UserError, match=rf"data\.{key}: there is no such (file|folder) \({tmp_path / name}\)"):
            script.main(arguments)
        (tmp_path / name).mkdir() if key == "images" else (tmp_path / name).touch()
    assert script.main(arguments) == 0
    (tmp_path / "all.json").unlink()
    (tmp_path / "all.json").mkdir()
    with pytest.raises(UserError, match=r"data\.source: is a folder, not a file"):
        script.main(arguments)


def test_ready_made_studies_without_their_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in STUDIES:
        if "source:" in file.read_text():
            with pytest.raises(UserError, match=rf"{file.name}: data.source: there is no such file \({tmp_path}/data/"):
                script.main([str(file), "--dry-run"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "gfl-sparse-seed0: data.unlabeled: is not given, and this run learns from unlabelled images - give a folder"),
        ("set: {data: {unlabeled: ., unlisted: unlabeled}}", "gfl-sparse-seed0: data.unlisted: is of no use beside data.unlabeled"),
        ("paradigms: [supervised]", None),
        ("paradigms: [dense]\nset: {guidance.stages.head.paradigm: none}", None),
        ("set: {data.unlisted: unlabeled}", None),
        ("rows: {a: {data.unlisted: unlabeled}}", None),
        ("set: {data.unlabeled: .}", None),
    ],
)
def test_guided_runs_have_unlabelled_images(tmp_path: Path, text: str, problem: str | None) -> None:
    file = write_study(tmp_path, f"data: {{labeled: a.json, val: b.json}}\n{text}\n")
    if problem is None:
        assert planned(file).runs
        return
    with pytest.raises(UserError) as error:
        planned(file)
    assert str(error.value).startswith(f"{file}: {problem}")


def test_a_part_of_the_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What says which runs there are, beside a setting of them."""
    file = write_study(tmp_path, "detectors: [gfl, faster_rcnn]\nparadigms: [supervised, dense]\ndata: {folds: [0, 1]}\n")
    part = ["detectors=[gfl]", "data.folds=[1, 3]", "run.steps=7", "seeds=[5]", "paradigms=[dense]"]
    assert script.main([str(file), "--output", str(tmp_path / "out"), "--dry-run", "--set", *part]) == 0
    *commands, last = capsys.readouterr().out.splitlines()
    assert last.startswith("2 runs ")
    runs = [command for command in commands if "--stop-at" not in command]
    assert [Path(shlex.split(command)[shlex.split(command).index("--output") + 1]).name for command in runs] == [
        "gfl-dense-fold1-seed5", "gfl-dense-fold3-seed5"
    ]  # fmt: skip
    assert all("run.steps=7" in command for command in runs)
    with pytest.raises(UserError, match=r"detectors: unknown value 'gf' - did you mean 'gfl'\?"):
        script.main([str(file), "--set", "detectors=[gf]"])


def test_bad_command_lines(tmp_path: Path) -> None:
    file = write_study(tmp_path, "")
    for arguments, part in (
        ([str(tmp_path / "studdy.yaml")], "did you mean 'study.yaml'"),
        ([str(file), "--jobs", "0"], "--jobs"),
        ([str(file), "--job", "2"], "did you mean '--jobs'"),
        ([str(file), "--dry-run", "--set", "run.stepz=3"], "did you mean 'run.steps'"),
    ):
        with pytest.raises(UserError, match=re.escape(part)):
            script.main(arguments)


def test_rows_run_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_study(tmp_path, "paradigms: [supervised, dense]\nrows: {low: {guidance.stages.head.tau: 0.2}, 'tau 0.5': {}, none: {}}\n")
    assert script.main([str(file), "--output", str(tmp_path / "out"), "--dry-run", "--rows", "tau 0.5", "low"]) == 0
    *commands, _ = capsys.readouterr().out.splitlines()
    ran = [Path(command.partition("--output ")[2].split()[0]).name for command in commands if "--stop-at" not in command]
    assert ran == ["gfl-supervised-low-seed0", "gfl-dense-low-seed0", "gfl-dense-tau_0.5-seed0"]
    with pytest.raises(UserError, match=r"study\.yaml: --rows: there is no row 'tau 0\.4' - did you mean 'tau 0\.5'\?"):
        script.main([str(file), "--dry-run", "--rows", "tau 0.4"])
    with pytest.raises(UserError, match="there is no row 'low' - the file has none: leave --rows out"):
        script.main([str(write_study(tmp_path / "plain", "paradigms: [dense]\n")), "--dry-run", "--rows", "low"])



def test_dry_run_prints_commands_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_study(tmp_path, "seeds: [0, 1]\n")
    assert script.main([str(file), "--dry-run", "--output", str(tmp_path / "out"), "--set", "guidance.start_step=7"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert commands.pop() == "6 runs (0 finished) and 2 shared supervised phases"
    assert len(commands) == 8
    for command in commands:
        train_parser().parse(shlex.split(command)[2:])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_folders_of_others_are_refused(tmp_path: Path, dry: list[str]) -> None:
    file, out = write_study(tmp_path, ""), tmp_path / "out"
    for names in (["notes.txt"], ["config.yaml", "metrics.jsonl", ".lock"], ["config.yaml", "runs/", "logs/"], ["runs/", "logs/"]):
        for name in names:
            (out / name).mkdir(parents=True) if name.endswith("/") else out.mkdir(exist_ok=True) or (out / name).touch()
        before = sorted(out.rglob("*"))
        with pytest.raises(UserError, match=r"out: holds something that is not a study's \(no study.yaml\) - give another --output"):
            script.main([str(file), "--output", str(out), *dry])
        assert sorted(out.rglob("*")) == before
        shutil.rmtree(out)


@pytest.mark.parametrize("names", [[], [".lock"], ["study.yaml", "splits"]])
def test_folders_of_studies_are_taken(tmp_path: Path, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / "out" / name).mkdir() if "." not in name else (tmp_path / "out" / name).touch()
    assert script.main([str(write_study(tmp_path, "")), "--dry-run", "--output", str(tmp_path / "out")]) == 0


def test_a_run_with_other_settings_is_not_taken_for_this_one(data: TinyData, tmp_path: Path) -> None:
    file = write_study(tmp_path, "paradigms: [supervised]\n", data)
    (work,) = planned(file, *TINY, "run.steps=1").runs
    assert fork(work.command(), tmp_path / "logs").status == 0
    assert planned(file, *TINY, "run.steps=1", "run.log_every=7").runs[0].finished
    assert work.told().startswith("AP ")
    assert planned(file, folder="elsewhere").runs[0].told() == ""
    with pytest.raises(UserError, match=r"other settings \(optim.lr: 0.0005 -> 0.25\).*another --output"):
        planned(file, *TINY, "run.steps=1", "optim.lr=0.25")
    with pytest.raises(UserError, match=r"other settings \(run.steps: 1 -> 2\)"):  # it would be trained on, and its results lost
        planned(file, *TINY, "run.steps=2")
    with pytest.raises(UserError, match=r"other settings \(images_of_a_step.labeled: \[1, 1\] -> \[2, 1\]\)"):
        planned(file, *TINY, "run.steps=1", "data.labeled_per_device=2")


def test_a_run_on_other_labels_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """Nor is a shared phase. Files that are gone are not needed by what is finished."""
    data = TinyData.write(tmp_path / "data")
    file = write_study(tmp_path, "paradigms: [supervised, dense]\n", data)
    settings = (*TINY, "run.steps=2")
    first = planned(file, *settings)
    (phase,), (supervised, dense) = first.phases, first.runs
    for work in (phase, supervised):
        assert fork(work.command(), tmp_path / "logs").status == 0
    assert planned(file, *settings).runs[0].finished

    def refused(path: Path, text: str, folder: Path) -> None:
        before = path.read_text()
        path.write_text(text)
        with pytest.raises(UserError) as error:
            planned(file, *settings)
        assert str(error.value) == (f"{folder}: has read other images, boxes or classes from {path} than are in it now - give another "
                                    "--output, or delete this folder")
        path.write_text(before)
        planned(file, *settings)

    content = json.loads(data.labeled.read_text())
    content["annotations"][0]["category_id"] = 3 - content["annotations"][0]["category_id"]
    refused(data.labeled, json.dumps(content), supervised.folder)
    fewer = json.loads(data.val.read_text())
    fewer["annotations"].pop()
    refused(data.val, json.dumps(fewer), supervised.folder)
    data.labeled.write_text(json.dumps(json.loads(data.labeled.read_text()), indent=1))  # the same labels
    planned(file, *settings)
    kept = supervised.folder.rename(tmp_path / "kept")
    refused(data.labeled, json.dumps(content), phase.folder)
    kept.rename(supervised.folder)
    assert fork(dense.command(), tmp_path / "logs").status == 0
    data.labeled.unlink()
    assert all(work.finished for work in planned(file, *settings).runs)
    (tmp_path / "out" / "study.yaml").touch()
    assert script.main([str(file), "--dry-run", "--output", str(tmp_path / "out"), "--set", *settings]) == 0


# Whole studies ---------------------------------------------------------------------------------------------------------


def run(file: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "scripts" / "study.py"), str(file), "--output", str(file.parent / "out"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_splits_interruption_failure_and_table(tmp_path: Path) -> None:
    """A source is split; one row cannot start and fails alone; the study is stopped, goes on, and ends with the table."""
    source, val = write_coco(tmp_path / "source", 12, 1), write_coco(tmp_path / "val", 3, 3)
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        (tmp_path / "source" / "images" / f"{number}.png").rename(tmp_path / "pictures" / f"{number}.png")
    file = write_study(tmp_path, (
        f"paradigms: [dense]\nrows: {{good: {{}}, bad: {{backbone.weights: nowhere.safetensors}}}}\n"
        f"data: {{source: {source}, images: {tmp_path / 'pictures'}, val: {val}, percents: [25], folds: [1]}}\n"
    ))  # fmt: skip
    settings = ["--set", *TINY, "run.steps=3000", "run.log_every=1"]
    folder = tmp_path / "out" / "runs" / "gfl-dense-good-25percent-fold1-seed0"
    process = run(file, *settings)
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=250)
    assert process.returncode == 130, err
    assert "stopped by signal 2 with 0 of 2 runs finished; the same command goes on" in err
    (checkpoint,) = (folder / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step_"))
    labeled = json.loads((tmp_path / "out" / "splits" / "fold1_25_labeled.json").read_text())["images"]
    unlabeled = json.loads((tmp_path / "out" / "splits" / "fold1_25_unlabeled.json").read_text())["images"]
    assert (len(labeled), len({image["id"] for image in labeled + unlabeled})) == (3, 12)

    process = run(file, "--set", *TINY, f"run.steps={step + 2}", "run.log_every=1")  # the other settings are the same
    out, err = process.communicate(timeout=250)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    assert "error: gfl-dense-bad-25percent-fold1-seed0: status 2: error: " in err
    assert "nowhere.safetensors" in err
    assert out.startswith("## Results")
    assert "\n| gfl, dense, good |" in out
    assert (tmp_path / "out" / "compare.md").read_text() in out
    assert (tmp_path / "out" / "study.yaml").read_text() == file.read_text()
    assert "<table>" in (tmp_path / "out" / "compare.html").read_text()
    log = (tmp_path / "out" / "logs" / f"{folder.name}.log").read_text()
    assert f"resuming from {checkpoint} at step {step}" in log
    assert [line["step"] for line in lines(folder)] == [*range(1, step + 3), step + 2]

    source.write_text(source.read_text().replace('"green"', '"blue"'))
    process = run(file, "--set", *TINY, f"run.steps={step + 2}", "run.log_every=1")
    _, err = process.communicate(timeout=250)
    assert process.returncode == 2
    assert "splits: made of another" in err
