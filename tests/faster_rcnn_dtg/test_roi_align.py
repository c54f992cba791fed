"""RoIAlign by embedding bags against torchvision's kernel."""
from __future__ import annotations

import pytest
import torch
import torchvision

from faster_rcnn_dtg.roi_align import bag_roi_align, roi_align


def some_rois(images: int) -> torch.Tensor:
    """Boxes inside, across every border, far beyond it, on it, and without an area."""
    x1y1 = torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) * 180 - 40
    sides = torch.rand(40, 2, generator=torch.Generator().manual_seed(1)) * 90
    special = torch.tensor([[-300.0, -300, -200, -200], [400, 10, 500, 60], [30, 20, 30, 20], [0, 0, 160, 112], [-8, -8, 4, 4]])
    boxes = torch.cat((torch.cat((x1y1, x1y1 + sides), 1), special))
    return torch.cat((torch.arange(len(boxes)).remainder(images).unsqueeze(1).float(), boxes), 1)


@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bags_pool_and_learn_as_torchvision(ratio: int, size: int, memory_format: torch.memory_format) -> None:
    features = torch.randn(3, 5, 14, 20, generator=torch.Generator().manual_seed(2)).to(memory_format=memory_format)
    features.requires_grad_()
    rois = some_rois(3)
    ours = bag_roi_align(features, rois, size, 1 / 8, ratio)
    theirs = torchvision.ops.roi_align(features, rois, size, 1 / 8, ratio, aligned=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (theirs != 0).any(3).any(2).any(1).sum() > 20
    assert (theirs == 0).flatten(1).all(1).any()

    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    (ours_gradient,) = torch.autograd.grad(ours, features, upstream)
    (theirs_gradient,) = torch.autograd.grad(theirs, features, upstream)
    torch.testing.assert_close(ours_gradient, theirs_gradient, rtol=1e-5, atol=1e-4)


def test_no_box_gives_no_feature_and_no_gradient() -> None:
    features = torch.ones(2, 4, 6, 6, requires_grad=True)
    pooled = bag_roi_align(features, torch.zeros(0, 5), 7, 0.25, 2)
    assert pooled.shape == (0, 4, 7, 7)
    pooled.sum().backward()
    assert features.grad is not None
    assert not features.grad.any()


def test_bags_serve_gradients_with_a_fixed_number_of_points(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = torchvision.ops.roi_align
    monkeypatch.setattr(torchvision.ops, "roi_align", lambda *a, **k: calls.append(a) or kernel(*a, **k))
    features, rois = torch.randn(3, 4, 14, 20), some_rois(3)
    expected = kernel(features, rois, 7, 0.125, 2, aligned=True)
    learning = features.clone().requires_grad_()
    torch.testing.assert_close(roi_align(learning, rois, 7, 0.125, 2), expected, rtol=1e-5, atol=1e-5)
    assert not calls
    assert torch.equal(roi_align(features, rois, 7, 0.125, 2), expected)
    assert len(calls) == 1
    roi_align(learning, rois, 7, 0.125, 0)
    assert len(calls) == 2
