"""What the teacher tells the student about a batch, step by step, and what sparse guidance would have told it (Figs. 3 and 4).

What training does within one step is kept, so that it can be looked at. Nothing here is fast.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torchvision.ops import box_iou

from dtg_core.boxes import SMALLEST_SIDE, clip, paired_iou, project, shortest_side, to_float64
from dtg_core.config import Hull, StageRule
from dtg_core.data.index import CocoIndex
from dtg_core.guidance.dense import dense_labels, teacher_scores
from dtg_core.guidance.inverse_nms import hit
from dtg_core.guidance.sparse import pseudo_labels
from dtg_core.protocol import Detector, Outputs
from dtg_core.structures import (
    Assignment,
    Candidates,
    Clusters,
    Detections,
    PairBatch,
    Proposals,
    Samples,
    Supervision,
    Targets,
    ViewBatch,
)

BOTH, DENSE_ONLY, SPARSE_ONLY, OTHER_CLASS = "both", "dense only", "sparse only", "other class"
SAME_OBJECT = 0.5  # IoU from which two boxes of a class mean the same object


@dataclass(frozen=True)
class Difference:
    """How a sample that either guidance makes a positive is labelled by both."""

    sample: int
    kind: str
    reason: str  # empty for BOTH


@dataclass(frozen=True)
class Explained:
    """Dense and sparse guidance of one stage for a batch of N images. S samples of the student."""

    candidates: Candidates  # teacher's view
    clusters: Clusters
    detections: Detections  # the teacher's final boxes above the lower threshold, in its view
    samples: Samples  # the student's
    dense: Assignment  # before background is drawn at random
    sparse: Assignment
    pseudo: Targets  # pseudo boxes in the student's view
    student_logit: Tensor  # [P] of the class that dense guidance assigns
    teacher_score: Tensor  # [N, S] best score of the teacher's samples that belong to a student's sample; -1: none does
    foreground: Tensor  # [N, S] bool, one of these is a candidate
    num_classes: int
    rule: StageRule
    threshold: Tensor | None  # [C] scores instead of the tau or pseudo_score that the rule's paradigm reads

    def differences(self, image: int) -> list[Difference]:
        """Differences for all samples of an image that are positive by dense or sparse guidance."""
        dense, sparse = (
            {sample: row for row, (at, sample) in enumerate(zip(part.image.tolist(), part.sample.tolist())) if at == image}
            for part in (self.dense, self.sparse)
        )
        found = []
        for sample in sorted(dense.keys() | sparse.keys()):
            if sample not in sparse:
                found.append(Difference(sample, DENSE_ONLY, self._why_not_sparse(image, dense[sample])))
            elif sample not in dense:
                found.append(Difference(sample, SPARSE_ONLY, self._why_not_dense(image, sample)))
            elif self.dense.label[dense[sample]] != self.sparse.label[sparse[sample]]:
                found.append(Difference(sample, OTHER_CLASS, "the pseudo box is of another class"))
            else:
                found.append(Difference(sample, BOTH, ""))
        return found

    def _why_not_sparse(self, image: int, row: int) -> str:
        same = (self.pseudo.image == image) & (self.pseudo.labels == self.dense.label[row])
        boxes = self.pseudo.boxes[same]
        if not len(boxes) or paired_iou(self.dense.box[row], boxes).max() < SAME_OBJECT:
            return f"no pseudo box over {self._limit('sparse', self.rule.pseudo_score)} there"
        if self.sparse.background[image, self.dense.sample[row]]:
            return "too little overlap with the pseudo box"
        return "not drawn, or ignored"

    def _why_not_dense(self, image: int, sample: int) -> str:
        if self.teacher_score[image, sample] < 0:
            return "no teacher sample lands there"
        if not self.foreground[image, sample]:
            subject = "teacher's score" if self.rule.member_tau is None else "its cluster's best score"
            return f"{subject} is under {self._limit('dense', self.rule.tau)}"
        reasons = ["its cluster left the view"]
        if self.rule.member_iou > 0:
            reasons.append(f"the sample overlaps its box by less than {self.rule.member_iou:g}")
        if self.rule.member_share > 0:
            reasons.append(f"the sample overlaps its box by less than {self.rule.member_share:g} of its cluster's best IoU")
        return ", or ".join(reasons)

    def _limit(self, paradigm: str, score: float) -> str:
        return f"{score:g}" if self.threshold is None or self.rule.paradigm != paradigm else "its class' threshold"


@torch.no_grad()
def explain(
    teacher: Detector, student: Detector, pair: PairBatch, rules: Mapping[str, StageRule],
    thresholds: Mapping[str, Tensor] = {},
) -> dict[str, Explained]:
    """Guide the stages of ``rules`` both ways; the teacher runs once for all of them.

    Args:
        teacher, student: in evaluation mode. pair: unlabelled views on their device.
        rules: by stage; both thresholds of a rule are used.
        thresholds: by stage, [C] scores, replacing the threshold of the rule's own paradigm.

    Returns:
        Explained by stage, on the device of the given views.
    """
    outputs = teacher.run(pair.teacher)
    return {name: _explain(teacher, outputs, student, pair, name, rule, thresholds.get(name)) for name, rule in rules.items()}


def _explain(
    teacher: Detector, outputs: Outputs, student: Detector, pair: PairBatch, name: str, rule: StageRule, threshold: Tensor | None
) -> Explained:
    stage, predictions = teacher.stages[name], outputs[name]
    grid = teacher.grid(pair.student.canvas, pair.student.pixels.device)

    dense_limit, sparse_limit = (threshold if rule.paradigm == kind else None for kind in ("dense", "sparse"))
    labels = dense_labels(stage, predictions, grid, pair, rule, dense_limit)
    moved, dense = labels.samples, labels.assignment

    lowest = min(rule.tau, rule.pseudo_score, *(() if threshold is None else threshold.tolist()))
    detections = teacher.detect(outputs, pair.teacher, lowest)
    pseudo = pseudo_labels(detections, rule.pseudo_score if sparse_limit is None else sparse_limit, pair)
    if stage.num_classes == 1:  # an RPN only knows objects
        pseudo = replace(pseudo, labels=torch.zeros_like(pseudo.labels))
    sparse = stage.assign(moved, pseudo, pair.student.sizes, pair.student.seeds)

    proposals = moved if isinstance(moved, Proposals) else None
    learnt = student.run(pair.student, {name: Supervision(assignment=dense, proposals=proposals)})
    logits = learnt[name].logits[dense.rows].float()
    return Explained(
        labels.candidates, labels.clusters, detections, moved, dense, sparse, pseudo, logits,
        teacher_scores(predictions, labels, pair),
        hit(labels.partner, labels.candidates.foreground, moved.num_samples),
        stage.num_classes, rule, threshold,
    )  # fmt: skip


def spearman(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two lists [K] of scores; 1 for the same order. 0 for fewer than two."""
    if len(first) < 2:
        return 0.0
    ranks = [to_float64(scores.argsort().argsort()) for scores in (first, second)]
    return float(1 - 6 * (ranks[0] - ranks[1]).square().sum() / (len(first) * (len(first) ** 2 - 1)))


@dataclass
class Tally:
    """Boxes of one kind, counted against hidden labels."""

    images: int = 0
    boxes: int = 0
    objects: int = 0
    right: int = 0
    overlap: float = 0.0  # sum of the right boxes' IoU

    @property
    def precision(self) -> float:
        return self.right / max(self.boxes, 1)

    @property
    def recall(self) -> float:
        return self.right / max(self.objects, 1)

    def add(self, boxes: Tensor, labels: Tensor, truth: Tensor, classes: Tensor) -> None:
        """One image: boxes [D, 4] of labels [D], best first, and objects [G, 4] of ``classes`` [G].

        As in COCO a box takes the free object of its class with the largest IoU, if that is at least ``SAME_OBJECT``.
        """
        overlap = torch.where(labels.unsqueeze(1) == classes, box_iou(boxes, truth), -1.0)
        for row in range(len(boxes)):
            best, place = overlap[row].max(0) if len(truth) else (overlap.new_tensor(-1.0), overlap.new_tensor(0))
            if best >= SAME_OBJECT:
                self.right += 1
                self.overlap += float(best)
                overlap[:, int(place)] = -1.0
        self.images, self.boxes, self.objects = self.images + 1, self.boxes + len(boxes), self.objects + len(truth)


@dataclass
class Tallies:
    """Boxes of a stage with a score above ``score``, counted batch by batch; a tensor holds [C] scores by class, or [1] of all."""

    score: float | Tensor
    clusters: Tally = field(default_factory=Tally)  # boxes that clusters keep
    final: Tally = field(default_factory=Tally)

    def add(self, explained: Explained, truth: Targets) -> None:
        """One batch, against the objects in the teacher's view."""
        candidates, keep, detections = explained.candidates, explained.clusters.keep, explained.detections
        own = candidates.image[keep], candidates.box[keep], candidates.label[keep], candidates.logit[keep].sigmoid()
        final = detections.image, detections.boxes, detections.labels, detections.scores
        for count, (image, boxes, labels, scores) in ((self.clusters, own), (self.final, final)):
            known = explained.num_classes > 1  # an RPN knows objects only
            for number in range(len(explained.teacher_score)):
                limit = self.score[labels] if isinstance(self.score, Tensor) and len(self.score) > 1 else self.score
                here, there = (image == number) & (scores > limit), truth.image == number
                classes = truth.labels[there]
                count.add(boxes[here], labels[here] * known, truth.boxes[there], classes * known)


def objects_in(views: ViewBatch, truth: CocoIndex, hull: Hull) -> Targets:
    """The objects of ``truth`` in views whose ``image_ids`` are its file names, without those that left their view."""
    row = {name: number for number, name in enumerate(truth.file_names)}
    boxes, labels, image = [], [], []
    for number, name in enumerate(views.image_ids):
        stored, classes = truth.objects(row[name])
        moved = clip(project(torch.from_numpy(stored), views.view_from_image[number].cpu(), hull), views.sizes[number].cpu())
        inside = shortest_side(moved) >= SMALLEST_SIDE
        boxes.append(moved[inside])
        labels.append(torch.from_numpy(classes)[inside])
        image.append(torch.full((len(boxes[-1]),), number))
    return Targets(torch.cat(boxes), torch.cat(labels), torch.cat(image)).to(views.pixels.device)
