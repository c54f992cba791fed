"""The detector as a whole on a small stub of a pyramid."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dtg_core.boxes import clip, paired_iou
from dtg_core.config import BackboneConfig
from dtg_core.losses import ordinary_terms
from dtg_core.protocol import Detector, Outputs
from dtg_core.structures import Assignment, Predictions, Proposals, Rows, Supervision, Targets, ViewBatch
from faster_rcnn_dtg import build
from faster_rcnn_dtg.config import FasterRCNNConfig, RCNNConfig, RPNConfig
from faster_rcnn_dtg.detector import FasterRCNN
from faster_rcnn_dtg.rcnn import RCNN
from faster_rcnn_dtg.rpn import propose

CLASSES = 3
SMALL = FasterRCNNConfig(
    channels=16,
    strides=(4, 8, 16),
    anchor_scale=4.0,
    rpn=RPNConfig(pre_nms=100, post_nms=60, samples=64),
    rcnn=RCNNConfig(hidden=32, samples=40, pool_size=3),
)


class StubPyramid(nn.Module):
    """Maps of strides 4, 8 and 16."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 7, 4, 3)
        self.down = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(2))

    def forward(self, views: ViewBatch) -> list[Tensor]:
        maps = [self.stem(views.pixels.float() / 128 - 1).relu()]
        for conv in self.down:
            maps.append(conv(maps[-1]).relu())
        return maps


def detector_of(config: FasterRCNNConfig = SMALL, seed: int = 0) -> FasterRCNN:
    torch.manual_seed(seed)
    return FasterRCNN(StubPyramid(config.channels), config, CLASSES)


def views_of(objects: tuple[int, ...] = (2, 1), seed: int = 0) -> ViewBatch:
    """Noise with colored rectangles, one color per class; the second image is smaller than the canvas."""
    generator = torch.Generator().manual_seed(seed)
    images = len(objects)
    pixels = torch.randint(100, 140, (images, 3, 96, 96), generator=generator, dtype=torch.uint8)
    boxes, labels, image = [], [], []
    for index, count in enumerate(objects):
        for number in range(count):
            left, top = 8 + 40 * number, 10 + 20 * number
            label = (index + number) % CLASSES
            pixels[index, :, top : top + 24, left : left + 28] = 0
            pixels[index, label, top : top + 24, left : left + 28] = 255
            boxes.append([left, top, left + 28, top + 24])
            labels.append(label)
            image.append(index)
    targets = Targets(
        torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(image, dtype=torch.int64),
    )
    sizes = torch.tensor([[96.0, 96.0], [80.0, 90.0]] + [[96.0, 96.0]] * (images - 2))[:images]
    return ViewBatch(pixels, sizes, targets, torch.arange(images) + 7, torch.eye(3).expand(images, 3, 3))


def total_loss(detector: FasterRCNN, views: ViewBatch) -> Tensor:
    supervision = {name: Supervision(views.targets) for name in detector.stages}
    total = torch.zeros(())
    for name, predictions in detector.run(views, supervision).items():
        stage = detector.stages[name]
        assignment = stage.assign(predictions.samples, views.targets, views.sizes, views.seeds)
        for term in ordinary_terms(stage.losses(predictions, assignment)).values():
            total = total + term.total / term.count.clamp(min=1)
    return total


def test_it_is_a_detector() -> None:
    detector: Detector = detector_of()
    assert set(detector.stages) == {"rpn", "rcnn"}
    assert detector.stages["rpn"].num_classes == 1
    assert detector.stages["rcnn"].num_classes == CLASSES


def test_run_without_supervision() -> None:
    detector, views = detector_of(), views_of()
    outputs = detector.run(views)
    rpn, rcnn = outputs["rpn"], outputs["rcnn"]
    grid, proposals = rpn.samples, rcnn.samples
    assert grid.num_samples == rpn.logits.shape[1] == 3 * (24 * 24 + 12 * 12 + 6 * 6)
    assert grid is detector.grid(views.canvas, views.pixels.device)
    assert isinstance(proposals, Proposals)
    assert proposals.boxes.shape == (2, 60, 4)
    assert rcnn.logits.shape == (2, 60, CLASSES)
    assert rcnn.raw.shape == (2, 60, 4 * CLASSES)
    assert not proposals.boxes.requires_grad
    torch.testing.assert_close(clip(proposals.boxes, views.sizes.unsqueeze(1)), proposals.boxes)
    stage = detector.stages["rpn"]
    sample = torch.tensor([0, 3 * 24 * 24, grid.num_samples - 1])
    image, label = torch.tensor([0, 1, 1]), torch.zeros_like(sample)
    assert stage.groups(grid, Rows(image, sample, label)).tolist() == [0, 4, 5]  # three levels


def test_run_gives_the_stages_that_supervision_names() -> None:
    detector, views = detector_of(), views_of()
    given = Proposals(torch.tensor([[[4.0, 4, 40, 40]], [[0.0, 0, 50, 30]]]), torch.tensor([[True], [True]]))
    assert set(detector.run(views, {"rpn": Supervision(views.targets)})) == {"rpn"}
    assert set(detector.run(views, {"rcnn": Supervision(views.targets)})) == {"rcnn"}
    assert set(detector.run(views, {})) == set()
    predictions = detector.run(views, {"rcnn": Supervision(proposals=given)})["rcnn"]
    assert predictions.samples is given
    assert predictions.logits.shape == (2, 1, CLASSES)
    own = detector.run(views, {"rcnn": Supervision(views.targets)})["rcnn"].samples
    assert isinstance(own, Proposals)
    assert own.boxes.shape == (2, 40, 4)


@pytest.mark.parametrize(("add_truth", "given"), [(True, False), (False, False), (True, True)])
def test_truth_joins_own_proposals_of_labeled_images_only(add_truth: bool, given: bool) -> None:
    detector, views = detector_of(), views_of()
    proposals = Proposals(torch.tensor([[[4.0, 4, 40, 40]]] * 2), torch.ones(2, 1, dtype=torch.bool)) if given else None
    told = Supervision(views.targets, None, proposals, add_truth)
    samples = detector.run(views, {"rcnn": told})["rcnn"].samples
    assert isinstance(samples, Proposals)
    for box, image in zip(views.targets.boxes, views.targets.image):
        assert (samples.boxes[image] == box).all(1).any() == (add_truth and not given)


@pytest.mark.parametrize("objects", [(2, 1), (0, 0), (0, 2)])
@pytest.mark.parametrize("focal", ["sigmoid", "softmax"])
def test_every_parameter_gets_a_gradient(objects: tuple[int, int], focal: str) -> None:
    config = replace(SMALL, rcnn=replace(SMALL.rcnn, focal=focal))  # type: ignore[arg-type]
    detector = detector_of(config)
    loss = total_loss(detector, views_of(objects))
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("focal", ["sigmoid", "softmax"])
def test_no_valid_proposals(focal: str) -> None:
    config = replace(SMALL, rcnn=replace(SMALL.rcnn, focal=focal))  # type: ignore[arg-type]
    detector, views = detector_of(config), views_of()
    nothing = Proposals(torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.bool))
    outputs = detector.run(views, {"rcnn": Supervision(proposals=nothing)})
    predictions = outputs["rcnn"]
    assert (predictions.logits.sigmoid() < 1e-6).all()
    found = detector.detect(outputs, views, 0.0)
    assert found.boxes.shape == (0, 4)
    empty = torch.zeros(0, dtype=torch.int64)
    assignment = Assignment(empty, empty, empty, torch.zeros(0, 4), torch.zeros(2, 5, dtype=torch.bool))
    losses = detector.stages["rcnn"].losses(predictions, assignment)
    total = losses.classification.sum() + losses.box.sum() + losses.background.sum()
    assert total == 0
    total.backward()
    assert all(parameter.grad is not None for parameter in detector.rcnn.parameters())


@pytest.mark.parametrize("min_side", [0.01, 0.0])
def test_boxes_are_not_proposals_when_they_left_the_view(min_side: float) -> None:
    detector, views = detector_of(replace(SMALL, rpn=replace(SMALL.rpn, min_side=min_side))), views_of()
    grid = detector.grid(views.canvas, views.pixels.device)
    shift = torch.tensor([50.0, 0, 0, 0]).expand(2, grid.num_samples, 4)
    proposals = propose(Predictions(grid, torch.randn(2, grid.num_samples, 1), shift), views.sizes, detector.config.rpn)
    assert proposals.boxes.shape == (2, 60, 4)
    assert not proposals.valid.any()
    assert not proposals.boxes.any()


def test_proposals_are_the_same_whatever_shares_an_nms_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU takes several images at once, whose boxes it gives back in the order of their scores."""
    detector, views = detector_of(), views_of((2, 0, 1))
    predictions = detector.run(views, {"rpn": Supervision(views.targets)})["rpn"]
    one_by_one = propose(predictions, views.sizes, SMALL.rpn)
    monkeypatch.setattr("dtg_core.boxes.NMS_BY_IMAGE", frozenset())
    together = propose(predictions, views.sizes, SMALL.rpn)
    assert torch.equal(one_by_one.valid, together.valid)
    assert torch.equal(one_by_one.boxes, together.boxes)


def test_the_coarsest_map_serves_the_rpn_only() -> None:
    """A proposal as large as the view is pooled from stride 32, not from stride 64 (FPN, Sec. 4.2)."""
    rcnn = RCNN(SMALL.rcnn, 16, (4, 8, 16, 32, 64), CLASSES)
    maps = [torch.full((1, 16, 1024 // stride, 1024 // stride), float(stride)) for stride in (4, 8, 16, 32, 64)]
    boxes = torch.tensor([[[0.0, 0, 1000, 1000], [0, 0, 300, 300], [0, 0, 40, 40]]])
    pooled, rows = rcnn.pool(maps, Proposals(boxes, torch.ones(1, 3, dtype=torch.bool)))
    assert dict(zip(rows.tolist(), pooled.amax((1, 2, 3)).tolist())) == {0: 32, 1: 16, 2: 4}


@pytest.mark.parametrize("focal", ["sigmoid", "softmax"])
def test_the_second_stage_starts_at_the_prior(focal: str) -> None:
    """Otherwise the many background samples decide the first steps; with softmax all classes are equally likely."""
    torch.manual_seed(0)
    config = replace(SMALL.rcnn, focal=focal, hidden=256)  # type: ignore[arg-type]
    rcnn = RCNN(config, 16, SMALL.strides, CLASSES)
    maps = [torch.rand(1, 16, 96 // stride, 96 // stride) for stride in SMALL.strides]
    predictions = rcnn(maps, Proposals(torch.tensor([[[4.0, 4, 40, 40], [10, 20, 90, 80]]]), torch.ones(1, 2, dtype=torch.bool)))
    prior = 0.01 if focal == "sigmoid" else 1 / (CLASSES + 1)
    torch.testing.assert_close(predictions.logits.sigmoid(), torch.full((1, 2, CLASSES), prior), rtol=0.15, atol=0)
    assert predictions.raw[..., : 4 * CLASSES].abs().max() < 0.05
    for layer in (rcnn.layers.fc6, rcnn.layers.fc7):  # Glorot's uniform range
        limit = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.98 * limit < layer.weight.abs().max() <= limit
        assert not layer.bias.any()
    assert rcnn.boxes.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert rcnn.classes.weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_only_the_best_pairs_of_an_image_enter_the_final_nms() -> None:
    config = replace(SMALL, rcnn=replace(SMALL.rcnn, pre_nms=4, nms_iou=1.0))
    detector, views = detector_of(config), views_of()
    predictions = detector.run(views)["rcnn"]
    proposals = predictions.samples
    assert isinstance(proposals, Proposals)
    logits = torch.randn(predictions.logits.shape, generator=torch.Generator().manual_seed(0))
    found = detector.detect({"rcnn": replace(predictions, logits=logits)}, views, 0.0)
    for image in range(2):
        scores = logits[image][proposals.valid[image]].sigmoid().flatten()
        torch.testing.assert_close(found.scores[found.image == image], scores.topk(4).values)


def test_defaults_are_mmdetections() -> None:
    """Of configs/_base_/models/faster_rcnn_r50_fpn.py, and PseCo's focal loss."""
    assert FasterRCNNConfig() == FasterRCNNConfig(
        channels=256, strides=(4, 8, 16, 32, 64), anchor_scale=8.0, ratios=(0.5, 1.0, 2.0),
        rpn=RPNConfig(
            loss="bce", positive_iou=0.7, negative_iou=0.3, low_quality_iou=0.3, samples=256, positive_share=0.5, pre_nms=2000,
            post_nms=1000, nms_iou=0.7, min_side=0.01,
        ),
        rcnn=RCNNConfig(
            focal="sigmoid", focal_weight=10.0, iou=0.5, samples=512, positive_share=0.25, add_truth=True, pool_size=7,
            sampling_ratio=0, hidden=1024, class_agnostic=False, delta_stds=(0.1, 0.1, 0.2, 0.2), nms_iou=0.5,
            pre_nms=5000, detections_per_image=100,
        ),
    )  # fmt: skip


def test_build_makes_coarser_levels_without_weights() -> None:
    detector = build(replace(FasterRCNNConfig(), channels=8), BackboneConfig("test_resnet", pretrained=False, freeze_to_stride=0), 3)
    maps = detector.pyramid(views_of())
    assert torch.equal(maps[4], maps[3][:, :, ::2, ::2])  # stride 64: every second cell of stride 32


def permuted(views: ViewBatch, order: list[int]) -> ViewBatch:
    index = torch.tensor(order)
    rows = [(views.targets.image == image).nonzero().squeeze(1) for image in order]
    picked = torch.cat(rows)
    image = torch.cat([torch.full((len(part),), place) for place, part in enumerate(rows)])
    targets = Targets(views.targets.boxes[picked], views.targets.labels[picked], image)
    matrices = views.view_from_image[index]
    return ViewBatch(views.pixels[index], views.sizes[index], targets, views.seeds[index], matrices)


def test_permuting_the_images_permutes_everything() -> None:
    detector, views = detector_of(), views_of((2, 0, 1))
    order = [2, 0, 1]
    first, second = detector.run(views), detector.run(permuted(views, order))
    for name in ("rpn", "rcnn"):
        torch.testing.assert_close(first[name].logits[order], second[name].logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(first[name].raw[order], second[name].raw, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(total_loss(detector, views), total_loss(detector, permuted(views, order)))


def detect_by_loop(
    detector: FasterRCNN, outputs: Outputs, views: ViewBatch, threshold: float
) -> list[list[tuple[float, int, list[float]]]]:
    """Greedy NMS per image and class: (score, label, box) per image, best first."""
    predictions = outputs["rcnn"]
    samples = predictions.samples
    assert isinstance(samples, Proposals)
    config, stage = detector.config.rcnn, detector.stages["rcnn"]
    result = []
    for image in range(len(views.sizes)):
        kept: list[tuple[float, int, Tensor]] = []
        for label in range(CLASSES):
            rows = []
            for sample in range(samples.num_samples):
                score = float(predictions.logits[image, sample, label].sigmoid())
                if samples.valid[image, sample] and score > threshold:
                    one = Rows(torch.tensor([image]), torch.tensor([sample]), torch.tensor([label]))
                    box = stage.decode(predictions, one)
                    rows.append((score, clip(box, views.sizes[image])[0]))
            rows.sort(key=lambda row: -row[0])
            chosen: list[tuple[float, int, Tensor]] = []
            for score, box in rows:
                if all(paired_iou(box, other) <= config.nms_iou for _, _, other in chosen):
                    chosen.append((score, label, box))
            kept += chosen
        kept.sort(key=lambda row: -row[0])
        result.append([(score, label, box.tolist()) for score, label, box in kept[: config.detections_per_image]])
    return result


@pytest.mark.parametrize("limit", [100, 7])
def test_detect_equals_loop(limit: int) -> None:
    config = replace(SMALL, rcnn=replace(SMALL.rcnn, detections_per_image=limit))
    detector, views = detector_of(config), views_of()
    with torch.no_grad():
        outputs = dict(detector.run(views))
        predictions = outputs["rcnn"]
        proposals = predictions.samples
        generator = torch.Generator().manual_seed(3)
        logits = torch.randn(predictions.logits.shape, generator=generator)
        raw = 5 * torch.randn(predictions.raw.shape, generator=generator)  # many boxes leave the view
        assert isinstance(proposals, Proposals)
        proposals = replace(proposals, valid=proposals.valid & (torch.rand(2, 60, generator=generator) > 0.3))
        outputs["rcnn"] = Predictions(proposals, logits, raw)
        found = detector.detect(outputs, views, 0.4)
        expected = detect_by_loop(detector, outputs, views, 0.4)
    assert found.image.tolist() == sorted(found.image.tolist())
    for image in range(2):
        mine = found.image == image
        scores, labels, boxes = zip(*expected[image])
        torch.testing.assert_close(found.scores[mine], torch.tensor(scores))
        assert found.labels[mine].tolist() == list(labels)
        torch.testing.assert_close(found.boxes[mine], torch.tensor(boxes), atol=1e-4, rtol=1e-5)
        assert int(mine.sum()) <= limit


def test_bfloat16_autocast_keeps_coordinates() -> None:
    detector, views = detector_of(), views_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = detector.run(views)
        found = detector.detect(outputs, views, 0.0)
    for predictions in outputs.values():
        assert predictions.logits.dtype == predictions.raw.dtype == torch.float32
        samples = predictions.samples
        boxes = samples.boxes if isinstance(samples, Proposals) else samples.anchors
        assert boxes.dtype == torch.float32
    assert found.boxes.dtype == torch.float32


def test_it_learns_two_images() -> None:
    detector, views = detector_of(), views_of((2, 1))
    optimizer = torch.optim.AdamW(detector.parameters(), 3e-3)
    for step in range(200):
        loss = total_loss(detector, replace(views, seeds=views.seeds + 100 * step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = detector.detect(detector.run(views), views, 0.5)
    assert len(found.boxes) == 3
    for box, label, image in zip(views.targets.boxes, views.targets.labels, views.targets.image):
        mine = (found.image == image) & (found.labels == label)
        assert paired_iou(found.boxes[mine], box).amax() > 0.7
