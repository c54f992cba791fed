"""Boxes: moving them between views, clipping, overlap and its loss, and NMS over groups.

Convention: ``(x1, y1, x2, y2)`` in continuous pixels, width is ``x2 - x1`` and pixel 0 spans 0 to 1. Functions keep
float32 under autocast, because they multiply and add instead of calling matmul; NMS is in float64.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision.ops import nms

from dtg_core.config import Hull

BLOCK = 2**22  # elements of a block of rows; pairwise overlaps need about 40 bytes per element, 75 in float64
NMS_BLOCK = 40_000  # most boxes per NMS call; a GPU's table of overlaps grows with their square, 200 MB at this size
CPU_BLOCK = 500  # most boxes of several images that a CPU compares at once; its time grows with their square
NMS_BY_IMAGE = frozenset({"cpu"})  # device types whose results take no wait, so that images may be dealt with one by one
SMALLEST_SIDE = 1.0  # px; an object or a proposal with a side below this after a move has left the view (A21)
TINY = 1e-6  # px^2, the least area that is divided by
GROUP_SPAN = 2**16  # px between the origins of two groups in NMS; larger than any view


def project(boxes: Tensor, matrix: Tensor, hull: Hull = "ellipse") -> Tensor:
    """Move boxes by an affine 3x3 matrix and take an axis-aligned box around the result.

    Args:
        boxes: [..., 4] in the matrix' source frame.
        matrix: [..., 3, 3] with 0, 0, 1 as its last row, broadcast against the boxes' leading dimensions.
        hull: what is enclosed after the move. ``"corners"`` encloses the four moved corners, as Soft Teacher does;
            ``"ellipse"`` encloses the moved inscribed ellipse, which fits objects in rotated and sheared views better
            (Kalra et al., "Towards Rotation Invariance in Object Detection", ICCV 2021). Both agree for shifts, scales and
            flips.

    Returns:
        [..., 4] in the matrix' target frame, not clipped.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    (a, b, c), (d, e, f), _ = (row.unbind(-1) for row in matrix.unbind(-2))
    x, y, half_width, half_height = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 2, (y2 - y1) / 2
    center_x, center_y = a * x + b * y + c, d * x + e * y + f
    # How far an ellipse, or a parallelogram, with these half axes reaches from its centre along x and along y.
    reach = torch.hypot if hull == "ellipse" else _sum_of_sizes
    reach_x, reach_y = reach(a * half_width, b * half_height), reach(d * half_width, e * half_height)
    return torch.stack((center_x - reach_x, center_y - reach_y, center_x + reach_x, center_y + reach_y), -1)


def _sum_of_sizes(first: Tensor, second: Tensor) -> Tensor:
    return first.abs() + second.abs()


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes [..., 4] cut to 0..width and 0..height; ``sizes`` [..., 2] are (height, width), broadcast."""
    return torch.minimum(boxes.clamp(min=0), torch.cat((sizes.flip(-1), sizes.flip(-1)), -1))


def area(boxes: Tensor) -> Tensor:
    """[...] area of boxes [..., 4]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def shortest_side(boxes: Tensor) -> Tensor:
    """[...] the smaller of width and height of boxes [..., 4]."""
    return torch.minimum(boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1])


def paired_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of boxes [..., 4] with boxes [..., 4], broadcast against each other; the union is at least ``TINY`` px^2."""
    top_left = torch.maximum(first[..., :2], second[..., :2])
    bottom_right = torch.minimum(first[..., 2:], second[..., 2:])
    sides = (bottom_right - top_left).clamp(min=0)
    overlap = sides[..., 0] * sides[..., 1]
    return overlap / (area(first) + area(second) - overlap).clamp(min=TINY)


def giou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """[P] 1 - GIoU (Rezatofighi et al. 2019) of boxes [P, 4] with targets [P, 4]; union and enclosing area are at least ``TINY``.

    torchvision's ``generalized_box_iou_loss`` indexes by a mask, which makes the host wait for the device.
    """
    sides = torch.minimum(boxes[:, 2:], targets[:, 2:]) - torch.maximum(boxes[:, :2], targets[:, :2])
    overlap = sides.clamp(min=0).prod(1)
    union = (area(boxes) + area(targets) - overlap).clamp(min=TINY)
    hull = torch.maximum(boxes[:, 2:], targets[:, 2:]) - torch.minimum(boxes[:, :2], targets[:, :2])
    enclosing = hull.clamp(min=0).prod(1).clamp(min=TINY)
    return 1 - overlap / union + (enclosing - union) / enclosing


def lacks_float64(device: torch.device) -> bool:
    """Whether a device has no float64, like Apple's GPUs; what needs it is then done on the CPU."""
    return device.type == "mps"


def to_float64(x: Tensor) -> Tensor:
    """``x`` in float64, on the CPU if its device has none."""
    return (x.cpu() if lacks_float64(x.device) else x).double()


def spread_groups(boxes: Tensor, groups: Tensor) -> Tensor:
    """Boxes [M, 4] moved apart by group [M], so that no two groups touch, in float64 so that no overlap changes.

    For devices that have float64, see ``lacks_float64``. The boxes must lie within half of ``GROUP_SPAN`` pixels of the origin,
    as those clipped to a view do.
    """
    return boxes.double() + (groups * GROUP_SPAN).unsqueeze(1)


def grouped_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """NMS within each group, in one kernel for all groups (torchvision's ``batched_nms`` loops over them or shifts boxes
    in float32, which moves an IoU by up to 1e-2 with many groups).

    Args:
        boxes: [M, 4], see ``spread_groups``. scores: [M]. groups: [M] int64.
        iou_threshold: a box is suppressed by a better one of its group when their IoU is greater.

    Returns:
        [J] int64 indices of the boxes that are kept, best score first; equal scores: lower index first.
    """
    if lacks_float64(boxes.device):
        return grouped_nms(boxes.cpu(), scores.cpu(), groups.cpu(), iou_threshold).to(boxes.device)
    # sync: NMS returns one index per surviving box.
    return nms(spread_groups(boxes, groups), scores.double(), iou_threshold)


def image_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """``grouped_nms`` of K boxes in each of N images that have no group in common; [J] indices into the flat [N * K].

    NMS compares each box with every kept one in the same call, so a CPU makes one call per image. Other devices, for which the
    host waits after each call, take as many images at once as the table of overlaps allows.

    Args:
        boxes: [N, K, 4]. scores, groups: [N, K].
    """
    if lacks_float64(boxes.device):
        return image_nms(boxes.cpu(), scores.cpu(), groups.cpu(), iou_threshold).to(boxes.device)
    images, count = scores.shape
    at_once = count if boxes.device.type in NMS_BY_IMAGE else NMS_BLOCK
    return torch.cat([
        grouped_nms(boxes[rows].flatten(0, 1), scores[rows].flatten(), groups[rows].flatten(), iou_threshold) + rows.start * count
        for rows in row_blocks(images, count, at_once)
    ])  # fmt: skip


def ordered_nms(boxes: Tensor, scores: Tensor, groups: Tensor, image: Tensor, images: int, iou_threshold: float) -> Tensor:
    """``grouped_nms`` of boxes [M, 4] in ascending order of ``image`` [M]; [J] indices, those of an image best score first.

    Image by image, see ``image_slices``, where one call for so many boxes would be slow or take much memory.
    """
    return torch.cat([
        grouped_nms(boxes[rows], scores[rows], groups[rows], iou_threshold) + rows.start
        for (rows,) in image_slices(images, image)
    ])  # fmt: skip


def image_slices(images: int, *lists: Tensor) -> list[tuple[slice, ...]]:
    """Slices of lists of rows such that no image has rows in two of them: a single one, or with many rows one for each image.

    For rows that are compared with all others of their slice. One by one, a CPU is the faster the more images there are; other
    devices, for which the host waits after each, take them all at once as long as a table of overlaps allows.

    Args:
        images: N. lists: the image of each row, [M] int64 and ascending.

    Returns:
        For each part the slice of each list; some may be empty.
    """
    limit = CPU_BLOCK if lists[0].device.type in NMS_BY_IMAGE else NMS_BLOCK
    if images == 1 or max(map(len, lists)) <= limit:
        return [(slice(0, None),) * len(lists)]  # without an end, which a traced graph does not know
    numbers = torch.arange(images, device=lists[0].device)
    ends = [torch.searchsorted(image, numbers, right=True).tolist() for image in lists]  # sync: only with so many rows
    return list(zip(*(map(slice, [0, *each], each) for each in ends)))


def row_blocks(rows: int, columns: int, limit: int | None = None) -> Iterator[slice]:
    """Slices of the rows of a [rows, columns] matrix that is too large to be made as a whole; an empty one for no rows.

    They depend on the sizes alone, which the host knows. ``limit``: elements per block (``BLOCK``), unless a row has more.
    """
    step = max((limit or BLOCK) // max(columns, 1), 1)
    return (slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step))


def rank_in_group(group: Tensor, num_groups: int) -> Tensor:
    """[M] int64: how many earlier rows have the same group; ``group`` [M] int64 must be ascending."""
    ones = torch.ones_like(group)
    counts = torch.zeros(num_groups, dtype=torch.int64, device=group.device).index_add(0, group, ones)
    starts = counts.cumsum(0) - counts
    return torch.arange(group.shape[0], device=group.device) - starts[group]
