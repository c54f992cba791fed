"""How to write a detector of your own: RetinaNet (Lin et al., 2017) under dense teacher guidance, on the built-in data.

    python examples/retinanet.py [run.steps=300 optim.lr=0.001 ...]

The core needs two things, described in ``dtg_core/protocol.py``, and knows nothing else about RetinaNet:

    RetinaNetStage   how the head's predictions are read, assigned to objects and judged
    RetinaNet        a network that has this stage: from views to predictions to final boxes

N images, A anchors per image, C classes, P assigned anchors, M any rows (image, anchor, class).
"""
from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import l1_loss
from torchvision.models.detection.retinanet import RetinaNetHead

from dtg_core import deltas, matching
from dtg_core.anchors import anchor_grid
from dtg_core.config import Config, cross_check
from dtg_core.data.plan import items_of, micro_batches, steps_loader
from dtg_core.data.sources import open_sources
from dtg_core.engine.processes import main_first
from dtg_core.engine.train_step import Window, prepare, train_step
from dtg_core.focal import sigmoid_focal
from dtg_core.models.backbone import Pyramid, build_pyramid
from dtg_core.postprocess import best_pairs, final_boxes
from dtg_core.protocol import Detector, Outputs, Stage
from dtg_core.ranges import check_ranges
from dtg_core.settings import load_config
from dtg_core.structures import (
    AnchorGrid,
    Assignment,
    Detections,
    Predictions,
    Rows,
    Samples,
    Supervision,
    Targets,
    Unreduced,
    ViewBatch,
)

STRIDES, SCALE, RATIOS = (8, 16, 32), 4.0, (0.5, 1.0, 2.0)  # anchors of 32, 64 and 128 px, three at each location
POSITIVE_IOU, NEGATIVE_IOU, NMS_IOU = 0.5, 0.4, 0.5
ANY_OVERLAP = 1e-6  # least IoU of an object with its best anchor, so that none takes an object without size


class RetinaNetStage:
    """Implements ``dtg_core.protocol.Stage``. A stage has no weights: its results depend only on its arguments."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def groups(self, samples: Samples, rows: Rows) -> Tensor:
        """[M] NMS group: boxes of different images or classes do not suppress each other."""
        return rows.image * self.num_classes + rows.label

    def decode(self, predictions: Predictions, rows: Rows) -> Tensor:
        """[M, 4] boxes: anchors moved by the predicted deltas, which all classes share."""
        return deltas.decode(predictions.samples.take(rows.image, rows.sample), predictions.raw[rows.image, rows.sample])

    def assign(self, samples: Samples, targets: Targets, sizes: Tensor, seeds: Tensor) -> Assignment:
        """An anchor takes the object it overlaps most, from an IoU of 0.5 on; an object takes its best anchor in any case."""
        matches = matching.match(samples, targets, samples.usable(sizes), POSITIVE_IOU, NEGATIVE_IOU, ANY_OVERLAP)
        return matching.to_assignment(matches, targets)

    def losses(self, predictions: Predictions, assignment: Assignment) -> Unreduced:
        """Focal loss and L1 of the deltas, anchor by anchor: the core decides how they are weighted and summed."""
        logits, (image, sample, _) = predictions.logits.float(), assignment.rows
        background = sigmoid_focal(logits, torch.zeros_like(logits)).sum(2) * assignment.background  # [N, A]
        rows = logits[image, sample]  # [P, C]
        quality = torch.ones_like(rows[:, 0]) if assignment.quality is None else assignment.quality
        target = assignment.class_targets(quality, self.num_classes)
        wanted = deltas.encode(predictions.samples.take(image, sample), assignment.box)
        box = l1_loss(predictions.raw[image, sample].float(), wanted, reduction="none").sum(1)
        weight = torch.ones_like(box)
        return Unreduced(sigmoid_focal(rows, target).sum(1), box, background, weight, weight.sum(), weight.sum())


class RetinaNet(Detector):
    """A pyramid, torchvision's head, and one stage."""

    def __init__(self, pyramid: Pyramid, num_classes: int) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.head = RetinaNetHead(pyramid.channels, len(RATIOS), num_classes, partial(nn.GroupNorm, pyramid.channels // 8))
        self.stage = RetinaNetStage(num_classes)
        self.stages: Mapping[str, Stage] = {"head": self.stage}  # the name is its key in guidance.stages and in the log

    def grid(self, canvas: tuple[int, int], device: torch.device) -> AnchorGrid:
        return anchor_grid(canvas, self.pyramid.strides, SCALE, RATIOS, device)

    def run(self, views: ViewBatch, supervision: Mapping[str, Supervision] | None = None) -> Outputs:
        """All anchors are samples, so ``supervision`` only says whether to run. torchvision's order is that of AnchorGrid."""
        if supervision is not None and "head" not in supervision:
            return {}
        found = self.head(self.pyramid(views))
        return {"head": Predictions(self.grid(views.canvas, views.pixels.device), found["cls_logits"], found["bbox_regression"])}

    @torch.no_grad()
    def detect(self, outputs: Outputs, views: ViewBatch, score_threshold: float) -> Detections:
        """The 1000 best pairs of an anchor and a class go through NMS, and at most 100 boxes per image are kept."""
        predictions = outputs["head"]
        rows, scores = best_pairs(predictions, views.sizes, 1000, score_threshold)
        return final_boxes(self.stage, predictions, rows, scores, views.sizes, NMS_IOU, 100)


def main(config: Config) -> list[dict[str, float]]:
    """Train, print the losses, and return the losses and figures of every step."""
    accelerator = Accelerator()
    sources = main_first(accelerator, lambda: open_sources(config.data, supervised=False))  # the main one makes the built-in data
    data = micro_batches(config, sources, accelerator.process_index, accelerator.num_processes)
    torch.manual_seed(config.run.seed)
    detector = RetinaNet(build_pyramid(config.backbone, 64, STRIDES, "conv"), len(sources.labeled.class_names))
    training = prepare(config, detector, sources.labeled.objects_per_image(), accelerator)
    training.student.train()

    history, parts = [], config.optim.accumulate
    batches = items_of(steps_loader(data, 0, config.run.steps * parts, config.data.workers))
    for step in range(1, config.run.steps + 1):
        window = Window()
        window.add(*train_step(training, [next(batches).to(accelerator.device) for _ in range(parts)]))
        history.append(window.means(accelerator))  # over the processes
        if step % config.run.log_every == 0:
            shown = [f"{name} {value:.3f}" for name, value in history[-1].items() if "labeled/" in name]
            accelerator.print(f"step {step}:", ", ".join(shown), flush=True)
    accelerator.end_training()
    return history


if __name__ == "__main__":
    config, origins = load_config(Config, Path(__file__).with_suffix(".yaml"), sys.argv[1:])
    check_ranges(config, origins)
    for warning in cross_check(config, origins):
        print(f"warning: {warning}", file=sys.stderr)
    main(config)
