"""Which images a run sees: built-in synthetic data, or the user's JSON files and folders, checked one by one and together."""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from dtg_core.config import DataConfig
from dtg_core.data.coco import list_folder, load_coco
from dtg_core.data.findings import Report
from dtg_core.data.index import CocoIndex, with_classes, without
from dtg_core.data.shapes import ShapesPaths, make_shapes
from dtg_core.errors import UserError


@dataclass(frozen=True)
class Sources:
    """``unlabeled`` is None for supervised training, ``val`` if nothing is to be evaluated."""

    labeled: CocoIndex
    unlabeled: CocoIndex | None
    val: CocoIndex | None


def open_sources(config: DataConfig, supervised: bool, report: Report | None = None) -> Sources:
    """Read what ``config`` names; without ``config.labeled`` make the built-in synthetic data set.

    Args:
        config: the data's settings.
        supervised: no unlabelled images.
        report: collects what was fixed or left out; None: it is logged as warnings.

    Raises:
        UserError: what ``load_coco`` finds; no unlabelled images although they are wanted; validation classes that differ.
    """
    notes = Report() if report is None else report
    if config.labeled is None:
        shapes = built_in(config)
        config = replace(config, labeled=str(shapes.labeled), unlabeled=str(shapes.unlabeled), val=str(shapes.val), images=None,
                         val_images=None, unlabeled_images=None, unlisted="ignore")
    assert config.labeled is not None
    images = Path(config.images) if config.images else None
    labeled = load_coco(Path(config.labeled), images, rules=config.rules, report=notes)
    if not (~labeled.crowd).any():
        raise UserError(f"{config.labeled}: no usable box in any of its {len(labeled)} images - label some objects")
    if len(labeled) < config.labeled_per_device:
        notes.add(config.labeled, f"images are fewer than data.labeled_per_device={config.labeled_per_device}, so a batch "
                                  "repeats them",
                  labeled.file_names)
    val = _val(config, labeled, images, notes) if config.val is not None else None
    unlabeled = None if supervised else _unlabeled(config, labeled, val, images, notes)
    if report is None:
        notes.log()
    return Sources(labeled, unlabeled, val)


def _val(config: DataConfig, labeled: CocoIndex, images: Path | None, report: Report) -> CocoIndex:
    assert config.val is not None
    val = load_coco(Path(config.val), Path(config.val_images) if config.val_images else images, rules=config.rules, report=report)
    if not (~val.crowd).any():
        raise UserError(f"{config.val}: no usable box to evaluate against - give a labelled set, or leave --val out")
    if set(val.class_names) != set(labeled.class_names):
        odd = ", ".join(map(repr, sorted(set(val.class_names) ^ set(labeled.class_names))[:5]))
        raise UserError(f"{config.val}: its classes are not those of {config.labeled} (only one of them has {odd}) - "
                        "use the same categories")
    if val.class_names != labeled.class_names:
        report.add(config.val, f"classes have other ids than in {config.labeled} and are matched by name", val.class_names)
    kind = f"IMAGES ARE ALSO IN {config.labeled}, SO THE FIGURES SAY NOTHING OF NEW IMAGES"
    _without_shared(labeled, val, kind, report, config.val)
    return with_classes(val, labeled.class_names)


def _unlabeled(config: DataConfig, labeled: CocoIndex, val: CocoIndex | None, images: Path | None, report: Report) -> CocoIndex:
    if config.unlabeled is not None and config.unlisted == "unlabeled":
        raise UserError("data.unlisted: it takes unlabelled images from the labelled ones' folder, but data.unlabeled names "
                        "others - give one of the two")
    if config.unlabeled is None and config.unlisted == "ignore":
        raise UserError("data.unlabeled: no unlabelled images given - add --unlabeled DIR, or use --paradigm supervised")
    path = Path(config.unlabeled or labeled.root)
    if path.suffix.lower() == ".json" and not path.is_dir():
        images = Path(config.unlabeled_images) if config.unlabeled_images else images
        found = load_coco(path, images, need_labels=False, rules=config.rules, report=report)
    else:
        found = list_folder(path, config.rules, report)
    rest = _without_shared(found, labeled, "images are labelled too and not used as unlabelled", report, path)
    if val is not None:
        rest = _without_shared(rest, val, "UNLABELLED IMAGES ARE ALSO IN THE VALIDATION SET AND NOT USED", report, path)
    if not len(rest):
        raise UserError(f"{path}: no image that is not labelled already ({len(found)} found) - give other images, "
                        "or use --paradigm supervised")
    return rest


def _without_shared(one: CocoIndex, other: CocoIndex, kind: str, report: Report, file: str | Path) -> CocoIndex:
    """``one`` without the images that are also in ``other``, which are reported as ``kind``."""
    rest = without(one, other)
    only = set(rest.file_names)
    report.add(file, kind, (name for name in one.file_names if name not in only))
    return rest


def built_in(config: DataConfig) -> ShapesPaths:
    """The built-in synthetic data set of a config, which is made if it is not there yet."""
    return make_shapes(
        None, labeled=config.shapes_labeled, unlabeled=config.shapes_unlabeled, val=config.shapes_val, seed=config.shapes_seed
    )
