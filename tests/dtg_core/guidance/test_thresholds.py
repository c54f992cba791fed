from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import DETECTORS, make_pair, tiny_detector

from dtg_core.config import StageRule, paper_stages
from dtg_core.guidance.paradigms import teach
from dtg_core.guidance.thresholds import FLOOD, HIGHEST, LOWEST, Thresholds, count_classes


def thresholds(objects: list[float], **rule) -> Thresholds:
    """Of a single stage with as many classes as ``objects``."""
    stages = {"head": SimpleNamespace(num_classes=len(objects))}
    return Thresholds({"head": StageRule(**{"tau": 0.5, "tau_rate": 0.1, **rule})}, stages, torch.tensor(objects))


def test_a_step_by_hand() -> None:
    """Wanted 2, 1 and 0.5 objects; found in two images 2, 3 and 0, so errors of -1/2, +1/2 and -1/2 (of at least one object)."""
    followed = thresholds([2.0, 1.0, 0.5])
    followed.follow({"head": torch.tensor([2.0, 3.0, 0.0])}, 2)
    expected = [1 / (1 + math.exp(-logit)) for logit in (-0.05, 0.05, -0.05)]
    assert followed.scores()["head"].tolist() == pytest.approx(expected)


def test_a_flood_has_its_limit_and_bounds_hold() -> None:
    followed = thresholds([1.0, 1.0])
    followed.follow({"head": torch.tensor([1000.0, 0.0])}, 1)
    assert followed.scores()["head"].logit().tolist() == pytest.approx([0.1 * FLOOD, -0.1], abs=1e-5)
    low, high = thresholds([1.0, 1.0], tau=0.05), thresholds([1.0, 1.0], tau=0.995)  # bounds are no nearer than the start
    for _ in range(200):
        for each in (followed, low, high):
            each.follow({"head": torch.tensor([1000.0, 0.0])}, 1)
    assert followed.scores()["head"].tolist() == pytest.approx([HIGHEST, LOWEST])
    assert low.scores()["head"].tolist() == pytest.approx([HIGHEST, 0.05])
    assert high.scores()["head"].tolist() == pytest.approx([0.995, LOWEST])


def test_it_comes_to_the_quantile_that_leaves_as_many_as_are_wanted() -> None:
    """Each class has scores of its own distribution, ten an image; the oracle knows the distribution."""
    generator = torch.Generator().manual_seed(0)
    wanted, power = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 0.5])  # scores are uniform numbers to this power
    followed = thresholds(wanted.tolist(), tau_rate=0.02)
    last = []
    for step in range(3000):
        scores = torch.rand(4, 10, 2, generator=generator) ** power
        followed.follow({"head": (scores > followed.scores()["head"]).float().sum((0, 1))}, 4)
        if step >= 2000:
            last.append(followed.scores()["head"])
    expected = (1 - wanted / 10) ** power
    torch.testing.assert_close(torch.stack(last).mean(0), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize(("share", "crowd", "images"), [(0.3, 20, 1), (0.05, 20, 2), (0.02, 40, 8)])
def test_objects_that_come_in_crowds_are_not_counted_too_low(share: float, crowd: int, images: int) -> None:
    """Few images hold all of them. The teacher is right at a threshold of 0.5: scores of objects are above, others below."""
    generator = torch.Generator().manual_seed(0)
    followed = thresholds([share * crowd], tau_rate=0.01, tau=0.6)
    found = []
    for step in range(8_000):
        present = torch.rand(images, generator=generator) < share
        scores = torch.rand(int(present.sum()) * crowd, 2, generator=generator) / 2 + torch.tensor([0.5, 0.0])
        count = (scores > followed.scores()["head"]).sum().float().reshape(1)
        followed.follow({"head": count}, images)
        if step >= 2_000:
            found.append(count / images)
    assert torch.stack(found).mean() == pytest.approx(share * crowd, rel=0.1)


def test_who_follows_and_from_where() -> None:
    stages = {"rpn": SimpleNamespace(num_classes=1), "rcnn": SimpleNamespace(num_classes=2), "off": SimpleNamespace(num_classes=2)}
    objects = torch.tensor([2.0, 0.5])

    def start(**rules: StageRule) -> dict[str, list[float]]:
        told = {"rpn": StageRule(), "rcnn": StageRule(), "off": StageRule()} | rules
        return {name: scores.tolist() for name, scores in Thresholds(told, stages, objects).scores().items()}

    assert start() == {}
    rule = StageRule(tau=0.25, pseudo_score=0.75, tau_rate=0.1)
    found = start(rpn=rule, rcnn=replace(rule, paradigm="sparse"), off=replace(rule, paradigm="none"))
    assert found == {"rpn": pytest.approx([0.25]), "rcnn": pytest.approx([0.75, 0.75])}  # a dense RPN knows objects only
    assert start(rpn=replace(rule, paradigm="sparse"))["rpn"] == pytest.approx([0.75, 0.75])
    assert start(rcnn=replace(rule, paradigm="sparse", pseudo_score=0.0))["rcnn"] == pytest.approx([0, 0], abs=1e-5)

    followed = Thresholds({"rpn": rule, "rcnn": StageRule(), "off": StageRule()}, stages, objects)
    for _ in range(50):
        followed.follow({"rpn": torch.tensor([2.5])}, 1)  # all objects together
    assert followed.scores()["rpn"].tolist() == pytest.approx([0.25])


def test_a_checkpoint_keeps_them_to_the_bit() -> None:
    followed, other = thresholds([2.0, 1.0]), thresholds([2.0, 1.0])
    for _ in range(7):
        followed.follow({"head": torch.tensor([1.0, 3.0])}, 3)
    other.restore(json.loads(json.dumps(followed.state())))
    assert torch.equal(other.scores()["head"], followed.scores()["head"])
    for fresh in (thresholds([2.0, 1.0, 1.0]), thresholds([2.0, 1.0], tau=0.4), thresholds([2.0, 1.0], paradigm="sparse", pseudo_score=0.4)):
        first = fresh.scores()["head"]
        fresh.restore(followed.state())  # of other classes, or of a run that started elsewhere
        fresh.restore({})  # of one that had none
        assert torch.equal(fresh.scores()["head"], first)


@pytest.mark.parametrize("score", [0.0, 1e-12, 1 - 1e-12])
def test_a_start_at_the_end_of_the_scale_is_a_number(score: float) -> None:
    followed = thresholds([1.0], paradigm="sparse", pseudo_score=score)
    followed.follow({"head": torch.zeros(1)}, 1)
    assert followed.scores()["head"].logit().isfinite().all()


def test_count_of_classes() -> None:
    labels = torch.tensor([0, 2, 2, 2])
    assert count_classes(labels, 4).tolist() == [1, 0, 3, 0]
    assert count_classes(labels, 3, torch.tensor([True, True, False, True])).tolist() == [1, 0, 2]
    assert count_classes(labels[:0], 2).tolist() == [0, 0]


def eager(name: str) -> torch.nn.Module:
    detector = tiny_detector(name).eval()
    with torch.no_grad():
        for key, parameter in detector.named_parameters():
            if key.endswith("bias") and parameter.min() < -2:
                parameter.fill_(0.3)
    return detector


@pytest.mark.parametrize("paradigm", ["dense", "sparse"])
@pytest.mark.parametrize("name", DETECTORS)
def test_thresholds_of_a_guided_stage(name: str, paradigm: str) -> None:
    """All at tau: what tau gives. One class at the top: it is gone, and the others are as they were."""
    teacher, pair = eager(name), make_pair(2, 64, 64)
    stage = list(teacher.stages)[-1]
    classes = teacher.stages[stage].num_classes
    rules = {key: replace(rule, paradigm=paradigm, tau=0.5, pseudo_score=0.5) for key, rule in paper_stages().items()}

    def taught(*scores: float) -> tuple[dict[int, list], torch.Tensor | None, dict]:
        given = {stage: torch.tensor(scores)} if scores else {}
        supervision, figures = teach(teacher, pair, rules, thresholds=given)
        told = supervision[stage]
        part = told.assignment if paradigm == "dense" else told.targets
        labels = part.label if paradigm == "dense" else part.labels
        boxes = part.box if paradigm == "dense" else part.boxes
        return {c: sorted(boxes[labels == c].tolist()) for c in range(classes)}, told.found, figures

    plain, none, _ = taught()
    same, found, figures = taught(*[0.5] * classes)
    assert none is None
    assert found is not None
    assert same == plain
    assert sum(map(len, plain.values())) > 0
    if paradigm == "dense":
        assert found.sum() / 2 == figures[f"guidance/{stage}/clusters"]
    busy = max(plain, key=lambda c: len(plain[c]))
    scores = [HIGHEST if c == busy else 0.5 for c in range(classes)]
    without, found, _ = taught(*scores)
    assert without[busy] == []
    assert found[busy] == 0
    assert {c: boxes for c, boxes in without.items() if c != busy} == {c: boxes for c, boxes in plain.items() if c != busy}
