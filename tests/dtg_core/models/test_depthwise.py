"""Depthwise convolutions against PyTorch's own."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dtg_core.config import BackboneConfig
from dtg_core.models.backbone import build_pyramid
from dtg_core.models.depthwise import DepthwiseConv2d, replace_depthwise


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel", "padding", "bias"), [(5, 2, False), (7, 3, True), ((3, 5), (1, 2), False), (5, 0, True)])
def test_values_and_gradients_are_those_of_the_convolution(kernel, padding, bias, layout) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(6, 6, kernel, padding=padding, groups=6, bias=bias))
    pixels = torch.randn(3, 6, 9, 12).to(memory_format=layout).requires_grad_()
    body = body.to(memory_format=layout)
    quick = copy.deepcopy(body)
    replace_depthwise(quick)
    assert isinstance(quick[0], DepthwiseConv2d)
    assert quick.state_dict().keys() == body.state_dict().keys()

    expected, found = body(pixels), quick(pixels)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), [pixels, *body.parameters()])
    gradients = torch.autograd.grad((found * weight).sum(), [pixels, *quick.parameters()])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-5)
    assert [gradient.stride() for gradient in gradients[1:]] == [parameter.stride() for parameter in quick.parameters()]


def test_frozen_kernels_and_inputs_get_no_gradient() -> None:
    body = nn.Sequential(nn.Conv2d(4, 4, 5, padding=2, groups=4, bias=False))
    replace_depthwise(body)
    pixels = torch.randn(2, 4, 8, 8)
    body(pixels).sum().backward()
    assert body[0].weight.grad.abs().sum() > 0
    body.zero_grad()
    body.requires_grad_(False)
    pixels.requires_grad_()
    body(pixels).sum().backward()
    assert body[0].weight.grad is None
    assert pixels.grad.abs().sum() > 0


@pytest.mark.parametrize("options", [
    {"kernel_size": 3, "groups": 4}, {"kernel_size": 5, "groups": 2}, {"kernel_size": 5, "groups": 4, "stride": 2},
    {"kernel_size": 5, "groups": 4, "dilation": 2}, {"kernel_size": 5, "groups": 4, "padding_mode": "reflect", "padding": 2},
    {"kernel_size": 5, "groups": 4, "padding": "same"},
])  # fmt: skip
def test_other_convolutions_stay_as_they_are(options) -> None:
    body = nn.Sequential(nn.Conv2d(4, 4, **options))
    replace_depthwise(body)
    assert type(body[0]) is nn.Conv2d


def test_backbones_get_them() -> None:
    pyramid = build_pyramid(BackboneConfig("tf_efficientnet_lite0", pretrained=False), 16, (8, 16, 32), "pool")
    assert sum(isinstance(module, DepthwiseConv2d) for module in pyramid.modules()) == 7


def test_half_precision_is_left_to_the_convolution() -> None:
    """Under autocast values and their dtype are those of the convolution that was replaced."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(4, 4, 5, padding=2, groups=4))
    quick, pixels = copy.deepcopy(body), torch.randn(2, 4, 8, 8)
    replace_depthwise(quick)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = body(pixels), quick(pixels)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)
