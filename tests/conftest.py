"""Shared fixtures: paths, batches of plain views, random proposals."""
from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Of the processes that tests start, wherever pytest was started: the same threads as here, and this checkout.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from dtg_core.structures import PairBatch, Proposals, Targets, ViewBatch  # noqa: E402

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell starts with it ignored


@pytest.fixture
def shared() -> Path:
    """Folder of tools and weights beside the checkout; tests that need it are skipped without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs tools or weights beside the checkout")
    return folder


@contextlib.contextmanager
def full_disk(room: int = 0) -> Iterator[None]:
    """No file can grow beyond ``room`` bytes, not even pytest's own: what is printed meanwhile has to be captured by capsys."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Terminal(io.StringIO):
    """To stand for stderr; to be set by the test itself, because pytest sets it after the fixtures are made."""

    def isatty(self) -> bool:
        return True


def make_views(
    images: int, height: int, width: int, boxes: list[list[list[float]]] | None = None,
    labels: list[list[int]] | None = None, seed: int = 0,
) -> ViewBatch:
    """Random pixels with given objects (per image); no objects by default."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (images, 3, height, width), dtype=torch.uint8, generator=generator)
    boxes = boxes or [[] for _ in range(images)]
    labels = labels or [[0] * len(of_image) for of_image in boxes]
    targets = Targets(
        torch.tensor([box for of_image in boxes for box in of_image], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([label for of_image in labels for label in of_image], dtype=torch.int64),
        torch.tensor([index for index, of_image in enumerate(boxes) for _ in of_image], dtype=torch.int64),
    )
    sizes = torch.tensor([[float(height), float(width)]]).repeat(images, 1)
    seeds = torch.arange(images) + 1000 * seed
    return ViewBatch(pixels, sizes, targets, seeds, torch.eye(3).repeat(images, 1, 1), tuple(range(images)))


def make_pair(images: int, height: int, width: int, matrix: torch.Tensor | None = None, seed: int = 0) -> PairBatch:
    """Unlabelled pairs whose student view shows the same canvas, moved by ``matrix`` (default: the same view)."""
    view = make_views(images, height, width, seed=seed)
    matrix = torch.eye(3) if matrix is None else matrix
    return PairBatch(view, view, matrix.float().repeat(images, 1, 1))


def random_boxes(count: int, generator: torch.Generator) -> torch.Tensor:
    corner = torch.rand(count, 2, generator=generator) * 60
    return torch.cat((corner, corner + 5 + torch.rand(count, 2, generator=generator) * 35), 1)


def random_proposals(seed: int, objects: tuple[int, ...] = (4, 0, 6), samples: int = 50) -> tuple[Proposals, Targets]:
    """``samples`` proposals per image, a fifth of them padding; some lie near the objects, and one object is there twice."""
    generator = torch.Generator().manual_seed(seed)
    images = len(objects)
    boxes = random_boxes(images * samples, generator).view(images, samples, 4)
    valid = torch.rand(images, samples, generator=generator) > 0.2
    image = torch.cat([torch.full((count,), index) for index, count in enumerate(objects)])
    truth = random_boxes(len(image), generator)
    for row in range(len(image)):
        boxes[image[row], row * 3] = truth[row] + torch.randn(4, generator=generator)
    if len(image) > 2:
        truth[-1] = truth[-2]
    return Proposals(boxes, valid), Targets(truth, torch.randint(0, 3, (len(image),), generator=generator), image)


#: What the tests of detectors run on.
DETECTORS = ["gfl", "faster_rcnn"]


def tiny_detector(
    name: str, num_classes: int = 3, batch_norm: str = "frozen", strides: tuple[int, ...] = (8, 16)
) -> torch.nn.Module:
    """A small detector of each kind on a small untrained backbone."""
    import faster_rcnn_dtg
    import gfl_dtg
    from dtg_core.config import BackboneConfig
    from faster_rcnn_dtg.config import FasterRCNNConfig, RCNNConfig, RPNConfig
    from gfl_dtg.config import GFLConfig

    torch.manual_seed(0)
    backbone = BackboneConfig("test_resnet", pretrained=False, freeze_to_stride=0, batch_norm=batch_norm)
    if name == "gfl":
        config = GFLConfig(channels=16, tower_depth=1, strides=strides, anchor_scale=4.0)
        return gfl_dtg.build(config, backbone, num_classes)
    rpn, rcnn = RPNConfig(pre_nms=100, post_nms=40, samples=32), RCNNConfig(samples=24, hidden=32)
    return faster_rcnn_dtg.build(
        FasterRCNNConfig(channels=16, strides=strides, anchor_scale=4.0, rpn=rpn, rcnn=rcnn), backbone, num_classes
    )
