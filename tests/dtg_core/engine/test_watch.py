"""Warnings about a training that goes wrong: each once, after the right time, with a remedy."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal
from unittest.mock import Mock

import numpy as np
import pytest
from runs import TinyData, command, run

from dtg_core.config import Config, GuidanceConfig
from dtg_core.engine.folder import RunFolder
from dtg_core.engine.metrics import MetricsWriter, read_metrics
from dtg_core.engine.recorder import Recorder
from dtg_core.engine.run_state import RunState
from dtg_core.engine.watch import PATIENCE, Watch

FINE = {"guidance/head/candidates": 20.0, "guidance/head/clusters": 3.0, "loss_ratio": 0.5, "unlabeled_weight": 4.0}


def watch(start_step: int = 100, paradigm: Literal["dense", "sparse"] = "dense") -> Watch:
    stages = {name: replace(rule, paradigm=paradigm) for name, rule in GuidanceConfig().stages.items()}
    return Watch(GuidanceConfig(start_step=start_step, stages=stages), 2.0, ["dot", "bar"], lambda stage: f"scores of {stage}")


def supervised_watch() -> Watch:
    rule = replace(GuidanceConfig().stages["head"], paradigm="none")
    return Watch(GuidanceConfig(start_step=500, stages={"head": rule}), 2.0, ["dot", "bar"], str)


def test_a_good_course_is_silent() -> None:
    one = watch()
    assert not [text for done in range(50, 2000, 50) for text in one.line(done, 50, FINE)]
    assert not one.evaluation(100, 20.0) + one.evaluation(200, 17.0) + one.evaluation(300, 40.0)


def test_an_adaptive_threshold_is_not_taken_for_its_first_value() -> None:
    stages = {**GuidanceConfig().stages, "head": replace(GuidanceConfig().stages["head"], tau=0.3, tau_rate=0.05)}
    one = Watch(GuidanceConfig(stages=stages), 2.0, ["dot"], str)
    one.line(10, 10, {"guidance/head/candidates": 0.0})
    (text,) = one.end(10)
    assert "found nothing over guidance.stages.head.tau=0.3, or what it has adapted to, for 10 steps" in text


@pytest.mark.parametrize(("paradigm", "kind", "key"), [("dense", "candidates", "tau"), ("sparse", "pseudo_boxes", "pseudo_score")])
def test_nothing_found_for_long_is_told_once(paradigm: Literal["dense", "sparse"], kind: str, key: str) -> None:
    one = watch(paradigm=paradigm)
    told = {done: one.line(done, 50, {f"guidance/rcnn/{kind}": 0.0}) for done in range(50, 5 * PATIENCE, 50)}
    assert [done for done, texts in told.items() if texts] == [PATIENCE]
    (text,) = told[PATIENCE]
    assert f"guidance.stages.rcnn.{key}" in text
    assert "scores of rcnn" in text
    assert "lower guidance.stages.rcnn." in text


def test_finding_something_starts_the_count_again() -> None:
    one = watch()
    for done in range(50, 10 * PATIENCE, 50):
        found = 1.0 if done % PATIENCE == PATIENCE - 50 else 0.0
        assert not one.line(done, 50, {"guidance/head/candidates": found})


@pytest.mark.parametrize(("paradigm", "kind", "key"), [("dense", "candidates", "tau"), ("sparse", "pseudo_boxes", "pseudo_score")])
def test_a_run_too_short_for_patience_is_told_at_its_end(paradigm: Literal["dense", "sparse"], kind: str, key: str) -> None:
    one = watch(paradigm=paradigm)
    assert not one.end(50)
    for done in (10, 20):
        assert not one.line(done, 10, {f"guidance/head/{kind}": 1.0, f"guidance/rcnn/{kind}": 0.0})
    (text,) = one.end(20)
    assert f"rcnn has found nothing over guidance.stages.rcnn.{key}=" in text
    assert "for 20 steps (scores of rcnn)" in text
    assert not one.end(20)
    for key in ("candidates", "clusters", "pseudo_boxes"):
        one.line(30, 10, {f"guidance/head/{key}": 3.0})
    one.line(40, 10, {f"guidance/head/{kind}": 0.0})
    assert not one.end(40)  # it has found something before


@pytest.mark.parametrize("pseudo", [0.001, 99.0])
def test_a_dense_stage_is_not_judged_by_pseudo_boxes(pseudo: float) -> None:
    one, none, told = watch(), {"guidance/head/candidates": 0.0, "guidance/head/clusters": 0.0}, []
    for done in range(50, 3 * PATIENCE, 50):
        assert not one.line(done, 50, {**FINE, "guidance/head/pseudo_boxes": pseudo})
    for done in range(3 * PATIENCE, 6 * PATIENCE, 50):
        told += one.line(done, 50, {**none, "guidance/head/pseudo_boxes": pseudo})
    assert sum("has found nothing" in text for text in told) == 1


@pytest.mark.parametrize(("found", "way"), [(61.0, "raise guidance.stages.head.tau"), (0.03, "lower guidance.stages.head.tau")])
def test_collapse_is_told_once(found: float, way: str) -> None:
    one = watch()
    (text,) = one.line(50, 50, {**FINE, "guidance/head/clusters": found})
    assert way in text
    assert not one.line(100, 50, {**FINE, "guidance/head/clusters": found})


@pytest.mark.parametrize(("paradigm", "kind", "key"), [("dense", "clusters", "tau"), ("sparse", "pseudo_boxes", "pseudo_score")])
def test_shrinking_guidance_is_told_once(paradigm: str, kind: str, key: str) -> None:
    """As measured on blood cells with too high a threshold: 8.8 boxes of 13 sink to 1, and AP with them."""
    rule = replace(GuidanceConfig().stages["head"], paradigm=paradigm)
    one = Watch(GuidanceConfig(stages={"head": rule}), 13.3, ["dot", "bar"], str)
    found = [8.8, 8.0, 6.7, 5.6, 3.63, 2.0, 1.26, 1.1, 1.07, 1.0, 1.0, 0.9]
    told = {step: text for step, value in enumerate(found) for text in one.line(50 * step, 50, {f"guidance/head/{kind}": value})}
    ((step, text),) = told.items()
    assert 6 <= step <= 10
    assert f"after {max(found)} before, labelled have 13.3" in text
    assert f"lower guidance.stages.head.{key}" in text
    again = Watch(GuidanceConfig(stages={"head": rule}), 13.3, ["dot", "bar"], str)
    again.restore(json.loads(json.dumps(one.state())))
    assert not again.line(700, 50, {f"guidance/head/{kind}": 0.5})


def test_noise_and_what_the_paradigm_does_not_use_are_not_taken_for_shrinking() -> None:
    one = Watch(GuidanceConfig(), 2.0, ["dot", "bar"], str)
    for step in range(1000):  # every step a line
        assert not one.line(step, 1, {**FINE, "guidance/head/clusters": [3.0, 0.1][step % 2], "guidance/head/pseudo_boxes": 3 - step / 400})
    enough = Watch(GuidanceConfig(), 2.0, ["dot", "bar"], str)
    assert not [text for step in range(100) for text in enough.line(step, 50, {"guidance/head/clusters": max(9.0 - step, 1.0)})]


def test_shrinking_is_measured_from_the_most_that_was_ever_found() -> None:
    """Also when that was long after the start, and before a resume."""
    one = Watch(GuidanceConfig(), 3.0, ["dot", "bar"], str)
    for done, found in ((50, 1.6), (300, 6.0), (550, 6.0)):
        assert not one.line(done, 250, {**FINE, "guidance/head/clusters": found})
    again = Watch(GuidanceConfig(), 3.0, ["dot", "bar"], str)
    again.restore(json.loads(json.dumps(one.state())))
    for watching in (one, again):
        (text,) = watching.line(800, 250, {**FINE, "guidance/head/clusters": 1.0})
        assert "sees 1 objects in an unlabelled image after 6 before" in text


def test_many_objects_where_labelled_images_have_few_are_no_collapse() -> None:
    """With one object in ten labelled images, some of which show a crowd, a multiple of 0.1 says little."""
    few = Watch(GuidanceConfig(), 0.1, ["dot", "bar"], str)
    assert not few.line(50, 50, {**FINE, "guidance/head/clusters": 29.0})
    assert few.line(100, 50, {**FINE, "guidance/head/clusters": 31.0})


def test_while_nothing_is_found_the_losses_are_not_judged() -> None:
    one, nothing = watch(), {"guidance/head/candidates": 0.0, "loss_ratio": 1e-6, "unlabeled_weight": 4.0}
    assert not one.line(50, 50, nothing)
    assert not one.line(100, 50, {**FINE, "loss_ratio": 1.0})
    assert one.line(150, 50, {**FINE, "loss_ratio": 1e-6})


@pytest.mark.parametrize("paradigm", ["dense", "sparse"])
def test_what_to_do_about_a_threshold(paradigm: str) -> None:
    """One that follows is not lowered by hand; one that does not may be told to."""
    key, kind = {"dense": ("tau", "clusters"), "sparse": ("pseudo_score", "pseudo_boxes")}[paradigm]
    told = []
    for rate in (0.0, 0.05):
        rule = replace(GuidanceConfig().stages["head"], paradigm=paradigm, tau_rate=rate)
        one = Watch(GuidanceConfig(stages={"head": rule}), 2.0, ["dot", "bar"], str)
        told += one.line(50, 50, {**FINE, f"guidance/head/{kind}": 999.0})
    assert f"raise guidance.stages.head.{key}, let it adapt (guidance.stages.head.tau_rate=0.05), or lower" in told[0]
    assert f"raise guidance.stages.head.tau_rate, or set it to 0 and raise {key}, or lower guidance.alpha" in told[1]


def test_thresholds_that_have_sunk_are_told_once_by_class() -> None:
    stages = {**GuidanceConfig().stages, "rcnn": replace(GuidanceConfig().stages["rcnn"], tau=0.3, tau_rate=0.05)}
    one = Watch(GuidanceConfig(stages=stages), 2.0, ["dot", "bar"], str)
    assert not one.thresholds({"rcnn": [0.3, 0.11], "rpn": [0.9]})
    (text,) = one.thresholds({"rcnn": [0.3, 0.1]})
    assert "rcnn's adaptive thresholds have sunk to 0.1 for bar:" in text
    assert "set guidance.stages.rcnn.tau_rate=0" in text
    assert not one.thresholds({"rcnn": [0.3, 0.1]})
    (text,) = one.thresholds({"rcnn": [0.1, 0.1]})
    assert "have sunk to 0.1 for dot:" in text
    assert not one.thresholds({"rcnn": [0.1, 0.1]})
    (text,) = one.thresholds({"rpn": [0.1]})
    assert "for objects:" in text


def test_a_threshold_that_begins_low_has_not_sunk() -> None:
    stages = {"head": replace(GuidanceConfig().stages["head"], tau=0.05, tau_rate=0.05)}
    assert not Watch(GuidanceConfig(stages=stages), 2.0, ["dot", "bar"], str).thresholds({"head": [0.05, 0.05]})


@pytest.mark.parametrize(("ratio", "advice"), [(6.0, "lower guidance.alpha"), (1e-4, "raise guidance.alpha")])
def test_loss_ratio_out_of_bounds(ratio: float, advice: str) -> None:
    one = watch()
    (text,) = one.line(50, 50, {**FINE, "loss_ratio": ratio})
    assert advice in text
    assert not one.line(100, 50, {**FINE, "loss_ratio": ratio})


def test_falling_teacher_is_measured_against_the_supervised_phase() -> None:
    one = watch(start_step=100)
    assert not one.evaluation(50, 50.0)
    assert not one.evaluation(100, 30.0)
    assert not one.evaluation(150, 25.0)
    (text,) = one.evaluation(200, 20.0)
    assert "20.0" in text
    assert "30.0" in text
    assert not one.evaluation(250, 1.0)
    assert not watch().evaluation(500, 1.0)  # never evaluated before it guided


def test_a_supervised_phase_hands_its_ap_on() -> None:
    phase, guided = supervised_watch(), watch(start_step=500)
    phase.evaluation(500, 40.0)
    guided.restore(json.loads(json.dumps(phase.state())))
    assert guided.evaluation(1500, 20.0)


def test_what_was_told_is_part_of_a_checkpoint() -> None:
    one = watch()
    one.evaluation(100, 30.0)
    one.line(50, 50, {**FINE, "guidance/head/clusters": 999.0})
    again = watch()
    again.restore(json.loads(json.dumps(one.state())))
    assert not again.line(100, 50, {**FINE, "guidance/head/clusters": 999.0})
    assert again.evaluation(200, 1.0)


def test_the_histogram_is_of_the_run_itself(tmp_path: Path) -> None:
    def impatient() -> None:
        import dtg_core.engine.watch as module

        module.PATIENCE = 3

    data = TinyData.write(tmp_path / "data")
    settings = [f"guidance.stages.{stage}.tau=0.9" for stage in ("head", "rpn", "rcnn")]
    for name, stages in (("gfl", ["head"]), ("faster_rcnn", ["rpn", "rcnn"])):
        ended = run(command(data, name, tmp_path / name, *settings), tmp_path / "logs", prepare=impatient)
        assert ended.status == 0, ended.err
        for stage in stages:
            assert ended.err.count(f"warning: the teacher's {stage} has found nothing") == 1
            logged = [line["warning"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "warning" in line]
            assert sum(text.startswith(f"the teacher's {stage} has found nothing") for text in logged) == 1
        assert "by tenths: 0.0: " in ended.err or "by tenths: 0.4: " in ended.err, ended.err


def test_a_run_reports_its_adaptive_thresholds(tmp_path: Path) -> None:
    """Random weights find nothing over 0.3, so that the thresholds sink from there as far as they may."""
    settings = ["guidance.stages.head.tau=0.3", "guidance.stages.head.tau_rate=1"]
    ended = run(command(TinyData.write(tmp_path / "data"), "gfl", tmp_path / "run", *settings), tmp_path / "logs")
    assert ended.status == 0, ended.err
    assert ended.err.count("head's adaptive thresholds have sunk to 0.1 for") == 1
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "guidance/head/lowest_threshold" in line]
    assert lines
    assert all(0.09 < line["guidance/head/lowest_threshold"] <= line["guidance/head/highest_threshold"] <= 0.3 for line in lines)
    assert "Lowest adaptive threshold" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_lines_that_will_come_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for step in (1, 2):
        writer.write(step, {"loss": 1.0})
        writer.write(step, {"teacher/AP": 1.0})
    MetricsWriter(path, 2, drop="teacher/AP")
    assert [(line["step"], "loss" in line) for line in read_metrics(path)] == [(1, True), (1, False), (2, True)]


def test_figures_that_do_not_exist_are_dashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = Mock(config=Config(), detectors=("teacher", "student"))
    training.teacher.stages = ("head",)
    labeled = Mock(class_names=("cat",), objects_per_image=lambda: np.ones(1))

    def opened(start: int, again: bool = False) -> Recorder:
        recorder = Recorder(training, RunState(Config(), {}, evaluation_due=again), Mock(labeled=labeled), RunFolder(tmp_path))
        recorder.open(start)
        return recorder

    recorder, figures = opened(0), {"AP": None, "AP50": 1.0, "AP75": None}
    recorder.evaluation(3, {"teacher": figures, "student": figures}, {})
    recorder.close()
    assert "teacher  AP -  AP50 1.00  AP75 -" in capsys.readouterr().err
    assert next(read_metrics(tmp_path / "metrics.jsonl"))["teacher/AP"] is None
    for again, left in ((False, [3]), (True, [])):  # whether that evaluation will be made once more
        opened(3, again).close()
        assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == left


def test_overfitting_without_guidance_is_no_matter_of_guidance() -> None:
    one = supervised_watch()
    assert not [text for step, figure in ((500, 40.0), (1500, 20.0)) for text in one.evaluation(step, figure)]


@pytest.mark.parametrize("paradigm", ["none", "dense"])
def test_stages_of_other_detectors_do_not_guide(tmp_path: Path, paradigm: str) -> None:
    """All settings hold a dense R-CNN, which GFL does not have."""

    def falling() -> None:
        import dtg_core.engine.evaluator as module

        real, given = module.metrics_and_curves, iter([90, 90, 10, 10])  # of teacher and student in turn
        module.metrics_and_curves = lambda *arguments: ({**real(*arguments)[0], "AP": float(next(given))}, real(*arguments)[1])

    settings = [f"guidance.stages.head.paradigm={paradigm}", "guidance.start_step=1", "run.evaluate_every=1"]
    arguments = command(TinyData.write(tmp_path / "data"), "gfl", tmp_path / "run", *settings, steps=2)
    ended = run(arguments, tmp_path / "logs", prepare=falling)
    assert ended.status == 0, ended.err
    assert ("the teacher's AP has fallen to 10.0 from 90.0 before it guided" in ended.err) == (paradigm == "dense")
