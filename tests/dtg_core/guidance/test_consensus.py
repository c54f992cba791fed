"""Consensus within clusters: pencil cases, loops, and what each of the options makes of a student's lesson."""
from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_pair, make_views, tiny_detector
from oracles import iou

from dtg_core.anchors import anchor_grid
from dtg_core.config import StageRule
from dtg_core.guidance.consensus import class_shares, cluster_trust, consensus, peer_consensus
from dtg_core.guidance.dense import teacher_scores
from dtg_core.guidance.inverse_nms import best_scores
from dtg_core.guidance.paradigms import teach
from dtg_core.losses import dense_terms
from dtg_core.models.student import StudentModule, learn
from dtg_core.structures import Assignment, DenseGuidance, Members, Predictions, Rows, Unreduced

STAGES = [("gfl", "head"), ("faster_rcnn", "rpn"), ("faster_rcnn", "rcnn")]
CURES = {"consensus_rank": 0.1, "cluster_trust": True, "soft_background": True, "quality": "consensus", "share_classes": True}
MATRIX = torch.tensor([[-1.0, 0, 96], [0, 1, 3], [0, 0, 1]])
# A whole square, its upper and its left half (IoU 1/2 with the square and 1/3 with each other), and a box that is alone.
FOUR = Members(
    torch.zeros(4).long(),
    torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 5, 10], [0, 0, 10, 10]]),
    torch.tensor([0.5, 0.25, 0.25, 0.9]),
    torch.tensor([1, 1, 1, 0]),
    1,
)


def random_members(seed: int, count: int = 30, clusters: int = 6) -> Members:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 20
    box = torch.cat((corner, corner + 10 + torch.rand(count, 2, generator=generator) * 20), 1)
    score, cluster = torch.rand(count, generator=generator), torch.randint(0, clusters, (count,), generator=generator)
    return Members(torch.zeros(count).long(), box, score, cluster, 1)


def test_pencil_case():
    peers = [0.5, (0.5 / 2 + 0.25 / 3) / 0.75, (0.5 / 2 + 0.25 / 3) / 0.75, 0.0]
    assert peer_consensus(FOUR).tolist() == pytest.approx(peers)
    assert cluster_trust(FOUR, 3).tolist() == pytest.approx([0, sum(peers) / 3, 0])
    square = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60]])
    found = consensus(square, torch.zeros(3).long(), torch.tensor([1, 0, 1]), FOUR)
    assert found.tolist() == pytest.approx([0.5 + 0.25 / 2 + 0.25 / 2, 1, 0])


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_loop(seed):
    members, other = random_members(seed), random_members(seed + 100)
    boxes, image, cluster = other.box, other.image, other.cluster
    for p in range(len(boxes)):
        same = [m for m in range(30) if members.cluster[m] == cluster[p]]
        total = sum(float(members.score[m]) for m in same)
        expected = sum(float(members.score[m]) * iou(boxes[p], members.box[m]) for m in same) / max(total, 1e-6)
        assert consensus(boxes, image, cluster, members)[p].item() == pytest.approx(expected, abs=1e-5)
        peers = [m for m in range(30) if members.cluster[m] == members.cluster[p] and m != p]
        total = sum(float(members.score[m]) for m in peers)
        expected = sum(float(members.score[m]) * iou(members.box[p], members.box[m]) for m in peers) / max(total, 1e-6)
        assert peer_consensus(members)[p].item() == pytest.approx(expected, abs=1e-5)


def test_blocks_of_rows_change_nothing(monkeypatch):
    members, other = random_members(1), random_members(2)
    whole = peer_consensus(members), consensus(other.box, other.image, other.cluster, members)
    monkeypatch.setattr("dtg_core.boxes.BLOCK", 70)  # two rows of 30 at once
    blocks = peer_consensus(members), consensus(other.box, other.image, other.cluster, members)
    for mine, theirs in zip(whole, blocks, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_image_by_image_changes_nothing(monkeypatch):
    """Three clusters in each of four images, of which one has no member and another one no box."""
    members, other = random_members(1), random_members(2)
    image = torch.tensor([0] * 12 + [1] * 8 + [3] * 10)
    members = replace(members, image=image, cluster=members.cluster % 3 + 3 * image, images=4)
    boxes, image = other.box[12:], torch.tensor([1] * 6 + [3] * 12)
    cluster = other.cluster[12:] % 3 + 3 * image
    whole = peer_consensus(members), consensus(boxes, image, cluster, members)
    monkeypatch.setattr("dtg_core.boxes.CPU_BLOCK", 0)
    parts = peer_consensus(members), consensus(boxes, image, cluster, members)
    for mine, theirs in zip(whole, parts, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_nothing_and_boxes_without_area():
    none = torch.zeros(0).long()
    nothing = Members(none, torch.zeros(0, 4), torch.zeros(0), none, 2)
    assert peer_consensus(nothing).shape == consensus(nothing.box, none, none, nothing).shape == (0,)
    assert cluster_trust(nothing, 0).shape == (0,)
    flat = Members(torch.zeros(2).long(), torch.zeros(2, 4), torch.ones(2), torch.zeros(2).long(), 1)
    assert peer_consensus(flat).tolist() == [0, 0]


def test_class_shares_with_a_pencil():
    """Clusters of two, of one and of nobody; one that sees no class at all shares nothing out."""
    scores = torch.tensor([[0.6, 0.2], [0.2, 0.2], [0.1, 0.3], [0.0, 0.0]])
    shares = class_shares(scores, torch.tensor([1, 1, 0, 3]), 4)
    torch.testing.assert_close(shares, torch.tensor([[2 / 3, 1 / 3], [2 / 3, 1 / 3], [0.25, 0.75], [0, 0]]))
    assert class_shares(torch.zeros(0, 2), torch.zeros(0).long(), 0).shape == (0, 2)


def test_best_scores():
    scores = torch.tensor([[0.2, 0.7, 0.1, -1.0], [0.3, 0.9, 0.4, 0.5]])
    row = torch.tensor([[0, 0, 2, 1], [-1, -1, 1, 1]])
    expected = torch.tensor([[0.7, -1, 0.1], [-1, 0.5, -1]])
    torch.testing.assert_close(best_scores(scores, row, 3), expected)


def test_the_teachers_padding_has_no_score():
    """All eight anchors lead to the first one of the student; the right half of the canvas is padding, which looks like objects."""
    grid = anchor_grid((32, 64), (16,), 2.0, (1.0,), torch.device("cpu"))
    logits = torch.tensor([-2.0, -1, 3, 3, -3, -2, 3, 3]).view(1, 8, 1)
    labels = SimpleNamespace(partner=torch.zeros(1, 8, dtype=torch.int64), samples=grid)
    pair = SimpleNamespace(teacher=SimpleNamespace(sizes=torch.tensor([[32.0, 32.0]])))
    scores = teacher_scores(Predictions(grid, logits, logits), labels, pair)
    assert scores[0].tolist() == pytest.approx([torch.tensor(-1.0).sigmoid().item(), *[-1] * 7])


def test_trust_and_background_weigh_the_losses_but_not_the_divisors():
    dense = DenseGuidance(
        cluster=torch.tensor([0, 0, 1]), num_clusters=2, candidate=torch.arange(3), teacher_logit=torch.tensor([2.0, 0, 1]),
        weight=torch.tensor([0.5, 0.5, 1]), live_clusters=torch.tensor(2.0),
    )  # fmt: skip
    zero = torch.zeros(3).long()
    assignment = Assignment(zero, torch.arange(3), zero, torch.zeros(3, 4), torch.tensor([[False, False, False, True, True]]), dense)
    unreduced = Unreduced(
        torch.tensor([1.0, 2, 4]), torch.tensor([3.0, 5, 7]), torch.tensor([[0, 0, 0, 8.0, 16]]), torch.ones(3),
        torch.tensor(10.0), torch.tensor(20.0),
    )  # fmt: skip
    logits = torch.tensor([[0.0], [1], [2], [0], [0]]).unsqueeze(0)
    cured = replace(dense, trust=torch.tensor([0.5, 0.0]), background_weight=torch.tensor([[9.0, 9, 9, 0.5, 0.25]]))
    for normalization, cls, box, background, divisors in (
        ("cluster", (1 + 2) / 4, (3 + 5) / 4, 8, (2, 2, 3)), ("stage", (1 + 2) / 2, (3 + 5) / 2, 8, (10, 20, 10)),
    ):  # fmt: skip
        rule = StageRule(normalization=normalization)
        plain = dense_terms(unreduced, logits, assignment, rule)
        terms = dense_terms(unreduced, logits, replace(assignment, dense=cured), rule)
        totals = [terms[kind].total.item() for kind in ("cls", "box", "background")]
        assert totals == pytest.approx([cls, box, background])
        assert [terms[kind].count.item() for kind in ("cls", "box", "background")] == list(divisors)
        # The second cluster has one member and no divergence.
        assert terms["rank"].total.item() == pytest.approx(plain["rank"].total.item() / 2)
        assert plain["rank"].total > 0.1


def noisy(name: str, seed: int) -> torch.nn.Module:
    model = tiny_detector(name).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model


def lesson(name: str, stage: str, quantile: float = 0.9, **options):
    """(teacher, pair, predictions of the stage, dense supervision of the stage) with clusters of several members."""
    teacher, pair = noisy(name, 1), make_pair(2, 64, 96, MATRIX)
    with torch.no_grad():
        predictions = teacher.run(pair.teacher)[stage]
    scores = predictions.logits.amax(2).sigmoid()
    rule = StageRule(tau=float(scores.quantile(quantile)), nms_iou=0.4, **options)
    rules = dict.fromkeys(teacher.stages, StageRule("none")) | {stage: rule}
    return teacher, pair, predictions, rules, teach(teacher, pair, rules)[0][stage]


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_each_option_changes_its_own_part_only(name, stage):
    *_, plain = lesson(name, stage)
    for option, value in CURES.items():
        *_, cured = lesson(name, stage, **{option: value})
        ours, theirs = vars(cured.assignment.dense), vars(plain.assignment.dense)
        changed = {"consensus_rank": "rank_target", "cluster_trust": "trust", "soft_background": "background_weight",
                   "quality": "members", "share_classes": "shares"}[option]  # fmt: skip
        if changed == "shares" and stage == "rpn":  # it has one class
            changed = ""
        for field in ours:
            same = ours[field] is theirs[field] or (ours[field] is not None and theirs[field] is not None and torch.equal(
                torch.as_tensor(ours[field]), torch.as_tensor(theirs[field])))  # fmt: skip
            assert same == (field != changed), field
        assert not changed or theirs[changed] is None
        assert torch.equal(cured.assignment.background, plain.assignment.background)


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_options_against_loops(name, stage):
    teacher, pair, predictions, rules, cured = lesson(name, stage, **CURES)
    told = cured.assignment
    dense, members = told.dense, told.dense.members
    scores = predictions.logits.amax(2).sigmoid()
    usable = predictions.samples.usable(pair.teacher.sizes)
    image, sample = (usable & (scores > rules[stage].tau)).nonzero(as_tuple=True)
    label = predictions.logits[image, sample].argmax(1)
    boxes = teacher.stages[stage].decode(predictions, Rows(image, sample, label))
    boxes = torch.stack((boxes[:, 0].clamp(0, 96), boxes[:, 1].clamp(0, 64), boxes[:, 2].clamp(0, 96), boxes[:, 3].clamp(0, 64)), 1)
    assert len(members.cluster) == len(image) > dense.num_clusters
    torch.testing.assert_close(members.score, scores[image, sample])
    # Mirrored and 3 px lower.
    moved = torch.stack((96 - boxes[:, 2], boxes[:, 1] + 3, 96 - boxes[:, 0], (boxes[:, 3] + 3).clamp(max=64)), 1)
    torch.testing.assert_close(members.box, moved, atol=1e-3, rtol=1e-4)

    in_teacher = Members(image, boxes, members.score, members.cluster, 2)
    peers, agreed = peer_consensus(in_teacher), consensus(boxes, image, members.cluster, in_teacher)
    torch.testing.assert_close(dense.rank_target, agreed[dense.candidate] / 0.1, atol=1e-3, rtol=1e-3)
    for j in range(dense.num_clusters) if stage != "rpn" else ():
        every = predictions.logits[image, sample].sigmoid()[members.cluster == j].mean(0)
        for row in (dense.cluster == j).nonzero().flatten():
            torch.testing.assert_close(dense.shares[row], every / every.sum(), atol=1e-5, rtol=1e-4)
    for j in range(dense.num_clusters):
        assert dense.trust[j].item() == pytest.approx(peers[members.cluster == j].mean().item(), abs=1e-4)
    assert torch.equal(members.cluster[dense.candidate], dense.cluster)

    # The student predicts boxes of its own; its class target is their consensus with the members, and carries no gradient.
    student = noisy(name, 2)
    views = pair.student
    out, learnt = learn(student, views, {stage: cured})[stage]
    own = student.stages[stage].decode(out, learnt.rows)
    expected = consensus(own.detach(), learnt.image, dense.cluster, members)
    torch.testing.assert_close(learnt.quality, expected)
    assert not learnt.quality.requires_grad
    assert 0 < expected.max() <= 1

    # Background that the teacher half takes for an object counts less.
    weight = dense.background_weight[told.background]
    assert (weight > 1 - rules[stage].tau - 1e-6).all()
    assert weight.min() < weight.max() < 1


@pytest.mark.parametrize("name", ["gfl", "faster_rcnn"])
@pytest.mark.parametrize("tau", [0.01, 0.9999], ids=["many", "no candidate"])
def test_a_step_with_all_options_is_finite(name, tau):
    teacher, student, pair = noisy(name, 1), noisy(name, 2).train(), make_pair(2, 64, 96, MATRIX)
    rules = dict.fromkeys(teacher.stages, StageRule(tau=tau, **CURES))
    supervision, _ = teach(teacher, pair, rules)
    labeled = make_views(1, 64, 64, [[[4.0, 4, 30, 34]]])
    terms = StudentModule(student, rules)(labeled, pair.student, supervision)
    total = sum(term.total / term.count.clamp(min=1) for term in terms.values())
    total.backward()
    assert total.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters() if parameter.grad is not None)
