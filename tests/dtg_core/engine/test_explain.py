"""Explained guidance: equal to what training does, differences by brute force, pencil cases of ranks and counts, pictures."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_pair, tiny_detector
from PIL import Image

from dtg_core.boxes import paired_iou
from dtg_core.config import StageRule, ViewsConfig
from dtg_core.data.coco import load_coco
from dtg_core.data.shapes import make_shapes
from dtg_core.engine import pictures
from dtg_core.engine.explain import BOTH, DENSE_ONLY, SPARSE_ONLY, Explained, Tallies, Tally, explain, objects_in, spearman
from dtg_core.engine.pictures import draw_found, guidance_sheet, views_sheet
from dtg_core.engine.predict import ImageDetections
from dtg_core.guidance.paradigms import teach
from dtg_core.structures import Targets

STAGES = [("gfl", "head"), ("faster_rcnn", "rpn"), ("faster_rcnn", "rcnn")]
MATRIX = torch.tensor([[-1.0, 0, 96], [0, 1, 3], [0, 0, 1]])


def noisy(name: str, seed: int) -> torch.nn.Module:
    model = tiny_detector(name).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model


def case(name: str, stage: str, tau: float | None = None):
    teacher, student, pair = noisy(name, 1), noisy(name, 2), make_pair(2, 64, 96, MATRIX)
    with torch.no_grad():
        scores = teacher.run(pair.teacher)[stage].logits.amax(2).sigmoid()
    tau = float(scores.quantile(0.9)) if tau is None else tau
    rule = StageRule(tau=tau, nms_iou=0.5, pseudo_score=0.01)
    return teacher, student, pair, rule, explain(teacher, student, pair, {stage: rule})[stage]


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_it_is_what_training_does(name, stage):
    teacher, _, pair, rule, explained = case(name, stage)
    others = dict.fromkeys(teacher.stages, StageRule("none"))
    dense = teach(teacher, pair, others | {stage: rule})[0][stage].assignment
    assert len(dense.image)
    for field in ("image", "sample", "label", "box", "background"):
        assert torch.equal(getattr(dense, field), getattr(explained.dense, field)), field
    sparse = teach(teacher, pair, others | {stage: replace(rule, paradigm="sparse")})[0][stage].targets
    assert torch.equal(sparse.boxes, explained.pseudo.boxes)


def test_the_teacher_runs_once_for_all_stages(monkeypatch):
    teacher, student, pair, rule, _ = case("faster_rcnn", "rpn")
    run, ran = teacher.run, []
    monkeypatch.setattr(teacher, "run", lambda *given: ran.append(given) or run(*given))
    both = explain(teacher, student, pair, {"rpn": rule, "rcnn": rule})
    assert list(both) == ["rpn", "rcnn"]
    assert len(ran) == 1
    for stage, told in both.items():
        alone = explain(teacher, student, pair, {stage: rule})[stage]
        assert torch.equal(told.student_logit, alone.student_logit)
        assert torch.equal(told.dense.box, alone.dense.box)
        assert torch.equal(told.pseudo.boxes, alone.pseudo.boxes)


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_differences_name_every_positive_once(name, stage):
    *_, explained = case(name, stage)
    for image in range(2):
        own = [set(part.sample[part.image == image].tolist()) for part in (explained.dense, explained.sparse)]
        found = explained.differences(image)
        assert [difference.sample for difference in found] == sorted(own[0] | own[1])
        for difference in found:
            inside = difference.sample in own[0], difference.sample in own[1]
            assert (difference.kind == DENSE_ONLY) == (inside == (True, False))
            assert (difference.kind == SPARSE_ONLY) == (inside == (False, True))
            assert bool(difference.reason) == (difference.kind != BOTH)


@pytest.mark.parametrize("paradigm", ["dense", "sparse"])
@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_thresholds_are_for_the_paradigm_of_the_rule(name, stage, paradigm):
    """Training's thresholds act on its own guidance; the other, for comparison, keeps to the number of the rule."""
    teacher, student, pair, rule, before = case(name, stage)
    rule = replace(rule, paradigm=paradigm)
    classes = teacher.stages[stage].num_classes if paradigm == "dense" else 3
    scores = before.detections.scores if paradigm == "sparse" else before.candidates.logit.sigmoid()
    limit = torch.full((classes,), float(scores.median()))
    told = explain(teacher, student, pair, {stage: rule}, {stage: limit})[stage]
    others = dict.fromkeys(teacher.stages, StageRule("none"))
    given = teach(teacher, pair, others | {stage: rule}, thresholds={stage: limit})[0][stage]
    if paradigm == "dense":
        assert torch.equal(told.dense.sample, given.assignment.sample)
        assert 0 < len(told.dense.sample) < len(before.dense.sample)
        assert torch.equal(told.sparse.sample, before.sparse.sample)
    else:
        assert torch.equal(told.pseudo.boxes, given.targets.boxes)
        assert 0 < len(told.pseudo.boxes) < len(before.pseudo.boxes)
        assert torch.equal(told.dense.sample, before.dense.sample)
    text = {"dense": "teacher's score is under its class' threshold", "sparse": "no pseudo box over its class' threshold there"}
    plain = {"dense": f"teacher's score is under {rule.tau:g}", "sparse": f"no pseudo box over {rule.pseudo_score:g} there"}
    nothing = explain(teacher, student, pair, {stage: rule}, {stage: torch.full_like(limit, 0.9999)})[stage]
    reasons = {found.reason for image in range(2) for found in nothing.differences(image)}
    assert plain[paradigm] not in reasons
    assert text[paradigm] in reasons


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_members_far_from_their_box_are_told(name, stage):
    """Of both kinds of samples: with ``member_iou`` the dense positives are those of before that overlap their box so far."""
    teacher, student, pair, rule, before = case(name, stage)
    overlap = paired_iou(before.samples.take(before.dense.image, before.dense.sample), before.dense.box)
    least = float(overlap.median())
    after = explain(teacher, student, pair, {stage: replace(rule, member_iou=least)})[stage]
    near = overlap >= least
    assert 0 < near.sum() < len(near)
    assert torch.equal(after.dense.image, before.dense.image[near])
    assert torch.equal(after.dense.sample, before.dense.sample[near])
    far = before.dense.image[~near], before.dense.sample[~near]
    assert not after.dense.background[far].any()
    reasons = {(image, found.sample): found.reason for image in range(2) for found in after.differences(image)}
    shared = [place for place in zip(*(column.tolist() for column in far)) if place in reasons]
    assert all("overlaps its box by less than" in reasons[place] for place in shared)


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_members_that_fit_their_cluster_badly_are_told(name, stage):
    """They become background, unlike those of ``member_iou``."""
    teacher, student, pair, rule, before = case(name, stage)
    after = explain(teacher, student, pair, {stage: replace(rule, member_share=0.9)})[stage]
    told, kept = (set(zip(part.image.tolist(), part.sample.tolist())) for part in (before.dense, after.dense))
    assert kept < told
    poor = sorted(told - kept)
    assert all(after.dense.background[place] for place in poor)
    reasons = {(image, found.sample): found.reason for image in range(2) for found in after.differences(image)}
    assert all("less than 0.9 of its cluster's best IoU" in reasons[place] for place in poor if place in reasons)


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_clusters_that_are_not_likely_are_told(name, stage):
    """With a tau that no sample reaches there is no cluster, however many candidates ``member_tau`` admits."""
    teacher, student, pair, rule, before = case(name, stage)
    after = explain(teacher, student, pair, {stage: replace(rule, tau=0.9999, member_tau=rule.tau)})[stage]
    assert len(after.dense.sample) == after.clusters.num_clusters == 0 < before.clusters.num_clusters
    reasons = {found.reason for image in range(2) for found in after.differences(image)}
    assert reasons <= {"its cluster's best score is under 0.9999", "no teacher sample lands there"}
    assert len(reasons) > 0


def test_best_teacher_score_of_a_student_sample():
    """By a loop over the teacher's samples."""
    from dtg_core.guidance.correspondence import correspond

    teacher, _, pair, rule, explained = case("gfl", "head")
    with torch.no_grad():
        predictions = teacher.run(pair.teacher)["head"]
    _, row = correspond(predictions.samples, teacher.grid(pair.student.canvas, torch.device("cpu")), pair, rule.min_iou)
    expected = torch.full_like(explained.teacher_score, -1.0)
    for image, sample in (row >= 0).nonzero().tolist():
        place = image, int(row[image, sample])
        expected[place] = max(expected[place], predictions.logits[image, sample].max().sigmoid())
    torch.testing.assert_close(explained.teacher_score, expected)


def test_agreement():
    scores = torch.tensor([0.9, 0.5, 0.7, 0.1])
    assert spearman(scores, scores * 2 - 3) == pytest.approx(1)
    assert spearman(scores, -scores) == pytest.approx(-1)
    assert spearman(torch.tensor([3.0, 2, 1]), torch.tensor([2.0, 3, 1])) == pytest.approx(0.5)  # 1 - 6 * 2 / 24
    assert spearman(scores[:1], scores[:1]) == 0


def test_tally_counts_each_object_once():
    truth, classes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]]), torch.tensor([0, 1])
    boxes = torch.tensor([[0.0, 0, 10, 8], [0, 0, 10, 10], [50, 50, 60, 60], [80, 80, 90, 90]])
    count = Tally()
    count.add(boxes, torch.tensor([0, 0, 0, 1]), truth, classes)  # right; taken; another class; nothing there
    assert (count.boxes, count.objects, count.right) == (4, 2, 1)
    assert count.overlap == pytest.approx(0.8)
    assert (count.precision, count.recall) == (0.25, 0.5)
    count.add(boxes[:0], classes[:0], truth[:0], classes[:0])
    count.add(boxes, torch.tensor([0, 0, 0, 1]), truth[:0], classes[:0])
    assert (count.images, count.boxes, count.objects, count.right) == (3, 8, 2, 1)


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_tally_of_perfect_labels(name, stage):
    """The clusters' own boxes as the truth."""
    *_, explained = case(name, stage)
    keep = explained.clusters.keep
    candidates = explained.candidates
    truth = Targets(candidates.box[keep], candidates.label[keep], candidates.image[keep])
    every, best = Tallies(0.0), Tallies(0.9999)
    for times in (1, 2):  # batches add up
        every.add(explained, truth)
        assert every.clusters.boxes == times * len(keep) > 0
        assert every.clusters.images == times * 2
        assert every.clusters.precision == every.clusters.recall == 1
    best.add(explained, truth)
    assert best.clusters.boxes == 0


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("cache"), 3, 2, 1)


def test_objects_follow_their_view(shapes):
    truth = load_coco(shapes.unlabeled_truth, shapes.unlabeled)
    pair = make_pair(2, 64, 96)
    flip = torch.tensor([[-1.0, 0, 160], [0, 1, 0], [0, 0, 1]])
    sizes = torch.full((2, 2), 160.0)
    names = truth.file_names[1], truth.file_names[0]
    views = replace(pair.teacher, image_ids=names, sizes=sizes, view_from_image=flip.repeat(2, 1, 1))
    found = objects_in(views, truth, "corners")
    boxes, labels = truth.objects(1)
    own = found.image == 0
    expected = np.stack((160 - boxes[:, 2], boxes[:, 1], 160 - boxes[:, 0], boxes[:, 3]), 1)
    np.testing.assert_allclose(found.boxes[own].numpy(), expected)
    assert (found.labels[own].numpy() == labels).all()
    away = torch.eye(3)
    away[0, 2] = 1000
    left = objects_in(replace(views, view_from_image=torch.stack((flip, away))), truth, "corners")
    assert torch.equal(left.image, torch.zeros(len(boxes), dtype=torch.int64))
    assert len(left.boxes) == len(left.labels) == len(boxes)


@pytest.mark.parametrize(("name", "stage"), STAGES)
@pytest.mark.parametrize("tau", [None, 0.9999], ids=["some", "no candidate"])
def test_guidance_sheet(name, stage, tau, monkeypatch):
    _, _, pair, _, explained = case(name, stage, tau)
    compared, differences = [], Explained.differences
    monkeypatch.setattr(Explained, "differences", lambda own, image: compared.append(image) or differences(own, image))
    picture = guidance_sheet(explained, pair, ["a", "b", "c"], range(2))
    assert compared == [0, 1]  # which is slow, so once for each image
    assert picture.width > picture.height
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 100


def test_views_sheet(shapes):
    index = load_coco(shapes.labeled, shapes.images)
    config = ViewsConfig(short_edge=(80, 80), long_edge=160)
    picture = views_sheet(index, [0, 2], config, 0)
    assert picture.width > 5 * 300
    assert np.array_equal(np.asarray(picture), np.asarray(views_sheet(index, [0, 2], config, 0)))
    assert not np.array_equal(np.asarray(picture), np.asarray(views_sheet(index, [0, 2], config, 1)))


@pytest.mark.parametrize(("boxes", "names"), [(10, 10), (11, 2)])
def test_over_many_boxes_a_class_is_named_once(shapes, monkeypatch, boxes, names):
    index = load_coco(shapes.labeled, shapes.images)
    corners = np.arange(boxes, dtype=np.float32)[:, None] * 4 + np.array((0, 0, 12, 12), np.float32)
    index = replace(index, boxes=corners, labels=np.arange(boxes) % 2, crowd=np.zeros(boxes, bool),
                    box_start=np.array([0, *[boxes] * len(index)]))  # fmt: skip
    named = []
    monkeypatch.setattr(pictures.Canvas, "label", lambda canvas, x, y, text, color: named.append(text))
    still = ViewsConfig(short_edge=(80, 80), long_edge=160, flip=0, geometric=0)
    views_sheet(index, [0], still, 0)
    assert len(named) == 5 * names
    assert set(named) == set(index.class_names[:2])


def test_predictions_on_small_and_large_images():
    found = ImageDetections((20, 40), np.array([[0, 0, 40, 20], [5, 5, 5, 5]], np.float32), np.array([0.9, 0.4]), np.array([1, 0]))
    small = draw_found(Image.new("RGB", (40, 20)), found, ["a", "long name"])
    assert small.size == (960, 480)
    assert (np.asarray(small)[:, 0] != 0).any()  # the first box' left side
    assert draw_found(Image.new("RGB", (1200, 30)), found, ["a", "b"]).size == (1200, 30)
    assert draw_found(Image.new("RGB", (900, 3)), found, ["a", "b"]).size == (960, 3)  # a strip is not blown up


def test_a_label_does_not_cover_an_earlier_one():
    canvas = pictures.Canvas.of(Image.new("RGB", (200, 100)), 1)
    for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):  # above the point, below it, and no room
        canvas.label(50, 50, "name", color)
    pixels = np.asarray(canvas.image)
    assert (pixels[:50, 50] == (255, 0, 0)).all(1).any()
    assert (pixels[50:, 50] == (0, 255, 0)).all(1).any()
    assert not (pixels == (0, 0, 255)).all(2).any()
    canvas.label(120, 50, "name", (0, 0, 255))  # beside them
    assert (np.asarray(canvas.image) == (0, 0, 255)).all(2).any()


def test_the_best_of_many_boxes_has_a_label():
    boxes = np.tile(np.array([[20, 20, 60, 60]], np.float32), (12, 1))
    scores, labels = np.linspace(0.9, 0.3, 12), np.arange(12)
    picture = draw_found(Image.new("RGB", (480, 480)), ImageDetections((480, 480), boxes, scores, labels), list("abcdefghijkl"))
    assert (np.asarray(picture)[10, 20:40] == pictures.COLORS[0]).all(1).any()
