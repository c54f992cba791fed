"""Fig. 3 and Sec. 4.5 of the paper: for identical samples, sparse and dense guidance give different training labels.

    (1) A poor sample overlaps a coarse pseudo box, but the teacher gives it a low score:
        positive in sparse, background in dense.
    (2) A precise sample hardly overlaps a badly placed pseudo box, but the teacher counts it to the same object:
        negative in sparse, positive in dense.

One object on a 256 px canvas. Only the teacher's predictions are made up; from ``teach`` to the student's assignment all is
the real thing.
"""
from __future__ import annotations

import pytest
import torch
from conftest import make_pair
from torch import Tensor

from dtg_core.boxes import paired_iou, project
from dtg_core.config import StageRule
from dtg_core.deltas import encode
from dtg_core.guidance.paradigms import teach
from dtg_core.structures import Assignment, Predictions, Proposals
from faster_rcnn_dtg import FasterRCNNConfig
from faster_rcnn_dtg.config import RPNConfig
from faster_rcnn_dtg.detector import FasterRCNN
from faster_rcnn_dtg.rcnn import RCNNStage
from faster_rcnn_dtg.rpn import RPNStage

CANVAS = (256, 256)
NUM_CLASSES, LABEL = 3, 1
SAME = torch.eye(3)
FLIP = torch.tensor([[-1.0, 0, 256], [0, 1, 0], [0, 0, 1]])
HALF = torch.tensor([[0.5, 0, 16], [0, 0.5, 8], [0, 0, 1]])


class FakeTeacher:
    """A Faster R-CNN that sees what it is told to; grid, stages and final boxes are the real detector's.

    Args:
        proposals: [A, 4]. scores: [A] of class LABEL, the others are near 0. refined: [A, 4] the R-CNN's boxes.
        objectness: {row of an anchor: score} of the RPN, which leaves its anchors as they are; 0.3 elsewhere.
    """

    config = FasterRCNNConfig(strides=(8, 16), anchor_scale=8.0, ratios=(1.0,), rpn=RPNConfig(samples=10_000))
    grid, detect = FasterRCNN.grid, FasterRCNN.detect

    def __init__(
        self, proposals: Tensor, scores: Tensor, refined: Tensor, objectness: dict[int, float] | None = None
    ) -> None:
        self.stages = {"rpn": RPNStage(self.config.rpn), "rcnn": RCNNStage(self.config.rcnn, NUM_CLASSES)}
        grid = self.grid(CANVAS, torch.device("cpu"))
        anchor_scores = torch.full((1, grid.num_samples, 1), 0.3)
        for row, score in (objectness or {}).items():
            anchor_scores[0, row] = score
        logits = torch.full((1, len(scores), NUM_CLASSES), -6.0)
        logits[0, :, LABEL] = scores.logit()
        deltas = encode(proposals, refined, self.config.rcnn.delta_stds).repeat(1, NUM_CLASSES)
        valid = torch.ones(1, len(scores), dtype=torch.bool)
        self.outputs = {
            "rpn": Predictions(grid, anchor_scores.logit(), torch.zeros(1, grid.num_samples, 4)),
            "rcnn": Predictions(Proposals(proposals[None], valid), logits, deltas[None]),
        }

    def run(self, views, supervision=None):
        return self.outputs


def labels_of(teacher: FakeTeacher, paradigm: str, stage: str, matrix: Tensor) -> tuple[Assignment, Tensor]:
    """The student's assignment under a paradigm, and the moved boxes of the sparse paradigm's pseudo labels."""
    pair = make_pair(1, *CANVAS, matrix)
    rules = {"rpn": StageRule(paradigm, tau=0.9, nms_iou=0.7), "rcnn": StageRule(paradigm, tau=0.45, nms_iou=0.5)}
    told = teach(teacher, pair, rules)[0][stage]
    if told.assignment is not None:
        return told.assignment, torch.zeros(0, 4)
    samples = teacher.grid(CANVAS, torch.device("cpu")) if stage == "rpn" else told.proposals
    assignment = teacher.stages[stage].assign(samples, told.targets, pair.student.sizes, pair.student.seeds)
    return assignment, told.targets.boxes


def positives(assignment: Assignment) -> dict[int, int]:
    """{row of a positive sample: its label}."""
    return dict(zip(assignment.sample.tolist(), assignment.label.tolist()))


def moved(box: list[float], matrix: Tensor) -> Tensor:
    return project(torch.tensor(box), matrix)



views = pytest.mark.parametrize("matrix", [SAME, FLIP, HALF], ids=["same view", "flipped", "half size"])


@views
def test_rcnn_poor_proposal_with_a_low_score(matrix):
    coarse, poor = [100.0, 60, 200, 160], [125.0, 60, 225, 160]  # IoU 7500 / 12500 = 0.6
    proposals = torch.tensor([coarse, poor])
    teacher = FakeTeacher(proposals, torch.tensor([0.9, 0.3]), proposals)
    assert paired_iou(*proposals).item() == pytest.approx(0.6)

    sparse, pseudo = labels_of(teacher, "sparse", "rcnn", matrix)
    torch.testing.assert_close(pseudo, moved(coarse, matrix)[None])
    assert positives(sparse) == {0: LABEL, 1: LABEL}
    dense, _ = labels_of(teacher, "dense", "rcnn", matrix)
    assert positives(dense) == {0: LABEL}
    assert dense.background.tolist() == [[False, True]]


@views
def test_rcnn_precise_proposal_beside_a_badly_placed_pseudo_box(matrix):
    truth, precise, bad = [100.0, 60, 200, 160], [104.0, 60, 204, 160], [140.0, 60, 240, 160]
    refined = [120.0, 60, 220, 160]  # the teacher pulls the precise proposal toward the box that it keeps
    proposals = torch.tensor([bad, precise])
    teacher = FakeTeacher(proposals, torch.tensor([0.9, 0.8]), torch.tensor([bad, refined]))
    assert paired_iou(torch.tensor(precise), torch.tensor(truth)) > 0.9
    assert paired_iou(torch.tensor(precise), torch.tensor(bad)) < 0.5
    assert paired_iou(torch.tensor(refined), torch.tensor(bad)) > 0.5  # so NMS suppresses it: one cluster

    sparse, pseudo = labels_of(teacher, "sparse", "rcnn", matrix)
    torch.testing.assert_close(pseudo, moved(bad, matrix)[None])
    assert positives(sparse) == {0: LABEL}
    assert sparse.background.tolist() == [[False, True]]
    dense, _ = labels_of(teacher, "dense", "rcnn", matrix)
    assert positives(dense) == {0: LABEL, 1: LABEL}
    assert not dense.background.any()
    assert dense.dense.num_clusters == 1
    torch.testing.assert_close(dense.box, moved(bad, matrix).expand(2, 4))  # b_k' of Eq. 3 for both


def anchor_row(x: int, y: int) -> int:
    """Row of the 64 px anchor centred at (8 x, 8 y); its level has 32 columns."""
    return 32 * y + x


anchor_views = pytest.mark.parametrize(
    ("matrix", "column"), [(SAME, lambda x: x), (FLIP, lambda x: 32 - x)], ids=["same view", "flipped"]
)


@anchor_views
def test_rpn_poor_anchor_with_a_low_score(matrix, column):
    """The anchor at (64, 64) overlaps the pseudo box, which is the anchor at (72, 64), with IoU 56 / 72 = 0.78."""
    coarse = torch.tensor([[40.0, 32, 104, 96]])
    poor, best = anchor_row(column(8), 8), anchor_row(column(9), 8)
    teacher = FakeTeacher(coarse, torch.tensor([0.9]), coarse, {anchor_row(9, 8): 0.95})

    sparse, _ = labels_of(teacher, "sparse", "rpn", matrix)
    assert {poor, best} <= set(positives(sparse))
    dense, _ = labels_of(teacher, "dense", "rpn", matrix)
    assert positives(dense) == {best: 0}
    assert dense.background[0, poor]


@anchor_views
def test_rpn_precise_anchor_beside_a_badly_placed_pseudo_box(matrix, column):
    """The anchor at (64, 64) is all but the object's box; the pseudo box is 40 px off (IoU 24 / 104 = 0.23)."""
    truth, bad = torch.tensor([34.0, 32, 98, 96]), torch.tensor([[72.0, 32, 136, 96]])
    precise = anchor_row(column(8), 8)
    teacher = FakeTeacher(bad, torch.tensor([0.9]), bad, {anchor_row(8, 8): 0.95})
    grid = teacher.grid(CANVAS, torch.device("cpu"))
    assert paired_iou(grid.anchors[anchor_row(8, 8)], truth) > 0.9

    sparse, _ = labels_of(teacher, "sparse", "rpn", matrix)
    assert precise not in positives(sparse)
    assert sparse.background[0, precise]
    dense, _ = labels_of(teacher, "dense", "rpn", matrix)
    assert positives(dense) == {precise: 0}
    assert not dense.background[0, precise]
