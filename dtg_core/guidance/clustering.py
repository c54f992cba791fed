"""From dense teacher predictions to clusters: the score threshold tau, then NMS seen as a grouping (Sec. 3.2).

NMS keeps one candidate for each object it believes in, and every other candidate is suppressed by one that is kept. So each
kept one names a cluster, and "suppressed by" is membership.
"""
from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from dtg_core.boxes import clip, image_slices, lacks_float64, row_blocks, spread_groups
from dtg_core.config import StageRule
from dtg_core.protocol import Stage
from dtg_core.structures import Candidates, Clusters, Predictions, Rows


def select_candidates(
    stage: Stage, predictions: Predictions, sizes: Tensor, rule: StageRule, threshold: Tensor | None = None
) -> Candidates:
    """Teacher samples with a score above tau, or ``member_tau``, if that is less. A sample is a candidate for its best class only
    (A17): the sigmoids of other classes would make a second cluster of the same object.

    Scores are compared as logits, so no sigmoid over all samples is needed.

    Args:
        stage, predictions: the teacher's. sizes: [N, 2] of its views. rule: tau and the limits.
        threshold: [C] a score for each class instead of tau.
    """
    usable = predictions.samples.usable(sizes)
    best, label = predictions.logits.max(2)  # [N, A]
    best = torch.where(usable, best, -torch.inf)
    limit = _limit(rule, threshold, label)
    if rule.member_tau is not None:
        limit = limit.clamp(max=logit(rule.member_tau))
    foreground, background = best > limit, usable & (best <= limit)  # a score that is not a number is neither
    if rule.background_tau is not None:
        background &= best <= logit(rule.background_tau)
    chosen = foreground.nonzero()  # sync: the number of candidates.
    if len(chosen) > rule.max_candidates:  # only then can an image have too many; sync: once more
        chosen = (foreground & _first(best.where(foreground, -torch.inf), rule.max_candidates)).nonzero()
    image, sample = chosen.unbind(1)
    rows = Rows(image, sample, label[image, sample])
    box = clip(stage.decode(predictions, rows), sizes[image])
    return Candidates(*rows, predictions.logits[rows].float(), box, foreground, background)


def above_tau(
    candidates: Candidates, clusters: Clusters, rule: StageRule, threshold: Tensor | None = None
) -> tuple[Candidates, Clusters]:
    """Without the clusters whose kept box has no score above tau; their samples are background. For ``member_tau``.

    NMS goes by scores, so a candidate below tau takes no member away from a cluster that stays.

    Args:
        candidates, clusters: of all scores above ``member_tau``. rule, threshold: as in ``select_candidates``.
    """
    sure = candidates.logit[clusters.keep] > _limit(rule, threshold, candidates.label[clusters.keep])
    member = sure[clusters.cluster]
    clear = ~member  # background
    if rule.background_tau is not None:
        clear &= candidates.logit <= logit(rule.background_tau)
    places = (candidates.image, candidates.sample)
    foreground, background = candidates.foreground.index_put(places, member), candidates.background.index_put(places, clear)
    rows, numbers = _trues(member, sure)
    cluster, keep = (sure.cumsum(0) - 1)[clusters.cluster[rows]], (member.cumsum(0) - 1)[clusters.keep[numbers]]
    left = candidates.image[rows], candidates.sample[rows], candidates.label[rows], candidates.logit[rows], candidates.box[rows]
    return Candidates(*left, foreground, background), Clusters(cluster, keep)


def cluster_nms(boxes: Tensor, scores: Tensor, groups: Tensor, image: Tensor, images: int, iou_threshold: float) -> Clusters:
    """NMS within each group, and for each suppressed box the kept one that suppresses it.

    A box is suppressed by a better kept box of its group when their IoU is greater than the threshold; it belongs to the first
    of them in score order (equal scores: lower index first), as in the greedy loop. Overlaps are computed in float64, on the
    CPU if the boxes' device has none.

    Args:
        boxes: [M, 4]. scores: [M], any increasing function of the score will do.
        groups: [M] int64, of one image each. image: [M] int64, ascending, of N = ``images``.

    Returns:
        Clusters with ``cluster`` [M] and ``keep`` [J], best score first. Empty input gives no cluster.
    """
    if lacks_float64(boxes.device):
        found = cluster_nms(boxes.cpu(), scores.cpu(), groups.cpu(), image.cpu(), images, iou_threshold)
        return Clusters(found.cluster.to(boxes.device), found.keep.to(boxes.device))
    slices = image_slices(images, image)
    parts = [_clusters(boxes[rows], scores[rows], groups[rows], iou_threshold) for (rows,) in slices]
    if len(parts) == 1:
        return parts[0]
    before = accumulate((part.num_clusters for part in parts), initial=0)
    cluster = torch.cat([part.cluster + number for part, number in zip(parts, before)])
    keep = torch.cat([part.keep + rows.start for part, (rows,) in zip(parts, slices)])
    order = torch.argsort(scores[keep], descending=True, stable=True)  # over the images
    return Clusters(torch.argsort(order)[cluster], keep[order])


def _clusters(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Clusters:
    """``cluster_nms`` of all boxes at once."""
    if len(boxes) == 0:
        empty = torch.zeros(0, dtype=torch.int64, device=boxes.device)
        return Clusters(empty, empty)
    order = torch.argsort(scores, descending=True, stable=True)
    boxes, groups = spread_groups(boxes, groups)[order], groups[order]
    position = torch.arange(len(order), device=order.device)
    # sync: NMS returns one index per surviving box; descending ranks replace the sorted scores.
    kept = nms(boxes, -position.double(), iou_threshold)
    parts = []
    for rows in row_blocks(len(boxes), len(kept)):
        overlap = box_iou(boxes[rows], boxes[kept])  # [B, J]
        better = (groups[rows].unsqueeze(1) == groups[kept]) & (kept <= position[rows].unsqueeze(1))
        overlap = torch.where(better, overlap.nan_to_num(), -1.0)
        first = (overlap > iou_threshold).max(1)  # the first True of each row
        # If rounding differs between the kernels, no suppressor may be found: take the nearest box.
        parts.append(torch.where(first.values, first.indices, overlap.argmax(1)))
    cluster = torch.cat(parts)
    cluster[kept] = torch.arange(len(kept), device=order.device)  # the IoU of an empty box with itself is not a number
    return Clusters(torch.empty_like(cluster).scatter_(0, order, cluster), order[kept])


def _limit(rule: StageRule, threshold: Tensor | None, label: Tensor) -> Tensor:
    """The logit of tau, or of the ``threshold`` [C] of each ``label``; of the shape of ``label``."""
    if threshold is None:
        return torch.full(label.shape, logit(rule.tau), device=label.device)
    return threshold.logit()[label]


def _trues(*masks: Tensor) -> list[Tensor]:
    """The indices, ascending, that are True in each 1-d mask; ``nonzero`` would wait for the device once for each."""
    counts = torch.stack([mask.sum() for mask in masks]).cpu().tolist()  # sync: all numbers in one transfer.
    return [torch.argsort(mask.int(), descending=True, stable=True)[:count] for mask, count in zip(masks, counts)]


def _first(values: Tensor, count: int) -> Tensor:
    """[N, A] bool, the ``count`` greatest of each row; of equal ones (frequent in half precision), the first."""
    last = values.topk(min(count, values.shape[1]), dim=1).values[:, -1:]
    above, equal = values > last, values == last
    return above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))


def logit(score: float) -> float:
    """The number whose sigmoid is ``score``."""
    return math.log(score / (1 - score))
