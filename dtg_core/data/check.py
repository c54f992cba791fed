"""The checks that take too long for every start: each image is decoded, and sets are compared by the contents of their files."""
from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from dtg_core.data.findings import Report
from dtg_core.data.index import CocoIndex
from dtg_core.errors import NeedsSetting, UserError

SMALL = 32  # px; sides below are unusual
NEAR = 3  # bits in which the signatures of near copies may differ
PLAIN_BITS = 8  # a signature with fewer bits set, or fewer not set, is that of a plain surface


@dataclass(frozen=True)
class Look:
    """What was found in one image file."""

    problem: str | None  # why it cannot be used
    odd: tuple[str, ...]
    digest: bytes  # SHA-256 of the file; empty where it cannot be used
    signature: int  # 64 bits of brightness differences (dHash); near copies have nearly the same


@dataclass(frozen=True)
class LookedAt:
    """A data set whose images have been decoded."""

    index: CocoIndex
    name: Path  # in messages
    looks: list[Look]  # one for each image


def check_images(
    index: CocoIndex, name: Path, report: Report, workers: int = 0,
    shown: Callable[[Iterable[Look], int], Iterable[Look]] | None = None,
) -> LookedAt:
    """Decode every image.

    Args:
        index: the images. name: the data set's, in the report.
        report: collects what is odd, and each image that cannot be used.
        workers: processes; 0: this one.
        shown: passes the looks on as they are made, and shows progress towards the given number.
    """
    rows = range(len(index))
    with ProcessPoolExecutor(workers, initializer=_keep, initargs=(index,)) if workers else contextlib.nullcontext() as pool:
        made = map(partial(_look, index), rows) if pool is None else pool.map(_look_kept, rows, chunksize=16)
        looks = list(made if shown is None else shown(made, len(index)))
    for file, look in zip(index.file_names, looks):
        if look.problem:
            report.add(name, "images cannot be used", [f"{file}: {look.problem}"])
        for kind in look.odd:
            report.add(name, kind, [file])
    return LookedAt(index, name, looks)


def require_images(checked: LookedAt) -> None:
    """UserError if more images cannot be used than the data set's rules allow."""
    index = checked.index
    bad = [f"{file}: {look.problem}" for file, look in zip(index.file_names, checked.looks) if look.problem]
    if len(bad) > index.rules.max_bad_images * len(index):
        raise UserError(f"{checked.name}: {len(bad)} of {len(index)} images cannot be used (first {bad[0]}) - fix them, take them "
                        "out, or raise data.rules.max_bad_images")


def check_shared(one: LookedAt, other: LookedAt, report: Report) -> None:
    """Report images of ``one`` whose file, or nearly the same picture, is also in ``other``."""
    files, others = one.index.file_names, other.index.file_names
    file_of = {look.digest: file for file, look in zip(others, other.looks) if look.digest}
    same = [file_of.get(look.digest) for look in one.looks]
    report.add(one.name, f"IMAGES ARE ALSO IN {other.name}, BYTE FOR BYTE",
               (f"{file} = {copy}" for file, copy in zip(files, same) if copy))  # fmt: skip
    theirs = np.array([look.signature for look in other.looks], np.uint64)
    near = []
    for file, look, copy in zip(files, one.looks, same):
        if copy is None and PLAIN_BITS <= look.signature.bit_count() <= 64 - PLAIN_BITS:
            distance = np.bitwise_count(theirs ^ np.uint64(look.signature))
            if distance.min() <= NEAR:
                near.append(f"{file} ~ {others[int(distance.argmin())]}")
    report.add(one.name, f"IMAGES LOOK LIKE ONES OF {other.name}", near)


_kept: CocoIndex  # a worker process's, sent once: COCO's takes longer to send than an image to decode


def _keep(index: CocoIndex) -> None:
    global _kept
    _kept = index
    # Ctrl-C reaches every process of a terminal. A worker then ends at once, without a traceback; one that ignored the signal
    # would first look at all images that wait for it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _look_kept(row: int) -> Look:
    return _look(_kept, row)


def _look(index: CocoIndex, row: int) -> Look:
    path, odd = index.path(row), set[str]()
    try:
        with _stderr_of_decoders() as noise:
            image = index.image(row, odd)
        if noise:
            odd.add("images make the decoder complain")
        if min(image.size) < SMALL:
            odd.add(f"images have a side under {SMALL} px")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
    except NeedsSetting:
        raise
    except (UserError, OSError) as error:
        reason = str(error).removeprefix(f"{path}: ").partition(" - ")[0]
        return Look(reason, tuple(sorted(odd)), b"", 0)
    return Look(None, tuple(sorted(odd)), digest, _signature(image))


def _signature(image: Image.Image) -> int:
    gray = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return int.from_bytes(np.packbits(gray[:, 1:] > gray[:, :-1]).tobytes(), "big")


@contextlib.contextmanager
def _stderr_of_decoders() -> Iterator[list[bytes]]:
    """Collects what C libraries print to stderr meanwhile."""
    noise: list[bytes] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield noise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            noise.extend(file.readlines())
