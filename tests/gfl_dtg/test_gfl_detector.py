"""The GFL detector: head, final detections against a loop, gradients, learning."""
from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from gfl_helpers import TinyPyramid, no_targets, random_targets, reduced, views_of
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import nms

from dtg_core.config import BackboneConfig
from dtg_core.models.backbone import ExtraConvs
from dtg_core.protocol import Detector
from dtg_core.structures import AnchorGrid, Predictions, Rows, Supervision, Targets, ViewBatch
from gfl_dtg import GFLConfig, build
from gfl_dtg.detector import GFL

SMALL = GFLConfig(channels=16, tower_depth=1, strides=(8, 16, 32), anchor_scale=4.0)


def tiny(classes: int = 3, config: GFLConfig = SMALL) -> GFL:
    torch.manual_seed(0)
    return GFL(TinyPyramid(config.channels, config.strides), config, classes)


@pytest.mark.parametrize(("channels", "groups"), [(2, 1), (4, 1), (8, 1), (12, 1), (16, 2), (64, 8), (256, 32), (512, 32)])
def test_groups_of_the_norms_are_not_of_single_channels(channels: int, groups: int) -> None:
    """On a level of a single cell they would leave nothing of the image, and with one image they cannot be computed."""
    detector = tiny(config=replace(SMALL, channels=channels)).eval()
    norms = [module for module in detector.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {groups}
    views = views_of(noise(1, (32, 32)), no_targets())  # the coarsest level, of stride 32, is one cell
    assert detector.run(views)["head"].logits.isfinite().all()


def noise(number: int, canvas: tuple[int, int] = (64, 96), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (number, 3, *canvas), generator=generator, dtype=torch.uint8)


def loss_of(detector: Detector, views: ViewBatch) -> Tensor:
    predictions = detector.run(views)["head"]
    stage = detector.stages["head"]
    assignment = stage.assign(predictions.samples, views.targets, views.sizes, views.seeds)
    return torch.stack(list(reduced(stage.losses(predictions, assignment)).values())).sum()


def test_head_follows_the_anchors_order_and_scales_each_level() -> None:
    detector = tiny()
    views = views_of(noise(2), no_targets())
    predictions = detector.run(views)["head"]
    samples = predictions.samples
    assert isinstance(samples, AnchorGrid)
    assert predictions.logits.shape == (2, samples.num_samples, 3)
    assert predictions.raw.shape == (2, samples.num_samples, 68)
    with torch.no_grad():
        detector.head.scales.copy_(torch.tensor([1.0, 2.0, 3.0]))
    scaled = detector.run(views)["head"]
    assert_close(scaled.raw, predictions.raw * torch.tensor([1.0, 2.0, 3.0])[samples.level].unsqueeze(1))
    assert torch.equal(scaled.logits, predictions.logits)
    # The same cell by hand: level 1, row 2, column 3.
    level = detector.pyramid(views)[1]
    box = detector.head.box
    cell = 2 * box.cls_logits(box.conv(level))[:, :, 2, 3]
    assert_close(scaled.raw[:, samples.level_sizes[0] + 2 * samples.shapes[1][1] + 3], cell)


@pytest.mark.parametrize("channels", [16, 64, 96, 48])
def test_head_starts_at_the_prior_with_any_width(channels: int) -> None:
    detector = tiny(4, GFLConfig(channels=channels, tower_depth=2))
    predictions = detector.run(views_of(noise(1), no_targets()))["head"]
    assert_close(predictions.logits.sigmoid().mean().item(), 0.01, rtol=0.2, atol=0)
    assert predictions.raw.abs().max() < 1
    assert_close(detector.head.classification.cls_logits.bias[0].item(), -math.log(99))
    assert detector.head.box.cls_logits.bias.abs().max() == 0


def test_channels_last_changes_nothing() -> None:
    detector, views = tiny(), views_of(noise(2), no_targets())
    plain = detector.run(views)["head"]
    other = copy.deepcopy(detector).to(memory_format=torch.channels_last).run(views)["head"]
    assert_close(other.logits, plain.logits)
    assert_close(other.raw, plain.raw)


def test_run_computes_only_what_supervision_names() -> None:
    detector, views = tiny(), views_of(noise(1), no_targets())
    assert detector.run(views, {}) == {}
    assert set(detector.run(views, {"head": Supervision(targets=no_targets())})) == {"head"}
    assert set(detector.run(views)) == {"head"}


def spread_predictions(samples: AnchorGrid, images: int, classes: int, seed: int) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, samples.num_samples, classes, generator=generator) * 2 - 2
    return Predictions(samples, logits, torch.randn(images, samples.num_samples, 68, generator=generator) * 3)


def looped_detect(
    detector: GFL, predictions: Predictions, views: ViewBatch, threshold: float
) -> list[list[tuple[float, int, list[float]]]]:
    """(score, label, box) of each image, best first: one image, one level, one class at a time."""
    found, config, samples = [], detector.config, predictions.samples
    num_classes = predictions.logits.shape[2]
    for image in range(predictions.logits.shape[0]):
        height, width = views.sizes[image].tolist()
        chosen: list[tuple[float, int, list[float]]] = []
        start = 0
        for size in samples.level_sizes:
            pairs = []
            for sample in range(start, start + size):
                box = samples.anchors[sample]
                if (box[0] + box[2]) / 2 >= width or (box[1] + box[3]) / 2 >= height:
                    continue
                for label, score in enumerate(predictions.logits[image, sample].sigmoid().tolist()):
                    if score > threshold:
                        pairs.append((score, label, sample))
            start += size
            for score, label, sample in sorted(pairs, reverse=True)[: config.pre_nms]:
                row = Rows(*(torch.tensor([value]) for value in (image, sample, label)))
                x1, y1, x2, y2 = detector.stages["head"].decode(predictions, row)[0].tolist()
                box_in_view = [max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)]
                chosen.append((score, label, box_in_view))
        kept = []
        for label in range(num_classes):
            mine = [entry for entry in chosen if entry[1] == label]
            if mine:
                boxes = torch.tensor([entry[2] for entry in mine])
                scores = torch.tensor([entry[0] for entry in mine])
                kept += [mine[index] for index in nms(boxes, scores, config.nms_iou).tolist()]
        found.append(sorted(kept, reverse=True)[: config.detections_per_image])
    return found


@pytest.mark.parametrize("config", [
    SMALL,
    GFLConfig(channels=16, tower_depth=1, strides=(8, 16, 32), anchor_scale=4.0, pre_nms=20, detections_per_image=6),
])
def test_detect_is_the_looped_algorithm(config: GFLConfig) -> None:
    detector = tiny(3, config)
    views = views_of(noise(3), no_targets(), [(64, 96), (50, 60), (64, 33)])
    samples = detector.grid(views.canvas, torch.device("cpu"))
    predictions = spread_predictions(samples, 3, 3, seed=1)
    found = detector.detect({"head": predictions}, views, 0.3)
    expected = looped_detect(detector, predictions, views, 0.3)
    assert torch.equal(found.image, found.image.sort().values)
    for image, entries in enumerate(expected):
        mine = found.image == image
        assert len(entries) > 5
        assert found.labels[mine].tolist() == [label for _, label, _ in entries]
        assert_close(found.scores[mine], torch.tensor([score for score, _, _ in entries]))
        assert_close(found.boxes[mine], torch.tensor([box for _, _, box in entries]), rtol=0, atol=1e-4)


def test_only_the_best_pairs_of_each_level_enter_nms() -> None:
    """Single pixels far apart suppress nothing: as many are left as entered, the best ones of each level."""
    detector, views = tiny(config=replace(SMALL, pre_nms=5)), views_of(noise(1), no_targets())
    samples = detector.grid(views.canvas, torch.device("cpu"))
    logits = torch.randn(1, samples.num_samples, 3, generator=torch.Generator().manual_seed(0))
    sides = torch.zeros(1, samples.num_samples, 4, 17)
    sides[..., 0] = 50.0  # all sides at their anchor's centre
    found = detector.detect({"head": Predictions(samples, logits, sides.flatten(2))}, views, 0.0)
    best = [level.flatten().sigmoid().topk(5).values for level in logits.split(samples.level_sizes, 1)]
    assert_close(found.scores, torch.cat(best).sort(descending=True).values)


def test_detect_nothing() -> None:
    detector, views = tiny(), views_of(noise(2), no_targets())
    found = detector.detect(detector.run(views), views, 0.99)
    assert found.boxes.shape == (0, 4)
    assert found.scores.shape == found.labels.shape == found.image.shape == (0,)


def test_the_padding_detects_nothing() -> None:
    detector = tiny()
    views = views_of(noise(1), no_targets(), [(40, 48)])
    samples = detector.grid(views.canvas, torch.device("cpu"))
    logits = torch.full((1, samples.num_samples, 3), -9.0)
    logits[:, ~samples.usable(views.sizes)[0]] = 9.0
    predictions = Predictions(samples, logits, torch.zeros(1, samples.num_samples, 68))
    assert detector.detect({"head": predictions}, views, 0.5).scores.numel() == 0


def test_every_parameter_learns_from_objects_and_is_reached_without() -> None:
    for targets in (random_targets([3, 2], (64, 96), 3, torch.Generator().manual_seed(0)), no_targets()):
        detector = tiny()
        loss_of(detector, views_of(noise(2), targets)).backward()
        for name, parameter in detector.named_parameters():
            assert parameter.grad is not None, name
            if targets.boxes.shape[0]:
                assert parameter.grad.abs().sum() > 0, name


def squares() -> tuple[Tensor, Targets]:
    """Two dark views with bright boxes of two classes."""
    boxes = torch.tensor([[8.0, 8, 40, 40], [56.0, 16, 88, 56], [24.0, 20, 72, 52]])
    labels, image = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    pixels = torch.full((2, 3, 64, 96), 30, dtype=torch.uint8)
    for (x1, y1, x2, y2), label, row in zip(boxes.long().tolist(), labels.tolist(), image.tolist()):
        pixels[row, label, y1:y2, x1:x2] = 230
    return pixels, Targets(boxes, labels, image)


def test_two_images_are_learned() -> None:
    pixels, targets = squares()
    views = views_of(pixels, targets)
    detector = tiny(2)
    optimizer = torch.optim.Adam(detector.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        loss_of(detector, views).backward()
        optimizer.step()
    found = detector.detect(detector.run(views), views, 0.4)
    for box, label, image in zip(targets.boxes, targets.labels, targets.image):
        mine = (found.image == image) & (found.labels == label)
        assert mine.any()
        assert (found.boxes[mine][0] - box).abs().max() < 4
    assert found.scores.numel() == 3


def test_defaults_are_mmdetections() -> None:
    """Of configs/gfl/gfl_r50_fpn_1x_coco.py."""
    assert GFLConfig() == GFLConfig(
        channels=256, tower_depth=4, strides=(8, 16, 32, 64, 128), anchor_scale=8.0, reg_max=16, prior=0.01, atss_topk=9,
        qfl_beta=2.0, quality_weight=1.0, giou_weight=2.0, dfl_weight=0.25, pre_nms=1000, nms_iou=0.6, detections_per_image=100,
    )


def test_build_gives_a_detector_of_the_protocol() -> None:
    config = GFLConfig(channels=32, tower_depth=1)
    detector: Detector = build(config, BackboneConfig(name="resnet18", pretrained=False), 5)
    views = views_of(noise(1, (64, 64)), random_targets([2], (64, 64), 5, torch.Generator().manual_seed(0)))
    predictions = detector.run(views)["head"]
    assert predictions.logits.shape == (1, predictions.samples.num_samples, 5)
    assert detector.grid((64, 64), torch.device("cpu")).base_size == 64
    (extra,) = (module for module in detector.modules() if isinstance(module, ExtraConvs))
    assert len(extra.convs) == 2  # of strides 64 and 128
    loss_of(detector, views).backward()
