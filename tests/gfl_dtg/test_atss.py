"""ATSS against mmdetection's recorded assignment and against the algorithm written with loops."""
from __future__ import annotations

import pytest
import torch
from gfl_helpers import load, no_targets, random_targets, tensor
from oracles import LargestTensor

from dtg_core.anchors import anchor_grid
from dtg_core.structures import AnchorGrid, Targets
from gfl_dtg.atss import assign_atss, nearest_anchors

CPU = torch.device("cpu")


def grid_of(canvas: tuple[int, int], strides: tuple[int, ...] = (8, 16, 32, 64, 128)) -> AnchorGrid:
    return anchor_grid(canvas, strides, 8.0, (1.0,), CPU)


def looped_atss(grid: AnchorGrid, targets: Targets, topk: int) -> dict[tuple[int, int], int]:
    """(image, anchor) -> object, one object and one anchor at a time, in plain numbers."""
    anchors = grid.anchors.double().tolist()
    best: dict[tuple[int, int], tuple[float, int]] = {}
    for row, (box, image) in enumerate(zip(targets.boxes.double().tolist(), targets.image.tolist())):
        candidates, start = [], 0
        for size in grid.level_sizes:
            def distance(index: int, box: list[float] = box) -> float:
                a = anchors[index]
                return (a[0] + a[2] - box[0] - box[2]) ** 2 + (a[1] + a[3] - box[1] - box[3]) ** 2

            candidates += sorted(range(start, start + size), key=distance)[:topk]
            start += size
        ious = []
        for index in candidates:
            a = anchors[index]
            width = max(0.0, min(a[2], box[2]) - max(a[0], box[0]))
            height = max(0.0, min(a[3], box[3]) - max(a[1], box[1]))
            both = width * height
            ious.append(both / ((a[2] - a[0]) * (a[3] - a[1]) + (box[2] - box[0]) * (box[3] - box[1]) - both))
        mean = sum(ious) / len(ious)
        threshold = mean + (sum((iou - mean) ** 2 for iou in ious) / (len(ious) - 1)) ** 0.5
        for index, iou in zip(candidates, ious):
            x, y = (anchors[index][0] + anchors[index][2]) / 2, (anchors[index][1] + anchors[index][3]) / 2
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if iou >= threshold and inside and iou > best.get((image, index), (-1.0, -1))[0]:
                best[image, index] = (iou, row)
    return {key: row for key, (_, row) in best.items()}


def everywhere(images: int, canvas: tuple[int, int]) -> torch.Tensor:
    """[N, A] usable anchors of views that fill their canvas: those beyond its border, of coarse levels, are usable too."""
    return torch.ones(images, grid_of(canvas).num_samples, dtype=torch.bool)


def as_dict(found: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> dict[tuple[int, int], int]:
    image, sample, row = (part.tolist() for part in found)
    assert len(set(zip(image, sample))) == len(image), "an anchor was assigned twice"
    return dict(zip(zip(image, sample), row))


@pytest.mark.parametrize("case", ["two", "one_empty", "all_empty", "single_box"])
def test_assignment_is_mmdetections(case: str) -> None:
    data = load("gfl_loss")
    boxes = [tensor(data[f"{case}/gt_boxes_{image}"]) for image in range(2)]
    starts = [0, boxes[0].shape[0]]
    image = torch.repeat_interleave(torch.arange(2), torch.tensor([len(b) for b in boxes]))
    targets = Targets(torch.cat(boxes), torch.zeros_like(image), image)
    found = as_dict(assign_atss(grid_of((128, 160)), targets, everywhere(2, (128, 160)), 9))
    expected = {
        (index, anchor): starts[index] + row
        for index in range(2)
        for anchor, row in enumerate(data[f"{case}/assigned_gt_{index}"].tolist())
        if row >= 0
    }
    assert found == expected


def test_anchors_are_mmdetections() -> None:
    data = load("anchors")
    for canvas in ((128, 160), (100, 75)):
        expected = [tensor(data[f"gfl/{canvas[0]}x{canvas[1]}/anchors_{level}"]) for level in range(5)]
        assert torch.equal(grid_of(canvas).anchors, torch.cat(expected))


@pytest.mark.parametrize("seed", range(8))
def test_assignment_is_the_looped_algorithm(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    canvas = (96, 160)  # the coarsest levels have fewer than 9 anchors
    targets = random_targets([6, 0, 3, 9], canvas, 3, generator)
    grid, usable = grid_of(canvas), everywhere(4, canvas)
    found = as_dict(assign_atss(grid, targets, usable, 9))
    assert found == looped_atss(grid, targets, 9)
    assert len(found) > 20


def test_objects_are_assigned_in_blocks_of_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = random_targets([16, 0, 13, 9], (256, 256), 3, torch.Generator().manual_seed(0))
    grid, usable = grid_of((256, 256)), everywhere(4, (256, 256))
    expected = assign_atss(grid, targets, usable, 9)
    monkeypatch.setattr("dtg_core.boxes.BLOCK", 5 * grid.num_samples)  # of 5 objects
    with LargestTensor() as largest:
        found = assign_atss(grid, targets, usable, 9)
    assert largest.elements <= 5 * grid.num_samples * 2  # offsets have 2 numbers
    assert all(torch.equal(part, wanted) for part, wanted in zip(found, expected, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_the_canvas_has_no_say(seed: int) -> None:
    """An object at the border of a small view gets the same anchors, by their boxes, on a canvas that a larger view needs."""
    view, large = (96, 104), (256, 320)
    targets = random_targets([12], view, 3, torch.Generator().manual_seed(seed))
    targets.boxes[:6, 2] = view[1]  # up to the border
    found = []
    for canvas in (view, large):
        grid = grid_of(canvas)
        usable = grid.usable(torch.tensor([[float(side) for side in view]]))
        _, sample, row = assign_atss(grid, targets, usable, 9)
        found.append({(*grid.anchors[anchor].tolist(), number) for anchor, number in zip(sample.tolist(), row.tolist())})
    assert found[0] == found[1]
    assert len(found[0]) > 10


def test_only_anchors_of_the_view_have_a_say_in_the_threshold() -> None:
    """The view is a corner of 8 x 8 px: of each level's candidates one is in it, and all of these but the first are too large."""
    grid = grid_of((128, 128), (8, 16))
    box = Targets(torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([0]), torch.tensor([0]))
    usable = grid.usable(torch.tensor([[8.0, 8.0]]))
    assert usable.sum() == 2
    alone = torch.zeros_like(usable)
    alone[0, 0] = True
    centers = (grid.anchors[:, :2] + grid.anchors[:, 2:]) / 2
    shifted = Targets(torch.tensor([[-4.0, -4, 4, 4]]), torch.tensor([0]), torch.tensor([0]))
    assert centers[0].tolist() == [0, 0]  # inside the second box, on the corner of the first
    assert assign_atss(grid, box, usable, 9)[1].tolist() == []
    # A mean over itself is reached by the IoU of a single candidate.
    assert assign_atss(grid, shifted, alone, 9)[1].tolist() == [0]


@pytest.mark.parametrize(("edge", "positive"), [(63.98, True), (63.995, False), (64.0, False)])
def test_a_centre_on_the_border_is_outside(edge: float, positive: bool) -> None:
    """mmdetection's margin of 0.01 px, for the anchor around (64, 64)."""
    grid = grid_of((128, 128), (8,))
    targets = Targets(torch.tensor([[edge, 34, edge + 64, 94]]), torch.tensor([0]), torch.tensor([0]))
    usable = torch.zeros(1, grid.num_samples, dtype=torch.bool)
    usable[0, 8 * 16 + 8] = True
    assert assign_atss(grid, targets, usable, 9)[1].tolist() == ([8 * 16 + 8] if positive else [])


def test_crowded_anchors_go_to_the_largest_iou() -> None:
    """Two objects around one another claim the same anchors; the one with the anchor's size gets most of them."""
    boxes = torch.tensor([[31.0, 31, 99, 99], [33.0, 33, 97, 97]])
    grid = grid_of((128, 128))
    targets = Targets(boxes, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    image, sample, row = assign_atss(grid, targets, everywhere(1, (128, 128)), 9)
    center = 8 * 16 + 8  # the anchor of level 0 around (64, 64)
    assert grid.anchors[center].tolist() == [32, 32, 96, 96]
    assert row[sample == center].tolist() == [1]
    assert as_dict((image, sample, row)) == looped_atss(grid, targets, 9)


def test_twins_do_not_share_an_anchor() -> None:
    boxes = torch.tensor([[30.0, 30, 95, 90]]).repeat(2, 1)
    targets = Targets(boxes, torch.tensor([0, 1]), torch.zeros(2, dtype=torch.int64))
    _, _, row = assign_atss(grid_of((128, 128)), targets, everywhere(1, (128, 128)), 9)
    assert row.numel() > 0
    assert torch.equal(row, torch.zeros_like(row)), "of equal objects the first one wins"


def test_the_same_object_in_two_images_is_assigned_in_both() -> None:
    boxes = torch.tensor([[30.0, 30, 95, 90]]).repeat(2, 1)
    targets = Targets(boxes, torch.tensor([0, 0]), torch.tensor([0, 2]))
    image, sample, _ = assign_atss(grid_of((128, 128)), targets, everywhere(3, (128, 128)), 9)
    assert sorted(image.unique().tolist()) == [0, 2]
    assert torch.equal(sample[image == 0], sample[image == 2])


def test_a_level_smaller_than_topk_gives_all_its_anchors() -> None:
    grid = grid_of((128, 160))
    centers = (grid.anchors[:, :2] + grid.anchors[:, 2:]) / 2
    box, first = torch.tensor([[20.0, 20, 60, 70]]), torch.zeros(1, dtype=torch.int64)
    candidates = nearest_anchors(centers, box, first, everywhere(1, (128, 160)), grid.level_sizes, 9)
    assert candidates.shape == (1, 9 + 9 + 9 + 6 + 2)
    assert set(candidates[0, -8:].tolist()) == set(range(420, 428))


def test_no_objects() -> None:
    for part in assign_atss(grid_of((128, 160)), no_targets(), everywhere(2, (128, 160)), 9):
        assert part.shape == (0,)
        assert part.dtype == torch.int64
