"""How fast weak and strong views are made, compared with the same operations by torchvision.transforms.v2.

Both start from the same image files and end with one 8-bit tensor of the weak and one of the strong view. The operations and
their probabilities are those of ``dtg_core/data/views.py``; torchvision's pipeline runs as its guide recommends, on 8-bit
tensors, and once on PIL images.
"""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from dtg_core.config import ViewsConfig
from dtg_core.data.geometry import FILL
from dtg_core.data.index import CocoIndex
from dtg_core.data.photometric import MAGNITUDES
from dtg_core.data.views import NO_BOXES, NO_LABELS, strong_view, weak_view

Pipeline = Callable[[Image.Image], tuple[Tensor, Tensor]]
PAIRS = 32  # per timing


def benchmark_views(pool: CocoIndex, config: ViewsConfig, repeats: int) -> dict[str, Any]:
    """Pairs of a weak and a strong view per second on one core, decoding included.

    Returns:
        "pairs_per_second" of "dtg", "v2_tensor" and "v2_pil"; "ratio": of ours to the faster of torchvision's two, the median
        over the repeats.
    """
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    pipelines: dict[str, Pipeline] = {
        "dtg": _ours(config), "v2_tensor": torchvision_pair(config, on_tensors=True),
        "v2_pil": torchvision_pair(config, on_tensors=False),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in pipelines}
    try:
        for repeat in range(repeats + 1):
            for name, pipeline in pipelines.items():
                began = time.perf_counter()
                for number in range(PAIRS):
                    pipeline(pool.image((repeat * PAIRS + number) % len(pool)))
                if repeat:  # the first one warms up
                    times[name].append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return rates(times)


def rates(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Figures from the seconds of ``PAIRS`` pairs in each repeat, by pipeline."""
    best = [min(seconds) for seconds in zip(times["v2_tensor"], times["v2_pil"], strict=True)]
    return {
        "pairs_per_second": {name: PAIRS / statistics.median(seconds) for name, seconds in times.items()},
        "ratio": statistics.median(other / own for own, other in zip(times["dtg"], best, strict=True)),
    }


def _ours(config: ViewsConfig) -> Pipeline:
    generator = np.random.default_rng(0)

    def pair(image: Image.Image) -> tuple[Tensor, Tensor]:
        views = [make(image, NO_BOXES, NO_LABELS, config, generator) for make in (weak_view, strong_view)]
        return views[0].pixels, views[1].pixels

    return pair


def torchvision_pair(config: ViewsConfig, on_tensors: bool) -> Pipeline:
    """The operations of ``weak_view`` and ``strong_view``, built from torchvision's transforms."""
    bilinear = v2.InterpolationMode.BILINEAR
    low, high = config.short_edge
    start = [v2.ToImage()] if on_tensors else []
    resize: list[Callable[..., Any]] = [
        v2.RandomChoice([v2.Resize(edge, bilinear, config.long_edge - 1 if edge == config.long_edge else config.long_edge)
                         for edge in sorted({*range(low, high, 32), high})])
        if low < high else v2.Resize((low, low) if low == config.long_edge else low, bilinear),
        v2.RandomHorizontalFlip(config.flip),
    ]  # fmt: skip
    fill = list(FILL)
    moves = [
        v2.RandomAffine(0, translate=(config.translate, 0), interpolation=bilinear, fill=fill),
        v2.RandomAffine(0, translate=(0, config.translate), interpolation=bilinear, fill=fill),
        v2.RandomAffine(config.rotate, interpolation=bilinear, fill=fill),
        v2.RandomAffine(0, shear=(-config.shear, config.shear, -config.shear, config.shear), interpolation=bilinear, fill=fill),
    ]
    geometric: Any = v2.RandomApply([v2.RandomChoice(moves)], config.geometric)
    color: Any = v2.RandomChoice(_colors()) if config.color else v2.Identity()
    orders = v2.RandomChoice([v2.Compose([color, geometric]), v2.Compose([geometric, color])])
    patches = v2.RandomErasing(1.0, (1e-4, config.erase_size**2), (1.0, 1.0), value=FILL[0])
    few, many = config.erase_patches
    erase = v2.RandomChoice([v2.Compose([patches] * count) if count else v2.Identity() for count in range(few, many + 1)])
    end = [] if on_tensors else [v2.ToImage()]
    weak = v2.Compose([*start, *resize, *end])
    strong = v2.Compose([*start, *resize, orders, *end, erase])

    def pair(image: Image.Image) -> tuple[Tensor, Tensor]:
        return weak(image), strong(image)

    return pair


def _colors() -> list[Any]:
    """The nine operations of ``dtg_core/data/photometric.py``; magnitudes are drawn where torchvision draws them, and otherwise
    fixed at the middle."""
    span = 0.28, 0.18 * MAGNITUDES + 0.1
    middle = (MAGNITUDES + 1) // 2
    return [
        v2.Identity(), v2.RandomAutocontrast(1.0), v2.RandomEqualize(1.0), v2.RandomSolarize(25.6 * middle, 1.0),
        v2.ColorJitter(saturation=span), v2.ColorJitter(contrast=span), v2.ColorJitter(brightness=span),
        v2.RandomAdjustSharpness(1.0 + 0.18 * 2, 1.0), v2.RandomPosterize(4 - int(0.4 * middle), 1.0),
    ]  # fmt: skip


def table(figures: Mapping[str, Any]) -> Iterator[str]:
    """Lines for the terminal."""
    names = {"dtg": "ours", "v2_tensor": "torchvision's v2 on tensors", "v2_pil": "torchvision's v2 on PIL images"}
    for name, rate in figures["pairs_per_second"].items():
        yield f"{rate:7.1f} weak and strong pairs a second and core: {names[name]}"
    yield f"{figures['ratio']:7.2f} times the faster of torchvision's"
