"""Dense guidance of one stage: the steps of Fig. 2 (clusters, correspondence, inverse NMS), then the options of its rule."""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dtg_core.config import StageRule
from dtg_core.guidance.clustering import above_tau, cluster_nms, select_candidates
from dtg_core.guidance.consensus import class_shares, cluster_trust, consensus
from dtg_core.guidance.correspondence import correspond, to_student
from dtg_core.guidance.inverse_nms import best_scores, inverse_nms
from dtg_core.guidance.thresholds import count_classes
from dtg_core.protocol import Stage
from dtg_core.stateless import sample_mask
from dtg_core.structures import (
    AnchorGrid,
    Assignment,
    Candidates,
    Clusters,
    DenseGuidance,
    Figures,
    Members,
    PairBatch,
    Predictions,
    Proposals,
    Samples,
    Supervision,
)


@dataclass(frozen=True)
class DenseLabels:
    """What the teacher's dense predictions become on the way to the student, before the options of the rule."""

    candidates: Candidates
    clusters: Clusters
    samples: Samples  # S samples of the student
    partner: Tensor  # [N, A] int64, the student's sample for each of the teacher's, -1: none
    assignment: Assignment  # of the student's samples


@torch.no_grad()
def dense_labels(
    stage: Stage, predictions: Predictions, grid: AnchorGrid, pair: PairBatch, rule: StageRule, threshold: Tensor | None = None
) -> DenseLabels:
    """The three steps of Fig. 2 before the losses: clusters of candidates, correspondence, inverse NMS.

    Args:
        stage, predictions: the teacher's. grid: the student's anchors. pair: both views. rule: how the stage is guided.
        threshold: [C] a score for each class instead of tau.
    """
    candidates = select_candidates(stage, predictions, pair.teacher.sizes, rule, threshold)
    groups = stage.groups(predictions.samples, candidates.rows)
    clusters = cluster_nms(candidates.box, candidates.logit, groups, candidates.image, len(pair.teacher.sizes), rule.nms_iou)
    if rule.member_tau is not None:
        candidates, clusters = above_tau(candidates, clusters, rule, threshold)
    samples, partner = correspond(predictions.samples, grid, pair, rule.min_iou)
    assignment = inverse_nms(candidates, clusters, partner, samples, pair, rule)
    return DenseLabels(candidates, clusters, samples, partner, assignment)


@torch.no_grad()
def dense_supervision(
    stage: Stage, predictions: Predictions, grid: AnchorGrid, pair: PairBatch, rule: StageRule, threshold: Tensor | None = None
) -> tuple[Supervision, Figures]:
    """Dense guidance of one stage, and figures of it by name. Arguments as in ``dense_labels``."""
    labels = dense_labels(stage, predictions, grid, pair, rule, threshold)
    candidates, clusters = labels.candidates, labels.clusters
    assignment = replace(
        labels.assignment, dense=_with_options(labels, predictions, pair, rule), background=_background(labels, pair, rule)
    )
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


@torch.no_grad()
def teacher_scores(predictions: Predictions, labels: DenseLabels, pair: PairBatch) -> Tensor:
    """[N, S] the teacher's best score for each of the student's samples; -1 where none of its samples corresponds."""
    usable = predictions.samples.usable(pair.teacher.sizes)
    scores = torch.where(usable, predictions.logits.amax(2).float().sigmoid(), -1.0)
    return best_scores(scores, labels.partner, labels.samples.num_samples)


def _with_options(labels: DenseLabels, predictions: Predictions, pair: PairBatch, rule: StageRule) -> DenseGuidance:
    """The class targets (A27) that the rule asks for, and its options that are not in the paper."""
    dense, candidates, clusters = labels.assignment.dense, labels.candidates, labels.clusters
    assert dense is not None
    members = Members(candidates.image, candidates.box, candidates.logit.sigmoid(), clusters.cluster, len(pair.teacher.sizes))
    if rule.quality == "one":
        dense = replace(dense, quality=torch.ones_like(dense.teacher_logit))
    elif rule.quality == "teacher":
        dense = replace(dense, quality=dense.teacher_logit.sigmoid())
    elif rule.quality == "consensus":  # the student's boxes decide, see ``consensus_quality``
        dense = replace(dense, members=replace(members, box=to_student(members.box, candidates.image, pair)))
    if rule.consensus_rank is not None:
        agreed = consensus(members.box, members.image, members.cluster, members)
        dense = replace(dense, rank_target=agreed[dense.candidate] / rule.consensus_rank)
    if rule.cluster_trust:
        dense = replace(dense, trust=cluster_trust(members, clusters.num_clusters))
    if rule.share_classes and predictions.logits.shape[2] > 1:
        scores = predictions.logits[candidates.image, candidates.sample].float().sigmoid()
        dense = replace(dense, shares=class_shares(scores, clusters.cluster, clusters.num_clusters)[dense.candidate])
    if rule.soft_background:
        dense = replace(dense, background_weight=1 - teacher_scores(predictions, labels, pair))
    return dense


def _background(labels: DenseLabels, pair: PairBatch, rule: StageRule) -> Tensor:
    """[N, S] bool, the student's samples that are background: all of the teacher's, or a random draw of them (A8)."""
    assignment = labels.assignment
    background = assignment.background
    if rule.background_samples is None:
        return background
    positives = torch.zeros(len(background), dtype=torch.int64, device=background.device)
    positives = positives.index_add(0, assignment.image, torch.ones_like(assignment.image))
    # Never less than the positives, as in the RPN's own sampler: otherwise more candidates would mean less background, hence
    # higher scores, hence more candidates.
    limit = torch.maximum(rule.background_samples - positives, positives)
    most = max(rule.background_samples, len(assignment.image))
    return sample_mask(background, limit, pair.student.seeds, most, labels.samples.identity)


def _used(proposals: Proposals, assignment: Assignment) -> Proposals:
    """The proposals without those that nothing is learnt from, so that no time is spent on them."""
    used = assignment.background.index_put((assignment.image, assignment.sample), proposals.valid.new_ones(()))
    return replace(proposals, valid=used)
