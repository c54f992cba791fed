"""The strict loader: every mistake is named with its place and key, everything written is read back equal."""

from __future__ import annotations

import dataclasses
import random
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtg_core.config import RENAMED, SCHEMA, Config, cross_check
from dtg_core.errors import UserError
from dtg_core.ranges import check_ranges
from dtg_core.settings import load_config, plain_yaml
from dtg_core.settings_text import flatten, to_yaml, yaml_scalar


def load(*overrides: str) -> Config:
    return load_config(Config, None, overrides)[0]


def written(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message(call: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_file_and_overrides_win_in_this_order(tmp_path: Path) -> None:
    path = written(tmp_path, "optim:\n  lr: 1e-3\n  gamma: 1\nguidance: {stages: {rpn: {tau: .8}}}\n")
    config, origins = load_config(Config, path, ["optim.lr=0.5", "guidance.stages.rpn.nms_iou=0.6"])
    assert config.optim.lr == 0.5
    assert config.optim.gamma == 1.0
    assert isinstance(config.optim.gamma, float)
    rpn = config.guidance.stages["rpn"]
    assert (rpn.tau, rpn.nms_iou, rpn.background_samples) == (0.8, 0.6, 256)
    assert config.guidance.stages["head"] == Config().guidance.stages["head"]
    assert origins["optim.lr"] == "command line"
    assert origins["optim.gamma"] == f"{path}:3"
    assert origins["guidance.stages.rpn.tau"] == f"{path}:4"
    assert origins["run.seed"] == "default"
    assert list(origins) == list(flatten(config))


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=1e-3", "optim.lr", 0.001),
        ("optim.lr=1", "optim.lr", 1.0),
        ("optim.lr=-.5E+1", "optim.lr", -5.0),
        ("run.steps=180_000", "run.steps", 180_000),
        ("optim.clip_norm=null", "optim.clip_norm", None),
        ("optim.clip_norm=", "optim.clip_norm", None),
        ("optim.milestones=[1, 2]", "optim.milestones", (1, 2)),
        ("optim.milestones=[]", "optim.milestones", ()),
        ("views.short_edge=[3,4]", "views.short_edge", (3, 4)),
        ("run.channels_last=false", "run.channels_last", False),
        ("optim.name=adamw", "optim.name", "adamw"),
        ("data.labeled=12:30", "data.labeled", "12:30"),
        ("data.labeled='null'", "data.labeled", "null"),
        ("data.labeled=a=b", "data.labeled", "a=b"),
        ("data.labeled=2026", "data.labeled", "2026"),
        (
            "backbone.options={a: [1, 1e-3, yes, true, null, 'true']}",
            "backbone.options",
            {"a": [1, 1e-3, "yes", True, None, "true"]},
        ),
        ("backbone.options.x.y=3", "backbone.options", {"x": {"y": 3}}),
    ],
)
def test_values_are_parsed_by_their_declared_type(override: str, key: str, value: object) -> None:
    found = flatten(load(override))[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.lr=abc", ["optim.lr", "a number", "'abc'"]),
        ("optim.lr=12:30", ["a number", "'12:30'"]),
        ("optim.lr='1'", ["a number", 'the text "1"']),
        ("optim.lr=true", ["a number", "'true'"]),
        ("optim.lr=", ["optim.lr", "nothing"]),
        ("optim.lr=[1]", ["a number", "a list of 1"]),
        ("optim.lr.x=1", ["keys and values"]),
        ("optim.lr=nan", ["finite"]),
        ("optim.lr=-.inf", ["finite"]),
        ("optim.lr=1e999", ["finite"]),
        ("run.steps=1e3", ["a whole number", "'1e3'"]),
        ("run.steps=1.0", ["a whole number"]),
        ("run.steps=010", ["a whole number"]),
        ("run.steps=" + "9" * 5000, ["a smaller number"]),
        ("run.channels_last=yes", ["true or false", "'yes'"]),
        ("run.channels_last=1", ["true or false"]),
        ("optim.name=adam", ["optim.name", "'adam'", "did you mean 'adamw'"]),
        ("optim=3", ["optim", "keys and values"]),
        ("guidance.stages.rpm.tau=1", ["did you mean 'guidance.stages.rpn'"]),
        ("optim.milestones=3", ["a list"]),
        ("optim.milestones=[1, b]", ["optim.milestones[1]", "'b'"]),
        ("views.short_edge=[1]", ["with 2 items", "a list of 1"]),
        ("lr=1", ["did you mean 'optim.lr'"]),
        ("optim.lrr=1", ["unknown key", "did you mean 'optim.lr'"]),
        ("data.labeled={a: b}", ["text"]),
        ("backbone.options.a=.nan", ["finite"]),
        ("backbone.options={a: 1, a: 2}", ["set twice"]),
        ("optim.name=null", ["'null'"]),
        ("optim.lr", ["dotted.key=value"]),
        ("=1", ["dotted.key=value"]),
        (".=1", ["unknown key"]),
        ("optim.lr=*a", ["aliases"]),
        ("optim.lr=&a 1", ["anchors"]),
        ("data.labeled=!!python/object/apply:os.system [id]", ["tag", "python"]),
        ("optim.lr=!!float 1", ["tag"]),
        ("optim.lr=[1", ["YAML"]),
        ("backbone.options=" + "[" * 3000, ["YAML"]),
        ("backbone.options={a: " + "[" * 400 + "]" * 400 + "}", ["deep"]),
        ("optim.lr=\x07", ["not text"]),
    ],
)
def test_wrong_override_is_named(override: str, parts: list[str]) -> None:
    text = message(load, override)
    assert text.startswith("--set ")
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        ("optim:\n  lr: 1\n  lrr: 2\n", 3, ["optim.lrr", "did you mean 'optim.lr'"]),
        ("optim:\n  lr: 1\n  lr: 2\n", 3, ["optim.lr", "set twice", "c.yaml:2"]),
        ("optim:\n\tlr: 1\n", 2, ["tab"]),
        ("a: &x 1\nb: *x\n", 1, ["anchors"]),
        ("optim: &x {lr: *x}\n", 1, ["anchors"]),
        ("x: *y\n", 1, ["aliases"]),
        ("run: !!python/object/apply:os.system [id]\n", 1, ["tag"]),
        ("- a\n", 1, ["keys and values"]),
        ("12\n", 1, ["keys and values"]),
        ("run:\n  seed: x\n", 2, ["run.seed", "'x'"]),
        ("? [a]\n: 1\n", 1, ["a plain key"]),
        ("run: {}\n---\nrun: {}\n", 2, ["YAML"]),
        ("optim: [\n", 2, ["YAML"]),
        ("run:\n  <<: {seed: 1}\n", 2, ["unknown key"]),
        ("guidance:\n  stages:\n    neck: {}\n", 3, ["guidance.stages.neck", "head, rpn, rcnn"]),
        ("run:\n  seed: .nan\n", 2, ["whole"]),
    ],
)
def test_wrong_file_is_named_with_its_line(tmp_path: Path, text: str, line: int, parts: list[str]) -> None:
    path = written(tmp_path, text)
    found = message(load_config, Config, path)
    assert found.startswith(f"{path}:{line}:")
    for part in parts:
        assert part in found


def test_unreadable_files(tmp_path: Path) -> None:
    path = written(tmp_path, "")
    assert load_config(Config, path)[0] == Config()
    path.write_bytes(b"\xef\xbb\xbfrun: {seed: 3}")  # a byte order mark
    assert load_config(Config, path)[0].run.seed == 3
    path.write_bytes(b"run:\n  output: \xff\n")
    assert message(load_config, Config, path).startswith(f"{path}:2: not UTF-8")
    path.write_bytes("run: {}".encode("utf-16"))
    assert "not UTF-8" in message(load_config, Config, path)
    path.write_bytes(b"run: {}\n\x00")
    assert message(load_config, Config, path).startswith(f"{path}:2: not text")
    assert "did you mean 'c.yaml'" in message(load_config, Config, tmp_path / "cc.yaml")
    assert "folder" in message(load_config, Config, tmp_path)


RENAMES: list[dict[str, str | None]] = [
    {"optim.rate": "optim.speed", "train": None, "guidance.weight": "optim.weight"},
    {"optim.speed": "optim.lr", "optim.weight": "guidance.alpha"},
]  # of a program whose settings are of version 3


def test_fault_60_older_schema_is_migrated(tmp_path: Path) -> None:
    text = "schema: 1\noptim:\n  rate: 0.5\n  gamma: 0.3\ntrain: {x: 1}\nguidance: {weight: 7}\n"
    path, notes = written(tmp_path, text), list[str]()
    config, origins = load_config(Config, path, ["run.steps=7"], RENAMES, notes)
    assert (config.optim.lr, config.optim.gamma, config.guidance.alpha, config.run.steps) == (0.5, 0.3, 7.0, 7)
    assert (origins["optim.lr"], origins["guidance.alpha"]) == (f"{path}:3", f"{path}:6")
    (note,) = notes
    assert note.startswith(f"{path}: made by version 1 of the settings, read as version 3 (optim.rate -> optim.speed, ")
    assert "train has no effect any more" in note
    notes.clear()
    written(tmp_path, "schema: 2\noptim: {weight: 2}\n")
    assert load_config(Config, path, [], RENAMES, notes)[0].guidance.alpha == 2
    assert "read as version 3 (optim.weight -> guidance.alpha)" in notes[0]
    assert plain_yaml("schema: 2\noptim: {speed: 3}\n", "x", RENAMES) == {"optim": {"lr": 3}}


def test_fault_60_newer_schema_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "run: {seed: 1, warp: 2}\nschema: 4\n")
    assert message(load_config, Config, path, [], RENAMES).startswith(f"{path}:2: schema: made by version 4 of the settings")
    for text, found in (("x", "'x'"), ("0", "'0'"), ("[1]", "a list of 1"), ("'1'", 'the text "1"'), ("", "nothing")):
        assert f"version from 1 on (found {found})" in message(load_config, Config, written(tmp_path, f"schema: {text}\n"), [], RENAMES)
    notes: list[str] = []
    written(tmp_path, f"schema: {SCHEMA}\nrun: {{seed: 9}}\n")
    assert load_config(Config, path, [], RENAMED, notes)[0].run.seed == 9
    written(tmp_path, "run: {seed: 9}\n")  # written by hand: of today
    assert load_config(Config, path, [], RENAMES, notes)[0].run.seed == 9
    assert notes == []
    assert f"schema: {SCHEMA}\n" in to_yaml(Config())


def test_empty_sections_change_nothing(tmp_path: Path) -> None:
    assert load_config(Config, written(tmp_path, "optim:\n  # lr: 1\nrun: {}\n"))[0] == Config()


texts = st.text(st.characters(codec=None), max_size=12)
numbers = st.one_of(
    st.integers(-(10**17), 10**17), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none(), texts
)
free = st.dictionaries(
    texts, st.recursive(numbers, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=5)
)


@given(texts, free, st.floats(allow_nan=False, allow_infinity=False), st.lists(st.integers(0, 10**6)))
@settings(max_examples=60, deadline=None)
def test_round_trip_of_any_value(
    tmp_path_factory: pytest.TempPathFactory, text: str, options: dict[str, Any], number: float, milestones: list[int]
) -> None:
    plain = Config()
    config = dataclasses.replace(
        plain,
        data=dataclasses.replace(plain.data, labeled=text),
        backbone=dataclasses.replace(plain.backbone, options=options),
        optim=dataclasses.replace(plain.optim, lr=number, milestones=tuple(milestones)),
    )
    path = tmp_path_factory.mktemp("round") / "c.yaml"
    for origins in (None, dict.fromkeys(flatten(config), "default")):
        assert load_config(Config, written(path.parent, to_yaml(config, origins)))[0] == config
    assert load(f"data.labeled={yaml_scalar(text)}").data.labeled == text


def test_yaml_says_everything_and_its_origin() -> None:
    config, origins = load_config(Config, None, ["optim.lr=1e-5"])
    lines = to_yaml(config, origins).splitlines()
    (line,) = (line for line in lines if line.startswith("  lr:"))
    assert line.split() == ["lr:", "1.0e-05", "#", "command", "line"]
    assert sum("#" in line for line in lines) == len(flatten(config))


def test_one_letter_typos_get_the_right_key() -> None:
    rng = random.Random(0)
    right = total = 0
    for key in [key for key in flatten(Config()) if key != "backbone.options"] * 4:
        head, _, name = key.rpartition(".")
        at = rng.randrange(len(name))
        letter = rng.choice(string.ascii_lowercase)
        changed = {
            0: name[:at] + name[at + 1 :],
            1: name[:at] + letter + name[at:],
            2: name[:at] + letter + name[at + 1 :],
            3: name[:at] + name[at + 1 : at + 2] + name[at] + name[at + 2 :],
        }[rng.randrange(4)]
        siblings = [
            other.removeprefix(f"{head}.").split(".")[0] for other in flatten(Config()) if other.startswith(f"{head}.")
        ]
        if not changed or changed in siblings:
            continue
        total += 1
        right += f"did you mean {key!r}" in message(load, f"{head}.{changed}=1")
    assert total > 200
    assert right / total >= 0.9, right / total


@pytest.mark.parametrize(
    "override",
    [
        "guidance.stages.rpn.tau=0",
        "guidance.stages.rpn.tau=1",
        "guidance.stages.head.temperature=0",
        "optim.lr=0",
        "optim.lr=-1",
        "run.steps=0",
        "views.flip=1.1",
        "views.flip=-0.1",
        "data.labeled_per_device=0",
        "optim.momentum=1",
        "optim.clip_norm=0",
        "views.short_edge=[0, 10]",
        "optim.ema=1.5",
        "run.seed=-1",
        "optim.milestones=[0]",
    ],
)
def test_ranges(override: str) -> None:
    config, origins = load_config(Config, None, [override])
    text = message(check_ranges, config, origins)
    assert text.startswith(f"command line: {override.partition('=')[0]}: is out of range (found")
    assert " - use " in text


def test_values_that_contradict_each_other() -> None:
    assert cross_check(Config(), {}) == []
    for override in (
        "optim.milestones=[2, 1]",
        "optim.milestones=[2, 2]",
        "views.short_edge=[20, 19]",
        "guidance.stages.rpn.background_tau=0.95",
        "guidance.stages.rpn.member_tau=0.95",
        *(f"data.{value}" for value in ("unlabeled=photos", "val=val.json", "images=photos", "unlisted=unlabeled")),
    ):
        config, origins = load_config(Config, None, [override])
        assert message(cross_check, config, origins).startswith(f"command line: {override.partition('=')[0]}")
    assert len(cross_check(load("run.steps=100"), {})) == 3
    (line,) = cross_check(load("views.short_edge=[400,800]", "views.test_short_edge=900", "views.long_edge=850"), {})
    assert line.startswith("views.long_edge: 850 keeps views smaller than the 900 px of")
    assert cross_check(load("data.labeled=own.json", "data.val=val.json", "data.images=photos"), {}) == []


def test_mutated_yaml_never_ends_in_another_error(tmp_path: Path) -> None:
    rng = random.Random(1)
    text = to_yaml(Config())
    for _ in range(60):
        cut = rng.randrange(len(text) - 400)
        characters = list(text[:300] + text[cut : cut + 300])
        for _ in range(rng.randint(1, 6)):
            characters[rng.randrange(len(characters))] = rng.choice("\t\n :[]{}&*!|>'\"%@`,#?-0aé\x00")
        try:
            load_config(Config, written(tmp_path, "".join(characters)))
        except UserError as error:
            lines = str(error).splitlines()
        else:
            continue
        assert len(lines) == 1
