"""Matching and balanced draws against a loop and against recorded values."""
from __future__ import annotations

import pytest
import torch
from conftest import random_proposals
from oracles import LargestTensor, Recorded
from torch import Tensor

from dtg_core.anchors import anchor_grid
from dtg_core.boxes import paired_iou
from dtg_core.matching import Matches, balanced, match, to_assignment
from dtg_core.structures import Proposals, Targets


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
    proposals, targets = random_proposals(seed)
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


@pytest.mark.parametrize("case", ["two", "one_empty"])
def test_matches_of_anchors_are_mmdetections(case: str) -> None:
    recorded = Recorded("rpn")
    grid = anchor_grid((128, 160), (4, 8, 16, 32, 64), 8.0, (0.5, 1.0, 2.0), torch.device("cpu"))
    boxes = [recorded[f"{case}/gt_boxes_{image}"] for image in range(2)]
    image = torch.cat([torch.full((len(box),), index) for index, box in enumerate(boxes)])
    targets = Targets(torch.cat(boxes), torch.zeros_like(image), image)
    usable = grid.usable(torch.tensor([[128.0, 160.0]] * 2))
    assert usable.all()
    matches = match(grid, targets, usable, 0.7, 0.3, 0.3)
    for image in range(2):
        expected = recorded[f"{case}/assigned_gt_{image}"]
        offset = int((targets.image < image).sum())
        torch.testing.assert_close(matches.positive[image], expected >= 0)
        torch.testing.assert_close(matches.negative[image], expected == -1)
        positive = matches.positive[image]
        torch.testing.assert_close(matches.row[image][positive] - offset, expected[positive])
    if case == "two":  # the recorded best overlaps
        overlaps = paired_iou(targets.boxes[:5].unsqueeze(1), grid.anchors).amax(0)
        torch.testing.assert_close(overlaps, recorded["two/max_overlaps_0"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", [(0.7, 0.3, 0.3), (0.5, 0.5, None)])
def test_objects_are_matched_in_blocks_of_bounded_memory(
    seed: int, rule: tuple[float, float, float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    proposals, targets = random_proposals(seed, objects=(14, 0, 26), samples=130)
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
    found = to_assignment(matches, targets)
    assert (found.image.tolist(), found.sample.tolist(), found.label.tolist()) == ([0], [0], [2])
    assert torch.equal(found.box, targets.boxes)
    for low, lifted in ((0.5, True), (0.51, False)):  # of an object's best sample
        assert match(Proposals(boxes, valid), targets, valid, 0.9, 0.25, low).positive.tolist() == [[lifted, False, False, False]]


def test_no_objects() -> None:
    proposals, targets = random_proposals(0, objects=(0, 0))
    matches = match(proposals, targets, proposals.valid, 0.7, 0.3, 0.3)
    assert not matches.positive.any()
    torch.testing.assert_close(matches.negative, proposals.valid)
    found = to_assignment(matches, targets)
    assert found.box.shape == (0, 4)
    assert found.label.shape == (0,)


def test_an_object_without_size_is_nobodys() -> None:
    targets = Targets(torch.tensor([[8.0, 8, 8, 8]]), torch.tensor([0]), torch.tensor([0]))
    boxes, valid = torch.tensor([[[0.0, 0, 10, 10], [5, 5, 9, 9]]]), torch.ones(1, 2, dtype=torch.bool)
    matches = match(Proposals(boxes, valid), targets, valid, 0.5, 0.4, 1e-6)
    assert not matches.positive.any()
    assert matches.negative.all()


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
