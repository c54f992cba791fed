"""Box deltas against values recorded from mmdetection; conventions that differ from torchvision's on purpose are tested as such."""
from __future__ import annotations

from functools import partial

import pytest
import torch
from oracles import Recorded
from torchvision.models.detection._utils import BoxCoder

from dtg_core.boxes import clip
from dtg_core.deltas import decode, encode

close = partial(torch.testing.assert_close, rtol=1e-5)


@pytest.mark.parametrize(("kind", "stds"), [("rcnn", (0.1, 0.1, 0.2, 0.2)), ("rpn", (1.0, 1.0, 1.0, 1.0))])
def test_deltas_are_mmdetections(kind: str, stds: tuple[float, float, float, float]) -> None:
    recorded = Recorded("delta_coder")
    proposals, truth, deltas = recorded["proposals"], recorded["gt"], recorded["deltas"]
    size = torch.tensor([128.0, 160.0])
    close(encode(proposals, truth, stds), recorded[f"{kind}/encoded"], atol=1e-5)
    close(decode(proposals, deltas, stds), recorded[f"{kind}/decoded_unclipped"], atol=1e-3)
    close(clip(decode(proposals, deltas, stds), size), recorded[f"{kind}/decoded_clipped_h128_w160"], atol=1e-4)
    many = decode(proposals.unsqueeze(1), recorded["deltas_multi"].unflatten(1, (7, 4)), stds)
    close(clip(many, size).flatten(1), recorded[f"{kind}/decoded_multi_clipped_h128_w160"], atol=1e-4)
    close(decode(proposals, encode(proposals, truth, stds), stds), recorded[f"{kind}/roundtrip"], atol=1e-4)


def test_half_precision_deltas_give_float32_boxes() -> None:
    box, deltas = torch.tensor([[300.0, 300, 340, 360]]), torch.tensor([[0.11, -0.07, 0.2, 0.3]]).bfloat16()
    assert decode(box, deltas).dtype == torch.float32
    assert torch.equal(decode(box, deltas, (0.1, 0.1, 0.2, 0.2)), decode(box, deltas.float(), (0.1, 0.1, 0.2, 0.2)))


def test_torchvision_clamps_growth_only() -> None:
    box = torch.tensor([[0.0, 0.0, 1000.0, 1000.0]])
    shrink = torch.tensor([[0.0, 0.0, -10.0, -10.0]])
    assert decode(box, shrink)[0, 2] - decode(box, shrink)[0, 0] == pytest.approx(16.0, rel=1e-5)
    theirs = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(shrink, box)
    assert theirs[0, 2] - theirs[0, 0] < 1


def test_boxes_without_size_have_finite_deltas() -> None:
    empty, box = torch.tensor([5.0, 5, 5, 5]), torch.tensor([0.0, 0, 10, 10])
    for samples, boxes in ((empty, box), (box, empty), (empty, empty)):
        assert encode(samples, boxes).isfinite().all()
    assert encode(torch.zeros(0, 4), torch.zeros(0, 4)).shape == decode(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)
