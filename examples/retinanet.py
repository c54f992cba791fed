"""How to write a detector of your own: RetinaNet (Lin et al., 2017) under dense teacher guidance.

    python examples/retinanet.py --steps 200

The core asks for two things, both described in ``dtg_core/protocol.py``, and knows nothing else of RetinaNet:

    RetinaNetStage   how its predictions are read, assigned and judged
    RetinaNet        a network with that stage: features in, predictions and final boxes out

Legend: N images, A anchors of an image, C classes, G objects of a batch, P assigned anchors, M any rows (image, anchor, class).
"""
from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import l1_loss
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou, sigmoid_focal_loss

from dtg_core.anchors import anchor_grid
from dtg_core.boxes import clip, grouped_nms, rank_in_group
from dtg_core.config import BackboneConfig, Config, DataConfig, GuidanceConfig, OptimConfig, RunConfig, StageRule, ViewsConfig
from dtg_core.data.plan import StepData, steps_loader
from dtg_core.data.sources import open_sources
from dtg_core.engine.loop import make_optimizer, train_step
from dtg_core.models.backbone import Pyramid, build_pyramid
from dtg_core.models.student import StudentModule
from dtg_core.models.teacher import make_teacher
from dtg_core.protocol import Outputs, Stage
from dtg_core.structures import (
    AnchorGrid, Assignment, Detections, Predictions, Samples, Supervision, Targets, Unreduced, ViewBatch,
)

CODER = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
STRIDES, SCALE, RATIOS, CHANNELS = (8, 16, 32), 4.0, (0.5, 1.0, 2.0), 64  # anchors of 32, 64 and 128 px, three at each location
POSITIVE_IOU, NEGATIVE_IOU, NMS_IOU = 0.5, 0.4, 0.5


class RetinaNetStage:
    """Satisfies ``dtg_core.protocol.Stage``: what the core has to know of the head."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def groups(self, samples: Samples, sample: Tensor, label: Tensor) -> Tensor:
        """[M] NMS group: boxes of different classes do not suppress each other."""
        return label

    def num_groups(self, samples: Samples) -> int:
        return self.num_classes

    def decode(self, samples: Samples, predictions: Predictions, image: Tensor, sample: Tensor, label: Tensor) -> Tensor:
        """[M, 4] boxes: the anchors moved by the predicted deltas, which all classes share."""
        return CODER.decode_single(predictions.raw[image, sample].float(), samples.take(image, sample))

    def assign(self, samples: Samples, targets: Targets, sizes: Tensor, seeds: Tensor) -> Assignment:
        """An anchor takes the object that it overlaps most, and an object's best anchor is never left without it."""
        assert isinstance(samples, AnchorGrid)
        usable = samples.usable(sizes)  # [N, A]
        iou = box_iou(targets.boxes, samples.anchors) * usable[targets.image]  # [G, A]
        image = targets.image.unsqueeze(1).expand_as(iou)
        best = torch.zeros_like(usable, dtype=iou.dtype).scatter_reduce(0, image, iou, "amax")  # [N, A] over an image's objects
        taken = (iou >= POSITIVE_IOU) | (iou == iou.amax(1, keepdim=True))
        row, sample = (taken & (iou == best[targets.image]) & (iou > 0)).nonzero().unbind(1)  # sync: the number of positives
        background = (usable & (best < NEGATIVE_IOU)).index_put((targets.image[row], sample), usable.new_zeros(()))
        return Assignment(targets.image[row], sample, targets.labels[row], targets.boxes[row], background)

    def losses(self, samples: Samples, predictions: Predictions, assignment: Assignment) -> Unreduced:
        """Focal loss and L1 of the deltas, for each anchor on its own: whoever calls decides how to weigh and sum them."""
        image, sample, dense = assignment.image, assignment.sample, assignment.dense
        logits = predictions.logits[image, sample].float()  # [P, C]
        quality = dense.quality if dense is not None and dense.quality is not None else logits.new_ones(len(image))
        targets = torch.zeros_like(logits).scatter(1, assignment.label.unsqueeze(1), quality.unsqueeze(1))
        everywhere = predictions.logits.float()
        background = sigmoid_focal_loss(everywhere, torch.zeros_like(everywhere)).sum(2)  # [N, A]
        deltas = CODER.encode_single(assignment.box, samples.take(image, sample))
        box = l1_loss(predictions.raw[image, sample].float(), deltas, reduction="none").sum(1)
        count = torch.ones_like(box).sum()
        return Unreduced(
            classification=sigmoid_focal_loss(logits, targets).sum(1),
            box=box,
            background=background * assignment.background,
            box_weight=torch.ones_like(box),
            classification_count=count,
            box_count=count,
        )


class RetinaNet(nn.Module):
    """Satisfies ``dtg_core.protocol.Detector``: a pyramid, torchvision's head, and one stage."""

    def __init__(self, pyramid: Pyramid, num_classes: int) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.head = RetinaNetHead(pyramid.channels, len(RATIOS), num_classes)
        self.stages: Mapping[str, Stage] = {"head": RetinaNetStage(num_classes)}

    def grid(self, canvas: tuple[int, int], device: torch.device) -> AnchorGrid:
        return anchor_grid(canvas, self.pyramid.strides, SCALE, RATIOS, device)

    def run(self, views: ViewBatch, supervision: Mapping[str, Supervision] | None = None) -> Outputs:
        """Every anchor is a sample, so supervision chooses nothing here."""
        found = self.head(self.pyramid(views))
        return {"head": (self.grid(views.canvas, views.pixels.device), Predictions(found["cls_logits"], found["bbox_regression"]))}

    @torch.no_grad()
    def detect(self, outputs: Outputs, views: ViewBatch, score_threshold: float) -> Detections:
        """The best 1000 pairs of an anchor and a class of each image, after NMS, and the best 100 of those."""
        (grid, predictions), stage = outputs["head"], self.stages["head"]
        scores = (predictions.logits.float().sigmoid() * grid.usable(views.sizes).unsqueeze(2)).flatten(1)  # [N, A * C]
        best, pair = scores.topk(min(1000, scores.shape[1]), 1)
        image, column = (best > score_threshold).nonzero().unbind(1)  # sync: the number of scores over the threshold
        score, sample, label = best[image, column], pair[image, column] // stage.num_classes, pair[image, column] % stage.num_classes
        boxes = clip(stage.decode(grid, predictions, image, sample, label), views.sizes[image])
        keep = grouped_nms(boxes, score, image * stage.num_classes + label, NMS_IOU)
        keep = keep[image[keep].argsort(stable=True)]  # image by image, best first
        keep = keep[(rank_in_group(image[keep], len(scores)) < 100).nonzero().squeeze(1)]  # sync: the number of boxes
        return Detections(boxes[keep], score[keep], label[keep], image[keep])


def main(config: Config) -> list[dict[str, float]]:
    """Train on the embedded shapes with dense guidance; gives the losses and figures of each step."""
    accelerator, sources = Accelerator(), open_sources(config.data, supervised=False)
    torch.manual_seed(config.run.seed)
    detector = RetinaNet(build_pyramid(config.backbone, CHANNELS, STRIDES, "conv"), len(sources.labeled.class_names))
    teacher, student = make_teacher(detector).to(accelerator.device), StudentModule(detector, config.guidance.stages).train()
    student, optimizer = accelerator.prepare(student, make_optimizer(student, config.optim))
    data = StepData(sources.labeled, sources.unlabeled, config.views, config.run.seed, config.data.labeled_per_device,
                    config.data.unlabeled_per_device, unlabeled_from=config.guidance.start_step)
    history = []
    for batch in steps_loader(data, 0, config.run.steps, config.data.workers):
        figures = train_step(student, teacher, optimizer, batch.to(accelerator.device), config, accelerator)
        history.append({name: float(value) for name, value in figures.items()})
        if (batch.step + 1) % config.run.log_every == 0:
            shown = (f"{name} {value:.3f}" for name, value in history[-1].items() if "/" in name)
            print(f"step {batch.step + 1}:", ", ".join(shown), flush=True)
    return history


def settings(steps: int) -> Config:
    """Small views, labelled images alone for the first half of the steps, then guidance. tau suits a teacher this young."""
    return Config(
        backbone=BackboneConfig("tf_efficientnet_lite0"),
        data=DataConfig(labeled_per_device=4, unlabeled_per_device=4),
        views=ViewsConfig(short_edge=(160, 160), long_edge=160, test_short_edge=160, geometric=0.0),
        guidance=GuidanceConfig(1.0, steps // 2, steps // 4, {"head": StageRule(tau=0.2, nms_iou=NMS_IOU, rank_weight=1.0)}),
        optim=OptimConfig("adamw", lr=5e-4, warmup_steps=10, milestones=(), clip_norm=10.0, ema=0.99),
        run=RunConfig(steps=steps, log_every=max(1, steps // 20)),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train RetinaNet on the embedded shapes with dense teacher guidance.")
    parser.add_argument("--steps", type=int, default=200)
    main(settings(parser.parse_args().steps))
