"""Whether a checkpoint may be continued: its stamp records the settings, data and number of processes it was made with."""
from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import dtg_core
from dtg_core.config import Config
from dtg_core.data.index import CocoIndex
from dtg_core.data.sources import Sources
from dtg_core.engine.effective import BATCH, INPUTS, PRECISION, SILENT, UNLABELED_ONLY, of_another, stage_paradigms
from dtg_core.engine.schedules import images_of_a_step
from dtg_core.errors import UserError
from dtg_core.settings_text import flatten

#: Settings that only matter to a run's first step.
BEGINNING = "run.init", "run.reset_head", "backbone.pretrained", "backbone.weights"
#: Settings that may change: they do not affect training, or the stamp records their effect instead.
FREE = SILENT - {"run.channels_last", "run.compile"} | {
    *BEGINNING, *INPUTS, "run.steps", "run.score_threshold", "data.unlisted", "data.shapes_labeled", "data.shapes_unlabeled",
    "data.shapes_val", "data.shapes_seed",
}  # fmt: skip


def stamp(config: Config, sources: Sources, processes: int, mixed_precision: str) -> dict[str, Any]:
    """JSON values that say what a checkpoint was made with; ``mixed_precision`` is the launcher's, such as "no" or "bf16"."""
    labeled, unlabeled = images_of_a_step(config, processes)
    made = {
        "torch": torch.__version__,
        "code": code_digest(),
        "processes": processes,
        PRECISION: mixed_precision,
        BATCH: {"labeled": labeled, "unlabeled": unlabeled},
        "data": {"labeled": digest(sources.labeled), "unlabeled": digest(sources.unlabeled), "val": digest(sources.val)},
        "config": flatten(config),
    }
    return json.loads(json.dumps(made))


def check_stamp(old: Mapping[str, Any], new: Mapping[str, Any], insist: bool) -> list[str]:
    """Notes to show when a checkpoint with the stamp ``old`` is continued by a run with the stamp ``new``.

    Raises:
        UserError: settings or data differ, unless ``insist``; another kind of optimizer.
    """
    if new.keys() - old.keys():
        raise UserError("--resume: the checkpoint is of another version of this program - start anew")
    former, name = old["config"]["optim.name"], new["config"]["optim.name"]
    if former != name:
        raise UserError(f"--resume: the checkpoint has the state of optim.name={former}, with which {name} cannot go on - undo it, "
                        "or start anew from its weights with --init")
    changes = list(_differences(old, new).values())
    if changes and not insist:
        raise UserError(f"--resume: the checkpoint was made with other settings ({'; '.join(changes)}) - undo them, "
                        "or insist with --resume-with-changes")
    notes = [f"resuming with changes: {change}" for change in changes]
    if old["processes"] != new["processes"]:
        notes.append(f"resuming with {new['processes']} processes instead of {old['processes']}: the same batches, but sums "
                     "in another order and other padding, so weights agree closely and not to the bit")
    if old["torch"] != new["torch"]:
        made, here = old["torch"], new["torch"]
        notes.append(f"warning: the checkpoint was made by torch {made}, this is {here} - results may differ slightly")
    if old["code"] != new["code"]:
        notes.append("warning: the checkpoint was made by another version of this program - results may differ slightly")
    if other_validation(old, new):
        notes.append("resuming with other validation data: AP so far cannot be compared with AP from here on")
    return notes


def changed_course(old: Mapping[str, Any], new: Mapping[str, Any], step: int) -> list[str]:
    """What a run with the stamp ``new`` would have done differently in the first ``step`` steps, including AP on other images.

    Guidance settings and unlabelled data have had no effect if neither run has guided its student yet.
    """
    guided = step > min(_first_guided(old), _first_guided(new))
    changes = [text for key, text in _differences(old, new).items()
               if guided or not (key.startswith(("guidance.", "paradigm")) or key in UNLABELED_ONLY)]  # fmt: skip
    return [*changes, *(["validation data"] if other_validation(old, new) else [])]


def other_validation(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the validation sets differ."""
    return old["data"]["val"] != new["data"]["val"]


def _first_guided(stamp: Mapping[str, Any]) -> float:
    """The step from which unlabelled images may count."""
    config = stamp["config"]
    guided = set(stage_paradigms(config).values()) - {"none"}
    return config["guidance.start_step"] if guided else math.inf


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Changes between two stamps that are only allowed by insisting, by setting or stream of data."""
    before, now = old["config"], new["config"]
    changes = {key: f"{key}: {_short(before[key])} -> {_short(now[key])}"
               for key in sorted(before.keys() & now.keys())  # another version of the program may have others
               if key not in FREE and before[key] != now[key] and not of_another(key, now.get("detector"))}  # fmt: skip
    if old[PRECISION] != new[PRECISION]:
        changes[PRECISION] = f"--mixed_precision: {old[PRECISION]} -> {new[PRECISION]}"
    for stream in ("labeled", "unlabeled"):
        number = old[BATCH][stream], new[BATCH][stream]
        if number[0] != number[1]:
            changes[f"{BATCH}.{stream}"] = (
                f"{stream} images of a step: {number[0]} -> {number[1]}, where processes x data.{stream}_per_device x "
                f"optim.accumulate has to stay {number[0]}"
            )
        data = old["data"][stream], new["data"][stream]
        if data[0] != data[1]:
            changes[f"data.{stream}"] = f"{stream} data: {_counts(data[0])} -> {_counts(data[1])}, or other files, boxes or classes"
    return changes


def code_digest() -> str:
    """A hash of the source of the core and of the detector packages next to it, which distinguishes versions of the same
    number."""
    root, found = Path(dtg_core.__file__).parent.parent, hashlib.sha256()
    for file in sorted([*root.glob("dtg_core/**/*.py"), *root.glob("*_dtg/**/*.py")]):
        found.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return found.hexdigest()


def digest(index: CocoIndex | None) -> dict[str, Any] | None:
    """Number of images and boxes, and a hash of file names, boxes and classes; the images themselves are not read."""
    if index is None:
        return None
    found = hashlib.sha256(json.dumps([list(index.file_names), list(index.class_names)]).encode())
    for array in (index.boxes, index.labels, index.box_start, index.crowd):
        found.update(array.tobytes())
    return {"images": len(index), "boxes": len(index.boxes), "sha256": found.hexdigest()}


def _counts(told: Mapping[str, Any] | None) -> str:
    return "none" if told is None else f"{told['images']} images with {told['boxes']} boxes"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
