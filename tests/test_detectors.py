"""What both detectors owe the core, and the core to both: one parametrised contract."""
from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import DETECTORS, make_pair, make_views, tiny_detector

from dtg_core.boxes import shortest_side
from dtg_core.config import StageRule, paper_stages
from dtg_core.guidance import teach
from dtg_core.losses import weigh
from dtg_core.models.student import StudentModule
from dtg_core.models.teacher import make_teacher
from dtg_core.structures import LossName

OBJECTS = [[[4.0, 4, 30, 34]], [[20.0, 10, 60, 50], [2, 30, 20, 60]]]
LABELS = [[0], [1, 2]]


def rules(**changes) -> dict[str, StageRule]:
    return {name: replace(rule, **changes) for name, rule in paper_stages().items()}


def eager(detector: torch.nn.Module) -> torch.nn.Module:
    """Raise the class biases, so that an untrained teacher has candidates."""
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if name.endswith("bias") and parameter.min() < -2:
                parameter.fill_(0.3)
    return detector


def losses_of(detector: torch.nn.Module, labeled, pair, stage_rules) -> tuple[dict[LossName, torch.Tensor], dict]:
    student, teacher = StudentModule(detector, stage_rules).train(), make_teacher(detector)
    supervision, figures = teach(teacher, pair, stage_rules)
    terms = student(labeled, pair.student, supervision)
    return {name: term.total / term.count.clamp(min=1) for name, term in terms.items()}, figures


def check_step(detector: torch.nn.Module, losses: dict[LossName, torch.Tensor], stage_rules) -> None:
    weigh(losses, stage_rules, 2.0).backward()
    for name, loss in losses.items():
        assert loss.isfinite(), name
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:  # batch norms are frozen
            assert parameter.grad is not None, f"{name} has no gradient"
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("name", DETECTORS)
def test_final_boxes_have_no_gradient(name):
    detector, views = eager(tiny_detector(name)).eval(), make_views(1, 64, 64)
    found = detector.detect(detector.run(views), views, 0.3)
    assert len(found.boxes)
    assert not any(tensor.requires_grad for tensor in (found.boxes, found.scores))


@pytest.mark.parametrize("name", DETECTORS)
def test_same_view_and_weights_are_their_own_teacher(name):
    detector = eager(tiny_detector(name)).eval()
    pair, stage_rules = make_pair(2, 64, 64), rules(tau=0.5, background_samples=None)
    supervision, figures = teach(make_teacher(detector), pair, stage_rules)
    outputs = detector.run(pair.student, supervision)
    student = StudentModule(detector, stage_rules).eval()
    terms = student(make_views(1, 64, 64), pair.student, supervision)
    for stage, told in supervision.items():
        assert figures[f"guidance/{stage}/candidates"] > 0
        assert figures[f"guidance/{stage}/matched"] == pytest.approx(1.0)
        assignment = told.assignment
        torch.testing.assert_close(outputs[stage].logits[assignment.rows], assignment.dense.teacher_logit, rtol=1e-4, atol=1e-4)
        rank = terms["unlabeled", stage, "rank"]
        assert (rank.total / rank.count).item() == pytest.approx(0, abs=1e-5)
        assert not assignment.background[assignment.image, assignment.sample].any()


@pytest.mark.parametrize("name", DETECTORS)
def test_dense_step_is_finite_and_reaches_every_parameter(name):
    detector = eager(tiny_detector(name))
    pair = replace(make_pair(3, 64, 96), student=make_views(3, 64, 96, seed=5))
    stage_rules = rules()
    for stage, predictions in make_teacher(detector).run(pair.teacher).items():
        median = predictions.logits.amax(2).sigmoid().median().item()  # half of the samples are candidates
        stage_rules[stage] = replace(stage_rules[stage], tau=median)
    losses, _ = losses_of(detector, make_views(2, 64, 64, OBJECTS, LABELS), pair, stage_rules)
    check_step(detector, losses, stage_rules)
    for stage in detector.stages:
        for kind in ("cls", "box", "background", "rank"):
            assert losses["unlabeled", stage, kind] > 0, kind


EMPTY_CASES = {
    "no object": dict(objects=False, tau=0.5),
    "no candidate": dict(objects=True, tau=0.999),
    "neither": dict(objects=False, tau=0.999),
    "one image": dict(objects=True, tau=0.5, images=1),
    "one class": dict(objects=False, tau=0.5, classes=1),
    "view gone": dict(objects=True, tau=0.5, shift=1000.0),
}


@pytest.mark.parametrize("case", EMPTY_CASES)
@pytest.mark.parametrize("paradigm", ["dense", "sparse"])
@pytest.mark.parametrize("name", DETECTORS)
def test_empty_batches(name, paradigm, case):
    options = EMPTY_CASES[case]
    images, classes = options.get("images", 2), options.get("classes", 3)
    detector = eager(tiny_detector(name, classes))
    stage_rules = rules(paradigm=paradigm, tau=options["tau"], pseudo_score=options["tau"])
    shift = torch.tensor([[1.0, 0, options.get("shift", 0.0)], [0, 1, 0], [0, 0, 1]])
    labeled = make_views(images, 64, 64, OBJECTS[:images] if options["objects"] else None, LABELS[:images])
    losses, _ = losses_of(detector, labeled, make_pair(images, 64, 64, shift), stage_rules)
    check_step(detector, losses, stage_rules)


@pytest.mark.parametrize("paradigm", ["dense", "sparse"])
@pytest.mark.parametrize("name", DETECTORS)
def test_without_anything_found_only_background_is_taught(name, paradigm):
    """Fault 65: losses of classes, boxes and ranks are exactly 0 and keep their graph."""
    detector = eager(tiny_detector(name))
    stage_rules = rules(paradigm=paradigm, tau=0.999, pseudo_score=0.999)
    losses, figures = losses_of(detector, make_views(2, 64, 64, OBJECTS, LABELS), make_pair(2, 64, 64), stage_rules)
    nothing = {name: loss for name, loss in losses.items() if name.branch == "unlabeled" and name.kind != "background"}
    assert {name.kind for name in nothing} == ({"cls", "box", "rank"} if paradigm == "dense" else {"cls", "box"})
    for key, loss in nothing.items():
        assert loss.item() == 0, key
        assert loss.requires_grad, key
    for stage in detector.stages:
        assert losses["unlabeled", stage, "background"] > 0
        assert figures[f"guidance/{stage}/{'candidates' if paradigm == 'dense' else 'pseudo_boxes'}"] == 0


def dense_kinds(rule: StageRule) -> set[str]:
    return {"dense": {"cls", "box", "background", "rank"}, "sparse": {"cls", "box", "background"}, "none": set()}[rule.paradigm]


@pytest.mark.parametrize(("rpn", "rcnn"), list(itertools.product(["dense", "sparse", "none"], repeat=2)))
def test_all_stage_mixes_have_their_losses_and_no_others(rpn, rcnn):
    detector = eager(tiny_detector("faster_rcnn"))
    stage_rules = rules(tau=0.5, pseudo_score=0.5)
    stage_rules["rpn"], stage_rules["rcnn"] = replace(stage_rules["rpn"], paradigm=rpn), replace(stage_rules["rcnn"], paradigm=rcnn)
    losses, _ = losses_of(detector, make_views(2, 64, 64, OBJECTS, LABELS), make_pair(2, 64, 64), stage_rules)
    found = {name for name in losses if name.branch == "unlabeled"}
    expected = {LossName("unlabeled", stage, kind) for stage in ("rpn", "rcnn") for kind in dense_kinds(stage_rules[stage])}
    assert found == expected
    check_step(detector, losses, stage_rules)


def test_a_teacher_runs_only_the_stages_that_teach():
    """The second stage is left out where the RPN alone is guided densely; pseudo boxes need it."""
    detector = eager(tiny_detector("faster_rcnn"))
    teacher, pair, stage_rules = make_teacher(detector), make_pair(2, 64, 64), rules(tau=0.5)
    passes = []
    teacher.rcnn.register_forward_hook(lambda *_: passes.append(1))
    for rpn, rcnn, expected in (("dense", "none", 0), ("sparse", "none", 1), ("none", "dense", 1), ("dense", "dense", 1)):
        mixed = {"rpn": replace(stage_rules["rpn"], paradigm=rpn), "rcnn": replace(stage_rules["rcnn"], paradigm=rcnn)}
        passes.clear()
        alone, _ = teach(teacher, pair, {**stage_rules, **mixed})
        assert (len(passes), set(alone)) == (expected, {name for name in mixed if mixed[name].paradigm != "none"})
        if rpn == "dense":
            both, _ = teach(teacher, pair, stage_rules)
            torch.testing.assert_close(alone["rpn"].assignment.box, both["rpn"].assignment.box)


@pytest.mark.parametrize("proposals", ["teacher", "student"])
def test_sparse_rcnn_takes_either_proposals(proposals):
    detector = eager(tiny_detector("faster_rcnn"))
    stage_rules = rules(paradigm="sparse", pseudo_score=0.5, proposals=proposals)
    supervision, _ = teach(make_teacher(detector), make_pair(2, 64, 64), stage_rules)
    assert (supervision["rcnn"].proposals is not None) == (proposals == "teacher")
    assert supervision["rcnn"].targets.boxes.shape[0] > 0
    assert not supervision["rcnn"].add_truth


@pytest.mark.parametrize("name", DETECTORS)
def test_images_of_a_batch_do_not_touch_each_other(name):
    detector = eager(tiny_detector(name)).eval()
    views = make_views(3, 64, 64)
    both = detector.detect(detector.run(views), views, 0.3)
    for image in range(3):
        one = replace(
            views, pixels=views.pixels[image : image + 1], sizes=views.sizes[image : image + 1], seeds=views.seeds[image : image + 1]
        )
        alone = detector.detect(detector.run(one), one, 0.3)
        rows = both.image == image
        assert alone.boxes.shape[0] == rows.sum() > 0
        torch.testing.assert_close(alone.boxes, both.boxes[rows], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", DETECTORS)
def test_guidance_under_bfloat16_keeps_coordinates_in_float32(name):
    detector = eager(tiny_detector(name)).eval()
    pair, stage_rules = make_pair(2, 64, 64), rules(tau=0.5)
    teacher = make_teacher(detector)
    full, _ = teach(teacher, pair, stage_rules)
    half, _ = teach(teacher, pair, stage_rules, autocast=partial(torch.autocast, "cpu", torch.bfloat16))
    for stage in full:
        assert half[stage].assignment.box.dtype == torch.float32
        assert half[stage].assignment.dense.teacher_logit.dtype == torch.float32
    assert teacher.grid((64, 64), torch.device("cpu")).anchors.dtype == torch.float32


@pytest.mark.parametrize(("quantile", "samples"), [(0.9, 64), (0.6, 64), (0.9, 0), (1.0, 16)])
def test_drawn_background_is_at_least_as_much_as_the_candidates(quantile, samples):
    detector, pair = eager(tiny_detector("faster_rcnn")).eval(), make_pair(2, 64, 64)
    scores = detector.run(pair.teacher)["rpn"].logits.detach().sigmoid().flatten()
    stage_rules = rules(tau=float(scores.quantile(quantile)), background_samples=None)
    everything, _ = teach(make_teacher(detector), pair, stage_rules)
    stage_rules = {name: replace(rule, background_samples=samples) for name, rule in stage_rules.items()}
    drawn, _ = teach(make_teacher(detector), pair, stage_rules)
    positives = torch.bincount(drawn["rpn"].assignment.image, minlength=2)
    whole = everything["rpn"].assignment.background.sum(1)
    expected = torch.minimum(torch.maximum(samples - positives, positives), whole)
    assert (positives > 0).all() == (quantile < 1)
    assert torch.equal(drawn["rpn"].assignment.background.sum(1), expected)


def test_proposals_that_teach_nothing_are_not_looked_at():
    """The second stage is run on fewer proposals, and its losses stay."""
    detector = eager(tiny_detector("faster_rcnn")).eval()
    pair = replace(make_pair(2, 64, 64), student=make_views(2, 64, 64, seed=5))
    logits = detector.run(pair.teacher)["rcnn"].logits.detach().amax(2)
    stage_rules = rules(tau=float(logits.sigmoid().quantile(0.9)), background_samples=6)
    supervision, _ = teach(make_teacher(detector), pair, stage_rules)
    proposals, assignment = supervision["rcnn"].proposals, supervision["rcnn"].assignment
    taught = assignment.background.clone()
    taught[assignment.image, assignment.sample] = True
    assert torch.equal(proposals.valid, taught)
    whole = shortest_side(proposals.boxes) >= 1
    assert taught.sum() < whole.sum()

    everything = {"rcnn": replace(supervision["rcnn"], proposals=replace(proposals, valid=whole))}
    student, labeled = StudentModule(detector, stage_rules).eval(), make_views(1, 64, 64)
    few, many = (student(labeled, pair.student, {"rcnn": told["rcnn"]}) for told in (supervision, everything))
    for kind in ("cls", "background", "box", "rank"):
        name = LossName("unlabeled", "rcnn", kind)
        assert many[name].total > 0, name
        torch.testing.assert_close(few[name].total, many[name].total)
        assert few[name].count == many[name].count
