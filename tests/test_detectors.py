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
from dtg_core.guidance.dense import dense_labels, teacher_scores
from dtg_core.guidance.inverse_nms import inverse_nms
from dtg_core.guidance.paradigms import teach
from dtg_core.losses import weigh
from dtg_core.models.student import StudentModule, learn
from dtg_core.models.teacher import make_teacher
from dtg_core.structures import LossName, PairBatch, Supervision

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


def unequal_pair() -> PairBatch:
    """A teacher's view of 40 x 56 px on a canvas of 64 x 96, and a student's on 128 x 160 that shows more at twice the size."""
    teacher = replace(make_views(2, 64, 96), sizes=torch.tensor([[40.0, 56.0]] * 2))
    return PairBatch(teacher, make_views(2, 128, 160), torch.diag(torch.tensor([2.0, 2.0, 1.0])).repeat(2, 1, 1))


@pytest.mark.parametrize("name", DETECTORS)
def test_views_of_unequal_sizes(name):
    """Each has its own padding and its own anchors; targets stay in the student's view."""
    detector, pair, stage_rules = eager(tiny_detector(name)).eval(), unequal_pair(), rules(tau=0.5, background_samples=None)
    outputs = detector.run(pair.teacher)
    grid = detector.grid(pair.student.canvas, torch.device("cpu"))
    for stage, predictions in outputs.items():
        samples = predictions.samples
        labels = dense_labels(detector.stages[stage], predictions, grid, pair, stage_rules[stage])
        candidates = labels.candidates
        assert torch.equal(candidates.foreground | candidates.background, samples.usable(pair.teacher.sizes))
        assert len(candidates.image) > 0
        assert (candidates.box[:, 2:] <= torch.tensor([56, 40])).all()
        padding = ~samples.usable(pair.teacher.sizes)
        logits = torch.where(padding.unsqueeze(2), 9.0, predictions.logits)
        scores = teacher_scores(replace(predictions, logits=logits), labels, pair)
        assert scores.shape == (2, labels.samples.num_samples)
        assert scores.max() < 0.999  # the padding has no say
    supervision, _ = teach(make_teacher(detector), pair, stage_rules)
    first = supervision[next(iter(supervision))].assignment
    assert first.background.shape == (2, grid.num_samples)
    assert (first.box[:, 2:] <= torch.tensor([112, 80])).all()


@pytest.mark.parametrize("name", DETECTORS)
def test_options_of_inverse_nms_come_from_the_rule(name):
    """In a view of half the size many samples meet, and few fit their targets well."""
    detector = eager(tiny_detector(name)).eval()
    pair = make_pair(2, 64, 64, torch.diag(torch.tensor([0.5, 0.5, 1.0])))
    stage = next(iter(detector.stages))
    predictions = detector.run(pair.teacher)[stage]
    grid = detector.grid(pair.student.canvas, torch.device("cpu"))
    found = {}
    for collisions, member_iou in (("best", 0.0), ("all", 0.0), ("best", 0.6)):
        rule = rules(tau=0.5, min_iou=0.1, collisions=collisions, member_iou=member_iou)[stage]
        labels = dense_labels(detector.stages[stage], predictions, grid, pair, rule)
        expected = inverse_nms(labels.candidates, labels.clusters, labels.partner, labels.samples, pair, rule)
        assert torch.equal(labels.assignment.sample, expected.sample)
        assert torch.equal(labels.assignment.background, expected.background)
        found[collisions, member_iou] = len(expected.sample)
    assert found["best", 0.6] < found["best", 0.0] < found["all", 0.0]


@pytest.mark.parametrize("name", DETECTORS)
def test_class_targets_are_those_of_the_rule(name):
    """None of the guidance's, which leaves them to the stage; 1; or the teacher's score of the member, not of its cluster."""
    detector, pair = eager(tiny_detector(name)).eval(), make_pair(2, 64, 64)
    outputs = detector.run(pair.teacher)
    for quality in ("stage", "one", "teacher"):
        supervision, _ = teach(make_teacher(detector), pair, rules(tau=0.5, quality=quality))
        for stage, told in supervision.items():
            found = told.assignment
            scores = outputs[stage].logits[found.rows].sigmoid()
            expected = {"stage": None, "one": torch.ones(len(scores)), "teacher": scores}[quality]
            assert len(scores) > 0
            if expected is None:
                assert found.quality is None
            else:
                torch.testing.assert_close(found.quality, expected)


@pytest.mark.parametrize("name", DETECTORS)
def test_figures_are_means_over_the_images(name):
    detector, pair = eager(tiny_detector(name)).eval(), make_pair(2, 64, 64)
    stage = list(detector.stages)[-1]
    predictions = detector.run(pair.teacher)[stage]
    scores = predictions.logits.detach().sigmoid().amax(2)
    rule = rules(tau=float(scores.quantile(0.2)), pseudo_score=float(scores.quantile(0.8)))[stage]
    grid = detector.grid(pair.student.canvas, torch.device("cpu"))
    labels = dense_labels(detector.stages[stage], predictions, grid, pair, rule)
    candidates, keep = labels.candidates, labels.clusters.keep
    supervision, figures = teach(make_teacher(detector), pair, {name: rule for name in detector.stages})
    told = supervision[stage].assignment
    expected = {
        "candidates": len(candidates.image) / 2, "clusters": len(keep) / 2, "cluster_size": len(candidates.image) / len(keep),
        "matched": len(told.image) / len(candidates.image), "background": int(told.background.sum()) / 2,
        "pseudo_boxes": int((candidates.logit[keep].sigmoid() > rule.pseudo_score).sum()) / 2,
    }  # fmt: skip
    assert {key: float(figures[f"guidance/{stage}/{key}"]) for key in expected} == pytest.approx(expected)
    assert 0 < expected["pseudo_boxes"] < expected["clusters"] < expected["candidates"]
    sparse = {name: replace(rule, paradigm="sparse") for name in detector.stages}
    supervision, figures = teach(make_teacher(detector), pair, sparse)
    assert figures[f"guidance/{stage}/pseudo_boxes"] == len(supervision[stage].targets.boxes) / 2 > 0


def test_each_stage_gets_pseudo_boxes_by_its_own_score():
    """The stages share one pass of the final NMS; a threshold that has adapted may be below all scores of the rules."""
    detector, pair = eager(tiny_detector("faster_rcnn")).eval(), make_pair(2, 64, 64)
    teacher = make_teacher(detector)
    detections = teacher.detect(teacher.run(pair.teacher), pair.teacher, 0.0)
    low, high = detections.scores.quantile(torch.tensor([0.2, 0.8])).tolist()
    base = rules(paradigm="sparse")
    mixed = {"rpn": replace(base["rpn"], pseudo_score=high), "rcnn": replace(base["rcnn"], pseudo_score=low)}
    supervision, _ = teach(teacher, pair, mixed)
    for stage, score in (("rpn", high), ("rcnn", low)):
        assert len(supervision[stage].targets.boxes) == int((detections.scores > score).sum()) > 0
    above = {name: replace(rule, pseudo_score=0.999) for name, rule in base.items()}
    supervision, _ = teach(teacher, pair, above, thresholds={"rcnn": torch.full((3,), low)})
    assert len(supervision["rcnn"].targets.boxes) == int((detections.scores > low).sum())
    assert len(supervision["rpn"].targets.boxes) == 0


def test_a_students_draws_follow_the_seeds_of_its_views():
    detector, views = tiny_detector("faster_rcnn").train(), make_views(2, 64, 64, OBJECTS, LABELS)
    truth = {name: Supervision(views.targets) for name in detector.stages}
    first, again, other = (
        learn(detector, replace(views, seeds=torch.tensor(seeds)), truth)["rpn"][1].background
        for seeds in ([5, 6], [5, 6], [7, 6])
    )  # fmt: skip
    assert torch.equal(first, again)
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[1], other[1])


@pytest.mark.parametrize("name", DETECTORS)
def test_assignment_and_losses_are_float32_under_autocast(name):
    """Coordinates and logarithms of half precision would be too coarse."""
    detector, views = tiny_detector(name), make_views(2, 64, 64, OBJECTS, LABELS)
    seen = []
    for stage in detector.stages.values():
        for method in ("assign", "losses"):
            own = getattr(stage, method)
            setattr(stage, method, lambda *args, own=own: seen.append(torch.is_autocast_enabled("cpu")) or own(*args))
    with torch.autocast("cpu", torch.bfloat16):
        terms = StudentModule(detector, rules())(views, None, {})
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False] * 2 * len(detector.stages)
    assert {term.total.dtype for term in terms.values()} == {torch.float32}


@pytest.mark.parametrize("paradigm", ["dense", "sparse"])
@pytest.mark.parametrize("name", DETECTORS)
def test_the_teacher_runs_in_the_networks_precision_and_guidance_does_not(name, paradigm):
    teacher, precisions = make_teacher(eager(tiny_detector(name))), []
    for module in teacher.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *_: precisions.append(torch.is_autocast_enabled("cpu")))
    guided = []
    for stage in teacher.stages.values():
        decode = stage.decode
        stage.decode = lambda *args, own=decode: guided.append(torch.is_autocast_enabled("cpu")) or own(*args)
    teach(teacher, make_pair(1, 64, 64), rules(paradigm=paradigm, tau=0.5, pseudo_score=0.5),
          autocast=partial(torch.autocast, "cpu", torch.bfloat16))  # fmt: skip
    assert set(precisions) == {True}
    assert set(guided) == {False}


@pytest.mark.parametrize("name", DETECTORS)
def test_a_score_of_exactly_the_threshold_is_no_detection(name):
    detector, views = eager(tiny_detector(name)).eval(), make_views(2, 64, 64)
    outputs = detector.run(views)
    stage = list(outputs)[-1]
    outputs[stage] = replace(outputs[stage], logits=torch.zeros_like(outputs[stage].logits))
    assert len(detector.detect(outputs, views, 0.5).scores) == 0
    assert len(detector.detect(outputs, views, 0.499).scores) > 0


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
