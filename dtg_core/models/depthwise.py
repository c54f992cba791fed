"""Depthwise convolutions whose training on a CPU is not held up by one slow kernel.

PyTorch's CPU library takes up to 25 times as long for the weight's gradient of a depthwise kernel larger than 3x3 as for the
convolution itself. But that gradient is a depthwise convolution too, of the input with the output's gradient, and as such it
is fast (measured: twice as fast on large maps, 20 times on small ones).
"""
from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Depthwise(torch.autograd.Function):
    """Stride-1 convolution of each channel of [N, C, H, W] with its own kernel [C, 1, k, k], padded with ``padding`` zeros."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(pixels, weight)
        ctx.padding = padding
        return F.conv2d(pixels, weight, None, 1, padding, 1, weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        pixels, weight = ctx.saved_tensors
        images, channels, height, width = pixels.shape
        of_pixels = of_weight = None
        if ctx.needs_input_grad[0]:
            of_pixels = torch.ops.aten.convolution_backward(
                grad, pixels, weight, None, (1, 1), ctx.padding, (1, 1), False, (0, 0), channels, (True, False, False)
            )[0]
        if ctx.needs_input_grad[1]:
            planes = pixels.reshape(1, images * channels, height, width)
            kernels = grad.reshape(images * channels, 1, *grad.shape[2:])
            each = F.conv2d(planes, kernels, None, 1, ctx.padding, 1, images * channels)
            summed = each.view(images, channels, *weight.shape[2:]).sum(0).unsqueeze(1)
            of_weight = torch.empty_like(weight).copy_(summed)  # in the weight's layout, which distributed runs need
        return of_pixels, of_weight, None


class DepthwiseConv2d(nn.Module):
    """Replaces a depthwise ``nn.Conv2d`` of stride 1, whose parameters it uses under the same names."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.padding = cast("tuple[int, int]", conv.padding)

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C, H', W']."""
        if not pixels.is_cpu or torch.is_autocast_enabled("cpu"):
            return F.conv2d(pixels, self.weight, self.bias, 1, self.padding, 1, self.weight.shape[0])
        maps = _Depthwise.apply(pixels, self.weight, self.padding)
        return maps if self.bias is None else maps + self.bias.view(-1, 1, 1)


def replace_depthwise(body: nn.Module) -> None:
    """Replace every convolution whose weight's gradient is slow on a CPU with ``DepthwiseConv2d``."""
    for name, module in list(body.named_modules()):
        if type(module) is nn.Conv2d and _is_slow(module):
            body.set_submodule(name, DepthwiseConv2d(module))


def _is_slow(conv: nn.Conv2d) -> bool:
    depthwise = conv.groups == conv.in_channels == conv.out_channels > 1
    plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and conv.dilation == (1, 1)
    return depthwise and plain and conv.stride == (1, 1) and max(conv.kernel_size) > 3
