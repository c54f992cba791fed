"""Correspondence: the closed form against brute force, and what must hold for known views."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_pair
from oracles import best_anchor_by_force

from dtg_core.anchors import anchor_grid
from dtg_core.boxes import paired_iou
from dtg_core.guidance.correspondence import anchor_level, best_anchor, correspond, to_student
from dtg_core.structures import AnchorGrid, Proposals

CPU = torch.device("cpu")


def rpn_grid(height: int, width: int) -> AnchorGrid:
    return anchor_grid((height, width), (4, 8, 16, 32, 64), 8.0, (0.5, 1.0, 2.0), CPU)


def random_boxes(count: int, height: float, width: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 1.2 - 0.1 * width
    side = 2 ** (torch.rand(count, 2, generator=generator) * 6 + 3)
    return torch.cat((center - side / 2, center + side / 2), 1)


def test_anchor_level_of_the_papers_anchor_sizes():
    squares = torch.tensor([[0, 0, s, s] for s in (32.0, 64.0, 128.0, 256.0, 512.0)])
    assert anchor_level(squares, 32, 5).tolist() == [0, 1, 2, 3, 4]
    assert anchor_level(squares, 64, 5).tolist() == [0, 0, 1, 2, 3]


def test_anchor_level_clamps_and_takes_flat_boxes():
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 5000, 5000], [3, 3, 3, 9], [0, 0, 45, 46]])
    assert anchor_level(boxes, 32, 5).tolist() == [0, 4, 0, 1]
    assert anchor_level(torch.zeros(0, 4), 32, 5).shape == (0,)


def test_best_anchor_equals_brute_force():
    grid = rpn_grid(224, 320)
    boxes = random_boxes(10_000, 224, 320)
    row, iou = best_anchor(boxes, grid, torch.tensor([224.0, 320.0]).expand(len(boxes), 2))
    expected = best_anchor_by_force(boxes, grid, 32.0).float()
    torch.testing.assert_close(iou, expected, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(paired_iou(boxes, grid.anchors[row]), iou)
    assert torch.equal(grid.level[row], anchor_level(boxes, 32, 5))


def test_every_anchor_of_a_full_canvas_finds_itself():
    grid = rpn_grid(800, 1344)
    row, iou = best_anchor(grid.anchors, grid, torch.tensor([800.0, 1344.0]).expand(grid.num_samples, 2))
    assert torch.equal(row, torch.arange(grid.num_samples))
    assert iou.min() > 1 - 1e-5


def test_best_anchor_of_nothing():
    row, iou = best_anchor(torch.zeros(0, 4), rpn_grid(64, 64), torch.zeros(0, 2))
    assert row.shape == iou.shape == (0,)


@pytest.mark.parametrize(("dx", "dy"), [(40, 0), (-40, 0), (0, 30), (0, -30), (13, 21)])
def test_what_leaves_the_view_has_no_partner_and_the_canvas_no_say(dx: int, dy: int):
    """Views of 117 x 150, alone on the least canvas and with more padding, moved by (dx, dy)."""
    matrix = torch.tensor([[1.0, 0, dx], [0, 1, dy], [0, 0, 1]])
    samples = rpn_grid(128, 160)
    center = (samples.anchors[:, :2] + samples.anchors[:, 2:]) / 2 + torch.tensor((dx, dy))
    inside = ((center >= 0) & (center < torch.tensor((150, 117)))).all(1)
    partners = []
    for canvas in ((128, 160), (192, 256)):
        pair = make_pair(1, *canvas, matrix)
        pair = replace(pair, student=replace(pair.student, sizes=torch.tensor([[117.0, 150.0]])))
        grid, row = correspond(samples, rpn_grid(*canvas), pair, 0.3)
        assert isinstance(grid, AnchorGrid)
        assert grid.usable(pair.student.sizes)[0, row[row >= 0]].all()
        partners.append(torch.where((row[0] >= 0)[:, None], grid.anchors[row[0]], torch.nan))
    torch.testing.assert_close(*partners, rtol=0, atol=0, equal_nan=True)
    assert partners[0][~inside].isnan().all()
    assert not partners[0][inside].isnan().all()


def test_twice_the_size_moves_every_anchor_one_level_up():
    teacher, student = rpn_grid(128, 128), rpn_grid(256, 256)
    pair = make_pair(1, 128, 128, torch.diag(torch.tensor([2.0, 2.0, 1.0])))
    pair = type(pair)(pair.teacher, make_pair(1, 256, 256).student, pair.student_from_teacher)
    _, row = correspond(teacher, student, pair, 0.3)
    matched = row[0] >= 0
    assert torch.equal(student.level[row[0][matched]], (teacher.level[matched] + 1).clamp(max=4))
    torch.testing.assert_close(student.anchors[row[0][matched & (teacher.level < 4)]], 2 * teacher.anchors[matched & (teacher.level < 4)])


def test_a_flip_maps_centres_to_their_mirror_image():
    grid = anchor_grid((64, 64), (8, 16), 4.0, (1.0,), CPU)
    flip = torch.tensor([[-1.0, 0, 64], [0, 1, 0], [0, 0, 1]])
    _, row = correspond(grid, grid, replace(make_pair(1, 64, 64, flip), hull="corners"), 0.3)
    centers = (grid.anchors[:, :2] + grid.anchors[:, 2:]) / 2
    # The anchors at x = 0 go to x = 64, where the grid has none: their partner is the last column, once more.
    inner = centers[:, 0] > 0
    mirrored = torch.stack((64 - centers[:, 0], centers[:, 1]), 1)
    assert torch.equal(centers[row[0][inner]], mirrored[inner])
    assert ((row[0][~inner] == -1) | (centers[row[0][~inner], 0] >= 48)).all()


def test_anchors_that_leave_the_view_have_no_partner():
    grid = anchor_grid((64, 64), (8,), 4.0, (1.0,), CPU)
    away = torch.tensor([[1.0, 0, 1000], [0, 1, 0], [0, 0, 1]])
    _, row = correspond(grid, grid, make_pair(2, 64, 64, away), 0.3)
    assert row.shape == (2, 64)
    assert (row == -1).all()


def test_proposals_correspond_by_index_and_are_dropped_outside():
    boxes = torch.tensor([[[0.0, 0, 20, 20], [50, 50, 64, 64], [40, 5, 60, 9]]])
    proposals = Proposals(boxes, torch.tensor([[True, True, False]]))
    shift = torch.tensor([[1.0, 0, -20.5], [0, 1, 0], [0, 0, 1]])
    moved, row = correspond(proposals, rpn_grid(64, 64), make_pair(1, 64, 64, shift), 0.3)
    assert row.tolist() == [[-1, 1, -1]]  # the first is left of the view, the third was padding
    torch.testing.assert_close(moved.boxes[0, 1], torch.tensor([29.5, 50, 43.5, 64]))


@pytest.mark.parametrize("hull", ["ellipse", "corners"])
def test_rotated_view_finds_overlapping_partners(hull):
    grid = anchor_grid((160, 160), (8, 16, 32), 4.0, (1.0,), CPU)
    angle = torch.tensor(0.3)
    c, s = angle.cos(), angle.sin()
    rotate = torch.tensor([[c, -s, 80 - 80 * c + 80 * s], [s, c, 80 - 80 * s - 80 * c], [0, 0, 1]])
    _, row = correspond(grid, grid, replace(make_pair(1, 160, 160, rotate), hull=hull), 0.3)
    assert (row >= 0).float().mean() > 0.5


def test_a_pair_of_exactly_the_least_iou_is_kept():
    """Squashed to half its height, an anchor of 32 px lies within its partner and has an IoU of 1/2 with it."""
    grid = anchor_grid((64, 64), (8,), 4.0, (1.0,), CPU)
    pair = make_pair(1, 64, 64, torch.diag(torch.tensor([1.0, 0.5, 1.0])))
    assert (correspond(grid, grid, pair, 0.5)[1] >= 0).all()
    assert (correspond(grid, grid, pair, 0.501)[1] == -1).all()


@pytest.mark.parametrize(("hull", "reach"), [("ellipse", 16.0), ("corners", 16 * 2**0.5)])
def test_all_boxes_are_moved_as_the_pair_says(hull, reach):
    """A turn by 45 degrees about (64, 64), where an anchor of 32 px is: its ellipse fits itself, its corners' box does not."""
    c = 0.5**0.5
    turn = torch.tensor([[c, -c, 64], [c, c, 64 - 128 * c], [0, 0, 1]])
    grid = anchor_grid((128, 128), (8,), 4.0, (1.0,), CPU)
    pair = replace(make_pair(1, 128, 128, turn), hull=hull)
    square, moved = torch.tensor([[48.0, 48, 80, 80]]), torch.tensor([[64 - reach, 64 - reach, 64 + reach, 64 + reach]])
    torch.testing.assert_close(to_student(square, torch.tensor([0]), pair), moved)
    proposals = Proposals(square[None], torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(correspond(proposals, grid, pair, 0.3)[0].boxes[0], moved)
    own = int((grid.anchors == square).all(1).nonzero())
    assert correspond(grid, grid, pair, 0.9)[1][0, own] == (own if hull == "ellipse" else -1)


def test_targets_are_clipped_to_the_students_view():
    """Views of both sizes, larger and smaller than the teacher's; each image has its own."""
    pair = make_pair(2, 64, 64, torch.diag(torch.tensor([2.0, 2.0, 1.0])))
    pair = replace(pair, student=replace(pair.student, sizes=torch.tensor([[90.0, 120.0], [50.0, 40.0]])))
    boxes = to_student(torch.tensor([[10.0, 10, 60, 60]]).repeat(2, 1), torch.tensor([0, 1]), pair)
    assert boxes.tolist() == [[20, 20, 120, 90], [20, 20, 40, 50]]
