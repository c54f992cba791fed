"""GFL's stage: losses and gradients against mmdetection's, decoding, dense quality targets, empty batches."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gfl_helpers import load, no_targets, random_targets, reduced, tensor
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dtg_core.anchors import anchor_grid
from dtg_core.structures import AnchorGrid, Assignment, DenseGuidance, Predictions, Rows, Targets, Unreduced
from gfl_dtg.config import GFLConfig
from gfl_dtg.losses import distances_from_boxes
from gfl_dtg.stage import GFLStage, centers_and_strides

CANVAS = (128, 160)
SIZES = torch.tensor([[128.0, 160.0]] * 2)
SEEDS = torch.arange(2)
CASES = ("two", "one_empty", "all_empty", "single_box")


def grid_of(canvas: tuple[int, int] = CANVAS) -> AnchorGrid:
    return anchor_grid(canvas, GFLConfig().strides, 8.0, (1.0,), torch.device("cpu"))


def flat(maps: list[Tensor]) -> Tensor:
    """Maps [N, D, h, w] of the levels as [N, A, D]."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1)


def random_predictions(grid: AnchorGrid, images: int, classes: int, seed: int = 0) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, grid.num_samples, classes, generator=generator) - 2
    raw = torch.randn(images, grid.num_samples, 68, generator=generator)
    return Predictions(grid, logits.requires_grad_(), raw.requires_grad_())


def total(unreduced: Unreduced) -> Tensor:
    return torch.stack(list(reduced(unreduced).values())).sum()


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_mmdetections(case: str) -> None:
    data = load("gfl_loss")
    boxes = [tensor(data[f"{case}/gt_boxes_{image}"]) for image in range(2)]
    labels = torch.cat([tensor(data[f"{case}/gt_labels_{image}"]) for image in range(2)])
    image = torch.repeat_interleave(torch.arange(2), torch.tensor([len(b) for b in boxes]))
    logits = flat([tensor(data[f"{case}/cls_logits_{level}"]) for level in range(5)]).requires_grad_()
    raw = flat([tensor(data[f"{case}/reg_logits_{level}"]) for level in range(5)]).requires_grad_()

    stage, predictions = GFLStage(GFLConfig(), 7), Predictions(grid_of(), logits, raw)
    assert torch.equal(predictions.samples.anchors, tensor(data["anchors"]))
    assignment = stage.assign(predictions.samples, Targets(torch.cat(boxes), labels, image), SIZES, SEEDS)
    unreduced = stage.losses(predictions, assignment)

    expected_labels = torch.stack([tensor(data[f"{case}/assigned_label_{index}"]) for index in range(2)])
    found_labels = torch.full_like(expected_labels, 7)
    found_labels[assignment.image, assignment.sample] = assignment.label
    assert torch.equal(found_labels, expected_labels)
    assert torch.equal(assignment.background, expected_labels == 7)
    for index in range(2):
        mine = assignment.image == index
        assert torch.equal(assignment.box[mine], tensor(data[f"{case}/bbox_targets_{index}"])[assignment.sample[mine]])
    assert unreduced.classification_count.item() == data[f"{case}/cls_avg_factor"].item()

    terms = reduced(unreduced)
    assert_close(terms["classification"] + terms["background"], tensor(data[f"{case}/loss_cls"]), rtol=1e-5, atol=0)
    box = tensor(data[f"{case}/loss_bbox"]) + tensor(data[f"{case}/loss_dfl"])
    assert_close(terms["box"], box, rtol=1e-5, atol=0)
    loss = total(unreduced)
    assert_close(loss, tensor(data[f"{case}/loss_total"]), rtol=1e-5, atol=0)
    loss.backward()
    for gradient, name in ((logits.grad, "cls"), (raw.grad, "reg")):
        expected = flat([tensor(data[f"{case}/grad_{name}_logits_{level}"]) for level in range(5)])
        assert_close(gradient, expected, rtol=1e-5, atol=1e-5 * max(expected.abs().max().item(), 1e-6))


def test_decoding_what_was_encoded_gives_the_box() -> None:
    grid, stage = grid_of(), GFLStage(GFLConfig(), 3)
    sample = torch.tensor([3, 50, 333, 410, 425])
    image = torch.tensor([0, 1, 1, 0, 1])
    centers, strides = centers_and_strides(grid, sample)
    assert strides.flatten().tolist() == [8, 8, 16, 32, 64]
    reach = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) * 15
    boxes = torch.cat((centers - reach[:, :2] * strides, centers + reach[:, 2:] * strides), 1)
    distances = distances_from_boxes(centers / strides, boxes / strides, 16)
    # Two neighbouring bins that share the probability give any distance.
    left = distances.long().unsqueeze(2)
    share = distances.unsqueeze(2) - left
    bins = torch.zeros(5, 4, 17).scatter(2, left, 1 - share).scatter(2, left + 1, share)
    raw = torch.randn(2, grid.num_samples, 68)
    raw[image, sample] = bins.clamp(min=1e-12).log().flatten(1)
    predictions = Predictions(grid, torch.zeros(2, grid.num_samples, 3), raw)
    assert_close(stage.decode(predictions, Rows(image, sample, image)), boxes, rtol=0, atol=1e-3)


def test_decoding_half_precision_gives_float32() -> None:
    grid, stage, row = grid_of(), GFLStage(GFLConfig(), 3), torch.tensor([1])
    predictions = random_predictions(grid, 2, 3)
    half = Predictions(grid, predictions.logits.bfloat16(), predictions.raw.bfloat16())
    assert stage.decode(half, Rows(row, row, row)).dtype == torch.float32
    assignment = stage.assign(grid, random_targets([2, 2], CANVAS, 3, torch.Generator().manual_seed(1)), SIZES, SEEDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unreduced = stage.losses(half, assignment)
    assert_close(unreduced, stage.losses(Predictions(grid, half.logits.float(), half.raw.float()), assignment))
    assert {unreduced.box.dtype, unreduced.classification.dtype, unreduced.background.dtype} == {torch.float32}


def test_padding_is_neither_positive_by_rule_nor_background() -> None:
    sizes = torch.tensor([[128.0, 160.0], [100.0, 40.0]])
    grid, stage = grid_of(), GFLStage(GFLConfig(), 3)
    assignment = stage.assign(grid, no_targets(), sizes, SEEDS)
    centers = (grid.anchors[:, :2] + grid.anchors[:, 2:]) / 2
    assert assignment.background[0].all()
    assert torch.equal(assignment.background[1], (centers[:, 0] < 40) & (centers[:, 1] < 100))


def test_background_and_positives_are_disjoint() -> None:
    grid, stage = grid_of(), GFLStage(GFLConfig(), 3)
    targets = random_targets([4, 3], CANVAS, 3, torch.Generator().manual_seed(0))
    assignment = stage.assign(grid, targets, SIZES, SEEDS)
    assert assignment.image.numel() > 0
    assert not assignment.background[assignment.image, assignment.sample].any()
    assert int(assignment.background.sum()) + assignment.image.numel() == 2 * grid.num_samples
    unreduced = stage.losses(random_predictions(grid, 2, 3), assignment)
    assert (unreduced.background[~assignment.background] == 0).all()
    assert (unreduced.background[assignment.background] > 0).all()


def test_empty_batches_stay_connected() -> None:
    grid, stage = grid_of(), GFLStage(GFLConfig(), 3)
    predictions = random_predictions(grid, 2, 3)
    unreduced = stage.losses(predictions, stage.assign(grid, no_targets(), SIZES, SEEDS))
    assert unreduced.classification.shape == unreduced.box.shape == unreduced.box_weight.shape == (0,)
    assert unreduced.classification_count.item() == 2
    assert unreduced.box_count.item() == 0
    total(unreduced).backward()
    assert predictions.raw.grad is not None
    assert (predictions.raw.grad == 0).all()


def test_permuted_images_have_the_same_losses() -> None:
    grid, stage = grid_of(), GFLStage(GFLConfig(), 4)
    targets = random_targets([4, 0, 6], CANVAS, 4, torch.Generator().manual_seed(3))
    sizes, seeds = torch.tensor([[128.0, 160.0], [128, 96], [96, 160]]), torch.arange(3)
    predictions = random_predictions(grid, 3, 4)
    place = torch.tensor([2, 0, 1])  # new position of each image
    order = place[targets.image].argsort(stable=True)
    moved = Targets(targets.boxes[order], targets.labels[order], place[targets.image][order])
    back = place.argsort()
    swapped = Predictions(grid, predictions.logits[back], predictions.raw[back])
    first = stage.losses(predictions, stage.assign(grid, targets, sizes, seeds))
    second = stage.losses(swapped, stage.assign(grid, moved, sizes[back], seeds))
    assert_close(reduced(second), reduced(first))


def test_class_targets_may_be_shared_out() -> None:
    """A class whose share is the score that the student gives it, as part of its box's IoU, costs nothing."""
    grid = grid_of()
    predictions, stage = random_predictions(grid, 2, 3), GFLStage(GFLConfig(), 3)
    plain = dense_assignment(grid, torch.tensor([0.5, 0.25]))
    shares = torch.tensor([[0.2, 0.3, 0.5], [0.0, 0.0, 1.0]])
    assert plain.dense is not None
    shared = replace(plain, dense=replace(plain.dense, shares=shares))
    targets = torch.tensor([[0.1, 0.15, 0.25], [0.0, 0.0, 0.25]])
    logits = predictions.logits[plain.image, plain.sample]
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    expected = ((targets - logits.sigmoid()).abs() ** 2 * cross_entropy).sum(1)
    assert_close(stage.losses(predictions, shared).classification, expected)
    own = replace(plain, dense=replace(plain.dense, shares=torch.eye(3)[plain.label]))
    assert_close(stage.losses(predictions, own).classification, stage.losses(predictions, plain).classification)


def test_weights_act_on_their_own_losses() -> None:
    grid = grid_of()
    predictions = random_predictions(grid, 2, 3)
    targets = random_targets([4, 3], CANVAS, 3, torch.Generator().manual_seed(0))

    def losses(**weights: float) -> Unreduced:
        stage = GFLStage(GFLConfig(**{"giou_weight": 1.0, "dfl_weight": 1.0, **weights}), 3)
        return stage.losses(predictions, stage.assign(grid, targets, SIZES, SEEDS))

    plain, quality = losses(), losses(quality_weight=3.0)
    assert_close(quality, replace(plain, classification=3 * plain.classification, background=3 * plain.background))
    giou, dfl = losses(dfl_weight=0.0).box, losses(giou_weight=0.0).box
    assert_close(plain.box, giou + dfl)
    assert_close(losses(giou_weight=2.0, dfl_weight=3.0).box, 2 * giou + 3 * dfl)


def dense_assignment(grid: AnchorGrid, quality: Tensor | None) -> Assignment:
    """Two samples toward boxes that reach beyond the bins."""
    boxes = torch.tensor([[-300.0, 10, 90, 80], [20.0, 30, 500, 400]])
    guidance = DenseGuidance(
        torch.tensor([0, 1]), 2, torch.arange(2), torch.zeros(2), torch.ones(2), torch.tensor(2.0), quality=quality
    )
    rows = torch.tensor([0, 1])
    background = torch.zeros(2, grid.num_samples, dtype=torch.bool)
    return Assignment(rows, torch.tensor([100, 120]), rows, boxes, background, guidance)


def test_dense_guidance_may_bring_its_own_class_targets() -> None:
    grid, stage = grid_of(), GFLStage(GFLConfig(), 2)
    predictions = random_predictions(grid, 2, 2)
    quality = torch.tensor([1.0, 0.25])
    guided = stage.losses(predictions, dense_assignment(grid, quality))
    logits = predictions.logits[[0, 1], [100, 120]].detach()
    targets = torch.diag(quality)
    expected = (targets - logits.sigmoid()) ** 2 * torch.nn.functional.binary_cross_entropy_with_logits(
        logits, targets, reduction="none"
    )
    assert_close(guided.classification, expected.sum(1))
    own = stage.losses(predictions, dense_assignment(grid, None))
    assert torch.isfinite(own.box).all()
    assert not torch.allclose(own.classification, guided.classification)
    ordinary = stage.losses(predictions, replace(dense_assignment(grid, None), dense=None))
    assert_close(own.classification, ordinary.classification)


def test_groups_are_images_and_classes() -> None:
    grid, stage = grid_of(), GFLStage(GFLConfig(), 5)
    image, label = torch.tensor([0, 1, 1]), torch.tensor([4, 0, 2])
    assert stage.groups(grid, Rows(image, torch.zeros(3, dtype=torch.int64), label)).tolist() == [4, 5, 7]


class Waits(TorchDispatchMode):
    """Counts the operations that would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.__name__.split(".")[0]
        masks = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], (list, tuple)) else ())
        )
        if masks or name in ("nonzero", "_local_scalar_dense", "masked_select"):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def test_assignment_waits_once_and_losses_never() -> None:
    grid, stage = grid_of(), GFLStage(GFLConfig(), 3)
    assert grid.level.shape == grid.anchors.shape[:1]  # what a grid keeps for its later use is made outside of the count
    assert len(grid.tables) == 3
    targets = random_targets([5, 4], CANVAS, 3, torch.Generator().manual_seed(0))
    predictions = random_predictions(grid, 2, 3)
    with Waits() as assigning:
        assignment = stage.assign(grid, targets, SIZES, SEEDS)
    assert assigning.found == Counter(nonzero=1)
    with Waits() as training:
        total(stage.losses(predictions, assignment)).backward()
    assert training.found == Counter()
