"""Matching and sampling against a loop, and the second stage's sampling of proposals."""
from __future__ import annotations

import pytest
import torch
from oracles import LargestTensor
from torch import Tensor

from dtg_core.anchors import anchor_grid
from dtg_core.boxes import paired_iou
from dtg_core.structures import Proposals, Samples, Targets
from faster_rcnn_dtg.config import RCNNConfig, RPNConfig
from faster_rcnn_dtg.matching import Matches, assignment, balanced, match
from faster_rcnn_dtg.rcnn import RCNNStage, sample_proposals
from faster_rcnn_dtg.rpn import RPNStage

SIZES = torch.tensor([[100.0, 100.0]] * 3)


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    corner = torch.rand(count, 2, generator=generator) * 60
    return torch.cat((corner, corner + 5 + torch.rand(count, 2, generator=generator) * 35), 1)


def random_case(seed: int, objects: tuple[int, ...] = (4, 0, 6), samples: int = 50) -> tuple[Proposals, Targets]:
    generator = torch.Generator().manual_seed(seed)
    images = len(objects)
    boxes = random_boxes(images * samples, generator).view(images, samples, 4)
    valid = torch.rand(images, samples, generator=generator) > 0.2
    image = torch.cat([torch.full((count,), index) for index, count in enumerate(objects)])
    truth = random_boxes(len(image), generator)
    # Some proposals near the objects, some objects twice.
    for row in range(len(image)):
        boxes[image[row], row * 3] = truth[row] + torch.randn(4, generator=generator)
    if len(image) > 2:
        truth[-1] = truth[-2]
    return Proposals(boxes, valid), Targets(truth, torch.randint(0, 3, (len(image),), generator=generator), image)


def match_by_loop(
    boxes: Tensor, truth: Tensor, usable: Tensor, positive_iou: float, negative_iou: float, low: float | None
) -> list[int]:
    """One image, mmdetection's rule: object of each sample, -1 negative, -2 ignored."""
    result = []
    for sample in range(len(boxes)):
        overlaps = [paired_iou(box, boxes[sample]).item() for box in truth]
        best = max(overlaps, default=0.0)
        if not usable[sample]:
            result.append(-2)
        elif best >= positive_iou and overlaps:
            result.append(overlaps.index(best))
        else:
            result.append(-1 if best < negative_iou else -2)
    for row, box in enumerate(truth):
        if low is None:
            break
        overlaps = [paired_iou(box, boxes[sample]).item() if usable[sample] else -1.0 for sample in range(len(boxes))]
        best = max(overlaps)
        if best >= low:
            result = [row if overlap == best else old for overlap, old in zip(overlaps, result)]
    return result


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", [(0.7, 0.3, 0.3), (0.5, 0.5, None), (0.6, 0.4, 0.1), (0.3, 0.5, None)])
def test_match_equals_loop(seed: int, rule: tuple[float, float, float | None]) -> None:
    proposals, targets = random_case(seed)
    matches = match(proposals, targets, proposals.valid, *rule)
    for image in range(3):
        rows = (targets.image == image).nonzero().squeeze(1)
        expected = match_by_loop(proposals.boxes[image], targets.boxes[rows], proposals.valid[image], *rule)
        found = torch.full((50,), -2)
        found[matches.negative[image]] = -1
        positive = matches.positive[image]
        found[positive] = matches.row[image][positive] - (int(rows[0]) if len(rows) else 0)
        assert found.tolist() == expected
    assert matches.positive.any()
    assert not (matches.positive & matches.negative).any()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", [(0.7, 0.3, 0.3), (0.5, 0.5, None)])
def test_objects_are_matched_in_blocks_of_bounded_memory(
    seed: int, rule: tuple[float, float, float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    proposals, targets = random_case(seed, objects=(14, 0, 26), samples=130)
    with LargestTensor() as whole:
        expected = match(proposals, targets, proposals.valid, *rule)
    assert whole.elements >= 40 * 130
    monkeypatch.setattr("dtg_core.boxes.BLOCK", 3 * 130)  # of 3 objects
    with LargestTensor() as largest:
        found = match(proposals, targets, proposals.valid, *rule)
    assert largest.elements <= 3 * 130 * 4  # boxes have 4 numbers
    for name in ("row", "positive", "negative"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.row.dtype == torch.int64


def test_thresholds_are_met_from_the_positive_one_on_and_below_the_negative_one() -> None:
    """Boxes of 10 x 10 px that lie in a 10 x 20 px object have an IoU of exactly 1/2; a quarter is 10 x 5 px."""
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0.0, 0, 10, 5], [0.0, 0, 10, 4], [0.0, 0, 10, 9]]])
    targets = Targets(torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([2]), torch.tensor([0]))
    valid = torch.ones(1, 4, dtype=torch.bool)
    matches = match(Proposals(boxes, valid), targets, valid, 0.5, 0.25)
    assert matches.positive.tolist() == [[True, False, False, False]]
    assert matches.negative.tolist() == [[False, False, True, False]]
    found = assignment(matches, targets)
    assert (found.image.tolist(), found.sample.tolist(), found.label.tolist()) == ([0], [0], [2])
    assert torch.equal(found.box, targets.boxes)


def test_no_objects() -> None:
    proposals, targets = random_case(0, objects=(0, 0))
    matches = match(proposals, targets, proposals.valid, 0.7, 0.3, 0.3)
    assert not matches.positive.any()
    torch.testing.assert_close(matches.negative, proposals.valid)
    found = assignment(matches, targets)
    assert found.box.shape == (0, 4)
    assert found.label.shape == (0,)


def matches_of(positives: int, negatives: int, samples: int = 600) -> Matches:
    positive, negative = torch.zeros(2, samples, dtype=torch.bool), torch.zeros(2, samples, dtype=torch.bool)
    positive[:, :positives] = True
    negative[:, positives : positives + negatives] = True
    return Matches(torch.zeros(2, samples, dtype=torch.int64), positive, negative)


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [(10, 500, (10, 246)), (300, 200, (128, 128)), (300, 50, (128, 50)), (0, 0, (0, 0)), (0, 600, (0, 256)), (3, 5, (3, 5))],
)
def test_balanced_counts(positives: int, negatives: int, expected: tuple[int, int]) -> None:
    given = matches_of(positives, negatives)
    drawn = balanced(given, 256, 0.5, torch.tensor([3, 4]), torch.arange(600))
    assert drawn.positive.sum(1).tolist() == [expected[0]] * 2
    assert drawn.negative.sum(1).tolist() == [expected[1]] * 2
    assert not (drawn.positive & ~given.positive).any()
    assert not (drawn.negative & ~given.negative).any()


def test_a_small_share_of_few_samples_still_trains_a_positive() -> None:
    drawn = balanced(matches_of(3, 50), 16, 0.05, torch.tensor([3, 4]), torch.arange(600))
    assert drawn.positive.sum(1).tolist() == [1, 1]
    assert drawn.negative.sum(1).tolist() == [15, 15]


def test_the_draw_depends_on_the_seed_alone() -> None:
    given = matches_of(200, 400)
    first, again = (balanced(given, 256, 0.5, torch.tensor([3, 4]), torch.arange(600)) for _ in range(2))
    swapped = balanced(given, 256, 0.5, torch.tensor([4, 3]), torch.arange(600))
    assert torch.equal(first.positive, again.positive)
    assert torch.equal(first.negative, swapped.negative.flip(0))
    assert not torch.equal(first.positive[0], first.positive[1])


def boxes_of(samples: Samples, image: int) -> set[tuple[float, ...]]:
    assert isinstance(samples, Proposals)
    return {tuple(box.tolist()) for box in samples.boxes[image][samples.valid[image]]}


@pytest.mark.parametrize("add_truth", [True, False])
def test_sampled_proposals(add_truth: bool) -> None:
    proposals, targets = random_case(1)
    config = RCNNConfig(samples=24)
    sampled = sample_proposals(proposals, targets, config, torch.tensor([1, 2, 3]), add_truth)
    assert sampled.boxes.shape == (3, 24, 4)
    for image in range(3):
        truth = {tuple(box.tolist()) for box in targets.boxes[targets.image == image]}
        allowed = boxes_of(proposals, image) | (truth if add_truth else set())
        assert boxes_of(sampled, image) <= allowed
    found = RCNNStage(config, 3).assign(sampled, targets, SIZES, torch.tensor([1, 2, 3]))
    positives = torch.bincount(found.image, minlength=3)
    assert (positives <= 6).all()
    assert positives[0] > 0
    assert positives[1] == 0
    torch.testing.assert_close(positives + found.background.sum(1), sampled.valid.sum(1))
    assert not (found.background & ~sampled.valid).any()
    assert torch.equal(sampled.valid.sum(1), torch.full((3,), 24))


def test_truth_joins_its_own_image_only() -> None:
    proposals, targets = random_case(1)
    nothing = Proposals(proposals.boxes, torch.zeros_like(proposals.valid))
    sampled = sample_proposals(nothing, targets, RCNNConfig(samples=512), torch.tensor([1, 2, 3]), True)
    assert sampled.boxes.shape == (3, 512, 4)
    for image in range(3):
        assert boxes_of(sampled, image) == {tuple(box.tolist()) for box in targets.boxes[targets.image == image]}


def test_sampling_an_empty_batch() -> None:
    proposals, targets = random_case(1, objects=(0, 0))
    nothing = Proposals(proposals.boxes, torch.zeros_like(proposals.valid))
    sampled = sample_proposals(nothing, targets, RCNNConfig(samples=30), torch.tensor([1, 2]), True)
    assert sampled.boxes.shape == (2, 30, 4)
    assert not sampled.valid.any()
    assert not sampled.boxes.any()


def test_an_image_draws_the_same_proposals_in_any_batch() -> None:
    proposals, targets = random_case(1, objects=(4, 2, 3))
    seeds, config = torch.tensor([1, 2, 3]), RCNNConfig(samples=12)
    together = sample_proposals(proposals, targets, config, seeds, True)
    for image in range(3):
        own = targets.image == image
        one = Targets(targets.boxes[own], targets.labels[own], torch.zeros_like(targets.image[own]))
        few = Proposals(proposals.boxes[image : image + 1], proposals.valid[image : image + 1])
        alone = sample_proposals(few, one, config, seeds[image : image + 1], True)
        assert boxes_of(alone, 0) == boxes_of(together, image)


def test_an_image_draws_the_same_anchors_on_any_canvas() -> None:
    objects = Targets(torch.tensor([[10.0, 10, 50, 60]]), torch.tensor([0]), torch.tensor([0]))
    sizes, drawn = torch.tensor([[64, 64]]), []
    for canvas in ((64, 64), (128, 192)):
        grid = anchor_grid(canvas, (8, 16, 32), 4, (0.5, 1.0, 2.0), torch.device("cpu"))
        found = RPNStage(RPNConfig(samples=32)).assign(grid, objects, sizes, torch.tensor([5]))
        drawn.append({tuple(box.tolist()) for box in grid.anchors[found.background[0]]})
        assert len(drawn[-1]) + len(found.sample) == 32
    assert drawn[0] == drawn[1]
