"""Rank Matching (Sec. 3.2, Eqs. 4 and 5): the student orders the members of a cluster as the teacher does."""
from __future__ import annotations

import torch
from torch import Tensor


def rank_matching(
    student_logits: Tensor, teacher_logits: Tensor, cluster: Tensor, num_clusters: int, temperature: float = 1.0
) -> Tensor:
    """KL(D(p^t) || D(p^s)) of each cluster, with D the softmax over the cluster's members (Eqs. 4 and 5).

    The mean over the clusters is taken in ``dtg_core.losses``, because their number is summed over processes first.

    Args:
        student_logits, teacher_logits: [P] logits of the target class; gradients flow to the student's only.
        cluster: [P] int64 in 0..J-1. num_clusters: J. temperature: T of Eq. 4.

    Returns:
        [J] float32, 0 for clusters with fewer than two members.
    """
    teacher = _log_softmax(teacher_logits.detach().float() / temperature, cluster, num_clusters)
    student = _log_softmax(student_logits.float() / temperature, cluster, num_clusters)
    divergence = teacher.exp() * (teacher - student)
    return torch.zeros(num_clusters, device=cluster.device).index_add(0, cluster, divergence)


def _log_softmax(logits: Tensor, cluster: Tensor, num_clusters: int) -> Tensor:
    """[P] log-softmax within each cluster."""
    lowest = torch.full((num_clusters,), -torch.inf, device=logits.device)
    highest = lowest.scatter_reduce(0, cluster, logits.detach(), "amax")  # a shift for stability needs no gradient
    shifted = logits - highest[cluster]
    total = torch.zeros(num_clusters, device=logits.device).index_add(0, cluster, shifted.exp())
    return shifted - total.log()[cluster]
