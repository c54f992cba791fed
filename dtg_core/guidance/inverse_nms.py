"""Inverse NMS Clustering (Sec. 3.2): the teacher's clusters label the student's samples.

Each member of cluster j gives its student sample the cluster's class c (Eq. 2) and the kept box b_k, moved into the student's
view (b_k' of Eq. 3). Teacher samples without a score above tau pass on "background".
"""
from __future__ import annotations

import torch
from torch import Tensor

from dtg_core.boxes import SMALLEST_SIDE, paired_iou, shortest_side
from dtg_core.config import StageRule
from dtg_core.guidance.correspondence import to_student
from dtg_core.structures import Assignment, Candidates, Clusters, DenseGuidance, PairBatch, Samples


def inverse_nms(
    candidates: Candidates, clusters: Clusters, partner: Tensor, samples: Samples, pair: PairBatch, rule: StageRule
) -> Assignment:
    """Turn the teacher's clusters and the correspondence into labels, box targets and background for the student.

    When several teacher samples share one student sample, the candidate with the highest score wins, and a candidate beats
    background (A6), so that a sample has one label. A cluster whose target leaves the view is dropped with all its members (A21).

    Args:
        candidates, clusters: the teacher's, in its view.
        partner: [N, A] int64, student sample of each teacher sample, -1: none.
        samples: the student's.
        pair: both views.
        rule: what may teach. With ``member_iou`` and ``member_share``, which are not in the paper, a member whose student sample
            fits its target badly does not: the sample is ignored, or background. With collisions "all" a student sample
            learns from each teacher sample that shares it, candidate or background.

    Returns:
        Assignment of the student's samples; its ``dense`` part holds the clusters for Eqs. 2 to 6.
    """
    image, keep, num_samples = candidates.image, clusters.keep, samples.num_samples
    target = to_student(candidates.box[keep], image[keep], pair)  # [J, 4]
    in_view = shortest_side(target) >= SMALLEST_SIDE

    sample = partner[image, candidates.sample]  # the student's
    alive = (sample >= 0) & in_view[clusters.cluster]
    foreground, background = candidates.foreground, candidates.background
    if rule.member_iou > 0 or rule.member_share > 0:
        iou = torch.where(alive, paired_iou(samples.take(image, sample.clamp(min=0)), target[clusters.cluster]), 0.0)
        best = iou.new_zeros(clusters.num_clusters).scatter_reduce(0, clusters.cluster, iou, "amax")
        poor = alive & (iou < rule.member_share * best[clusters.cluster])
        places = (image, candidates.sample)
        foreground, background = foreground.index_put(places, ~poor), background.index_put(places, poor)
        alive = alive & ~poor & (iou >= rule.member_iou)
    if rule.collisions == "best":
        alive &= _is_best(image * num_samples + sample, alive, candidates.logit, partner.shape[0] * num_samples)
    chosen = alive.nonzero().squeeze(1)  # sync: the number of assigned samples.

    cluster, num_clusters = clusters.cluster[chosen], clusters.num_clusters
    members = torch.zeros(num_clusters, device=partner.device).index_add(0, cluster, torch.ones_like(cluster, dtype=torch.float32))
    dense = DenseGuidance(
        cluster=cluster,
        num_clusters=num_clusters,
        candidate=chosen,
        teacher_logit=candidates.logit[chosen],
        weight=1 / members[cluster],
        live_clusters=(members > 0).sum(),
    )
    background = hit(partner, background, num_samples)
    if rule.collisions == "best":  # "clear background" only reaches student samples that no candidate points to
        background &= ~hit(partner, foreground, num_samples)
    return Assignment(image[chosen], sample[chosen], candidates.label[chosen], target[cluster], background, dense)


def best_scores(scores: Tensor, partner: Tensor, num_samples: int) -> Tensor:
    """[N, S] highest score of the teacher samples that correspond to each student sample; -1 where none does.

    Args:
        scores: [N, A] the teacher's, -1 where a sample is not usable. partner: [N, A] as in ``inverse_nms``.
        num_samples: S, how many samples an image has in the student's view.
    """
    best = scores.new_full((len(partner), num_samples + 1), -1.0)
    return best.scatter_reduce(1, torch.where(partner >= 0, partner, num_samples), scores, "amax")[:, :num_samples]


def hit(partner: Tensor, source: Tensor, num_samples: int) -> Tensor:
    """[N, S] bool: the student samples that the teacher samples of the mask ``source`` [N, A] correspond to."""
    target = torch.where(source & (partner >= 0), partner, num_samples)
    found = torch.zeros(partner.shape[0], num_samples + 1, dtype=torch.bool, device=partner.device)
    return found.scatter_(1, target, True)[:, :num_samples]


def _is_best(place: Tensor, alive: Tensor, logit: Tensor, num_places: int) -> Tensor:
    """[M] bool: the row has the highest logit of all rows that are alive at its place (ties: lower index)."""
    order = torch.argsort(logit, descending=True, stable=True)
    ranks = torch.arange(len(order), dtype=torch.int32, device=order.device)  # not every device has minima of int64
    rank = torch.empty_like(ranks).scatter_(0, order, ranks)
    place = torch.where(alive, place, num_places)  # an extra place collects the others
    first = ranks.new_full((num_places + 1,), len(order)).scatter_reduce(0, place, rank, "amin")
    return first[place] == rank
