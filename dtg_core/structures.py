"""The values that flow through a training step.

Legend, used by every module of the project:

    N images of a batch        A samples (anchors or proposals) per image    C classes of a stage (1 in the RPN)
    M teacher candidates       J clusters                                     P samples assigned to an object
    G objects of a batch       L pyramid levels                               R anchors per grid cell

Boxes are ``(x1, y1, x2, y2)`` in float32 pixels of the view they were made for, with the edge convention: pixel 0 spans
0 to 1, so a horizontal flip maps x to width - x. Labels are 0 to C - 1. *Logits* are before the sigmoid, *scores* after.
Everything is flat over the batch: a row carries the index of its image instead of sitting in a per-image list, so that no
step needs a Python loop over images.
"""
# No ``annotations`` of the future: the reference of the code cannot look up those of a NamedTuple as texts.

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from dtg_core.config import Hull

T = TypeVar("T", bound="Movable")


class Movable:
    """Gives a frozen dataclass of tensors ``to`` and ``pin_memory``; nested ones are moved too, other values are kept."""

    def to(self: T, device: torch.device | str, non_blocking: bool = False) -> T:
        """A copy on ``device``; tensors that are there already are shared. ``non_blocking`` as in ``Tensor.to``."""
        return _mapped(self, lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self: T) -> T:
        """A copy in page-locked memory, from which ``to`` need not wait; DataLoader calls it."""
        return _mapped(self, lambda value: value.pin_memory())


def _mapped(batch: T, change: Callable[[Any], Any]) -> T:
    assert is_dataclass(batch)
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: change(value) for name, value in values.items() if isinstance(value, (Tensor, Movable))})


@dataclass(frozen=True)
class Targets(Movable):
    """Objects of a batch: the ground truth of labelled images or sparse pseudo boxes of unlabelled ones."""

    boxes: Tensor  # [G, 4]
    labels: Tensor  # [G] int64
    image: Tensor  # [G] int64, ascending


@dataclass(frozen=True)
class ViewBatch(Movable):
    """One augmented view of each image of a batch, padded on the right and at the bottom to a common canvas."""

    pixels: Tensor  # [N, 3, H, W] uint8, RGB; H and W are multiples of 32
    sizes: Tensor  # [N, 2] float32, (height, width) of the view without the padding
    targets: Targets  # empty for unlabelled images
    seeds: Tensor  # [N] int64, seed of all random draws for the image in this step (see dtg_core/stateless.py)
    view_from_image: Tensor  # [N, 3, 3] float32, pixels of the stored image -> pixels of the view
    image_ids: tuple[Any, ...] = ()

    @property
    def canvas(self) -> tuple[int, int]:
        """Padded (height, width)."""
        return self.pixels.shape[-2], self.pixels.shape[-1]


@dataclass(frozen=True)
class PairBatch(Movable):
    """The same unlabelled images twice: the teacher's weak and the student's strong view."""

    teacher: ViewBatch
    student: ViewBatch
    student_from_teacher: Tensor  # [N, 3, 3] float32, inverted on the CPU while collating
    hull: Hull = "ellipse"  # how boxes are moved, see ``boxes.project``


@dataclass(frozen=True)
class StepBatch(Movable):
    """Everything one process needs for one step. ``unlabeled`` is None for supervised training."""

    step: int
    labeled: ViewBatch
    unlabeled: PairBatch | None


@dataclass(frozen=True)
class AnchorGrid:
    """The anchors of one canvas, the same for all images: level by level, row by row, R cell anchors at each location."""

    anchors: Tensor  # [A, 4]
    cells: tuple[Tensor, ...]  # L x [R, 4], the anchors of the location at (0, 0)
    shapes: tuple[tuple[int, int], ...]  # L x (rows, columns)
    strides: tuple[int, ...]  # L
    base_size: float  # side of the smallest level's square anchor; S of the paper (Sec. 3.2)

    @property
    def num_samples(self) -> int:
        return self.anchors.shape[0]

    @cached_property
    def level_sizes(self) -> tuple[int, ...]:
        """Number of anchors of each level."""
        return tuple(rows * columns * cell.shape[0] for (rows, columns), cell in zip(self.shapes, self.cells))

    @cached_property
    def level(self) -> Tensor:
        """[A] int64, level of each anchor."""
        device = self.anchors.device
        return torch.cat([torch.full((size,), index, device=device) for index, size in enumerate(self.level_sizes)])

    @cached_property
    def identity(self) -> Tensor:
        """[A] int64 identifying each anchor by its place and shape, the same on all canvases, for random draws."""
        left, top, right, bottom = (self.anchors * 8).round().long().unbind(1)
        return left * 73856093 + top * 19349663 + right * 83492791 + bottom * 2654435761  # a spatial hash's primes

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Per level, on the anchors' device: cells [L, R, 4]; (rows, columns, stride) [L, 3]; first anchor's row [L]."""
        starts = [sum(self.level_sizes[:index]) for index in range(len(self.shapes))]
        layout = [number for shape, stride in zip(self.shapes, self.strides) for number in (*shape, stride)]
        device = self.anchors.device
        return torch.stack(self.cells), _filled(layout, device).view(-1, 3), _filled(starts, device)

    def take(self, image: Tensor, sample: Tensor) -> Tensor:
        """Boxes [M, 4] of samples given by their image [M] and sample [M]."""
        return self.anchors[sample]

    def usable(self, sizes: Tensor) -> Tensor:
        """[N, A] bool: the anchor's centre lies in the unpadded view; ``sizes`` [N, 2] are (height, width)."""
        x = (self.anchors[:, 0] + self.anchors[:, 2]) / 2
        y = (self.anchors[:, 1] + self.anchors[:, 3]) / 2
        return (x >= 0) & (y >= 0) & (y < sizes[:, :1]) & (x < sizes[:, 1:])


@dataclass(frozen=True)
class Proposals(Movable):
    """Boxes proposed for each image, padded to a common number."""

    boxes: Tensor  # [N, A, 4]
    valid: Tensor  # [N, A] bool, False for padding and for boxes that left the view

    @property
    def num_samples(self) -> int:
        return self.boxes.shape[1]

    @property
    def identity(self) -> Tensor:
        """[A] int64, the proposals' ranks, for random draws."""
        return torch.arange(self.num_samples, device=self.boxes.device)

    def take(self, image: Tensor, sample: Tensor) -> Tensor:
        """Boxes [M, 4] of samples given by their image [M] and sample [M]."""
        return self.boxes[image, sample]

    def usable(self, sizes: Tensor) -> Tensor:
        """[N, A] bool: the proposal is not padding."""
        return self.valid


Samples = AnchorGrid | Proposals


@dataclass(frozen=True)
class Predictions:
    """What a stage predicts for each of its samples. Boxes are decoded on demand, for the requested rows only."""

    samples: Samples  # the A samples of each image
    logits: Tensor  # [N, A, C] class logits, for sigmoids
    raw: Tensor  # [N, A, D] the box branch's output as the stage's ``decode`` reads it


class Rows(NamedTuple):
    """Predictions picked out of a batch; the index of their logits: ``predictions.logits[rows]`` is [M]."""

    image: Tensor  # [M] int64
    sample: Tensor  # [M] int64
    label: Tensor  # [M] int64


@dataclass(frozen=True)
class Detections(Movable):
    """Final boxes of a batch after NMS, best score first within an image."""

    boxes: Tensor  # [G, 4]
    scores: Tensor  # [G]
    labels: Tensor  # [G] int64
    image: Tensor  # [G] int64, ascending


@dataclass(frozen=True)
class Candidates:
    """Teacher predictions that pass the score threshold tau (Sec. 3.2), flat over the batch, in the teacher's view."""

    image: Tensor  # [M] int64, ascending
    sample: Tensor  # [M] int64
    label: Tensor  # [M] int64
    logit: Tensor  # [M]
    box: Tensor  # [M, 4] decoded by the teacher, clipped to its view
    foreground: Tensor  # [N, A] bool, the sample has a score above tau
    background: Tensor  # [N, A] bool, "clear background": no score above tau

    @property
    def rows(self) -> Rows:
        return Rows(self.image, self.sample, self.label)


@dataclass(frozen=True)
class Clusters:
    """How NMS grouped M candidates into J clusters."""

    cluster: Tensor  # [M] int64 in 0..J-1
    keep: Tensor  # [J] int64, the candidate that survives in each cluster, best score first

    @property
    def num_clusters(self) -> int:
        return self.keep.shape[0]


@dataclass(frozen=True)
class Members:
    """The boxes of M candidates and the clusters that they are members of."""

    image: Tensor  # [M] int64, ascending
    box: Tensor  # [M, 4]
    score: Tensor  # [M]
    cluster: Tensor  # [M] int64 in 0..J-1
    images: int  # N


@dataclass(frozen=True)
class DenseGuidance:
    """What only dense guidance knows about the P samples that it assigned, besides their labels and boxes."""

    cluster: Tensor  # [P] int64 in 0..J-1
    num_clusters: int  # J as NMS returned it; clusters may have lost all their members on the way to the student
    candidate: Tensor  # [P] int64 row of the teacher's candidates
    teacher_logit: Tensor  # [P] the teacher's logit of the assigned label (p^t of Eq. 4)
    weight: Tensor  # [P] 1 / N_j with the N_j members that reached the student: the mean of Eqs. 2 and 3
    live_clusters: Tensor  # [] number of clusters with a member
    _: KW_ONLY
    rank_target: Tensor | None = None  # [P] what ranks the members instead of the teacher's logit
    quality: Tensor | None = None  # [P] classification target in 0..1; None: the stage's own rule
    members: Members | None = None  # in the student's view, if ``quality`` is to be their consensus
    shares: Tensor | None = None  # [P, C] how a class target is shared out over the classes; None: all of it is the label's
    trust: Tensor | None = None  # [J] weight of each cluster's losses; None: 1
    background_weight: Tensor | None = None  # [N, A] weight of each background sample; None: 1


@dataclass(frozen=True)
class Assignment:
    """Which samples a stage trains towards which targets. Samples that are neither in [P] nor background are ignored."""

    image: Tensor  # [P] int64
    sample: Tensor  # [P] int64
    label: Tensor  # [P] int64
    box: Tensor  # [P, 4] target in the frame of the stage's own view
    background: Tensor  # [N, A] bool
    dense: DenseGuidance | None = None

    @property
    def rows(self) -> Rows:
        return Rows(self.image, self.sample, self.label)

    @property
    def quality(self) -> Tensor | None:
        """[P] classification target set by the guidance, None: the stage's own rule."""
        return None if self.dense is None else self.dense.quality

    def class_targets(self, quality: Tensor, num_classes: int) -> Tensor:
        """[P, C] target scores: ``quality`` [P] for the label and 0 for other classes, unless the guidance shares it out."""
        if self.dense is not None and self.dense.shares is not None:
            return quality.unsqueeze(1) * self.dense.shares
        return quality.new_zeros(len(quality), num_classes).scatter(1, self.label.unsqueeze(1), quality.unsqueeze(1))


@dataclass(frozen=True)
class Supervision:
    """What one stage learns from on one batch: objects to assign by its own rule, or a finished assignment."""

    targets: Targets | None = None
    assignment: Assignment | None = None
    proposals: Proposals | None = None  # samples that a proposal-based stage has to use, in the student's view
    add_truth: bool = True  # whether target boxes join the detector's own proposals; False for pseudo boxes (A29)
    found: Tensor | None = None  # [C] objects of each class that the teacher has found, if thresholds adapt to them


@dataclass(frozen=True)
class Unreduced:
    """A stage's losses, and the divisors of its ordinary (labelled) reduction.

    Relative weights within a loss (GFL's GIoU against DFL) are already applied. ``classification_weight`` is not, so that means
    over clusters do not include it.
    """

    classification: Tensor  # [P]
    box: Tensor  # [P]
    background: Tensor  # [N, A], 0 where ``Assignment.background`` is False
    box_weight: Tensor  # [P] weight of the box loss in the ordinary reduction, detached
    classification_count: Tensor  # [] divisor of the classification and background losses
    box_count: Tensor  # [] divisor of the weighted box loss
    classification_weight: float = 1.0  # of the classification and background losses in the ordinary reduction


#: A stage's losses: of classes, of background, of boxes, and rank matching.
LossKind = Literal["cls", "background", "box", "rank"]


class LossName(NamedTuple):
    """Which of a step's losses a number is; as text, its name in ``metrics.jsonl``."""

    branch: Literal["labeled", "unlabeled"]
    stage: str
    kind: LossKind

    def __str__(self) -> str:
        return "/".join(self)


#: The losses of a step.
Losses = dict[LossName, Tensor]
#: Other figures for the log, by name; scalar tensors where only the device knows them.
Figures = dict[str, Tensor | float]


@dataclass(frozen=True)
class LossTerm:
    """A loss as a sum and its divisor, kept apart so that the divisor can be summed over processes first."""

    total: Tensor  # []
    count: Tensor  # [] at least 1 is used


def _filled(numbers: Sequence[int], device: torch.device) -> Tensor:
    """[K] int64, written by the device itself: a copy from the host would wait for its earlier work."""
    return torch.stack([torch.full((), number, device=device) for number in numbers])
