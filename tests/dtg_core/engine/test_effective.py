"""Which settings have an effect, and that what names settings names ones that there are."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT

from dtg_core.config import StageRule
from dtg_core.engine.effective import (
    BATCH,
    DENSE_KEYS,
    INPUTS,
    SILENT,
    SPARSE_KEYS,
    UNLABELED_ONLY,
    UNREAD,
    effective,
    of_another,
    stage_paradigms,
)
from dtg_core.engine.resume import FREE
from dtg_core.settings import plain_yaml
from dtg_core.settings_text import dotted, flatten, to_yaml

sys.path[:0] = [str(ROOT / "scripts")]
from read_settings import RunSettings  # noqa: E402


@pytest.mark.parametrize("names", [SILENT, UNREAD, UNLABELED_ONLY, INPUTS, FREE])
def test_tables_name_settings_that_there_are(names):
    known = [*flatten(RunSettings()), *(f"{BATCH}.{kind}" for kind in ("labeled", "unlabeled"))]
    assert [name for name in names if name not in known] == []


def test_every_setting_of_a_rule_is_read_by_the_paradigms_that_it_is_for():
    assert not DENSE_KEYS & SPARSE_KEYS
    assert StageRule.__dataclass_fields__.keys() - DENSE_KEYS - SPARSE_KEYS == {"paradigm", "tau_rate"}
    assert StageRule.__dataclass_fields__.keys() >= DENSE_KEYS | SPARSE_KEYS


def test_a_setting_that_nobody_knows_is_read_by_dense_and_sparse_guidance():
    """As that of an extension, whose runs must not be taken for seeds of one another."""
    for paradigm, read in (("dense", True), ("sparse", True), ("none", False)):
        settings = {"detector": "gfl", "guidance.stages.head.paradigm": paradigm, "guidance.stages.head.jitter": 3}
        assert ("guidance.stages.head.jitter" in effective(settings)) == read


def test_a_section_that_was_emptied_by_hand_is_no_ones():
    emptied = {"detector": "gfl", "guidance": None, "guidance.stages": None, "views.flip": 0.5}
    assert [key for key in emptied if of_another(key, "gfl")] == []
    assert effective(emptied).keys() == emptied.keys() - {"guidance", "guidance.stages"}  # nothing is guided
    assert of_another("guidance.stages.rpn.tau", "gfl")
    assert of_another("faster_rcnn.channels", "gfl")


def test_paradigms_are_those_of_the_own_stages():
    settings = {"guidance.stages.head.paradigm": "none", "guidance.stages.rcnn.paradigm": "dense"}
    assert stage_paradigms({**settings, "detector": "gfl"}) == {"head": "none"}
    assert stage_paradigms({**settings, "detector": "mine"}) == {"head": "none", "rcnn": "dense"}  # which nobody knows


def test_effective_settings_of_a_detector():
    settings = dotted(plain_yaml(to_yaml(RunSettings(detector="faster_rcnn")), "text"))
    kept = effective(settings)
    assert {"faster_rcnn.rpn.pre_nms", "guidance.stages.rpn.tau", "optim.lr"} <= kept.keys()
    assert not any(key.startswith(("gfl.", "guidance.stages.head.")) for key in kept)
    assert not {"run.output", "guidance.stages.rcnn.pseudo_score", "paradigm"} & kept.keys()
    assert any(key.startswith("guidance.stages.head.") for key in effective({**settings, "detector": "mine"}))  # which nobody knows
    mixed = {**settings, "guidance.stages.rpn.paradigm": "sparse", "guidance.stages.rcnn.paradigm": "none"}
    of_stages = {key.removeprefix("guidance.stages.") for key in effective(mixed) if key.startswith("guidance.stages.")}
    assert of_stages == {"rpn.paradigm", "rpn.pseudo_score", "rpn.tau_rate", "rcnn.paradigm"}
    assert {"guidance.stages.rpn.tau_rate", "guidance.stages.rcnn.tau_rate"} <= kept.keys()  # dense guidance reads it too
