"""Which image, which view and which random numbers at which step: all a pure function of (seed, step, slot).

A stream is the labelled or the unlabelled images. Slot i of step t takes position t * slots + i of the stream's endless
sequence, which is one seeded permutation of the pool after another. So there is no state to save: a run that resumes, or
that has another number of loader workers or of processes (with the same global batch), sees the same batches.
"""
from __future__ import annotations

import atexit
import logging
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dtg_core.config import Config, ViewsConfig
from dtg_core.data.geometry import fitted
from dtg_core.data.index import CocoIndex
from dtg_core.data.sources import Sources
from dtg_core.data.views import (
    NO_BOXES,
    NO_LABELS,
    View,
    collate,
    collate_pair,
    labeled_view,
    strong_view,
    test_canvas,
    test_view,
    weak_view,
)
from dtg_core.errors import NeedsSetting, UserError, printable
from dtg_core.structures import PairBatch, StepBatch, ViewBatch

log = logging.getLogger(__name__)
T = TypeVar("T")

LABELED, UNLABELED = 0, 1  # streams
# What is drawn for a slot. Each has its own generator, so a change to one recipe leaves the others' draws unchanged.
SEED, WEAK, STRONG, SUBSTITUTE = 0, 1, 2, 3
TRIES = 10  # images tried for a slot if they are unreadable


@lru_cache(maxsize=8)  # two streams, each between two epochs
def permutation(seed: int, stream: int, epoch: int, size: int) -> np.ndarray:
    """[size] int64, the order in which an epoch visits the pool."""
    return np.random.default_rng((seed, stream, epoch)).permutation(size)


def planned_row(seed: int, stream: int, position: int, size: int) -> int:
    """Row of the pool at a position of the stream's endless sequence."""
    epoch, place = divmod(position, size)
    return int(permutation(seed, stream, epoch, size)[place])


@dataclass(eq=False)
class StepData(Dataset[StepBatch]):
    """The batches of one part of a run's steps; item t is its share of step t's batch, a contiguous one of the step's slots."""

    labeled: CocoIndex  # images with boxes; those without any stay, as pure background
    unlabeled: CocoIndex | None  # images whose boxes are never read; None for supervised training
    views: ViewsConfig  # how views are made
    seed: int  # of the whole run, at least 0
    labeled_per_device: int  # labelled images in each part's batch, at least 1
    unlabeled_per_device: int  # unlabelled ones; 0 is the same as ``unlabeled=None``
    part: int = 0
    parts: int = 1  # as many as processes times micro-batches
    unlabeled_from: int = 0  # first step that has an unlabelled batch
    substituted: int = field(default=0, init=False)  # unreadable images that were replaced in this loader process

    def __getitem__(self, step: int) -> StepBatch:
        return StepBatch(step, self._labeled_batch(step), self._unlabeled_batch(step))

    def _labeled_batch(self, step: int) -> ViewBatch:
        views, seeds, ids = [], [], []
        for slot in self._slots(self.labeled_per_device):
            row, image, scale = self._image(self.labeled, LABELED, step, slot, self.labeled_per_device)
            boxes, labels = self.labeled.objects(row)
            boxes = boxes * np.tile(scale, 2)
            view = labeled_view(image, boxes, labels, self.views, self._generator(LABELED, step, slot, WEAK))
            views.append(_of_whole(view, scale))
            seeds.append(self._seed(LABELED, step, slot))
            ids.append(self.labeled.image_ids[row])
        return collate(views, seeds, ids)

    def _unlabeled_batch(self, step: int) -> PairBatch | None:
        if self.unlabeled is None or self.unlabeled_per_device == 0 or step < self.unlabeled_from:
            return None
        weak: list[View] = []
        strong: list[View] = []
        seeds, ids = [], []
        nothing = NO_BOXES, NO_LABELS
        for slot in self._slots(self.unlabeled_per_device):
            row, image, scale = self._image(self.unlabeled, UNLABELED, step, slot, self.unlabeled_per_device)
            for made, view, use in ((weak, weak_view, WEAK), (strong, strong_view, STRONG)):
                generator = self._generator(UNLABELED, step, slot, use)
                made.append(_of_whole(view(image, *nothing, self.views, generator), scale))
            seeds.append(self._seed(UNLABELED, step, slot))
            ids.append(self.unlabeled.image_ids[row])
        return collate_pair(weak, strong, seeds, ids, self.views.box_hull)

    def _slots(self, per_device: int) -> range:
        return range(self.part * per_device, (self.part + 1) * per_device)

    def _generator(self, stream: int, step: int, slot: int, use: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, stream, step, slot, use))

    def _seed(self, stream: int, step: int, slot: int) -> int:
        return int(self._generator(stream, step, slot, SEED).integers(2**63))

    def _image(self, pool: CocoIndex, stream: int, step: int, slot: int, per_device: int) -> tuple[int, Image.Image, np.ndarray]:
        """The slot's row and image, with its size [2] (x, y) as a share of the whole one, as large ones may come reduced.

        An unreadable image is replaced by another of the pool, the same one in every run.
        """
        row = planned_row(self.seed, stream, step * per_device * self.parts + slot, len(pool))
        for attempt in range(TRIES):
            try:
                found = pool.decoded(row, wanted=self._largest)
                return row, found.image, np.array(found.image.size, np.float32) / np.array(found.size[::-1], np.float32)
            except NeedsSetting:
                raise
            except UserError as error:
                self.substituted += 1
                problem = printable(str(error))
                log.warning("%s; another image takes its place (number %d in this process)", problem, self.substituted)
                row = int(self._generator(stream, step, slot, SUBSTITUTE + attempt).integers(len(pool)))
        reason = problem.rpartition(" - ")[0]
        raise UserError(f"{pool.root}: {TRIES} images in a row cannot be used (step {step}; {reason}) - check the data and the "
                        "disk")

    def _largest(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the largest view of an image."""
        return fitted(height, width, self.views.short_edge[1], self.views.long_edge)


def _of_whole(view: View, scale: np.ndarray) -> View:
    """The same view, whose matrix begins at the whole image instead of one that is ``scale`` [2] as large."""
    return replace(view, view_from_image=view.view_from_image @ np.diag((*scale, 1.0)))


def step_data(config: Config, sources: Sources, part: int, parts: int) -> StepData:
    """The batches of one of a run's ``parts``, by its settings."""
    return StepData(
        sources.labeled, sources.unlabeled, config.views, config.run.seed, config.data.labeled_per_device,
        config.data.unlabeled_per_device, part, parts, unlabeled_from=config.guidance.start_step,
    )  # fmt: skip


class MicroBatches(Dataset[StepBatch]):
    """The micro-batches of one process; item i is part i % K of step i // K.

    Args:
        parts: K data sets. The k-th of process r is part r * K + k of K times as many parts as processes, so the images of a
            step are the same whether processes or micro-batches share them.
    """

    def __init__(self, parts: Sequence[StepData]) -> None:
        self.parts = parts

    def __getitem__(self, item: int) -> StepBatch:
        step, part = divmod(item, len(self.parts))
        return self.parts[part][step]


def micro_batches(config: Config, sources: Sources, process: int, processes: int) -> MicroBatches:
    """Those of one of a run's processes, ``optim.accumulate`` for each step."""
    parts = config.optim.accumulate
    return MicroBatches([step_data(config, sources, process * parts + part, processes * parts) for part in range(parts)])


class EvalData(Dataset[ViewBatch | None]):
    """Batches of test views; over all processes, each readable image occurs once. ``ViewBatch.image_ids`` says which they are. A
    batch without readable images is None.

    Where sizes are known, the images of a batch have the same canvas, so that figures do not depend on what else is in a batch.
    """

    def __init__(self, index: CocoIndex, views: ViewsConfig, batch: int, rank: int = 0, world_size: int = 1) -> None:
        self.index, self.views = index, views
        sizes, size_of_row = np.unique(index.sizes, axis=0, return_inverse=True)
        known = ((height, width) for height, width in sizes.tolist())
        canvases = np.array([test_canvas(*size, views) if min(size) else (0, 0) for size in known]).reshape(-1, 2)
        _, kind = np.unique(canvases, axis=0, return_inverse=True)
        kind_of_row = kind.reshape(-1)[size_of_row.reshape(-1)]
        share = np.array_split(np.argsort(kind_of_row, kind="stable"), world_size)[rank]
        runs = np.split(share, np.flatnonzero(np.diff(kind_of_row[share])) + 1)
        self.batches = [run[start : start + batch] for run in runs for start in range(0, len(run), batch)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, item: int) -> ViewBatch | None:
        rows = [(row, image) for row in self.batches[item].tolist() if (image := self._image(row)) is not None]
        views = [test_view(image, *self.index.objects(row), self.views) for row, image in rows]
        return collate(views, [0] * len(rows), [self.index.image_ids[row] for row, _ in rows]) if rows else None

    def _image(self, row: int) -> Image.Image | None:
        """An image, None where it cannot be read."""
        try:
            return self.index.image(row)
        except NeedsSetting:
            raise
        except UserError as error:
            log.warning("%s; it is not evaluated", printable(str(error)))
            return None


def steps_loader(dataset: Dataset[StepBatch], start: int, stop: int, workers: int) -> DataLoader[StepBatch]:
    """Items ``start`` to ``stop - 1`` of ``StepData`` or ``MicroBatches``, made ahead by ``workers`` processes (0: made
    on demand).

    A worker runs on one thread, which is PyTorch's own setting for workers.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_signals,
    )


def items_of(loader: DataLoader[T]) -> Iterator[T]:
    """The loader's items; UserError, within seconds, if a worker has died or was refused its shared memory.

    PyTorch's own handler, which is disabled, would raise wherever the process happens to be: in a checkpoint, or at its end.
    """
    items = iter(loader)
    if not loader.num_workers:
        yield from items
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from items
    except (RuntimeError, EOFError, ConnectionError) as error:  # the last two: it died while handing over a batch
        text = str(error)
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in text and "</torch_" not in text:
            raise
        reason = " ".join(text.strip().rpartition("\n")[2].split()) or type(error).__name__
        raise UserError(
            f"data.workers={loader.num_workers}: a worker that makes batches has died ({reason}) - use fewer workers; where "
            "memory or /dev/shm is small, 0"
        ) from error


def _ignore_signals(worker: int) -> None:
    """A signal to the whole process group is for the training process to handle, which still needs its batches."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Kill workers that are left at exit, which would be waited for forever: they ignore the signal that should end them."""
    for child in multiprocessing.active_children():
        if child.daemon:  # multiprocessing ends daemons at exit too
            child.kill()


def eval_batches(
    index: CocoIndex, views: ViewsConfig, batch: int, rank: int = 0, world_size: int = 1, workers: int = 0
) -> DataLoader[ViewBatch | None]:
    """Test views of this process's share of the images, see ``EvalData``."""
    data = EvalData(index, views, batch, rank, world_size)
    return DataLoader(
        data, batch_size=None, num_workers=workers, pin_memory=torch.cuda.is_available(), worker_init_fn=_ignore_signals
    )
