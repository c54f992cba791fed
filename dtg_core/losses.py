"""From unreduced losses to the terms of Eqs. 1 to 6.

A term keeps its sum and its divisor apart until the divisors are summed over processes and micro-batches, so that N processes
compute what one process with all their images would.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from dtg_core.config import StageRule
from dtg_core.guidance.rank_matching import rank_matching
from dtg_core.structures import Assignment, DenseGuidance, Losses, LossKind, LossTerm, Unreduced


def ordinary_terms(unreduced: Unreduced) -> dict[LossKind, LossTerm]:
    """The detector's own reduction, for ground truth and for sparse pseudo boxes."""
    weight, count = unreduced.classification_weight, unreduced.classification_count
    return {
        "cls": LossTerm(weight * unreduced.classification.sum(), count),
        "background": LossTerm(weight * unreduced.background.sum(), count),
        "box": LossTerm((unreduced.box * unreduced.box_weight).sum(), unreduced.box_count),
    }


def dense_terms(unreduced: Unreduced, logits: Tensor, assignment: Assignment, rule: StageRule) -> dict[LossKind, LossTerm]:
    """Dense guidance: means over clusters of the means within them (Eqs. 2, 3 and 5), and the background.

    The background sum is divided by the number of assigned samples. ``rule.normalization`` "stage" reduces classes, boxes and
    background as on labelled images instead (A12). Losses that the rule switches off give no term.
    """
    dense = assignment.dense
    assert dense is not None
    unreduced = _weighted(unreduced, dense)
    terms = ordinary_terms(unreduced)
    if rule.normalization == "cluster":
        terms = {
            "cls": LossTerm((unreduced.classification * dense.weight).sum(), dense.live_clusters),
            "background": LossTerm(unreduced.background.sum(), dense.weight.new_full((), len(dense.weight))),
            "box": LossTerm((unreduced.box * dense.weight).sum(), dense.live_clusters),
        }
    if not rule.classification:
        del terms["cls"], terms["background"]
    if not rule.box:
        del terms["box"]
    if rule.rank:
        ranks = dense.teacher_logit if dense.rank_target is None else dense.rank_target
        divergence = rank_matching(logits[assignment.rows], ranks, dense.cluster, dense.num_clusters, rule.temperature)
        divergence = divergence if dense.trust is None else dense.trust * divergence
        terms["rank"] = LossTerm(divergence.sum(), dense.live_clusters)
    return terms


def _weighted(unreduced: Unreduced, dense: DenseGuidance) -> Unreduced:
    """Losses times the trust in their clusters and the weight of background samples; the divisors stay."""
    if dense.trust is not None:
        trust = dense.trust[dense.cluster]
        unreduced = replace(unreduced, classification=trust * unreduced.classification, box=trust * unreduced.box)
    if dense.background_weight is not None:
        unreduced = replace(unreduced, background=dense.background_weight * unreduced.background)
    return unreduced


def weigh(losses: Losses, rules: Mapping[str, StageRule], unlabeled_weight: float) -> Tensor:
    """The total of Eq. 1, L^l + alpha L^u, with L^u = L_cls + L_reg + beta L_RM of each stage (Eq. 6).

    Args:
        losses: at least one. rules: for beta, by stage. unlabeled_weight: alpha times its warm-up.
    """
    weighted = []
    for (branch, stage, kind), loss in losses.items():
        weight = unlabeled_weight if branch == "unlabeled" else 1.0
        weighted.append((weight * rules[stage].rank_weight if kind == "rank" else weight) * loss)
    return sum(weighted[1:], weighted[0])
