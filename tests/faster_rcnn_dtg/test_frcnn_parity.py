"""Agreement with mmdetection on recorded inputs and outputs; conventions that differ on purpose are tested as such."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from dtg_core.anchors import anchor_grid
from dtg_core.boxes import clip, paired_iou
from dtg_core.structures import AnchorGrid, Assignment, Predictions, Proposals, Targets
from faster_rcnn_dtg.config import RCNNConfig, RPNConfig
from faster_rcnn_dtg.deltas import decode, encode
from faster_rcnn_dtg.matching import match
from faster_rcnn_dtg.rcnn import RCNN, pool_levels
from faster_rcnn_dtg.rpn import RPNStage, flatten, propose

FIXTURES = Path(__file__).parents[1] / "fixtures"

STRIDES = (4, 8, 16, 32, 64)
RCNN_STDS = (0.1, 0.1, 0.2, 0.2)
UNIT_STDS = (1.0, 1.0, 1.0, 1.0)


class Recorded:
    """Arrays of a file as tensors."""

    def __init__(self, name: str) -> None:
        self.arrays = np.load(FIXTURES / f"{name}.npz")

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])


def close(actual: Tensor | None, expected: Tensor, atol: float = 1e-6) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=atol)


def grid_of(height: int, width: int) -> AnchorGrid:
    return anchor_grid((height, width), STRIDES, 8.0, (0.5, 1.0, 2.0), torch.device("cpu"))


@pytest.mark.parametrize("size", [(128, 160), (100, 75)])
def test_anchors(size: tuple[int, int]) -> None:
    recorded = Recorded("anchors")
    grid = grid_of(*size)
    parts = [recorded[f"rpn/{size[0]}x{size[1]}/anchors_{level}"] for level in range(5)]
    assert grid.level_sizes == tuple(len(part) for part in parts)
    close(grid.anchors, torch.cat(parts), atol=1e-4)


@pytest.mark.parametrize(("kind", "stds"), [("rcnn", RCNN_STDS), ("rpn", UNIT_STDS)])
def test_deltas(kind: str, stds: tuple[float, float, float, float]) -> None:
    recorded = Recorded("delta_coder")
    proposals, truth, deltas = recorded["proposals"], recorded["gt"], recorded["deltas"]
    size = torch.tensor([128.0, 160.0])
    close(encode(proposals, truth, stds), recorded[f"{kind}/encoded"], atol=1e-5)
    close(decode(proposals, deltas, stds), recorded[f"{kind}/decoded_unclipped"], atol=1e-3)
    close(clip(decode(proposals, deltas, stds), size), recorded[f"{kind}/decoded_clipped_h128_w160"], atol=1e-4)
    many = decode(proposals.unsqueeze(1), recorded["deltas_multi"].unflatten(1, (7, 4)), stds)
    close(clip(many, size).flatten(1), recorded[f"{kind}/decoded_multi_clipped_h128_w160"], atol=1e-4)
    close(decode(proposals, encode(proposals, truth, stds), stds), recorded[f"{kind}/roundtrip"], atol=1e-4)


def test_torchvision_clamps_growth_only() -> None:
    box = torch.tensor([[0.0, 0.0, 1000.0, 1000.0]])
    shrink = torch.tensor([[0.0, 0.0, -10.0, -10.0]])
    assert decode(box, shrink)[0, 2] - decode(box, shrink)[0, 0] == pytest.approx(16.0, rel=1e-5)
    theirs = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(shrink, box)
    assert theirs[0, 2] - theirs[0, 0] < 1


def targets_of(recorded: Recorded, case: str) -> Targets:
    boxes = [recorded[f"{case}/gt_boxes_{image}"] for image in range(2)]
    image = torch.cat([torch.full((len(box),), index) for index, box in enumerate(boxes)])
    return Targets(torch.cat(boxes), torch.zeros(len(image), dtype=torch.int64), image)


@pytest.mark.parametrize("case", ["two", "one_empty"])
def test_rpn_matching(case: str) -> None:
    recorded, grid = Recorded("rpn"), grid_of(128, 160)
    targets = targets_of(recorded, case)
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
        close(overlaps, recorded["two/max_overlaps_0"])


@pytest.mark.parametrize("case", ["two", "one_empty"])
@pytest.mark.parametrize("sampling", ["all", "random256"])
def test_rpn_losses_and_gradients(case: str, sampling: str) -> None:
    recorded, grid = Recorded("rpn"), grid_of(128, 160)
    logits = [recorded[f"{case}/cls_logits_{level}"].requires_grad_() for level in range(5)]
    deltas = [recorded[f"{case}/reg_deltas_{level}"].requires_grad_() for level in range(5)]
    predictions = flatten(logits, deltas)
    assert predictions.logits.shape == (2, 5118, 1)
    assert predictions.raw.shape == (2, 5118, 4)

    rows, background = [], torch.zeros(2, 5118, dtype=torch.bool)
    for index in range(2):
        sample = recorded[f"{case}/{sampling}/pos_inds_{index}"]
        object_ = recorded[f"{case}/assigned_gt_{index}"][sample]
        rows.append((torch.full_like(sample, index), sample, recorded[f"{case}/gt_boxes_{index}"][object_]))
        if sampling == "all":
            background[index] = recorded[f"{case}/assigned_gt_{index}"] == -1
        else:
            background[index, recorded[f"{case}/random256/neg_inds_{index}"]] = True
    image, sample, box = (torch.cat(column) for column in zip(*rows))
    assignment = Assignment(image, sample, torch.zeros_like(image), box, background)
    losses = RPNStage(RPNConfig()).losses(grid, predictions, assignment)

    factor = recorded[f"{case}/{sampling}/avg_factor"]
    classification = (losses.classification.sum() + losses.background.sum()) / factor
    regression = (losses.box * losses.box_weight).sum() / factor
    close(classification, recorded[f"{case}/{sampling}/loss_rpn_cls"])
    close(regression, recorded[f"{case}/{sampling}/loss_rpn_bbox"])
    (classification + regression).backward()
    for level in range(5):
        close(logits[level].grad, recorded[f"{case}/{sampling}/grad_cls_logits_{level}"], atol=1e-8)
        close(deltas[level].grad, recorded[f"{case}/{sampling}/grad_reg_deltas_{level}"], atol=1e-8)

    # The divisor is the number of sampled anchors; mmdetection counts an image without positives as having one.
    if sampling == "random256":
        assert losses.classification_count == losses.box_count == 512
        assert factor == 512 + (case == "one_empty")


@pytest.mark.parametrize("case", ["two", "one_empty"])
@pytest.mark.parametrize(("name", "numbers"), [("proposals_test", (1000, 1000)), ("proposals_small", (120, 60))])
def test_proposals(case: str, name: str, numbers: tuple[int, int]) -> None:
    recorded, grid = Recorded("rpn"), grid_of(128, 160)
    predictions = flatten(
        [recorded[f"{case}/cls_logits_{level}"] for level in range(5)],
        [recorded[f"{case}/reg_deltas_{level}"] for level in range(5)],
    )
    sizes = torch.tensor([[128.0, 160.0], [120.0, 140.0]])
    config = RPNConfig(pre_nms=numbers[0], post_nms=numbers[1])
    proposals = propose(grid, predictions, sizes, config)
    assert proposals.boxes.shape == (2, numbers[1], 4)
    for image in range(2):
        expected = recorded[f"{case}/{name}/boxes_{image}"]
        found = proposals.boxes[image][proposals.valid[image]]
        assert found.shape == expected.shape
        close(found, expected, atol=1e-3)


def test_pooling_levels() -> None:
    recorded = Recorded("roi_align")
    torch.testing.assert_close(pool_levels(recorded["levels/rois"][:, 1:], 4, 4), recorded["levels/level"])


def rcnn_of(channels: int, config: RCNNConfig, strides: tuple[int, ...] = STRIDES) -> RCNN:
    return RCNN(replace(config, hidden=8), channels, strides, 3)


def test_pooling_over_levels() -> None:
    recorded = Recorded("roi_align")
    rois = recorded["extract/rois"]
    images = rois[:, 0].long()
    boxes, valid = torch.zeros(2, 40, 4), torch.zeros(2, 40, dtype=torch.bool)
    slots = torch.arange(len(rois)) + 5  # padding before, between and after
    boxes[images, slots], valid[images, slots] = rois[:, 1:], True
    pyramid = [recorded[f"extract/feat_{level}"] for level in range(4)]
    pooled, rows = rcnn_of(2, RCNNConfig()).pool([*pyramid, pyramid[-1]], Proposals(boxes, valid))
    assert sorted(rows.tolist()) == sorted((images * 40 + slots).tolist())
    all_rows = torch.zeros(80, 2, 7, 7).index_copy(0, rows, pooled)
    close(all_rows[images * 40 + slots], recorded["extract/out"], atol=1e-5)


@pytest.mark.parametrize("ratio", [0, 2])
def test_pooling_of_one_level_and_its_gradient(ratio: int) -> None:
    recorded = Recorded("roi_align")
    rois = recorded["rois"]
    images, samples = rois[:, 0].long(), torch.arange(len(rois))
    boxes, valid = torch.zeros(2, len(rois), 4), torch.zeros(2, len(rois), dtype=torch.bool)
    boxes[images, samples], valid[images, samples] = rois[:, 1:], True
    features = recorded["feat"].requires_grad_()
    pooled, rows = rcnn_of(3, RCNNConfig(sampling_ratio=ratio), strides=(8,)).pool([features], Proposals(boxes, valid))
    out = torch.zeros(2 * len(rois), 3, 7, 7).index_copy(0, rows, pooled)[images * len(rois) + samples]
    close(out, recorded[f"out7_sr{ratio}_aligned/out"], atol=1e-5)
    if ratio == 0:
        (out * recorded["out7_sr0_aligned/grad_out"]).sum().backward()
        close(features.grad, recorded["out7_sr0_aligned/grad_feat"], atol=1e-5)


def test_predictions_are_in_grid_order() -> None:
    """The flattened maps of a head that writes anchors' own coordinates are the grid's anchors."""
    grid = grid_of(100, 75)
    maps = [
        part.view(1, rows, columns, 12).permute(0, 3, 1, 2)
        for part, (rows, columns) in zip(grid.anchors.split(grid.level_sizes), grid.shapes)
    ]
    predictions: Predictions = flatten([part[:, ::4] for part in maps], maps)
    torch.testing.assert_close(predictions.raw[0], grid.anchors)
    torch.testing.assert_close(predictions.logits[0, :, 0], grid.anchors[:, 0])
