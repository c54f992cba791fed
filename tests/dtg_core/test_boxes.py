"""Boxes: projection, clipping, NMS over groups."""
from __future__ import annotations

import math

import pytest
import torch
from oracles import Recorded, greedy_nms
from torch import Tensor
from torchvision.ops import nms

from dtg_core.boxes import (
    clip,
    giou_loss,
    grouped_nms,
    image_nms,
    image_slices,
    lacks_float64,
    ordered_nms,
    paired_iou,
    project,
    rank_in_group,
    row_blocks,
    shortest_side,
)
from dtg_core.guidance.clustering import cluster_nms


def rotation(degrees: float, x: float = 0, y: float = 0) -> torch.Tensor:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, -s, x - c * x + s * y], [s, c, y - s * x - c * y], [0, 0, 1]])


@pytest.mark.parametrize("hull", ["ellipse", "corners"])
def test_flip_scale_and_shift(hull):
    matrix = torch.tensor([[-2.0, 0, 200], [0, 3, 5], [0, 0, 1]])
    moved = project(torch.tensor([[10.0, 20, 30, 50]]), matrix, hull)
    assert moved.tolist() == [[140, 65, 180, 155]]


def test_rotated_hulls_with_a_pencil():
    square = torch.tensor([[-1.0, -1, 1, 1]])
    root = math.sqrt(2)
    torch.testing.assert_close(project(square, rotation(45), "corners"), torch.tensor([[-root, -root, root, root]]))
    torch.testing.assert_close(project(square, rotation(45), "ellipse"), square)  # a circle stays a circle


def test_ellipse_against_points_on_it():
    box = torch.tensor([[3.0, 5, 23, 11]])
    matrix = rotation(25) @ torch.tensor([[1.2, 0.3, 4], [0.1, 0.9, -2], [0, 0, 1]])
    t = torch.linspace(0, 2 * math.pi, 20_000)
    points = torch.stack((13 + 10 * t.cos(), 8 + 3 * t.sin(), torch.ones_like(t)))
    moved = matrix @ points
    expected = torch.cat((moved[:2].amin(1), moved[:2].amax(1)))
    torch.testing.assert_close(project(box, matrix, "ellipse")[0], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["identity", "flip_w160", "scale_translate", "rotate_shear"])
def test_corners_equal_mmdetection(name):
    recorded = Recorded("functions")
    moved = project(recorded["project/boxes"], recorded[f"project/{name}/matrix"].float(), "corners")
    clipped = clip(moved, torch.tensor([128.0, 160.0]))
    torch.testing.assert_close(moved, recorded[f"project/{name}/out_unclipped"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(clipped, recorded[f"project/{name}/out_clipped_h128_w160"], rtol=1e-5, atol=1e-4)


def test_clip_takes_height_and_width():
    clipped = clip(torch.tensor([[-5.0, -5, 500, 500]]), torch.tensor([[40.0, 60.0]]))
    assert clipped.tolist() == [[0, 0, 60, 40]]
    assert shortest_side(clipped).tolist() == [40]


def test_iou_of_boxes_that_do_not_touch_is_zero():
    """Apart along x, along y, and along both, where two negative sides would have a positive product."""
    others = torch.tensor([[30.0, 0, 40, 10], [0, 30, 10, 40], [30, 30, 40, 40], [5, 0, 15, 10]])
    assert paired_iou(torch.tensor([[0.0, 0, 10, 10]]), others).tolist() == pytest.approx([0, 0, 0, 1 / 3])


def test_groups_do_not_touch_wherever_their_boxes_are():
    """In views of up to 2 ** 14 px a side; boxes of one group at the same place do."""
    for reach in (2**power for power in range(4, 15)):
        boxes = torch.tensor([[0.0, 0, 10, 10], [reach, reach, reach + 10, reach + 10], [0, 0, 10, 10]])
        for groups in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
            assert len(grouped_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor(groups), 0.5)) == 3
        assert grouped_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([3, 3, 3]), 0.5).tolist() == [0, 1]


def test_iou_of_empty_boxes_is_zero():
    empty = torch.tensor([[5.0, 5, 5, 5]])
    assert paired_iou(empty, empty).tolist() == [0]


def test_giou_loss_is_mmdetections():
    recorded = Recorded("functions")
    boxes = recorded["giou/pred"].requires_grad_()
    loss = giou_loss(boxes, recorded["giou/target"])
    torch.testing.assert_close(loss, recorded["giou/loss_none"], rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    torch.testing.assert_close(boxes.grad, recorded["giou/grad_pred_of_sum"], rtol=1e-5, atol=1e-6)


def test_giou_loss_of_nothing_is_connected():
    boxes = torch.zeros(0, 4, requires_grad=True)
    giou_loss(boxes, torch.zeros(0, 4)).sum().backward()
    assert boxes.grad is not None


@pytest.mark.parametrize("seed", range(20))
def test_grouped_nms_equals_the_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(60, 2, generator=generator) * 80
    boxes = torch.cat((corner, corner + torch.rand(60, 2, generator=generator) * 60), 1)
    scores = torch.rand(60, generator=generator)
    groups = torch.randint(0, 5, (60,), generator=generator)
    assert grouped_nms(boxes, scores, groups, 0.4).tolist() == greedy_nms(boxes, scores, groups, 0.4)[1]


@pytest.mark.parametrize("limit", [0, 10**6])
def test_nms_image_by_image_keeps_what_one_call_keeps(monkeypatch, limit):
    """Also with an image without boxes, and in the same order within each image."""
    monkeypatch.setattr("dtg_core.boxes.CPU_BLOCK", limit)
    torch.manual_seed(0)
    image = torch.tensor([0] * 40 + [2] * 60)
    corner, scores = torch.rand(100, 2) * 30, torch.rand(100)
    boxes, groups = torch.cat((corner, corner + 20), 1), image * 3 + torch.randint(3, (100,))
    once, found = grouped_nms(boxes, scores, groups, 0.4), ordered_nms(boxes, scores, groups, image, 3, 0.4)
    for number in (0, 2):
        assert found[image[found] == number].tolist() == once[image[once] == number].tolist() != []
    assert ordered_nms(boxes[:0], scores[:0], groups[:0], image[:0], 3, 0.4).shape == (0,)


@pytest.mark.parametrize(("by_image", "limit", "cut"), [({"cpu"}, 4, True), ({"cpu"}, 5, False), (set(), 4, False)])
def test_slices_of_images(monkeypatch, by_image, limit, cut):
    """Of two lists, the longer one decides. On devices that the host waits for, only a table too large for NMS is cut."""
    monkeypatch.setattr("dtg_core.boxes.NMS_BY_IMAGE", by_image)
    monkeypatch.setattr("dtg_core.boxes.CPU_BLOCK", limit)
    few, many = torch.tensor([1, 3]), torch.tensor([0, 1, 1, 3, 3])
    expected = [([], [0]), ([1], [1, 1]), ([], []), ([3], [3, 3]), ([], [])] if cut else [([1, 3], [0, 1, 1, 3, 3])]
    assert [(few[a].tolist(), many[b].tolist()) for a, b in image_slices(5, few, many)] == expected
    assert image_slices(1, few) == [(slice(0, None),)]
    monkeypatch.setattr("dtg_core.boxes.NMS_BLOCK", 4)
    monkeypatch.setattr("dtg_core.boxes.CPU_BLOCK", 4)
    assert len(image_slices(5, few, many)) == 5


def test_grouped_nms_of_nothing():
    assert grouped_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), 0.5).shape == (0,)


@pytest.mark.parametrize(("by_image", "block", "calls"), [({"cpu"}, 10**6, 5), (set(), 10**6, 1), (set(), 80, 3), (set(), 1, 5)])
def test_image_nms_is_one_nms_over_all_images(monkeypatch, by_image, block, calls):
    monkeypatch.setattr("dtg_core.boxes.NMS_BY_IMAGE", by_image)
    monkeypatch.setattr("dtg_core.boxes.NMS_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(5, 40, 2, generator=generator) * 80
    boxes = torch.cat((corner, corner + torch.rand(5, 40, 2, generator=generator) * 60), 2)
    scores = torch.rand(5, 40, generator=generator).round(decimals=1)  # some are equal
    groups = torch.arange(5).unsqueeze(1) * 3 + torch.randint(0, 3, (5, 40), generator=generator)
    called = []
    with monkeypatch.context() as patch:
        patch.setattr("dtg_core.boxes.nms", lambda *args: called.append(args) or nms(*args))
        kept = image_nms(boxes, scores, groups, 0.4)
    assert len(called) == calls
    expected = grouped_nms(boxes.flatten(0, 1), scores.flatten(), groups.flatten(), 0.4)
    image = expected // 40
    assert torch.equal(kept[(kept // 40).argsort(stable=True)], expected[image.argsort(stable=True)])


def test_image_nms_of_nothing():
    assert image_nms(torch.zeros(0, 7, 4), torch.zeros(0, 7), torch.zeros(0, 7).long(), 0.5).shape == (0,)
    assert image_nms(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0).long(), 0.5).shape == (0,)


def test_without_float64_nms_is_done_on_the_cpu(monkeypatch):
    """For Apple's GPUs. Here both are the CPU, so the first answer stands for the device and the second for the CPU."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [30, 30, 40, 40]])
    scores, groups, image = torch.tensor([0.5, 0.9, 0.2]), torch.zeros(3).long(), torch.zeros(3).long()
    for function, module, given in (
        (grouped_nms, "dtg_core.boxes", (boxes, scores, groups)),
        (cluster_nms, "dtg_core.guidance.clustering", (boxes, scores, groups, image, 1)),
    ):
        expected = function(*given, 0.5)
        answers, moved = iter((True, False)), []
        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.lacks_float64", lambda device, answers=answers: next(answers))
            patch.setattr(Tensor, "cpu", lambda self, moved=moved: moved.append(self) or self)
            found = function(*given, 0.5)
        assert [id(tensor) for tensor in moved] == [id(tensor) for tensor in given if isinstance(tensor, Tensor)]
        assert all(torch.equal(a, b) for a, b in zip(parts(found), parts(expected)))
    assert lacks_float64(torch.device("mps"))
    assert not lacks_float64(torch.device("cuda", 0))


def parts(found):
    return (found,) if isinstance(found, Tensor) else (found.cluster, found.keep)


@pytest.mark.parametrize(("rows", "columns", "sizes"), [(7, 3, [3, 3, 1]), (6, 4, [2, 2, 2]), (2, 99, [1, 1]), (0, 5, [0]), (4, 0, [4])])
def test_row_blocks(monkeypatch, rows, columns, sizes):
    monkeypatch.setattr("dtg_core.boxes.BLOCK", 10)
    blocks = list(row_blocks(rows, columns))
    assert [block.stop - block.start for block in blocks] == sizes
    assert torch.equal(torch.cat([torch.arange(rows)[block] for block in blocks]), torch.arange(rows))


def test_rank_in_group():
    assert rank_in_group(torch.tensor([0, 0, 2, 2, 2, 5]), 6).tolist() == [0, 1, 0, 1, 2, 0]
    assert rank_in_group(torch.zeros(0).long(), 3).shape == (0,)
