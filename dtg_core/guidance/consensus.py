"""Consensus: how far the members of a cluster agree on their box. Not in the paper; for weak teachers, whose scores are noise.

A box that many likely boxes of its cluster overlap well is likely to be right, whatever its own score. Only dense predictions
show this: after NMS there is nothing left to agree with.
"""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dtg_core.boxes import image_slices, paired_iou, row_blocks
from dtg_core.protocol import Stage
from dtg_core.structures import Assignment, Members, Predictions


def consensus(boxes: Tensor, image: Tensor, cluster: Tensor, members: Members) -> Tensor:
    """[P] score-weighted mean IoU of boxes [P, 4] with all members of their clusters [P]; ``image`` [P] is ascending."""
    return _mean_iou(boxes, image, cluster, members, with_itself=True)


def peer_consensus(members: Members) -> Tensor:
    """[M] score-weighted mean IoU of each member with the others of its cluster; 0 for one that is alone."""
    return _mean_iou(members.box, members.image, members.cluster, members, with_itself=False)


def cluster_trust(members: Members, num_clusters: int) -> Tensor:
    """[J] mean of ``peer_consensus`` over each cluster; 0 for a cluster of one, which no other sample confirms."""
    zero = members.score.new_zeros(num_clusters)
    size = zero.index_add(0, members.cluster, torch.ones_like(members.score))
    return zero.index_add(0, members.cluster, peer_consensus(members)) / size.clamp(min=1)


def class_shares(scores: Tensor, cluster: Tensor, num_clusters: int) -> Tensor:
    """[M, C] the mean scores [M, C] of each member's cluster [M], over their sum: how likely it thinks each class, if any."""
    sums = scores.new_zeros(num_clusters, scores.shape[1]).index_add(0, cluster, scores)
    return (sums / sums.sum(1, keepdim=True).clamp(min=1e-12))[cluster]


@torch.no_grad()
def consensus_quality(stage: Stage, predictions: Predictions, assignment: Assignment) -> Assignment:
    """The student's class targets: the consensus of its own predicted boxes with the teacher's members."""
    dense = assignment.dense
    assert dense is not None
    assert dense.members is not None
    boxes = stage.decode(predictions, assignment.rows)
    return replace(assignment, dense=replace(dense, quality=consensus(boxes, assignment.image, dense.cluster, dense.members)))


def _mean_iou(boxes: Tensor, image: Tensor, cluster: Tensor, members: Members, with_itself: bool) -> Tensor:
    """[P] score-weighted mean IoU of boxes [P, 4] with the members of their clusters [P]; 0 where there is none.

    ``with_itself`` False: the boxes are the members, and none counts for itself. Memory: a few [P, M] matrices, in blocks.
    """
    parts = []
    for own, theirs in image_slices(members.images, image, members.image):
        box, score = members.box[theirs], members.score[theirs]
        for rows in row_blocks(len(boxes[own]), len(box)):
            weight = score * (cluster[own][rows].unsqueeze(1) == members.cluster[theirs])
            if not with_itself:
                weight.diagonal(rows.start).zero_()
            overlap = paired_iou(boxes[own][rows].unsqueeze(1), box)
            parts.append((weight * overlap).sum(1) / weight.sum(1).clamp(min=1e-6))
    return torch.cat(parts)
