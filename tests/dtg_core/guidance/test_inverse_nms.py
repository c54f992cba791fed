"""Inverse NMS Clustering: labels, targets and background on pencil cases, and Eqs. 2 to 6 against a loop."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_pair
from oracles import cluster_losses, greedy_nms

from dtg_core.config import Collisions, StageRule
from dtg_core.guidance.clustering import cluster_nms
from dtg_core.guidance.inverse_nms import inverse_nms
from dtg_core.losses import dense_terms, weigh
from dtg_core.structures import Assignment, Candidates, LossName, Proposals, Unreduced


def make_candidates(
    rows: list[tuple[int, int, int, float, list[float]]], images: int, samples: int
) -> Candidates:
    """Candidates from (image, sample, label, logit, box); every other sample is background."""
    image = torch.tensor([row[0] for row in rows], dtype=torch.int64)
    sample = torch.tensor([row[1] for row in rows], dtype=torch.int64)
    foreground = torch.zeros(images, samples, dtype=torch.bool)
    foreground[image, sample] = True
    return Candidates(
        image, sample, torch.tensor([row[2] for row in rows], dtype=torch.int64), torch.tensor([row[3] for row in rows]),
        torch.tensor([row[4] for row in rows]).reshape(-1, 4), foreground, ~foreground,
    )


def clustered(candidates: Candidates, threshold: float = 0.5):
    groups = candidates.image * 10 + candidates.label
    return cluster_nms(candidates.box, candidates.logit, groups, candidates.image, len(candidates.foreground), threshold)


def assign(
    candidates: Candidates, row: torch.Tensor, samples: int, matrix: torch.Tensor | None = None, collisions: Collisions = "best"
) -> Assignment:
    pair = make_pair(row.shape[0], 100, 100, matrix)
    boxes = torch.zeros(row.shape[0], samples, 4)
    proposals = Proposals(boxes, torch.ones(boxes.shape[:2], dtype=torch.bool))
    return inverse_nms(candidates, clustered(candidates), row, proposals, pair, StageRule(collisions=collisions))


THREE = [(0, 1, 2, 2.0, [10.0, 10, 30, 30]), (0, 2, 2, 1.0, [10.0, 10, 30, 28]), (0, 4, 5, 0.5, [60.0, 60, 90, 90])]


def test_members_get_the_class_and_the_kept_box_of_their_cluster():
    result = assign(make_candidates(THREE, 1, 6), torch.arange(6)[None], 6)
    assert result.sample.tolist() == [1, 2, 4]
    assert result.label.tolist() == [2, 2, 5]
    assert result.box.tolist() == [[10, 10, 30, 30], [10, 10, 30, 30], [60, 60, 90, 90]]
    assert result.background.tolist() == [[True, False, False, True, False, True]]
    assert result.dense is not None
    assert result.dense.cluster.tolist() == [0, 0, 1]
    assert result.dense.weight.tolist() == [0.5, 0.5, 1.0]
    assert (result.dense.live_clusters, len(result.dense.weight)) == (2, 3)


def test_targets_are_moved_into_the_students_view_and_clipped():
    matrix = torch.tensor([[-2.0, 0, 100], [0, 2, 0], [0, 0, 1]])  # mirrored, twice as large
    result = assign(make_candidates(THREE[:2], 1, 6), torch.arange(6)[None], 6, matrix)
    assert result.box[0].tolist() == [40, 20, 80, 60]
    gone = assign(make_candidates(THREE[2:], 1, 6), torch.arange(6)[None], 6, matrix)
    assert gone.sample.tolist() == []  # x 60 to 90 goes to -80 to -20
    assert not gone.background[0, 4]  # a candidate is never background


def test_a_lost_partner_leaves_the_rest_of_the_cluster_with_its_weight():
    row = torch.tensor([[0, -1, 2, 3, 4, 5]])
    result = assign(make_candidates(THREE, 1, 6), row, 6)
    assert result.sample.tolist() == [2, 4]
    assert result.box[0].tolist() == [10, 10, 30, 30]  # the kept box teaches although its own sample is lost
    assert result.dense.weight.tolist() == [1.0, 1.0]


def test_collisions_go_to_the_higher_score_and_candidates_beat_background():
    row = torch.tensor([[3, 3, 3, 3, 4, 5]])  # four teacher samples meet in student sample 3
    result = assign(make_candidates(THREE, 1, 6), row, 6)
    assert result.sample.tolist() == [3, 4]
    assert result.dense.teacher_logit.tolist() == [2.0, 0.5]
    assert result.background.tolist() == [[False, False, False, False, False, True]]  # 0 to 2 are hit by no one: ignored


def test_all_that_collide_may_teach():
    """Samples 1 and 2 of the first cluster and the background of 0 and 3 meet in student sample 3; 4 and 5 are alone."""
    candidates, row = make_candidates(THREE, 1, 6), torch.tensor([[3, 3, 3, 3, 4, 5]])
    result = assign(candidates, row, 6, collisions="all")
    assert result.sample.tolist() == [3, 3, 4]
    assert result.label.tolist() == [2, 2, 5]
    assert result.dense.candidate.tolist() == [0, 1, 2]
    assert result.dense.weight.tolist() == [0.5, 0.5, 1.0]
    assert result.background.tolist() == [[False, False, False, True, False, True]]
    alone = torch.arange(6)[None]
    one, every = assign(candidates, alone, 6), assign(candidates, alone, 6, collisions="all")
    assert one.sample.tolist() == every.sample.tolist()
    assert one.background.tolist() == every.background.tolist()


def test_what_the_teacher_takes_for_neither_teaches_nothing():
    """Padding, scores between both thresholds and scores that are no numbers; a partner of one of them stays background if
    another sample says so."""
    candidates = make_candidates(THREE, 1, 6)
    candidates = replace(candidates, background=torch.tensor([[True, False, False, False, False, False]]))
    assert assign(candidates, torch.arange(6)[None], 6).background.tolist() == [[True, False, False, False, False, False]]
    shared = torch.tensor([[5, 1, 2, 5, 4, 5]])
    assert assign(candidates, shared, 6).background.tolist() == [[False, False, False, False, False, True]]


def test_images_do_not_mix():
    rows = [(0, 0, 1, 1.0, [0.0, 0, 10, 10]), (1, 0, 1, 2.0, [0.0, 0, 10, 10])]
    result = assign(make_candidates(rows, 2, 2), torch.arange(2).repeat(2, 1), 2)
    assert result.dense.live_clusters == 2
    assert result.image.tolist() == [0, 1]


def test_members_whose_sample_is_far_from_the_target_are_ignored():
    """The IoU of the student's samples with the kept box is 1, 0.6 and 0.5; the last neither learns the object nor background."""
    rows = [(0, sample, 2, 2.0 - sample, [10.0, 10, 30, 30]) for sample in range(3)]
    candidates = make_candidates(rows, 1, 4)
    boxes = torch.tensor([[[10.0, 10, 30, 30], [10, 10, 30, 22], [10, 10, 30, 20], [10, 10, 30, 30]]])
    samples, pair = Proposals(boxes, torch.ones(1, 4, dtype=torch.bool)), make_pair(1, 100, 100)
    for least, kept in ((0.0, [0, 1, 2]), (0.5, [0, 1, 2]), (0.51, [0, 1]), (0.61, [0])):
        result = inverse_nms(candidates, clustered(candidates), torch.arange(4)[None], samples, pair, StageRule(member_iou=least))
        assert result.sample.tolist() == kept
        assert result.background.tolist() == [[False, False, False, True]]
        assert result.dense.weight.tolist() == pytest.approx([1 / len(kept)] * len(kept))


def test_members_whose_sample_fits_worse_than_the_best_of_their_cluster_are_background():
    """The student's samples overlap the first target by 0.6, 0.5 and 0.3, the second, which no sample fits well, by 0.2 and 0.1.
    A sample that another member reaches, too, is no background."""
    rows = [(0, sample, 2, 2.0 - sample, [10.0, 10, 30, 30]) for sample in range(3)]
    rows += [(0, sample, 2, 2.0 - sample, [60.0, 60, 80, 80]) for sample in (3, 4)]
    candidates = make_candidates(rows, 1, 6)
    boxes = torch.tensor([[[10.0, 10, 30, 22], [10, 10, 30, 20], [10, 10, 30, 16], [60, 60, 80, 64], [60, 60, 80, 62], [0, 0, 1, 1]]])
    samples, pair = Proposals(boxes, torch.ones(1, 6, dtype=torch.bool)), make_pair(1, 100, 100)
    for share, kept, background in ((0.4, [0, 1, 2, 3, 4], [5]), (0.6, [0, 1, 3], [2, 4, 5]), (0.9, [0, 3], [1, 2, 4, 5])):
        rule = StageRule(member_share=share)
        result = inverse_nms(candidates, clustered(candidates), torch.arange(6)[None], samples, pair, rule)
        assert result.sample.tolist() == kept
        assert result.background[0].nonzero().squeeze(1).tolist() == background
    rule, shared = StageRule(member_share=0.6), torch.tensor([[0, 1, 2, 3, 3, 5]])  # row 4 now has the sample of row 3
    result = inverse_nms(candidates, clustered(candidates), shared, samples, pair, rule)
    assert result.sample.tolist() == [0, 1, 3]
    assert result.background[0].nonzero().squeeze(1).tolist() == [2, 5]
    lost = torch.tensor([[-1, 1, 2, 3, 4, 5]])  # the best one has no sample, so the others are measured by the second
    result = inverse_nms(candidates, clustered(candidates), lost, samples, pair, rule)
    assert result.sample.tolist() == [1, 2, 3]
    assert result.background[0].nonzero().squeeze(1).tolist() == [4, 5]


@pytest.mark.parametrize("rule", [StageRule(member_iou=0.5), StageRule(member_share=0.5)])
def test_no_members_to_choose_from(rule: StageRule) -> None:
    samples, none = Proposals(torch.zeros(1, 4, 4), torch.ones(1, 4, dtype=torch.bool)), make_candidates([], 1, 4)
    result = inverse_nms(none, clustered(none), torch.arange(4)[None], samples, make_pair(1, 100, 100), rule)
    assert len(result.sample) == 0
    assert result.background.all()


def test_a_member_that_may_not_teach_leaves_its_sample_to_another():
    """Both reach student sample 0, which lies on the second one's box; the first has the higher score and is far away."""
    candidates = make_candidates([(0, 0, 2, 2.0, [60.0, 60, 90, 90]), (0, 1, 5, 1.0, [10.0, 10, 30, 30])], 1, 2)
    samples = Proposals(torch.tensor([[[10.0, 10, 30, 30], [0, 0, 5, 5]]]), torch.ones(1, 2, dtype=torch.bool))
    partner, pair = torch.tensor([[0, 0]]), make_pair(1, 100, 100)
    for least, label in ((0.0, 2), (0.5, 5)):
        result = inverse_nms(candidates, clustered(candidates), partner, samples, pair, StageRule(member_iou=least))
        assert (result.sample.tolist(), result.label.tolist()) == ([0], [label])


def test_no_candidates():
    result = assign(make_candidates([], 2, 3), torch.arange(3).repeat(2, 1), 3)
    assert result.box.shape == (0, 4)
    assert result.background.all()
    assert result.dense.live_clusters == 0


@pytest.mark.parametrize("seed", range(20))
def test_equations_2_to_6_against_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    count, samples, images = 25, 40, 2
    corner = torch.rand(count, 2, generator=generator) * 40
    box = torch.cat((corner, corner + 20 + torch.rand(count, 2, generator=generator) * 20), 1)
    place = torch.randperm(images * samples, generator=generator)[:count]
    logit = torch.randn(count, generator=generator)
    rows = [
        (int(place[i]) // samples, int(place[i]) % samples, i % 3, float(logit[i]), box[i].tolist()) for i in range(count)
    ]
    candidates = make_candidates(rows, images, samples)
    row = torch.stack([torch.randperm(samples, generator=generator) for _ in range(images)])
    row[torch.rand(row.shape, generator=generator) < 0.2] = -1
    result = assign(candidates, row, samples)

    logits = torch.randn(images, samples, 3, generator=generator, requires_grad=True)
    assigned = len(result.sample)
    classification, regression = torch.rand(2, assigned, generator=generator)
    background = torch.rand(images, samples, generator=generator) * result.background
    unreduced = Unreduced(
        classification, regression, background, torch.ones(assigned), torch.tensor(1.0), torch.tensor(1.0)
    )
    rule = StageRule(temperature=0.7, rank_weight=3.0)
    terms = dense_terms(unreduced, logits, result, rule)
    losses = {LossName("unlabeled", "head", name): term.total / term.count.clamp(min=1) for name, term in terms.items()}

    # The loop: group the living candidates by the textbook NMS, then sum the equations one by one.
    cluster, keep = greedy_nms(candidates.box, candidates.logit, candidates.image * 10 + candidates.label, 0.5)
    members: dict[int, list[int]] = {}
    partner_logits, teacher_logits, targets = [], [], []
    for i, (image, sample, label, *_) in enumerate(rows):
        partner = int(row[image, sample])
        if partner < 0:
            continue
        place = next(p for p in range(assigned) if (result.image[p], result.sample[p]) == (image, partner))
        members.setdefault(cluster[i], []).append(place)
        assert result.label[place] == label
        targets.append((place, box[keep[cluster[i]]]))
    for p in range(assigned):
        partner_logits.append(float(logits.detach()[result.image[p], result.sample[p], result.label[p]]))
        teacher_logits.append(float(result.dense.teacher_logit[p]))
    for place, target in targets:
        torch.testing.assert_close(result.box[place], target)
    cls, reg, rank = cluster_losses(
        classification.tolist(), regression.tolist(), partner_logits, teacher_logits, list(members.values()), 0.7
    )
    assert losses["unlabeled", "head", "cls"].item() == pytest.approx(cls, rel=1e-5)
    assert losses["unlabeled", "head", "box"].item() == pytest.approx(reg, rel=1e-5)
    assert losses["unlabeled", "head", "rank"].item() == pytest.approx(rank, rel=1e-5)
    below = float(background.sum()) / assigned
    assert losses["unlabeled", "head", "background"].item() == pytest.approx(below, rel=1e-5)
    total = weigh(losses, {"head": rule}, 4.0)
    assert total.item() == pytest.approx(4 * (cls + reg + 3 * rank + below), rel=1e-5)


def test_switches_leave_out_their_terms():
    candidates = make_candidates(THREE, 1, 6)
    result = assign(candidates, torch.arange(6)[None], 6)
    logits = torch.zeros(1, 6, 6)
    unreduced = Unreduced(torch.ones(3), torch.ones(3), torch.zeros(1, 6), torch.ones(3), torch.ones(()), torch.ones(()))
    names = {
        switch: set(dense_terms(unreduced, logits, result, StageRule(**{switch: False})))
        for switch in ("classification", "box", "rank")
    }
    assert names == {"classification": {"box", "rank"}, "box": {"cls", "background", "rank"}, "rank": {"cls", "background", "box"}}
