"""The data plan: pure in (seed, step, slot), whatever the number of workers and processes."""
from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dtg_core.config import Config, DataConfig, GuidanceConfig, Hull, RunConfig, ViewsConfig
from dtg_core.data.coco import list_folder
from dtg_core.data.index import CocoIndex
from dtg_core.data.plan import LABELED, MicroBatches, StepData, eval_batches, permutation, planned_row, step_data, steps_loader
from dtg_core.data.sources import Sources
from dtg_core.errors import UserError

VIEWS = ViewsConfig(short_edge=(40, 64), test_short_edge=64, long_edge=96)


@pytest.fixture
def unlabeled(tmp_path: Path) -> CocoIndex:
    generator = np.random.default_rng(0)
    for number in range(7):
        size = (48, 64, 3) if number % 2 else (64, 48, 3)
        Image.fromarray(generator.integers(0, 256, size, np.uint8)).save(tmp_path / f"{number}.png")
    return list_folder(tmp_path)


@pytest.fixture
def labeled(unlabeled: CocoIndex) -> CocoIndex:
    """Image k has k boxes, so the first has none; the last box of each is a crowd."""
    count = len(unlabeled)
    start = np.concatenate(([0], np.cumsum(np.arange(count))))
    boxes = np.tile(np.array((5, 6, 30, 40), np.float32), (start[-1], 1))
    crowd = np.zeros(start[-1], bool)
    crowd[start[2:] - 1] = True
    sizes = np.array([(48, 64) if number % 2 else (64, 48) for number in range(count)], np.int32)
    return replace(
        unlabeled, boxes=boxes, labels=np.arange(start[-1]) % 3, box_start=start, crowd=crowd, sizes=sizes,
        class_names=("a", "b", "c"), category_ids=[1, 2, 3],
    )  # fmt: skip


def assert_same(first: Any, second: Any) -> None:
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif is_dataclass(first):
        for field in fields(first):
            assert_same(getattr(first, field.name), getattr(second, field.name))
    else:
        assert first == second


def test_every_image_once_an_epoch() -> None:
    rows = [planned_row(3, LABELED, position, 10) for position in range(40)]
    epochs = [rows[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert not np.array_equal(permutation(3, 0, 0, 10), permutation(3, 1, 0, 10))
    assert not np.array_equal(permutation(3, 0, 0, 10), permutation(4, 0, 0, 10))


STOPPED_HALFWAY = """
from dtg_core.data.plan import steps_loader

class Numbers:
    def __getitem__(self, item):
        return item

batches = iter(steps_loader(Numbers(), 0, 100, 1))
next(batches)
"""


def test_a_process_ends_though_its_workers_wait() -> None:
    """As where an error's traceback keeps the loader; workers are deaf to the signal by which multiprocessing ends them."""
    subprocess.run([sys.executable, "-c", STOPPED_HALFWAY], timeout=60, check=True)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_and_resuming_change_nothing(labeled: CocoIndex, unlabeled: CocoIndex) -> None:
    data = StepData(labeled, unlabeled, VIEWS, 5, 2, 3)
    alone = list(steps_loader(data, 0, 6, 0))
    for batch, other in zip(alone, steps_loader(data, 0, 6, 2), strict=True):
        assert_same(batch, other)
    fresh = StepData(labeled, unlabeled, VIEWS, 5, 2, 3)
    for batch, other in zip(alone[4:], steps_loader(fresh, 4, 6, 0), strict=True):
        assert_same(batch, other)
    assert [batch.step for batch in alone] == list(range(6))


def test_seeds_steps_and_slots_differ(labeled: CocoIndex, unlabeled: CocoIndex) -> None:
    first, other = StepData(labeled, unlabeled, VIEWS, 0, 2, 3), StepData(labeled, unlabeled, VIEWS, 1, 2, 3)
    seeds = []
    for batch in (first[0], first[1], other[0]):
        assert batch.unlabeled is not None
        seeds += batch.labeled.seeds.tolist() + batch.unlabeled.student.seeds.tolist()
        assert torch.equal(batch.unlabeled.teacher.seeds, batch.unlabeled.student.seeds)
    assert len(set(seeds)) == 15
    assert min(seeds) >= 0


def test_parts_are_the_whole_batch(labeled: CocoIndex, unlabeled: CocoIndex) -> None:
    whole = StepData(labeled, unlabeled, VIEWS, 5, 4, 6)
    shares = [StepData(labeled, unlabeled, VIEWS, 5, 2, 3, part, 2) for part in range(2)]
    for step in (0, 1, 9):
        batch, parts = whole[step], [data[step] for data in shares]
        assert batch.unlabeled is not None
        for branch in ("labeled", "teacher", "student"):
            one = batch.labeled if branch == "labeled" else getattr(batch.unlabeled, branch)
            pieces = [part.labeled if branch == "labeled" else getattr(part.unlabeled, branch) for part in parts]
            assert one.image_ids == pieces[0].image_ids + pieces[1].image_ids
            assert_same(one.seeds, torch.cat([piece.seeds for piece in pieces]))
            assert_same(one.view_from_image, torch.cat([piece.view_from_image for piece in pieces]))
            assert_same(one.targets.boxes, torch.cat([piece.targets.boxes for piece in pieces]))
            sums = [piece.pixels.long().sum((1, 2, 3)) for piece in pieces]  # the canvases may differ
            assert_same(one.pixels.long().sum((1, 2, 3)), torch.cat(sums))


def test_weak_and_strong_views_are_drawn_apart(labeled: CocoIndex, unlabeled: CocoIndex) -> None:
    """Otherwise both would be flipped and sized alike, and the student would learn from its teacher's own view."""
    data = StepData(labeled, unlabeled, replace(VIEWS, geometric=0.0), 0, 1, 7)
    pairs = [data[step].unlabeled for step in range(4)]
    scales = torch.cat([pair.student_from_teacher for pair in pairs if pair is not None])[:, 0, 0]
    assert (scales < 0).float().mean() == pytest.approx(0.5, abs=0.3)  # one is a mirror image of the other
    assert len(scales.abs().round(decimals=3).unique()) > 10


def test_micro_batches_are_parts_of_a_step(labeled: CocoIndex, unlabeled: CocoIndex) -> None:
    """All parts of a step before those of the next, and together the batch of one process."""
    sources = Sources(labeled, unlabeled, None)
    config = Config(
        views=VIEWS, run=RunConfig(seed=3), data=DataConfig(labeled_per_device=2, unlabeled_per_device=1),
        guidance=GuidanceConfig(start_step=1),
    )  # fmt: skip
    items = MicroBatches([step_data(config, sources, part, 3) for part in range(3)])
    whole = StepData(labeled, unlabeled, VIEWS, 3, 6, 3, unlabeled_from=1)
    for step in range(3):
        batch, parts = whole[step], [items[3 * step + part] for part in range(3)]
        assert [part.step for part in parts] == [step] * 3
        assert_same(batch.labeled.seeds, torch.cat([part.labeled.seeds for part in parts]))
        assert {part.unlabeled is None for part in parts} == {batch.unlabeled is None} == {step < 1}
        if batch.unlabeled is not None:
            assert_same(batch.unlabeled.student.seeds, torch.cat([part.unlabeled.student.seeds for part in parts if part.unlabeled]))


def test_targets(labeled: CocoIndex, unlabeled: CocoIndex) -> None:
    """Crowds are never targets, images without boxes stay, unlabeled images have no targets."""
    data = StepData(labeled, labeled, VIEWS, 0, 7, 7)
    batch = data[0]
    counts = dict(zip(batch.labeled.image_ids, torch.bincount(batch.labeled.targets.image, minlength=7).tolist()))
    assert counts == {f"{number}.png": max(number - 1, 0) for number in range(7)}
    assert batch.unlabeled is not None
    assert batch.unlabeled.student.targets.boxes.shape == (0, 4)
    assert batch.unlabeled.teacher.targets.boxes.shape == (0, 4)


def test_supervised(labeled: CocoIndex, unlabeled: CocoIndex) -> None:
    assert StepData(labeled, None, VIEWS, 0, 2, 3)[0].unlabeled is None
    assert StepData(labeled, unlabeled, VIEWS, 0, 2, 0)[0].unlabeled is None
    early = StepData(labeled, unlabeled, VIEWS, 0, 2, 3)
    late = StepData(labeled, unlabeled, VIEWS, 0, 2, 3, unlabeled_from=4)
    assert late[3].unlabeled is None
    assert_same(late[4], early[4])


def test_unreadable_images_are_replaced(labeled: CocoIndex, unlabeled: CocoIndex, caplog: pytest.LogCaptureFixture) -> None:
    unlabeled.path(2).write_bytes(b"broken")
    data = StepData(labeled, unlabeled, VIEWS, 0, 1, 7)
    with caplog.at_level(logging.WARNING):
        batch = data[0]
    assert batch.unlabeled is not None
    assert "2.png" not in batch.unlabeled.student.image_ids
    assert data.substituted >= 1
    assert "2.png: it cannot be read" in caplog.text
    assert_same(batch, StepData(labeled, unlabeled, VIEWS, 0, 1, 7)[0])
    for row in range(7):
        unlabeled.path(row).write_bytes(b"broken")
    with pytest.raises(UserError, match="10 images in a row"):
        data[1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_each_image_once(labeled: CocoIndex, world_size: int) -> None:
    seen: list[Any] = []
    for rank in range(world_size):
        for batch in eval_batches(labeled, VIEWS, 2, rank, world_size):
            assert batch.sizes.min(1).values.tolist() == [64] * len(batch.image_ids)
            seen += batch.image_ids
    assert sorted(seen) == labeled.image_ids


def test_evaluated_images_share_a_batch_with_their_like(labeled: CocoIndex) -> None:
    """48 x 64 and 64 x 48 px, and one whose size is not known."""
    sizes = labeled.sizes.copy()
    sizes[6] = 0
    batches = list(eval_batches(replace(labeled, sizes=sizes), VIEWS, 2))
    assert all(len({tuple(size) for size in batch.sizes.tolist()}) == 1 for batch in batches)
    assert sorted(len(batch.image_ids) for batch in batches) == [1, 1, 1, 2, 2]
    assert sorted(image_id for batch in batches for image_id in batch.image_ids) == labeled.image_ids


def test_evaluation_leaves_out_what_cannot_be_read(labeled: CocoIndex, caplog: pytest.LogCaptureFixture) -> None:
    labeled.path(3).write_bytes(b"broken")
    batches = list(eval_batches(labeled, VIEWS, 1))
    assert batches.count(None) == 1
    assert sorted(batch.image_ids[0] for batch in batches if batch) == [name for name in labeled.image_ids if name != "3.png"]
    seen = [image_id for batch in eval_batches(labeled, VIEWS, 2) for image_id in batch.image_ids]  # beside another of its batch
    assert len(seen) == len(labeled) - 1
    assert "3.png: it cannot be read as an image" in caplog.text


@pytest.mark.parametrize("hull", ["ellipse", "corners"])
def test_a_pair_says_how_its_boxes_are_moved(labeled: CocoIndex, unlabeled: CocoIndex, hull: Hull) -> None:
    data = StepData(labeled, unlabeled, replace(VIEWS, box_hull=hull), 0, 1, 1)
    pair = data[0].unlabeled
    assert pair is not None
    assert pair.hull == pair.to("cpu").hull == hull
