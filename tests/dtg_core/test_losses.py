"""The detector's own reduction and the total of Eq. 1, with a pencil."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dtg_core.config import StageRule
from dtg_core.losses import ordinary_terms, weigh
from dtg_core.structures import LossName, Unreduced


def test_the_ordinary_reduction_weighs_boxes_and_has_two_divisors():
    """GFL's boxes weigh as much as their best scores, whose sum is their divisor."""
    unreduced = Unreduced(
        classification=torch.tensor([1.0, 2.0]), box=torch.tensor([4.0, 8.0]), background=torch.tensor([[16.0, 0.0, 32.0]]),
        box_weight=torch.tensor([0.5, 0.25]), classification_count=torch.tensor(3.0), box_count=torch.tensor(0.75),
    )  # fmt: skip
    terms = ordinary_terms(unreduced)
    assert {name: (float(term.total), float(term.count)) for name, term in terms.items()} == {
        "cls": (3.0, 3.0), "background": (48.0, 3.0), "box": (4.0, 0.75)
    }  # fmt: skip
    weighted = ordinary_terms(replace(unreduced, classification_weight=10.0))
    assert {name: (float(term.total), float(term.count)) for name, term in weighted.items()} == {
        "cls": (30.0, 3.0), "background": (480.0, 3.0), "box": (4.0, 0.75)
    }  # fmt: skip


def test_the_total_weighs_the_unlabelled_branch_and_the_ranks():
    rules = {"rpn": StageRule(rank_weight=3.0), "rcnn": replace(StageRule(), rank_weight=5.0)}
    losses = {
        LossName("labeled", "rpn", "cls"): 1.0, LossName("labeled", "rcnn", "box"): 10.0, LossName("unlabeled", "rpn", "box"): 100.0,
        LossName("unlabeled", "rpn", "rank"): 1000.0, LossName("unlabeled", "rcnn", "rank"): 10000.0,
        LossName("unlabeled", "rcnn", "background"): 100000.0,
    }  # fmt: skip
    tensors = {name: torch.tensor(loss) for name, loss in losses.items()}
    assert weigh(tensors, rules, 2.0) == pytest.approx(11 + 2 * (100 + 3 * 1000 + 5 * 10000 + 100000))
    assert weigh(tensors, rules, 0.0) == pytest.approx(11)
