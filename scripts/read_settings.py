"""The settings of a run, from the command line of ``train.py``, and its detector. Importing this loads neither torch nor numpy."""
from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, cast

from command_line import Parser, number, one_of

from dtg_core.config import RENAMED, Config, Paradigm, cross_check
from dtg_core.detectors import KNOWN
from dtg_core.errors import UserError
from dtg_core.ranges import Count, Seed, check_ranges
from dtg_core.settings import COMMAND_LINE, DEFAULT, load_config, overridden, refuse
from dtg_core.settings_text import dotted, flatten, yaml_scalar
from faster_rcnn_dtg.config import FasterRCNNConfig
from gfl_dtg.config import GFLConfig

if TYPE_CHECKING:
    from dtg_core.protocol import Detector

T = TypeVar("T")
QUICKSTART = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
PARADIGMS = ("dense", "sparse", "supervised")
DETECTORS = tuple(KNOWN)


@dataclass(frozen=True)
class RunSettings(Config):
    """What ``config.yaml`` of a run folder holds: the core's configuration and one section for each detector, of which only that of
    ``detector`` has an effect."""

    detector: Literal["gfl", "faster_rcnn"] = "gfl"
    # The paradigm of every stage that ``guidance.stages`` leaves open; supervised: no unlabelled images at all.
    paradigm: Literal["dense", "sparse", "supervised"] = "dense"
    gfl: GFLConfig = field(default_factory=GFLConfig)
    faster_rcnn: FasterRCNNConfig = field(default_factory=FasterRCNNConfig)


def train_parser() -> Parser:
    """The command line of ``train.py``."""
    parser = Parser("Train a detector on few labelled and many unlabelled images.")
    add = parser.add_argument
    add("--detector", type=one_of(DETECTORS), metavar="|".join(DETECTORS), help="required unless the config names it")
    add("--config", type=Path, metavar="FILE", help="YAML settings (default: configs/quickstart.yaml)")
    add("--paradigm", type=one_of(PARADIGMS), metavar="|".join(PARADIGMS),
        help="guidance of every stage; if the config has this paradigm already, what it sets for single stages stays")
    add("--backbone", metavar="TIMM_NAME", help="any timm model with feature maps (backbone.name)")
    add("--steps", type=number(Count), metavar="N", help="training steps (run.steps)")
    add("--seed", type=number(Seed), metavar="N", help="seed of all random draws (run.seed)")
    add("--labeled", metavar="ANNOTATIONS.json", help="labelled images, COCO format (data.labeled)")
    add("--unlabeled", metavar="DIR|ANNOTATIONS.json", help="unlabelled images (data.unlabeled)")
    add("--val", metavar="ANNOTATIONS.json", help="images to evaluate on (data.val)")
    add("--images", metavar="DIR", help="folder that file names in the JSONs are relative to (data.images)")
    add("--val-images", metavar="DIR", help="the same for --val, if different (data.val_images)")
    add("--output", metavar="DIR", help="run folder (run.output)")
    add("--init", metavar="WEIGHTS", help="weights file or run folder that student and teacher start from (run.init)")
    add("--reset-head", action="store_const", const=True, help="with --init: train the class layers from scratch (run.reset_head)")
    add("--resume", metavar="auto|CHECKPOINT", help="continue from the newest or the given checkpoint")
    add("--resume-with-changes", action="store_true", help="resume although settings or data have changed")
    add("--stop-at", type=number(Count), metavar="N",
        help="write a checkpoint after N steps and stop there, to be resumed later")
    add("--overwrite", action="store_true", help="first delete what an earlier run has written into the folder")
    add("--scale-lr", action="store_true", help="multiply lr by this run's images per step / optim.reference_batch")
    add("--replay", type=Path, metavar="FILE", help="repeat the step at which a run gave up (its nonfinite/step.json)")
    parser.add_list("--set", "dotted.key=value", "set any value of the config")
    add("--print-config", action="store_true", help="print every setting and where it comes from, and exit")
    add("--dry-run", action="store_true", help="check everything, try two steps, estimate time and memory, and write nothing")
    return parser


#: Flags that set a key.
_FLAG_KEYS = {
    "detector": "detector", "backbone": "backbone.name", "steps": "run.steps", "seed": "run.seed", "labeled": "data.labeled",
    "unlabeled": "data.unlabeled", "val": "data.val", "images": "data.images", "val_images": "data.val_images",
    "output": "run.output", "init": "run.init", "reset_head": "run.reset_head", "paradigm": "paradigm",
}


def load_settings(arguments: argparse.Namespace) -> tuple[RunSettings, dict[str, str], list[str]]:
    """The settings of a ``train_parser`` command line; see ``settings_from``.

    Raises:
        UserError: for contradictory flags, too.
    """
    if arguments.resume and arguments.overwrite:
        raise UserError("--resume and --overwrite: the one keeps what the other deletes - give one of them")
    overrides = [f"{key}={yaml_scalar(getattr(arguments, flag))}" for flag, key in _FLAG_KEYS.items()
                 if getattr(arguments, flag) is not None]
    for flag in ("detector", "paradigm"):  # which name a run's folder, and a study's runs; of other keys, the later one wins
        value = getattr(arguments, flag)
        other = next((text for text in arguments.set if text.partition("=")[0] == flag), None)
        if value is not None and other is not None and other.partition("=")[2] != value:
            raise UserError(f"--set {other}: --{flag} says {value} - leave one of the two out")
    settings, origins, notes = settings_from(arguments.config or QUICKSTART, [*overrides, *arguments.set])
    if origins["detector"] == DEFAULT:
        raise UserError(f"--detector: missing - choose from {', '.join(DETECTORS)}")
    if settings.paradigm == "supervised" and arguments.unlabeled:
        refuse("paradigm", "supervised uses no unlabelled images (found --unlabeled) - leave one of the two out", origins)
    return settings, origins, notes


def settings_from(file: Path | None, overrides: Sequence[str]) -> tuple[RunSettings, dict[str, str], list[str]]:
    """The defaults with the settings of a YAML file and "dotted.key=value"; later ones win.

    Returns:
        The settings, the origin of each key, and warnings to show.

    Raises:
        UserError: for whatever ``load_config``, the range checks and the detector's settings among each other find.
    """
    notes: list[str] = []
    of_file, origins = load_config(RunSettings, file and _shortest(file), (), RENAMED, notes)
    settings = overridden(of_file, overrides, origins)
    stages = KNOWN[settings.detector].stages
    if missing := [stage for stage in stages if stage not in settings.guidance.stages]:
        raise UserError(f"guidance.stages.{missing[0]}: is missing - add its StageRule to paper_stages in dtg_core/config.py")
    settings = _fill_paradigms(_plain_paths(settings), origins, settings.paradigm != of_file.paradigm)
    check_ranges(settings, origins)
    acting = replace(settings, guidance=settings.guidance.only(stages))  # no other stage can be wrong
    for name, rule in acting.guidance.stages.items():
        if settings.paradigm == "supervised" and rule.paradigm != "none":
            key = f"guidance.stages.{name}.paradigm"
            refuse(key, f"the paradigm is supervised (found {rule.paradigm}) - use none, or another paradigm", origins)
    return settings, origins, [*notes, *cross_check(acting, origins)]


def _fill_paradigms(settings: RunSettings, origins: dict[str, str], changed: bool) -> RunSettings:
    """Give the run's paradigm to the stages without a more specific one, noting its origin. If the command line has ``changed`` it,
    those of the file, which may be a run's own config.yaml, are no longer valid."""
    stages = dict(settings.guidance.stages)
    for stage, rule in stages.items():
        key = f"guidance.stages.{stage}.paradigm"
        if origins[key] == DEFAULT or (changed and origins[key] != COMMAND_LINE):
            stages[stage] = replace(rule, paradigm=stage_paradigm(settings.paradigm))
            origins[key] = origins["paradigm"]
    return replace(settings, guidance=replace(settings.guidance, stages=stages))


def stage_paradigm(paradigm: str) -> Paradigm:
    """A stage's paradigm in a run of this one."""
    return "none" if paradigm == "supervised" else cast(Paradigm, paradigm)


def _plain_paths(settings: RunSettings) -> RunSettings:
    """A leading ~ in a path becomes the user's folder, which neither YAML nor the shell does in key=~/file. ./photos/ becomes
    photos, so that runs with the two are alike."""

    def plain(section: T, *keys: str) -> T:
        found = {key: value for key in keys if (value := getattr(section, key))}
        changed = {key: os.path.normpath(os.path.expanduser(value)) for key, value in found.items()}
        return replace(section, **changed)  # type: ignore[type-var]

    return replace(
        settings, data=plain(settings.data, "labeled", "unlabeled", "val", "images", "val_images", "unlabeled_images"),
        run=plain(settings.run, "output", "init"), backbone=plain(settings.backbone, "weights"),
    )  # fmt: skip


def _shortest(path: Path) -> Path:
    """Relative to the working folder where that is shorter: it is shown in messages."""
    try:
        relative = Path(os.path.relpath(path))
    except ValueError:  # another drive
        return path
    return relative if len(str(relative)) < len(str(path)) else path


def without_effect(given: Sequence[str], settings: RunSettings) -> list[str]:
    """A note on keys given by ``--set`` that the run's detector and paradigm do not read."""
    from dtg_core.engine.effective import SILENT, effective

    every = dotted(flatten(settings))
    idle = {text.partition("=")[0] for text in given} & every.keys() - effective(every).keys() - SILENT - {"paradigm"}
    return [f"--set {', '.join(sorted(idle))}: without effect, as this detector and paradigm do not read it"] if idle else []


def is_supervised(settings: RunSettings) -> bool:
    """Whether no stage of the chosen detector learns from unlabelled images, so that none are loaded."""
    return all(settings.guidance.stages[stage].paradigm == "none" for stage in KNOWN[settings.detector].stages)


def build_detector(settings: RunSettings, num_classes: int) -> Detector:
    """The detector of ``settings`` with its initial weights."""
    package = importlib.import_module(KNOWN[settings.detector].package)
    return package.build(getattr(settings, settings.detector), settings.backbone, num_classes)
