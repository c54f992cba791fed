"""Paradigms: how teacher predictions become supervision for a stage of the student.

``dense``: correspondence, clusters, inverse NMS (the paper's dense-to-dense). ``sparse``: pseudo boxes (sparse-to-dense).
``none``: the stage learns nothing from unlabelled images. Each stage has its own, so Tables 2(a) and 2(c) are just settings.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from dtg_core.config import StageRule
from dtg_core.guidance.clustering import cluster_nms, select_candidates
from dtg_core.guidance.consensus import class_shares, cluster_trust, consensus
from dtg_core.guidance.correspondence import correspond, to_student
from dtg_core.guidance.inverse_nms import best_scores, inverse_nms
from dtg_core.guidance.pseudo_labels import pseudo_labels
from dtg_core.guidance.thresholds import LOWEST, count_classes
from dtg_core.protocol import Detector, Stage
from dtg_core.stateless import sample_mask
from dtg_core.structures import (
    AnchorGrid,
    Assignment,
    Candidates,
    Clusters,
    DenseGuidance,
    Detections,
    Members,
    PairBatch,
    Predictions,
    Proposals,
    Samples,
    Supervision,
)

#: All stages use their fixed tau and pseudo_score.
NO_THRESHOLDS: Mapping[str, Tensor] = MappingProxyType({})
#: Guidance figures for the log, by name; scalar tensors where only the device knows them.
Figures = dict[str, Tensor | float]


@torch.no_grad()
def teach(
    teacher: Detector, pair: PairBatch, rules: Mapping[str, StageRule],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    thresholds: Mapping[str, Tensor] = NO_THRESHOLDS,
) -> tuple[dict[str, Supervision], Figures]:
    """The teacher's pass over its weak views, and what each stage of the student learns from it.

    Args:
        teacher: detector in evaluation mode. pair: weak and strong views. rules: how each stage is guided, by stage name.
        autocast: makes a context with the networks' precision; guidance is float32.
        thresholds: per-class scores [C] of the stages that have them, see ``Thresholds``.

    Returns:
        (supervision of the guided stages, in the student's view; figures ``guidance/<stage>/<name>``).
    """
    guided = {name: rules[name] for name in teacher.stages if rules[name].paradigm != "none"}
    sparse = [name for name, rule in guided.items() if rule.paradigm == "sparse"]
    with autocast():  # final boxes need all stages
        outputs = teacher.run(pair.teacher, None if sparse else dict.fromkeys(guided, Supervision()))
    grid = teacher.grid(pair.student.canvas, pair.student.pixels.device)
    detections = None
    if sparse:
        lowest = min(rules[name].pseudo_score for name in sparse)
        lowest = min(lowest, LOWEST) if thresholds.keys() & sparse else lowest  # reading the thresholds would wait
        detections = teacher.detect(outputs, pair.teacher, lowest)
    supervision: dict[str, Supervision] = {}
    figures: Figures = {}
    for name, rule in guided.items():
        stage, predictions, threshold = teacher.stages[name], outputs[name], thresholds.get(name)
        if rule.paradigm == "dense":
            supervision[name], told = _dense(stage, predictions, grid, pair, rule, threshold)
        else:
            assert detections is not None
            supervision[name], told = _sparse(detections, predictions.samples, grid, pair, rule, threshold)
        figures |= {f"guidance/{name}/{key}": value for key, value in told.items()}
    return supervision, figures


@dataclass(frozen=True)
class DenseLabels:
    """What the teacher's dense predictions become on the way to the student, before class targets and weights."""

    candidates: Candidates
    clusters: Clusters
    samples: Samples  # S samples of the student
    row: Tensor  # [N, A] int64, the student's sample for each of the teacher's, -1: none
    assignment: Assignment  # of the student's samples


@torch.no_grad()
def dense_labels(
    stage: Stage, predictions: Predictions, grid: AnchorGrid, pair: PairBatch, rule: StageRule, threshold: Tensor | None = None
) -> DenseLabels:
    """The three steps of Fig. 2 before the losses: clusters of candidates, correspondence, inverse NMS.

    Args:
        stage, predictions: the teacher's. grid: the student's anchors. pair: both views. rule: see ``teach``.
        threshold: [C] a score for each class instead of tau.
    """
    candidates = select_candidates(stage, predictions, pair.teacher.sizes, rule, threshold)
    groups = stage.groups(predictions.samples, candidates.rows)
    clusters = cluster_nms(candidates.box, candidates.logit, groups, rule.nms_iou)
    moved, row = correspond(predictions.samples, grid, pair, rule.min_iou)
    assignment = inverse_nms(candidates, clusters, row, moved, pair, rule.member_iou, rule.collisions)
    return DenseLabels(candidates, clusters, moved, row, assignment)


@torch.no_grad()
def teacher_scores(predictions: Predictions, labels: DenseLabels, pair: PairBatch) -> Tensor:
    """[N, S] the teacher's best score for each of the student's samples; -1 where none of its samples corresponds."""
    usable = predictions.samples.usable(pair.teacher.sizes)
    scores = torch.where(usable, predictions.logits.amax(2).float().sigmoid(), -1.0)
    return best_scores(scores, labels.row, labels.samples.num_samples)


def _dense(
    stage: Stage, predictions: Predictions, grid: AnchorGrid, pair: PairBatch, rule: StageRule, threshold: Tensor | None
) -> tuple[Supervision, Figures]:
    """Dense guidance of one stage with the options of its rule."""
    labels = dense_labels(stage, predictions, grid, pair, rule, threshold)
    candidates, clusters = labels.candidates, labels.clusters
    assignment = _with_options(labels.assignment, labels.samples, pair, rule)
    assert assignment.dense is not None
    dense = _with_consensus(assignment.dense, candidates, clusters, pair, rule)
    if rule.share_classes and stage.num_classes > 1:
        scores = predictions.logits[candidates.image, candidates.sample].float().sigmoid()
        dense = replace(dense, shares=class_shares(scores, clusters.cluster, clusters.num_clusters)[dense.candidate])
    if rule.soft_background:
        dense = replace(dense, background_weight=1 - teacher_scores(predictions, labels, pair))
    assignment = replace(assignment, dense=dense)
    proposals = _used(labels.samples, assignment) if isinstance(labels.samples, Proposals) else None

    images = pair.student.sizes.shape[0]
    found, matched = candidates.image.shape[0], assignment.image.shape[0]
    figures: Figures = {
        "candidates": found / images,
        "clusters": clusters.num_clusters / images,
        "cluster_size": found / max(clusters.num_clusters, 1),
        "matched": matched / max(found, 1),
        "background": assignment.background.sum() / images,
    }
    if stage.num_classes > 1:  # what sparse guidance would keep of the clusters; an RPN's are no final boxes
        figures["pseudo_boxes"] = (candidates.logit[clusters.keep].sigmoid() > rule.pseudo_score).sum() / images
    kept = None if threshold is None else count_classes(candidates.label[clusters.keep], len(threshold))
    return Supervision(assignment=assignment, proposals=proposals, found=kept), figures


def _sparse(
    detections: Detections, samples: Samples, grid: AnchorGrid, pair: PairBatch, rule: StageRule, threshold: Tensor | None
) -> tuple[Supervision, Figures]:
    """Sparse guidance of one stage: the teacher's ``detections`` over the threshold, for the student's own assignment."""
    targets = pseudo_labels(detections, rule.pseudo_score if threshold is None else threshold, pair)
    found = None
    if threshold is not None:
        over = detections.scores > threshold[detections.labels]
        found = count_classes(detections.labels, len(threshold), over)
    proposals = _shared_proposals(samples, grid, pair, rule)
    supervision = Supervision(targets, proposals=proposals, add_truth=False, found=found)
    return supervision, {"pseudo_boxes": targets.boxes.shape[0] / len(pair.student.sizes)}


def _with_options(assignment: Assignment, samples: Samples, pair: PairBatch, rule: StageRule) -> Assignment:
    """The class targets (A27) and the random background (A8) that the rule asks for; ``samples`` are the student's."""
    dense = assignment.dense
    assert dense is not None
    if rule.quality == "one":
        dense = replace(dense, quality=torch.ones_like(dense.teacher_logit))
    elif rule.quality == "teacher":
        dense = replace(dense, quality=dense.teacher_logit.sigmoid())
    background = assignment.background
    if rule.background_samples is not None:
        positives = torch.zeros(len(background), dtype=torch.int64, device=background.device)
        positives = positives.index_add(0, assignment.image, torch.ones_like(assignment.image))
        # Never less than the positives, as in the RPN's own sampler: otherwise more candidates would mean less background, hence
        # higher scores, hence more candidates.
        limit = torch.maximum(rule.background_samples - positives, positives)
        most = max(rule.background_samples, len(assignment.image))
        background = sample_mask(background, limit, pair.student.seeds, most, samples.identity)
    return replace(assignment, background=background, dense=dense)


def _with_consensus(
    dense: DenseGuidance, candidates: Candidates, clusters: Clusters, pair: PairBatch, rule: StageRule
) -> DenseGuidance:
    """Apply the rule's options that use the agreement between a cluster's members."""
    members = Members(candidates.box, candidates.logit.sigmoid(), clusters.cluster)
    if rule.quality == "consensus":
        dense = replace(dense, members=replace(members, box=to_student(members.box, candidates.image, pair)))
    if rule.cluster_trust:
        dense = replace(dense, trust=cluster_trust(members, clusters.num_clusters))
    if rule.consensus_rank is not None:
        agreed = consensus(members.box, members.cluster, members)
        dense = replace(dense, rank_target=agreed[dense.candidate] / rule.consensus_rank)
    return dense


def _used(proposals: Proposals, assignment: Assignment) -> Proposals:
    """The proposals without those that nothing is learnt from, so that no time is spent on them."""
    used = assignment.background.index_put((assignment.image, assignment.sample), proposals.valid.new_ones(()))
    return replace(proposals, valid=used)


def _shared_proposals(
    samples: Samples, grid: AnchorGrid, pair: PairBatch, rule: StageRule
) -> Proposals | None:
    """The teacher's proposals in the student's view, for a sparse R-CNN that uses them (A30)."""
    if not isinstance(samples, Proposals) or rule.proposals == "student":
        return None
    moved, _ = correspond(samples, grid, pair, rule.min_iou)
    assert isinstance(moved, Proposals)
    return moved
