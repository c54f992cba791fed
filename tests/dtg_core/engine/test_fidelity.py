"""Gradients of guidance against those of true labels: perfect guidance, pencil cases of sums and shares, nothing at all."""
from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_pair, make_views, tiny_detector

from dtg_core.config import StageRule
from dtg_core.engine.fidelity import agreement, count_labels, gradients, head_parameters, measure
from dtg_core.structures import Assignment, Detections, LossName, LossTerm, Targets

BOXES = [[[4.0, 4, 30, 34], [40, 8, 80, 50]], [[20.0, 10, 60, 50]]]
NAMES = ["gfl", "faster_rcnn"]


def detector(name: str, seed: int = 1) -> torch.nn.Module:
    model = tiny_detector(name).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    if name == "faster_rcnn":  # as on pseudo boxes
        model.config = replace(model.config, rcnn=replace(model.config.rcnn, add_truth=False))
    return model


def truth() -> Targets:
    return make_views(2, 64, 96, BOXES, [[0, 2], [1]]).targets


def oracle_teacher(model: torch.nn.Module, targets: Targets) -> SimpleNamespace:
    """A teacher whose final boxes are the truth."""
    found = Detections(targets.boxes, torch.full((len(targets.boxes),), 0.99), targets.labels, targets.image)
    return SimpleNamespace(run=model.run, stages=model.stages, grid=model.grid, detect=lambda *_: found)


@pytest.mark.parametrize("name", NAMES)
def test_perfect_guidance_has_cosine_1_and_ratio_1(name):
    model, targets, pair = detector(name), truth(), make_pair(2, 64, 96)
    rules = dict.fromkeys(model.stages, StageRule("sparse", proposals="student"))
    wrong = replace(targets, boxes=targets.boxes.flip(0), labels=(targets.labels + 1) % 3)
    for given, perfect in ((targets, True), (wrong, False)):
        found = measure(oracle_teacher(model, given), model, [(pair, targets)] * 2, {"it": rules})["it"]
        for stage in (*model.stages, "all"):
            for kind, value in found.agreements(stage).items():
                assert (value.cosine > 0.9999) == (abs(value.ratio - 1) < 1e-4) == perfect, (stage, kind)
                assert value.error == pytest.approx(0, abs=1e-9)
        for stage in model.stages:
            labels = found.label_figures(stage)
            assert labels["positives"] > 0
            if perfect:
                assert [labels[key] for key in ("precision", "box_iou", "found", "missed")] == pytest.approx([1, 1, 1, 0])
    assert set(found.agreements("all")) == {"all"}


@pytest.mark.parametrize("name", NAMES)
def test_dense_guidance_has_every_kind_and_its_switches_take_them_away(name):
    teacher, model, pair = detector(name, 2), detector(name), make_pair(2, 64, 96)
    with torch.no_grad():
        scores = {stage: output.logits.amax(2).sigmoid() for stage, output in teacher.run(pair.teacher).items()}
    rules = {stage: StageRule(tau=float(score.quantile(0.9))) for stage, score in scores.items()}
    settings = {"all": rules} | {
        switch: {stage: replace(rule, **{switch: False}) for stage, rule in rules.items()}
        for switch in ("classification", "box", "rank")
    }
    found = measure(teacher, model, [(pair, truth())], settings)
    for stage in model.stages:
        whole = found["all"].agreements(stage)
        assert set(whole) == {"class", "box", "rank", "all"}
        assert all(value.ratio > 0 and abs(value.cosine) <= 1 and value.error is None for value in whole.values())
        for switch, kind in (("classification", "class"), ("box", "box"), ("rank", "rank")):
            part = found[switch].agreements(stage)
            assert set(part) == set(whole) - {kind}
            assert all(part[other] == whole[other] for other in part if other != "all")
        references = {kind: rows[0][2] for (at, kind), rows in found["all"].products.items() if at == stage}
        assert references["rank"] == references["class"] != references["box"]
        labels = found["all"].label_figures(stage)
        assert labels["clusters"] > 0
        assert labels["positives"] == pytest.approx(labels["candidates"] * labels["matched"])


def test_gradients_are_those_of_the_weighted_losses():
    weight = torch.nn.Parameter(torch.zeros(2))
    unused = torch.nn.Parameter(torch.zeros(1))
    slopes = {"a/cls": (2.0, 0.0), "a/background": (0.0, 4.0), "a/box": (6.0, 0.0), "a/rank": (0.0, 2.0), "b/box": (2.0, 2.0)}
    terms = {LossName("unlabeled", *name.split("/")): LossTerm(weight @ torch.tensor(slope), torch.tensor(2.0))
             for name, slope in slopes.items()}  # fmt: skip
    last = LossName("unlabeled", "b", "box")
    terms[last] = replace(terms[last], count=torch.tensor(0.0))  # at least 1 is used
    found = gradients(terms, {"a": StageRule(rank_weight=3.0), "b": StageRule()}, [weight, unused])
    assert {key: value.tolist() for key, value in found.items()} == {
        ("a", "class"): [1, 2, 0], ("a", "box"): [3, 0, 0], ("a", "rank"): [0, 3, 0], ("a", "all"): [4, 5, 0],
        ("b", "box"): [2, 2, 0], ("b", "all"): [2, 2, 0], ("all", "all"): [6, 7, 0],
    }  # fmt: skip


def test_agreement_of_batches():
    # Gradients (3, 4) and (0, 2) against true ones (5, 0) and (0, -1): cosines 0.6 and -1.
    value = agreement([(15.0, 25.0, 25.0), (-2.0, 4.0, 1.0)])
    assert value.cosine == pytest.approx(-0.2)
    assert value.error == pytest.approx(0.8)  # 1.6 / sqrt 2 is their standard deviation
    assert value.ratio == pytest.approx(math.sqrt(29 / 26))
    nothing = agreement([(0.0, 0.0, 4.0), (2.0, 1.0, 4.0)])
    assert (nothing.cosine, nothing.error) == (0.5, pytest.approx(0.5))
    assert agreement([(0.0, 1.0, 0.0)]).ratio == 0
    assert agreement([(1.0, 1.0, 1.0)]).error is None


class FixedStage:
    """Gives objects 0, 1, ... of image 0 to samples 0, 1, ... of ``truth_samples``."""

    num_classes = 3

    def __init__(self, samples: list[int]) -> None:
        self.samples = torch.tensor(samples)

    def assign(self, samples, targets, sizes, seeds):
        rows = torch.arange(len(self.samples)) % 2
        image = torch.zeros_like(self.samples)
        return Assignment(image, self.samples, targets.labels[rows], targets.boxes[rows], torch.zeros(2, 8, dtype=torch.bool))


def test_labels_are_counted_against_the_truth():
    # An image beside it has an object of class 2, which is no reason for a label here.
    views = make_views(2, 64, 96, [[[0.0, 0, 10, 10], [50, 50, 60, 60]], [[0, 0, 10, 10]]], [[0, 1], [2]])
    box = torch.tensor([[0.0, 0, 10, 8], [0, 0, 10, 10], [50, 50, 60, 54], [50, 50, 60, 60]])
    background = torch.zeros(2, 8, dtype=torch.bool)
    background[0, [6, 7]] = True
    # Right with IoU 0.8; another class; IoU 0.4 only; right.
    own = Assignment(torch.zeros(4).long(), torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, 1, 1]), box, background)
    # True samples: 0 of class 0 (found), 1 of class 1 (called 2), 6 of class 0 (background), 5 of class 1 (ignored).
    counts = count_labels(FixedStage([0, 1, 6, 5]), None, own, views.targets, views)  # type: ignore[arg-type]
    assert counts == pytest.approx(
        {"images": 2, "positives": 4, "right": 2, "overlap": 1.8, "true": 4, "found": 1, "missed": 1}
    )
    objectness = FixedStage([0, 1, 6, 5])
    objectness.num_classes = 1  # classes are not known to it
    any_object = replace(own, label=torch.zeros(4).long())
    assert count_labels(objectness, None, any_object, views.targets, views)["right"] == 3  # type: ignore[arg-type]
    nothing = replace(own, image=own.image[:0], sample=own.sample[:0], label=own.label[:0], box=own.box[:0])
    counts = count_labels(FixedStage([0, 1, 6, 5]), None, nothing, views.targets, views)  # type: ignore[arg-type]
    assert (counts["positives"], counts["right"], counts["found"], counts["missed"]) == (0, 0, 0, 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("objects", [True, False])
def test_no_candidate_and_no_object(name, objects):
    model, pair = detector(name), make_pair(2, 64, 96)
    targets = truth() if objects else make_views(2, 64, 96).targets
    settings = {kind: dict.fromkeys(model.stages, StageRule(kind, tau=0.9999, pseudo_score=0.9999)) for kind in ("dense", "sparse")}
    found = measure(model, model, [(pair, targets)], settings)
    for kind in settings:
        for stage in model.stages:
            values, labels = found[kind].agreements(stage), found[kind].label_figures(stage)
            assert values["class"].ratio > 0  # all is background
            assert (values["box"].cosine, values["box"].ratio) == (0, 0)
            assert labels["positives"] == labels["precision"] == labels["found"] == 0
            assert all(math.isfinite(value) for value in labels.values())
            if objects and name == "gfl":  # whose samples do not depend on its predictions
                assert labels["missed"] > 0.5


def test_unguided_stages_are_left_out():
    model = detector("faster_rcnn")
    rules = {"rpn": StageRule("none"), "rcnn": StageRule(tau=0.01)}
    found = measure(model, model, [(make_pair(2, 64, 96), truth())], {"it": rules})["it"]
    assert set(found.labels) == {"rcnn"}
    assert not found.agreements("rpn")
    assert found.agreements("all")["all"].ratio > 0


@pytest.mark.parametrize("name", NAMES)
def test_parameters_of_the_backbone_are_left_out(name):
    model = tiny_detector(name)
    own = {id(parameter) for parameter in head_parameters(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) not in own}
    assert names == {f"pyramid.body.{name}" for name, _ in model.pyramid.body.named_parameters()}
