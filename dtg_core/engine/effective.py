"""Which settings of a run have an effect: what its detector and its paradigms read, and what changes weights or figures."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dtg_core.config import Config
from dtg_core.detectors import KNOWN

#: What a run reads, and what has to be there.
INPUTS = {"data.labeled": "file", "data.val": "file", "data.unlabeled": "file or folder", "data.images": "folder",
          "data.val_images": "folder", "data.unlabeled_images": "folder"}  # fmt: skip
#: Settings that change no weight and no figure, except for the order of sums.
SILENT = {
    "schema", "run.output", "run.log_every", "run.evaluate_every", "run.evaluate_batch", "run.checkpoint_every", "run.trackers",
    "run.max_skipped", "run.channels_last", "run.compile", "data.workers", "optim.reference_batch", "data.labeled_per_device",
    "data.unlabeled_per_device", "optim.accumulate",
}  # fmt: skip
#: The images of a step, over all processes: what the last three result in. A run records it beside its settings, as it does
#: the launcher's mixed precision.
BATCH, PRECISION = "images_of_a_step", "mixed_precision"
#: Sections and keys that all detectors share.
CORE = {field.name for field in fields(Config)} | {BATCH}
#: Settings of a stage's rule that only one paradigm reads. Dense and sparse guidance may both read any other.
DENSE_KEYS = {
    "tau", "nms_iou", "classification", "box", "max_candidates", "min_iou", "collisions", "background_tau", "background_samples",
    "normalization", "quality", "rank", "rank_weight", "temperature", "member_iou", "member_share", "member_tau", "consensus_rank",
    "cluster_trust", "share_classes", "soft_background",
}  # fmt: skip
SPARSE_KEYS = {"pseudo_score", "proposals"}
#: Every stage's rule has them, but proposals are moved to the student one by one and need no partner, anchors are no proposals,
#: and an RPN has no classes.
UNREAD = {"guidance.stages.rcnn.min_iou", "guidance.stages.rcnn.collisions", "guidance.stages.rpn.proposals",
          "guidance.stages.rpn.share_classes", "guidance.stages.head.proposals"}  # fmt: skip
#: Settings that only matter where something is learnt from unlabelled images.
UNLABELED_ONLY = {"data.unlabeled", "data.unlabeled_images", "data.unlisted", f"{BATCH}.unlabeled", "data.shapes_unlabeled",
                  "views.geometric", "views.rotate", "views.shear", "views.translate", "views.box_hull",
                  "views.erase_patches", "views.erase_size"}  # fmt: skip


def of_another(key: str, detector: object) -> bool:
    """Whether ``key`` belongs to another detector than this one: its section, or a stage that this one does not have."""
    parts = key.split(".")
    if parts[:2] == ["guidance", "stages"] and len(parts) > 2:
        return detector in KNOWN and parts[2] not in KNOWN[str(detector)].stages
    return detector is not None and len(parts) > 1 and parts[0] not in CORE and parts[0] != detector


def effective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, by dotted key, that had an effect: without other detectors' sections and stages, or what the paradigms do not
    read. A detector that is not ``KNOWN`` has all stages of its settings."""
    detector = settings.get("detector")
    settings = {key: value for key, value in settings.items() if not of_another(key, detector)}
    paradigms = stage_paradigms(settings)
    supervised = set(paradigms.values()) <= {"none"}

    def matters(key: str) -> bool:
        parts = key.split(".")
        if key in SILENT or key == "paradigm":  # the stages' own are more specific than the run's
            return False
        if key == "optim.momentum":
            return settings.get("optim.name") == "sgd"
        if parts[:2] == ["guidance", "stages"] and len(parts) > 2:
            return parts[2] in paradigms and reads(paradigms[parts[2]], key)
        if supervised and (key in UNLABELED_ONLY or parts[0] == "guidance"):
            return False
        built_in = settings.get("data.labeled") is None
        return not (key.startswith("data.shapes_") and not built_in)

    return {key: value for key, value in settings.items() if matters(key)}


def reads(paradigm: Any, key: str) -> bool:
    """Whether a stage that is guided in this way reads ``key``, such as "guidance.stages.rpn.tau", of its rule."""
    option = key.split(".")[-1]
    if option == "paradigm":
        return True
    return paradigm != "none" and key not in UNREAD and option not in (SPARSE_KEYS if paradigm == "dense" else DENSE_KEYS)


def stage_paradigms(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How each stage of the detector was guided, from settings by dotted key."""
    return {key.split(".")[2]: value for key, value in settings.items()
            if key.startswith("guidance.stages.") and key.endswith(".paradigm")
            and not of_another(key, settings.get("detector"))}  # fmt: skip


def paradigm_of(stages: Mapping[str, Any]) -> str:
    """"dense", "sparse" or "supervised"; listed by stage if they differ."""
    kinds = set(stages.values())
    if len(kinds) <= 1:
        return "supervised" if kinds <= {"none"} else kinds.pop()
    return ", ".join(f"{stage} {value}" for stage, value in stages.items())
