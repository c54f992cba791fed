"""The best pairs of a sample and a class, against a plain loop."""
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dtg_core.anchors import anchor_grid
from dtg_core.postprocess import best_pairs
from dtg_core.structures import AnchorGrid, Predictions, Proposals, Samples

CLASSES = 3
SIZES = torch.tensor([[64.0, 96.0], [40.0, 50.0], [64.0, 10.0]])  # on a canvas of 64 x 96


def grid() -> AnchorGrid:
    """Three levels of 96, 24 and 6 anchors."""
    return anchor_grid((64, 96), (8, 16, 32), 4.0, (1.0,), torch.device("cpu"))


def proposals(count: int = 20) -> Proposals:
    """``count`` for each of three images; the last image has padding only."""
    valid = torch.rand(3, count, generator=torch.Generator().manual_seed(1)) > 0.3
    valid[2] = False
    return Proposals(torch.rand(3, count, 4), valid)


def predictions_of(samples: Samples, images: int = 3, seed: int = 0) -> Predictions:
    shape = images, samples.num_samples, CLASSES
    logits = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return Predictions(samples, logits, torch.zeros(images, samples.num_samples, 4))


def is_usable(samples: Samples, image: int, sample: int, sizes: Tensor) -> bool:
    """By definition: a proposal that is no padding, an anchor with its centre in the view."""
    if isinstance(samples, Proposals):
        return bool(samples.valid[image, sample])
    x1, y1, x2, y2 = samples.anchors[sample].tolist()
    height, width = sizes[image].tolist()
    return (y1 + y2) / 2 < height and (x1 + x2) / 2 < width


def looped(
    predictions: Predictions, sizes: Tensor, limit: int, threshold: float, level_sizes: tuple[int, ...]
) -> list[tuple[int, int, int, float]]:
    """(image, sample, label, score) in order: one image, one level, one pair at a time."""
    found = []
    for image in range(len(sizes)):
        start = 0
        for size in level_sizes:
            pairs = []
            for sample in range(start, start + size):
                for label in range(CLASSES):
                    score = 1 / (1 + math.exp(-float(predictions.logits[image, sample, label])))
                    if is_usable(predictions.samples, image, sample, sizes) and score > threshold:
                        pairs.append((image, sample, label, score))
            start += size
            found += sorted(pairs, key=lambda pair: -pair[3])[:limit]
    return found


@pytest.mark.parametrize("limit", [1, 7, 10_000])
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("kind", ["levels", "anchors", "proposals"])
def test_best_pairs_equal_a_loop(kind: str, threshold: float, limit: int) -> None:
    samples = proposals() if kind == "proposals" else grid()
    predictions = predictions_of(samples)
    level_sizes = samples.level_sizes if kind == "levels" and isinstance(samples, AnchorGrid) else None
    rows, scores = best_pairs(predictions, SIZES, limit, threshold, level_sizes)
    expected = looped(predictions, SIZES, limit, threshold, level_sizes or (samples.num_samples,))
    assert list(zip(*(part.tolist() for part in rows))) == [pair[:3] for pair in expected]
    torch.testing.assert_close(scores, torch.tensor([pair[3] for pair in expected]))
    torch.testing.assert_close(scores, predictions.logits[rows].sigmoid())
    assert len(expected) > 0 or threshold == 1.0


@pytest.mark.parametrize(("images", "count"), [(0, 5), (3, 0), (0, 0)])
def test_no_image_or_no_sample_gives_no_pair(images: int, count: int) -> None:
    samples = Proposals(torch.zeros(images, count, 4), torch.ones(images, count, dtype=torch.bool))
    rows, scores = best_pairs(predictions_of(samples, images), SIZES[:images], 10, 0.0)
    assert scores.shape == (0,)
    assert all(part.shape == (0,) and part.dtype == torch.int64 for part in rows)


def test_samples_that_are_not_usable_take_no_place() -> None:
    """The best ones of all are padding: the limit is for the others."""
    samples = proposals()
    predictions = predictions_of(samples)
    predictions.logits[~samples.valid] = 50.0
    rows, scores = best_pairs(predictions, SIZES, 4, 0.0)
    assert samples.valid[rows.image, rows.sample].all()
    assert rows.image.tolist() == [0] * 4 + [1] * 4
    for image in range(2):
        torch.testing.assert_close(scores[rows.image == image], predictions.logits[image][samples.valid[image]].sigmoid().flatten().topk(4).values)


def test_scores_of_half_precision_are_float32() -> None:
    predictions = predictions_of(proposals())
    half = Predictions(predictions.samples, predictions.logits.bfloat16(), predictions.raw)
    _, scores = best_pairs(half, SIZES, 5, 0.1)
    assert scores.dtype == torch.float32
