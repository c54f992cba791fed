"""A feature pyramid from one map, for plain vision transformers (ViTDet, Li et al., 2022, Sec. 3)."""
from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock
from torchvision.ops.misc import Conv2dNormActivation

#: Strides that can be made from a map, as multiples of its own.
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)


class SimplePyramid(nn.Module):
    """Up- and downsampled copies of the last map; replaces torchvision's ``FeaturePyramidNetwork``.

    Args:
        in_channels: of the map. channels: of each level.
        scales: the levels' strides relative to the map's, each one of ``SCALES``, finest first.
        extra: makes coarser levels from the last one.
    """

    def __init__(self, in_channels: int, channels: int, scales: tuple[float, ...], extra: ExtraFPNBlock | None) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_level(in_channels, channels, scale) for scale in scales)
        self.extra = extra

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        (last,) = maps.values()
        results = [level(last) for level in self.levels]
        names = [str(number) for number in range(len(results))]
        if self.extra is not None:
            results, names = self.extra(results, [last], names)
        return OrderedDict(zip(names, results))


def _level(in_channels: int, channels: int, scale: float) -> nn.Sequential:
    """GroupNorm with one group replaces ViTDet's layer norm over channels, which has no kernel for channels-last maps."""
    half, quarter = in_channels // 2, in_channels // 4
    up: list[nn.Module] = [nn.ConvTranspose2d(in_channels, half, 2, 2)]
    makers: dict[float, tuple[list[nn.Module], int]] = {
        0.25: ([*up, nn.GroupNorm(1, half), nn.GELU(), nn.ConvTranspose2d(half, quarter, 2, 2)], quarter),
        0.5: (up, half),
        1.0: ([], in_channels),
        2.0: ([nn.MaxPool2d(2)], in_channels),
        4.0: ([nn.MaxPool2d(4)], in_channels),
    }
    resize, width = makers[scale]

    def norm(count: int) -> nn.GroupNorm:
        return nn.GroupNorm(1, count)

    return nn.Sequential(
        *resize,
        Conv2dNormActivation(width, channels, 1, norm_layer=norm, activation_layer=None, bias=False),
        Conv2dNormActivation(channels, channels, 3, norm_layer=norm, activation_layer=None, bias=False),
    )
