"""Pseudo boxes: what passes the threshold and stays in the student's view, with a pencil."""
from __future__ import annotations

from dataclasses import replace

import torch
from conftest import make_pair

from dtg_core.anchors import anchor_grid
from dtg_core.config import StageRule
from dtg_core.guidance.sparse import pseudo_labels, sparse_supervision
from dtg_core.structures import Detections

# Twice as large and 40 px to the left, in a view of 100 x 80 px: the third box leaves it but for a sliver of half a pixel.
PAIR = make_pair(2, 80, 100, torch.tensor([[2.0, 0, -40], [0, 2, 0], [0, 0, 1]]))
FOUND = Detections(
    torch.tensor([[30.0, 10, 50, 30], [10, 10, 40, 60], [5, 10, 20.25, 30], [60, 30, 90, 38]]), torch.tensor([0.75, 0.5, 0.9, 0.625]),
    torch.tensor([2, 0, 1, 1]), torch.tensor([0, 0, 0, 1]),
)  # fmt: skip


def test_good_boxes_are_moved_and_clipped():
    targets = pseudo_labels(FOUND, 0.25, PAIR)
    assert targets.boxes.tolist() == [[20, 20, 60, 60], [0, 20, 40, 80], [80, 60, 100, 76]]
    assert targets.labels.tolist() == [2, 0, 1]
    assert targets.image.tolist() == [0, 0, 1]


def test_a_score_of_exactly_the_threshold_is_too_low():
    assert pseudo_labels(FOUND, 0.5, PAIR).labels.tolist() == [2, 1]
    assert pseudo_labels(FOUND, 0.75, PAIR).boxes.shape == (0, 4)


def test_each_class_has_its_own_threshold():
    assert pseudo_labels(FOUND, torch.tensor([0.4, 0.7, 0.8]), PAIR).labels.tolist() == [0]
    assert pseudo_labels(FOUND, torch.tensor([0.6, 0.6, 0.6]), PAIR).labels.tolist() == [2, 1]


def test_a_sliver_counts_from_one_pixel_on():
    inside = replace(FOUND, boxes=torch.tensor([[5.0, 10, 20.5, 30]]).repeat(4, 1))
    assert len(pseudo_labels(inside, 0.0, PAIR).labels) == 4


def test_found_counts_each_class_by_its_own_threshold():
    """As the teacher sees them, so the third box counts, too, which leaves the student's view."""
    grid = anchor_grid((96, 128), (8,), 4.0, (1.0,), torch.device("cpu"))
    rule, threshold = StageRule("sparse"), torch.tensor([0.4, 0.7, 0.8])
    told, _ = sparse_supervision(FOUND, grid, grid, PAIR, rule, threshold)
    assert told.found.tolist() == [1, 1, 0]
    assert told.targets.labels.tolist() == [0]
    assert sparse_supervision(FOUND, grid, grid, PAIR, rule)[0].found is None
