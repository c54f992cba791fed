"""Which images a run sees: the embedded shapes, or the user's JSON files and folders."""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from dtg_core.config import DataConfig
from dtg_core.data.coco import CocoIndex, list_folder, load_coco, without
from dtg_core.data.shapes import make_shapes
from dtg_core.errors import UserError


@dataclass(frozen=True)
class Sources:
    """``unlabeled`` is None for supervised training, ``val`` where nothing is to be evaluated."""

    labeled: CocoIndex
    unlabeled: CocoIndex | None
    val: CocoIndex | None


def open_sources(config: DataConfig, supervised: bool) -> Sources:
    """Read what ``config`` names; without ``config.labeled`` make the embedded data set.

    Raises:
        UserError: what ``load_coco`` finds; no unlabelled images although they are wanted; validation classes that differ.
    """
    if config.labeled is None:
        config = _embedded(config)
    assert config.labeled is not None
    images = Path(config.images) if config.images else None
    labeled = load_coco(Path(config.labeled), images)
    if not (~labeled.crowd).any():
        raise UserError(f"{config.labeled}: no usable box in any of its {len(labeled.image_ids)} images - label some objects")
    val = None
    if config.val is not None:
        val = load_coco(Path(config.val), images)
        if val.class_names != labeled.class_names:
            odd = sorted(set(val.class_names) ^ set(labeled.class_names))
            found = f"only one of them has {', '.join(map(repr, odd[:5]))}" if odd else "their order differs"
            raise UserError(f"{config.val}: its classes are not those of {config.labeled} ({found}) - use the same categories")
    return Sources(labeled, None if supervised else _unlabeled(config, labeled), val)


def _unlabeled(config: DataConfig, labeled: CocoIndex) -> CocoIndex:
    if config.unlabeled is None:
        raise UserError("data.unlabeled: no unlabelled images given - add --unlabeled DIR, or use --paradigm supervised")
    path = Path(config.unlabeled)
    if path.suffix.lower() == ".json":
        found = load_coco(path, Path(config.images) if config.images else None)
    else:
        found = list_folder(path)
    rest = without(found, labeled)
    if not rest.image_ids:
        raise UserError(f"{path}: no image that is not labelled already ({len(found.image_ids)} found) - give other images, "
                        "or use --paradigm supervised")
    return rest


def _embedded(config: DataConfig) -> DataConfig:
    shapes = make_shapes(
        None, labeled=config.shapes_labeled, unlabeled=config.shapes_unlabeled, val=config.shapes_val, seed=config.shapes_seed
    )
    return replace(config, labeled=str(shapes.labeled), unlabeled=str(shapes.unlabeled), val=str(shapes.val), images=None)
