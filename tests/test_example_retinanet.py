"""The example detector: the contract that ``test_detectors.py`` asks of the built-in ones, and a few steps of training."""
from __future__ import annotations

import ast
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_pair, make_views
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples")]

import retinanet  # noqa: E402
from retinanet import RetinaNet, RetinaNetStage  # noqa: E402

from dtg_core.config import BackboneConfig, Config, StageRule, cross_check  # noqa: E402
from dtg_core.engine.waits import device_work  # noqa: E402
from dtg_core.guidance.paradigms import teach  # noqa: E402
from dtg_core.losses import weigh  # noqa: E402
from dtg_core.models.backbone import build_pyramid  # noqa: E402
from dtg_core.models.student import StudentModule  # noqa: E402
from dtg_core.models.teacher import make_teacher  # noqa: E402
from dtg_core.settings import load_config  # noqa: E402
from dtg_core.structures import Predictions, Supervision, Targets  # noqa: E402

CLASSES = 3
OBJECTS, LABELS = [[[4.0, 4, 30, 34]], [[20.0, 10, 60, 50], [2, 30, 20, 60]]], [[0], [1, 2]]


@pytest.fixture
def detector() -> RetinaNet:
    torch.manual_seed(0)
    backbone = BackboneConfig("test_resnet", pretrained=False, freeze_to_stride=0)
    detector = RetinaNet(build_pyramid(backbone, 16, (8, 16), "conv"), CLASSES)
    torch.nn.init.constant_(detector.head.classification_head.cls_logits.bias, 0.3)  # an untrained teacher with candidates
    return detector


def step_losses(detector: RetinaNet, labeled, pair, rules: dict[str, StageRule]) -> dict[str, Tensor]:
    student = StudentModule(detector, rules).train()
    supervision, _ = teach(make_teacher(detector), pair, rules)
    terms = student(labeled, pair.student, supervision)
    losses = {name: term.total / term.count.clamp(min=1) for name, term in terms.items()}
    weigh(losses, rules, 2.0).backward()
    return losses


def test_same_view_and_weights_are_their_own_teacher(detector):
    pair, rules = make_pair(2, 64, 64), {"head": StageRule(tau=0.5)}
    supervision, figures = teach(make_teacher(detector), pair, rules)
    assignment = supervision["head"].assignment
    predictions = detector.eval().run(pair.student)["head"]
    torch.testing.assert_close(predictions.logits[assignment.rows], assignment.dense.teacher_logit, rtol=1e-4, atol=1e-4)
    assert figures["guidance/head/candidates"] > 0
    assert figures["guidance/head/matched"] == 1
    rank = StudentModule(detector, rules).eval()(make_views(1, 64, 64), pair.student, supervision)["unlabeled", "head", "rank"]
    assert (rank.total / rank.count).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("paradigm", ["dense", "sparse"])
@pytest.mark.parametrize("case", ["full", "no object", "no candidate"])
def test_step_is_finite_and_reaches_every_parameter(detector, paradigm, case):
    tau = 0.9999 if case == "no candidate" else 0.5
    labeled = make_views(2, 64, 64, None if case == "no object" else OBJECTS, LABELS)
    pair = replace(make_pair(2, 64, 64), student=make_views(2, 64, 64, seed=5))
    losses = step_losses(detector, labeled, pair, {"head": StageRule(paradigm, tau=tau, pseudo_score=tau)})
    for name, loss in losses.items():
        assert loss.isfinite(), name
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    assert (losses["labeled", "head", "box"] > 0) == (case != "no object")
    assert (losses["unlabeled", "head", "box"] > 0) == (case != "no candidate")


def test_assignment_is_torchvisions(detector):
    """Image by image, torchvision's Matcher with RetinaNet's numbers finds the same positives, objects and background."""
    generator = torch.Generator().manual_seed(1)
    corner, side = torch.rand(7, 2, generator=generator) * 90, 10 + torch.rand(7, 2, generator=generator) * 60
    side[0] = 12  # no anchor overlaps it by half
    targets = Targets(torch.cat((corner, corner + side), 1), torch.arange(7), torch.tensor([0, 0, 0, 0, 2, 2, 2]))
    grid = detector.grid((160, 160), torch.device("cpu"))
    sizes = torch.full((3, 2), 1000.0)  # torchvision uses anchors beyond the border as well
    grid = replace(grid, anchors=grid.anchors + 1)  # no anchor is centred on the border
    found = RetinaNetStage(7).assign(grid, targets, sizes, torch.zeros(3, dtype=torch.int64))
    for image in (0, 2):
        rows = (targets.image == image).nonzero().squeeze(1)
        matched = Matcher(0.5, 0.4, allow_low_quality_matches=True)(box_iou(targets.boxes[rows], grid.anchors))
        here = found.image == image
        expected = {(sample, int(rows[row])) for sample, row in enumerate(matched.tolist()) if row >= 0}
        assert set(zip(found.sample[here].tolist(), found.label[here].tolist())) == expected
        assert torch.equal(found.background[image], matched == Matcher.BELOW_LOW_THRESHOLD)
    assert found.background[1].all()


def test_an_object_without_size_is_nobodys(detector):
    views = make_views(2, 64, 64, [[[20.0, 20, 20, 20]], []])
    predictions, stage = detector.run(views)["head"], detector.stage
    assignment = stage.assign(predictions.samples, views.targets, views.sizes, views.seeds)
    assert len(assignment.sample) == 0
    assert torch.equal(assignment.background, predictions.samples.usable(views.sizes))
    unreduced = stage.losses(predictions, replace(assignment, **dict.fromkeys(("image", "sample", "label"), torch.tensor([0])), box=views.targets.boxes))
    assert unreduced.box.isfinite().all()


def test_a_stage_that_is_not_named_is_not_run(detector):
    views = make_views(1, 64, 64)
    assert detector.run(views, {}) == {}
    assert list(detector.run(views, {"head": Supervision(views.targets)})) == ["head"]


def test_the_host_waits_for_the_number_of_positives_alone(detector):
    views = make_views(2, 64, 64, OBJECTS, LABELS)
    predictions, stage = detector.run(views)["head"], detector.stage
    with device_work() as work:
        assignment = stage.assign(predictions.samples, views.targets, views.sizes, views.seeds)
        stage.losses(predictions, assignment)
        stage.decode(predictions, assignment.rows)
    assert dict(work.waits) == {"aten::nonzero": 1}


def test_losses_are_torchvisions(detector):
    """On one image the ordinary reduction is torchvision's ``compute_loss``."""
    views = make_views(1, 64, 64, OBJECTS[1:], LABELS[1:])
    predictions, stage = detector.run(views)["head"], detector.stages["head"]
    assignment = stage.assign(predictions.samples, views.targets, views.sizes, views.seeds)
    unreduced = stage.losses(predictions, assignment)
    matched = torch.full((predictions.samples.num_samples,), Matcher.BETWEEN_THRESHOLDS)
    matched[assignment.background[0]] = Matcher.BELOW_LOW_THRESHOLD
    matched[assignment.sample] = (assignment.label == 2).long()  # rows of the targets
    expected = detector.head.compute_loss(
        [{"boxes": views.targets.boxes, "labels": views.targets.labels}],
        {"cls_logits": predictions.logits, "bbox_regression": predictions.raw}, [predictions.samples.anchors], [matched],
    )
    classification = unreduced.classification.sum() + unreduced.background.sum()
    torch.testing.assert_close(classification / unreduced.classification_count, expected["classification"])
    torch.testing.assert_close(unreduced.box.sum() / unreduced.box_count, expected["bbox_regression"])


def test_detect_gives_the_boxes_of_clear_scores(detector):
    views = make_views(2, 64, 64)
    grid = detector.grid((64, 64), torch.device("cpu"))
    logits = torch.full((2, grid.num_samples, CLASSES), -9.0)
    centered = int(((grid.anchors[:, :2] + grid.anchors[:, 2:]) / 2 - 32).norm(dim=1).argmin())
    logits[1, centered, 1:] = torch.tensor([2.0, 3.0])  # two classes at one place are two objects
    logits[1, centered + 1, 2] = 1.0  # of another shape, IoU 0.55, so NMS removes it
    found = detector.detect({"head": Predictions(grid, logits, torch.zeros(2, grid.num_samples, 4))}, views, 0.5)
    assert found.image.tolist() == [1, 1]
    assert found.labels.tolist() == [2, 1]
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 2.0]).sigmoid())
    torch.testing.assert_close(found.boxes, grid.anchors[centered].clamp(0, 64).expand(2, 4))


def train(*settings: str) -> list[dict[str, float]]:
    """The figures of a short training, with ``settings`` of its own."""
    small = [
        "backbone.name=test_resnet", "backbone.pretrained=false", "backbone.freeze_to_stride=0", "data.workers=0",
        "data.shapes_labeled=4", "data.shapes_unlabeled=4", "data.shapes_val=1",
    ]
    config, _ = load_config(Config, Path(retinanet.__file__).with_suffix(".yaml"), [*small, *settings])
    return retinanet.main(config)


def test_training_lowers_the_loss(tmp_path, monkeypatch):
    monkeypatch.setenv("DTG_CACHE", str(tmp_path))
    history = train(
        "backbone.batch_norm=train", "data.labeled_per_device=2", "data.unlabeled_per_device=2", "run.steps=30", "optim.lr=0.003",
        "guidance.start_step=20", "guidance.ramp_steps=1", "guidance.stages.head.tau=0.05",
    )
    total = [sum(value for name, value in figures.items() if name.startswith("labeled/")) for figures in history]
    assert sum(total[-5:]) < 0.9 * sum(total[:5])
    guided = history[-1]
    assert {f"unlabeled/head/{kind}" for kind in ("cls", "box", "background", "rank")} <= set(guided)
    assert max(figures.get("guidance/head/candidates", 0) for figures in history) > 0
    assert not any(figures["skipped"] for figures in history)


def test_micro_batches_share_the_images_of_a_step(tmp_path, monkeypatch):
    monkeypatch.setenv("DTG_CACHE", str(tmp_path))
    common = "run.steps=3", "guidance.start_step=1", "guidance.ramp_steps=1", "guidance.stages.head.tau=0.009"
    whole = train("data.labeled_per_device=2", "data.unlabeled_per_device=2", *common)
    parts = train("data.labeled_per_device=1", "data.unlabeled_per_device=1", "optim.accumulate=2", *common)
    assert whole[-1]["guidance/head/candidates"] > 0
    for one, other in zip(whole, parts, strict=True):
        losses = {name: value for name, value in other.items() if "labeled/" in name}
        assert {name: one[name] for name in losses} == pytest.approx(losses, rel=1e-3, abs=1e-4)


def test_command_line_sets_what_the_config_has():
    """The settings file fits ``Config``, and guidance starts within the run."""
    config, _ = load_config(Config, Path(retinanet.__file__).with_suffix(".yaml"), ["run.steps=200", "optim.lr=0.002"])
    assert (config.run.steps, config.optim.lr) == (200, 0.002)
    assert config.guidance.start_step + config.guidance.ramp_steps <= config.run.steps
    assert cross_check(config, {}) == []


def test_file_is_short_and_stands_on_the_core_alone():
    text = Path(retinanet.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    modules = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert not any(module.startswith(("gfl_dtg", "faster_rcnn_dtg")) or "._" in module for module in modules if module)
