"""Whole training runs for tests: a tiny COCO data set on the disk, and ``train.py`` in forked processes.

A fork of the test process has everything imported, so a run of a few steps takes about a second. It is a process of its own
all the same, with its own exit status, that can be killed.
"""
from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate.utils
import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts")]

import command_line  # noqa: E402
import train  # noqa: E402

import dtg_core.engine.trainer  # noqa: E402, F401 - imported before a fork, not in each
import faster_rcnn_dtg  # noqa: E402, F401
import gfl_dtg  # noqa: E402, F401

TIMES = {"step_seconds", "data_seconds"}

#: Small networks with thresholds that an untrained teacher passes, so that every loss is at work.
TINY = [
    "backbone.name=test_resnet", "backbone.pretrained=false", "views.short_edge=[64,64]", "views.long_edge=64",
    "views.test_short_edge=64", "gfl.channels=16", "gfl.tower_depth=1", "gfl.strides=[8,16]", "gfl.anchor_scale=4",
    "faster_rcnn.channels=16", "faster_rcnn.strides=[8,16]", "faster_rcnn.anchor_scale=4", "faster_rcnn.rcnn.hidden=16",
    "data.workers=0", "data.labeled_per_device=1", "data.unlabeled_per_device=2", "guidance.start_step=1",
    "guidance.ramp_steps=2", "guidance.stages.head.tau=0.005", "guidance.stages.rpn.tau=0.45",
    "guidance.stages.rcnn.tau=0.005", "guidance.stages.head.pseudo_score=0.005",
    "guidance.stages.rpn.pseudo_score=0.005", "guidance.stages.rcnn.pseudo_score=0.005", "guidance.alpha=2",
    "faster_rcnn.rpn.pre_nms=300", "faster_rcnn.rpn.post_nms=100", "faster_rcnn.rpn.samples=64",
    "faster_rcnn.rcnn.samples=64", "faster_rcnn.rcnn.sampling_ratio=2", "optim.name=adamw", "optim.lr=5.0e-4",
    "optim.warmup_steps=0", "optim.milestones=[]", "optim.ema=0.995", "run.log_every=1",
]  # fmt: skip


def write_coco(folder: Path, images: int, seed: int, size: int = 64, objects: int = 2) -> Path:
    """Noise with two rectangles of two classes on each image."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(images):
        image = Image.fromarray(rng.integers(0, 90, (size, size, 3), dtype=np.uint8))
        for label in range(objects):
            x, y = rng.integers(0, size - 26, 2).tolist()
            width, height = rng.integers(16, 26, 2).tolist()
            color = (220, 40, 40) if label else (40, 220, 40)
            ImageDraw.Draw(image).rectangle([x, y, x + width, y + height], fill=color)
            annotations.append({"id": len(annotations) + 1, "image_id": number + 1, "category_id": label + 1, "iscrowd": 0,
                                "bbox": [x, y, width, height], "area": width * height})  # fmt: skip
        image.save(folder / "images" / f"{number}.png")
        records.append({"id": number + 1, "file_name": f"{number}.png", "width": size, "height": size})
    categories = [{"id": 1, "name": "green"}, {"id": 2, "name": "red"}]
    content = {"images": records, "annotations": annotations, "categories": categories}
    (folder / "all.json").write_text(json.dumps(content))
    return folder / "all.json"


@dataclass(frozen=True)
class TinyData:
    """Annotation files of a labelled, an unlabelled and a validation set."""

    labeled: Path
    unlabeled: Path
    val: Path

    @staticmethod
    def write(folder: Path) -> TinyData:
        parts = (("labeled", 5, 1), ("unlabeled", 9, 2), ("val", 3, 3))
        return TinyData(*(write_coco(folder / name, count, seed) for name, count, seed in parts))

    def flags(self) -> list[str]:
        return ["--labeled", str(self.labeled), "--unlabeled", str(self.unlabeled), "--val", str(self.val)]


def command(
    data: TinyData, detector: str, output: Path, *settings: str, steps: int = 6, paradigm: str = "dense"
) -> list[str]:
    """Arguments of ``train.py``. The config is an empty file, so that changes of the quick start leave tests alone."""
    empty = data.labeled.with_name("empty.yaml")
    empty.touch()
    flags = ["--config", str(empty), *data.flags()]
    if paradigm == "supervised":
        del flags[4:6]
    base = ["--detector", detector, "--paradigm", paradigm, "--steps", str(steps), "--output", str(output)]
    return [*base, *flags, "--set", *TINY, *settings]


@dataclass
class Process:
    """A forked ``train.py`` whose output goes to files."""

    pid: int
    folder: Path
    status: int | None = None

    def wait(self, seconds: float = 120) -> Process:
        """Until it ends; -9 is the status of a kill, as ``subprocess`` has it."""
        limit = time.monotonic() + seconds
        while self.status is None and time.monotonic() < limit:
            self.poll()
            time.sleep(0.005)
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            raise TimeoutError(f"train.py still runs after {seconds} s\n{self.err}")
        return self

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()


def errors(process: Process) -> list[str]:
    """Lines of stderr that are no warnings."""
    return [line for line in process.err.splitlines() if not line.startswith("warning: ")]


def start(
    arguments: Sequence[str], logs: Path, env: dict[str, str] | None = None, prepare: Callable[[], None] | None = None,
    main: Callable[[Sequence[str]], int | None] = train.main,
) -> Process:
    """Fork and run ``train.py``, or the ``main`` of another script; ``prepare`` is called in the new process first."""
    logs.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Process(pid, logs)
    status = 99
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        os.environ.update({"ACCELERATE_USE_CPU": "true", **(env or {})})
        accelerate.state.AcceleratorState._reset_state(True)
        torch.set_num_threads(1)
        warnings.resetwarnings()  # as outside of tests
        sys.argv = [f"{main.__module__}.py", *arguments]
        if prepare:
            prepare()
        command_line.main_guard(main)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(
    arguments: Sequence[str], logs: Path, env: dict[str, str] | None = None, prepare: Callable[[], None] | None = None,
    main: Callable[[Sequence[str]], int | None] = train.main,
) -> Process:
    return start(arguments, logs, env, prepare, main).wait()


def start_many(
    arguments: Sequence[str], logs: Path, processes: int, prepare: Callable[[], None] | None = None
) -> list[Process]:
    """The processes of one run, joined by gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    return [
        start(arguments, logs / str(rank), {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, prepare)
        for rank in range(processes)
    ]


def checkpoint_state(path: Path) -> dict[str, Any]:
    """What a run has put into a checkpoint beside tensors, and its step."""
    stored = json.loads((path / "state.json").read_text())
    return {**stored["state"], "step": stored["step"]}


def lines(output: Path, times: bool = False) -> list[dict[str, Any]]:
    """metrics.jsonl without warnings and what a clock has measured."""
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in found if "warning" not in line]
    return [{key: value for key, value in line.items() if times or key not in TIMES} for line in found]


def weights(output: Path) -> dict[str, bytes]:
    """The tensors of teacher and student as bytes, without the settings that stand beside them in the files."""
    from safetensors.torch import load_file

    return {
        f"{which}/{name}": tensor.contiguous().numpy().tobytes()
        for which in ("teacher", "student")
        for name, tensor in load_file(output / "weights" / f"{which}.safetensors").items()
    }
