"""The draws of anchors and of proposals that a stage is trained on."""
from __future__ import annotations

import pytest
import torch
from conftest import random_proposals

from dtg_core.anchors import anchor_grid
from dtg_core.structures import Proposals, Samples, Targets
from faster_rcnn_dtg.config import RCNNConfig, RPNConfig
from faster_rcnn_dtg.rcnn import RCNNStage, sample_proposals
from faster_rcnn_dtg.rpn import RPNStage

SIZES = torch.tensor([[100.0, 100.0]] * 3)


def boxes_of(samples: Samples, image: int) -> set[tuple[float, ...]]:
    assert isinstance(samples, Proposals)
    return {tuple(box.tolist()) for box in samples.boxes[image][samples.valid[image]]}


@pytest.mark.parametrize("add_truth", [True, False])
def test_sampled_proposals(add_truth: bool) -> None:
    proposals, targets = random_proposals(1)
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
    proposals, targets = random_proposals(1)
    nothing = Proposals(proposals.boxes, torch.zeros_like(proposals.valid))
    sampled = sample_proposals(nothing, targets, RCNNConfig(samples=512), torch.tensor([1, 2, 3]), True)
    assert sampled.boxes.shape == (3, 512, 4)
    for image in range(3):
        assert boxes_of(sampled, image) == {tuple(box.tolist()) for box in targets.boxes[targets.image == image]}


def test_sampling_an_empty_batch() -> None:
    proposals, targets = random_proposals(1, objects=(0, 0))
    nothing = Proposals(proposals.boxes, torch.zeros_like(proposals.valid))
    sampled = sample_proposals(nothing, targets, RCNNConfig(samples=30), torch.tensor([1, 2]), True)
    assert sampled.boxes.shape == (2, 30, 4)
    assert not sampled.valid.any()
    assert not sampled.boxes.any()


def test_an_image_draws_the_same_proposals_in_any_batch() -> None:
    proposals, targets = random_proposals(1, objects=(4, 2, 3))
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
