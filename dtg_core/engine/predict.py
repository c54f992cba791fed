"""Trained weights as a detector that takes images and returns boxes in their pixels.

    from dtg_core import load_detector
    found = load_detector("runs/mine").predict(["a.jpg", "b.jpg"])

A weights file says all that is needed: the detector's name, its settings, and the user's classes.
"""
from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dtg_core.boxes import clip, project
from dtg_core.config import RENAMED, Config, without_weights
from dtg_core.data.images import read_image, to_rgb
from dtg_core.data.views import NO_BOXES, NO_LABELS, collate, test_canvas, test_view
from dtg_core.detectors import KNOWN
from dtg_core.drafts import reading
from dtg_core.engine.checkpoint import load_into, load_weights
from dtg_core.engine.effective import CORE, of_another
from dtg_core.errors import UserError
from dtg_core.protocol import Detector
from dtg_core.settings import load_config, plain_yaml
from dtg_core.settings_text import dotted, yaml_scalar

OneImage = str | Path | Image.Image


@dataclass(frozen=True)
class ImageDetections:
    """What was found in one image, best first. D boxes."""

    size: tuple[int, int]  # (height, width) of the image, upright
    boxes: np.ndarray  # [D, 4] float32 (x1, y1, x2, y2) in the image's pixels, clipped to it
    scores: np.ndarray  # [D] float32
    labels: np.ndarray  # [D] int64, rows of ``class_names`` and ``category_ids``


@dataclass(frozen=True)
class Predictor:
    """A detector in evaluation mode, with what its run knew."""

    detector: Detector
    settings: Config
    class_names: tuple[str, ...]
    category_ids: list[Any]  # as the user wrote them
    device: torch.device
    thresholds: Mapping[str, Tensor]  # [C] where the run's guidance ended, for stages that have one for each class

    @torch.no_grad()
    def predict(
        self, images: OneImage | Sequence[OneImage], score_threshold: float | None = None, batch: int = 8
    ) -> list[ImageDetections]:
        """Boxes of each image.

        Args:
            images: files, or PIL images, which are taken as they lie in memory: an EXIF orientation does not turn them, as it does
                files. One alone is like a list of it. batch: images at once.
            score_threshold: of boxes that are kept; None: the run's.

        Raises:
            UserError: a file cannot be read.
        """
        if isinstance(images, OneImage):
            images = [images]
        threshold = self.settings.run.score_threshold if score_threshold is None else score_threshold
        found: list[ImageDetections] = []
        for start in range(0, len(images), batch):
            found += self._found([self._opened(image) for image in images[start : start + batch]], threshold)
        return found

    def _found(self, images: Sequence[Image.Image], threshold: float) -> list[ImageDetections]:
        """Detections in images of any sizes; only those with the same canvas share a batch."""
        kinds: dict[tuple[int, int], list[int]] = {}
        for number, image in enumerate(images):
            kinds.setdefault(test_canvas(image.height, image.width, self.settings.views), []).append(number)
        found = {
            number: one
            for numbers in kinds.values()
            for number, one in zip(numbers, self._batch([images[number] for number in numbers], threshold))
        }
        return [found[number] for number in range(len(images))]

    def _opened(self, image: OneImage) -> Image.Image:
        if isinstance(image, Image.Image):
            return to_rgb(image, Path("image"), self.settings.data.rules, set())
        return read_image(Path(image), rules=self.settings.data.rules)

    def _batch(self, images: Sequence[Image.Image], threshold: float) -> list[ImageDetections]:
        made = [test_view(image, NO_BOXES, NO_LABELS, self.settings.views) for image in images]
        views = collate(made, [0] * len(images), range(len(images)))
        moved = views.to(self.device)
        detections = self.detector.detect(self.detector.run(moved), moved, threshold).to("cpu")
        back = torch.from_numpy(np.linalg.inv(np.stack([view.view_from_image for view in made])))
        sizes = torch.tensor([(image.height, image.width) for image in images], dtype=torch.float64)
        boxes = clip(project(detections.boxes.double(), back[detections.image], "corners"), sizes[detections.image]).float()
        parts = [(detections.image == number).nonzero().squeeze(1) for number in range(len(images))]
        return [
            ImageDetections((image.height, image.width), boxes[rows].numpy(), detections.scores[rows].float().numpy(),
                  detections.labels[rows].numpy())
            for image, rows in zip(images, parts)
        ]  # fmt: skip


def load_detector(path: str | Path, device: str | None = None, which: str = "teacher") -> Predictor:
    """Rebuild a detector from a weights file alone.

    Args:
        path: a file of ``weights/`` in a run folder, or the run folder. device: None: an accelerator, or else the CPU.
        which: "teacher", "student" or "best" of a run folder.

    Raises:
        UserError: not a weights file of this project, damaged, with settings that no longer exist, or no such device.
    """
    where = pick_device(device)
    path = find_weights(Path(path), which)
    tensors, metadata = load_weights(path)
    missing = {"detector", "class_names", "category_ids", "config"} - metadata.keys()
    if missing or metadata["detector"] not in KNOWN:
        raise UserError(f"{path}: does not say which detector it belongs to - give weights/*.safetensors of a run folder")
    name, class_names = metadata["detector"], tuple(metadata["class_names"])
    package, own, settings = _settings(path, name, metadata["config"])
    detector = package.build(own, without_weights(settings).backbone, len(class_names))
    load_into(detector, tensors, path)
    thresholds = {name: torch.tensor(scores, device=where) for name, scores in metadata.get("thresholds", {}).items()}
    return Predictor(detector.eval().to(where), settings, class_names, list(metadata["category_ids"]), where, thresholds)


def find_weights(path: Path, which: str = "teacher") -> Path:
    """The weights file of a run folder: its teacher, student or best teacher. UserError if there is none. A file's path is returned
    unchanged, whether it exists or not."""
    if not path.is_dir():
        return path
    weights = path / "weights" / f"{which}.safetensors"
    with reading(weights):
        there = weights.is_file()
    if not there:
        raise UserError(f"{path}: no weights/{which}.safetensors in it - give a run that was evaluated, or a weights file")
    return weights


def pick_device(name: str | None) -> torch.device:
    """A device by its name; None: an accelerator if there is one. Raises UserError when it does not exist or cannot be used."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return accelerator or torch.device("cpu")
    there = ["cpu"]
    if accelerator is not None:
        there += [accelerator.type, *(f"{accelerator.type}:{number}" for number in range(torch.accelerator.device_count()))]
    if name not in there:
        raise UserError(f"--device {name}: there is no such device - use {' or '.join(there)}")
    try:
        torch.zeros(1, device=name)
    except RuntimeError as error:  # from a GPU that another process holds
        reason = str(error).split("\n")[0]
        raise UserError(f"--device {name}: cannot be used ({reason}) - use cpu") from error
    return torch.device(name)


def _settings(path: Path, name: str, text: str) -> tuple[Any, Any, Config]:
    """The detector's package, its section of the settings, and the core's settings."""
    known = KNOWN[name]
    try:
        package = importlib.import_module(known.package)
        section = getattr(package, known.config)
    except ImportError as error:
        raise UserError(f"{path}: its package {known.package} cannot be imported ({error}) - install it") from error
    try:
        told = {key: yaml_scalar(value) for key, value in dotted(plain_yaml(text, "its settings", RENAMED)).items()}
        core = [f"{key}={value}" for key, value in told.items() if key.split(".")[0] in CORE and not of_another(key, name)]
        own = [f"{key.removeprefix(f'{name}.')}={value}" for key, value in told.items() if key.startswith(f"{name}.")]
        return package, load_config(section, None, own)[0], load_config(Config, None, core)[0]
    except UserError as error:
        raise UserError(f"{path}: its settings are of another version ({error})") from error
