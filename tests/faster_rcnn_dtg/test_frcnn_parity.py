"""Agreement with mmdetection on recorded inputs and outputs; conventions that differ on purpose are tested as such."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import Recorded
from torch import Tensor

from dtg_core.anchors import anchor_grid
from dtg_core.structures import AnchorGrid, Assignment, Predictions, Proposals
from faster_rcnn_dtg.config import RCNNConfig, RPNConfig
from faster_rcnn_dtg.rcnn import RCNN, pool_levels
from faster_rcnn_dtg.rpn import RPNStage, flatten, propose

STRIDES = (4, 8, 16, 32, 64)


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


@pytest.mark.parametrize("case", ["two", "one_empty"])
@pytest.mark.parametrize("sampling", ["all", "random256"])
def test_rpn_losses_and_gradients(case: str, sampling: str) -> None:
    recorded, grid = Recorded("rpn"), grid_of(128, 160)
    logits = [recorded[f"{case}/cls_logits_{level}"].requires_grad_() for level in range(5)]
    deltas = [recorded[f"{case}/reg_deltas_{level}"].requires_grad_() for level in range(5)]
    predictions = flatten(grid, logits, deltas)
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
    losses = RPNStage(RPNConfig()).losses(predictions, assignment)

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
        grid,
        [recorded[f"{case}/cls_logits_{level}"] for level in range(5)],
        [recorded[f"{case}/reg_deltas_{level}"] for level in range(5)],
    )
    sizes = torch.tensor([[128.0, 160.0], [120.0, 140.0]])
    config = RPNConfig(pre_nms=numbers[0], post_nms=numbers[1])
    proposals = propose(predictions, sizes, config)
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
    predictions: Predictions = flatten(grid, [part[:, ::4] for part in maps], maps)
    torch.testing.assert_close(predictions.raw[0], grid.anchors)
    torch.testing.assert_close(predictions.logits[0, :, 0], grid.anchors[:, 0])
