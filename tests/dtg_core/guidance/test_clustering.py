"""Clusters: NMS as a grouping, against the textbook loop."""
from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from conftest import make_views, tiny_detector
from oracles import LargestTensor, greedy_nms
from torchvision.ops import batched_nms

from dtg_core.config import StageRule
from dtg_core.engine.waits import device_work
from dtg_core.guidance.clustering import above_tau, cluster_nms, select_candidates
from dtg_core.structures import Clusters, Predictions, Proposals


def one_image(boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor, threshold: float) -> Clusters:
    return cluster_nms(boxes, scores, groups, torch.zeros_like(groups), 1, threshold)


def random_case(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    count = rng.randint(1, 30)
    corner = torch.rand(count, 2, generator=generator) * 60
    boxes = torch.cat((corner, corner + torch.rand(count, 2, generator=generator) * 40), 1)
    scores = torch.rand(count, generator=generator)
    if seed % 2:  # ties
        scores = (scores * 4).round() / 4
    if seed % 3 == 0:  # duplicates
        boxes[count // 2 :] = boxes[: count - count // 2].clone()
    if seed % 5 == 0:  # empty boxes
        boxes[0, 2:] = boxes[0, :2]
    groups = torch.randint(0, rng.randint(1, 4), (count,), generator=generator)
    return boxes, scores, groups, rng.choice([0.3, 0.5, 0.6, 0.7])


@pytest.mark.parametrize("block", range(10))
def test_equals_the_greedy_loop_and_torchvision(block):
    for seed in range(100 * block, 100 * block + 100):
        boxes, scores, groups, threshold = random_case(seed)
        clusters = one_image(boxes, scores, groups, threshold)
        cluster, keep = greedy_nms(boxes, scores, groups, threshold)
        assert clusters.keep.tolist() == keep
        assert clusters.cluster.tolist() == cluster
        assert set(batched_nms(boxes, scores, groups, threshold).tolist()) == set(keep)


def batch_case(seed: int, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes, scores, groups and images of a batch; scores and boxes are often equal, within an image and between images."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    corner = torch.randint(0, 6, (len(image), 2), generator=generator) * 4.0
    boxes = torch.cat((corner, corner + torch.randint(2, 6, (len(image), 2), generator=generator) * 5.0), 1)
    groups = image * 3 + torch.randint(0, 3, (len(image),), generator=generator)
    return boxes, torch.randint(0, 4, (len(image),), generator=generator) / 4, groups, image


@pytest.mark.parametrize("counts", [[40, 0, 25, 1, 60], [0, 0, 30, 0], [0, 0, 0], [5, 5]])
def test_image_by_image_gives_the_clusters_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch, counts: list[int]) -> None:
    """Also in the same order: best score first over the batch, of equal scores the lower index."""
    monkeypatch.setattr("dtg_core.boxes.CPU_BLOCK", 0)
    for seed in range(50):
        boxes, scores, groups, image = batch_case(seed, counts)
        found = cluster_nms(boxes, scores, groups, image, len(counts), 0.5)
        whole = cluster_nms(boxes, scores, groups, image, 1, 0.5)  # as of a single image, all at once
        assert torch.equal(found.keep, whole.keep)
        assert torch.equal(found.cluster, whole.cluster)
        cluster, keep = greedy_nms(boxes, scores, groups, 0.5)
        assert (found.cluster.tolist(), found.keep.tolist()) == (cluster, keep)


def test_overlaps_of_different_images_are_not_computed_on_a_cpu() -> None:
    """A matrix of all boxes by all clusters is 16 times as large for 4 times as many images."""
    largest = []
    for images in (2, 8):
        boxes, scores, groups, image = batch_case(0, [300] * images)
        boxes = torch.rand(len(boxes), 2, generator=torch.Generator().manual_seed(1)).repeat(1, 2) * 900 + boxes
        with LargestTensor() as found:
            clusters = cluster_nms(boxes, scores, groups, image, images, 0.5)
        assert clusters.num_clusters > 200 * images
        largest.append(found.elements)
    assert largest[1] < 1.2 * largest[0]


def test_waits_for_a_device_do_not_grow_with_the_images() -> None:
    waits = []
    for images in (2, 8):
        boxes, scores, groups, image = batch_case(0, [300] * images)
        with device_work() as work:
            cluster_nms(boxes, scores, groups, image, images, 0.5)
        waits.append(work.waits)
    assert waits[0] == waits[1] == {"torchvision::nms": 1}


def test_clusters_are_found_in_blocks_of_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    corner = torch.rand(300, 2, generator=torch.Generator().manual_seed(0)) * 500
    boxes, scores, groups = torch.cat((corner, corner + 40), 1), torch.rand(300), torch.arange(300) % 2
    expected = one_image(boxes, scores, groups, 0.5)
    monkeypatch.setattr("dtg_core.boxes.BLOCK", 4 * expected.num_clusters)  # 4 boxes
    with LargestTensor() as largest:
        clusters = one_image(boxes, scores, groups, 0.5)
    assert torch.equal(clusters.cluster, expected.cluster)
    assert torch.equal(clusters.keep, expected.keep)
    assert largest.elements <= 4 * 4 * expected.num_clusters  # boxes and corners of overlaps have 4 and 2 numbers


def test_pencil_case():
    # b overlaps a by 0.6 and joins it; c overlaps b by 0.6 but a by only 1/3, and b is gone, so c stays.
    boxes = torch.tensor([[0.0, 0, 100, 10], [25, 0, 125, 10], [50, 0, 150, 10]])
    clusters = one_image(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3).long(), 0.5)
    assert clusters.cluster.tolist() == [0, 0, 1]
    assert clusters.keep.tolist() == [0, 2]


def test_many_groups_far_from_the_origin_do_not_change_overlaps():
    boxes = torch.tensor([[1000.0, 1000, 1010, 1010], [1000, 1004.9, 1010, 1010]])  # IoU 0.51
    groups = torch.arange(400).repeat_interleave(2)
    clusters = one_image(boxes.repeat(400, 1), torch.tensor([0.9, 0.8]).repeat(400), groups, 0.505)
    assert clusters.num_clusters == 400
    assert torch.equal(clusters.keep[clusters.cluster], torch.arange(400).repeat_interleave(2) * 2)


def test_order_of_the_candidates_does_not_matter():
    boxes, scores, groups, threshold = random_case(4)
    scores = torch.rand(len(scores), generator=torch.Generator().manual_seed(9))
    shuffle = torch.randperm(len(boxes), generator=torch.Generator().manual_seed(1))
    clusters = one_image(boxes, scores, groups, threshold)
    shuffled = one_image(boxes[shuffle], scores[shuffle], groups[shuffle], threshold)
    assert torch.equal(shuffled.cluster, clusters.cluster[shuffle])


def test_nothing():
    clusters = one_image(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), 0.5)
    assert clusters.num_clusters == 0
    assert clusters.cluster.shape == (0,)


def test_two_thousand_alike_are_one_cluster_of_the_first():
    """Fault 67: all candidates in one cluster, with equal scores."""
    boxes = torch.tensor([[5.0, 5, 60, 70]]).repeat(2000, 1)
    clusters = one_image(boxes, torch.full((2000,), 0.7), torch.zeros(2000).long(), 0.5)
    assert clusters.keep.tolist() == [0]
    assert clusters.cluster.tolist() == [0] * 2000


def test_equal_scores_do_not_pass_the_limit_of_candidates():
    """Fault 67: half precision makes many equal scores; of those at the limit the first samples are taken."""
    views = make_views(2, 64, 64)
    stage, predictions = tiny_detector("gfl").stages["head"], tiny_detector("gfl").run(views)["head"]
    logits = torch.full_like(predictions.logits, 1.0)
    logits[0, 7, 1] = logits[0, 5, 0] = 2.0
    predictions = replace(predictions, logits=logits)
    found = select_candidates(stage, predictions, views.sizes, StageRule(tau=0.5, max_candidates=6))
    assert found.sample[found.image == 0].tolist() == [0, 1, 2, 3, 5, 7]
    assert found.sample[found.image == 1].tolist() == [0, 1, 2, 3, 4, 5]
    assert found.foreground.all()  # what is left out is no background either


@pytest.mark.parametrize(("limit", "kept"), [(2.0, 2.0), (1.5, 2.0), (1.0, 2.0), (0.5, 1.0)])
def test_the_limit_of_candidates_is_per_image(limit: float, kept: float) -> None:
    """In two images of A candidates each, with limits of ``limit`` x A."""
    detector, views = tiny_detector("gfl"), make_views(2, 64, 64)
    predictions = detector.run(views)["head"]
    number = predictions.logits.shape[1]
    predictions = replace(predictions, logits=torch.full_like(predictions.logits, 1.0))
    rule = StageRule(tau=0.5, max_candidates=int(limit * number))
    found = select_candidates(detector.stages["head"], predictions, views.sizes, rule)
    assert len(found.image) == int(kept * number)


def test_only_candidates_count_for_their_limit():
    """With a threshold for each class, better samples may be no candidates."""
    stage, predictions = constant_case([[2.0, -9.0], [2.0, -9.0], [-9.0, 1.0], [-9.0, 0.5], [-9.0, 0.8]], [[1.0, 1, 9, 9]] * 5)
    rule = StageRule(max_candidates=2)
    found = select_candidates(stage, predictions, torch.tensor([[40, 60]]), rule, torch.tensor([0.95, 0.5]))
    assert found.sample.tolist() == [2, 4]


@pytest.mark.parametrize("threshold", [None, torch.tensor([0.4, 0.5, 0.6])])
def test_a_score_that_is_not_a_number_is_neither_candidate_nor_background(threshold: torch.Tensor | None) -> None:
    detector, views = tiny_detector("gfl").eval(), make_views(1, 64, 64)
    with torch.no_grad():
        predictions = detector.run(views)["head"]
    logits = torch.full_like(predictions.logits, -1.0)
    logits[0, 3, 0], logits[0, 4, 1] = 1.0, torch.nan
    rule = StageRule(tau=0.5)
    found = select_candidates(detector.stages["head"], replace(predictions, logits=logits), views.sizes, rule, threshold)
    assert found.sample.tolist() == [3]
    assert not found.background[0, [3, 4]].any()
    assert found.background.sum() == logits.shape[1] - 2


def constant_case(logits: list[list[float]], boxes: list[list[float]]):
    """A stage whose samples, their logits [A, C] and decoded boxes [A, 4] are given, in an image of 40 x 60 px."""
    proposals = Proposals(torch.tensor([boxes]), torch.ones(1, len(boxes), dtype=torch.bool))
    predictions = Predictions(proposals, torch.tensor([logits]), torch.zeros(1, len(boxes), 0))

    class Given:
        num_classes = len(logits[0])

        def decode(self, predictions, rows):
            return predictions.samples.boxes[rows.image, rows.sample]

        def groups(self, samples, rows):
            return rows.image * self.num_classes + rows.label

    return Given(), predictions


def test_candidates_and_background_with_a_pencil():
    """A score of exactly tau is none, one between both thresholds is neither, and boxes end at the image's edge."""
    stage, predictions = constant_case(
        [[0.0, -9.0], [0.1, -9.0], [-9.0, -1.0], [-4.0, -9.0], [-9.0, 2.0]],
        [[1.0, 1, 9, 9], [-5, 2, 70, 50], [1, 1, 9, 9], [1, 1, 9, 9], [10, 5, 20, 15]],
    )
    rule = StageRule(tau=0.5, background_tau=0.1)
    found = select_candidates(stage, predictions, torch.tensor([[40, 60]]), rule)
    assert found.foreground.tolist() == [[False, True, False, False, True]]
    assert found.background.tolist() == [[False, False, False, True, False]]
    assert (found.image.tolist(), found.sample.tolist(), found.label.tolist()) == ([0, 0], [1, 4], [0, 1])
    assert found.logit.tolist() == pytest.approx([0.1, 2.0])
    assert found.box.tolist() == [[0, 2, 60, 40], [10, 5, 20, 15]]
    everything = select_candidates(stage, predictions, torch.tensor([[40, 60]]), replace(rule, background_tau=None))
    assert everything.background.tolist() == [[True, False, True, True, False]]


def test_padding_is_neither_candidate_nor_background():
    """However likely the teacher finds it; the network sees padding too."""
    stage, predictions = constant_case([[2.0], [2.0], [-2.0], [-2.0]], [[1.0, 1, 9, 9]] * 4)
    predictions = replace(predictions, samples=replace(predictions.samples, valid=torch.tensor([[True, False, True, False]])))
    for threshold in (None, torch.tensor([0.5])):
        found = select_candidates(stage, predictions, torch.tensor([[40, 60]]), StageRule(tau=0.5), threshold)
        assert found.sample.tolist() == [0]
        assert found.foreground.tolist() == [[True, False, False, False]]
        assert found.background.tolist() == [[False, False, True, False]]


def test_each_class_has_its_own_threshold():
    """Scores of 0.57 and 0.27: the first is too low for its class, the second high enough for its own."""
    stage, predictions = constant_case([[0.3, -9.0], [-9.0, -1.0]], [[1.0, 1, 9, 9]] * 2)
    found = select_candidates(stage, predictions, torch.tensor([[40, 60]]), StageRule(tau=0.9), torch.tensor([0.6, 0.2]))
    assert (found.sample.tolist(), found.label.tolist()) == ([1], [1])
    assert found.background.tolist() == [[True, False]]


def test_an_overlap_of_exactly_the_threshold_suppresses_nothing():
    """The last box has an IoU of 0.5 with the first and of 0.8 with the second, which alone suppresses it."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 1, 10, 5], [0, 0, 10, 5]])
    clusters = one_image(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3).long(), 0.5)
    assert clusters.keep.tolist() == [0, 1]
    assert clusters.cluster.tolist() == [0, 1, 1]


def lenient(stage, predictions, rule: StageRule, threshold: torch.Tensor | None = None):
    """Candidates and clusters of ``constant_case`` as dense guidance makes them with a ``member_tau``."""
    candidates = select_candidates(stage, predictions, torch.tensor([[40, 60]]), rule, threshold)
    groups = stage.groups(predictions.samples, candidates.rows)
    clusters = cluster_nms(candidates.box, candidates.logit, groups, candidates.image, 1, rule.nms_iou)
    return above_tau(candidates, clusters, rule, threshold)


def test_members_need_less_than_their_cluster():
    """Two of three objects have a score above their class' tau; a likely sample of the third is background, as are unlikely ones."""
    one, two, three = [0.0, 0, 10, 10], [20.0, 0, 30, 10], [40.0, 0, 50, 10]
    stage, predictions = constant_case(
        [[-1.0, -9.0], [2.0, -9.0], [-3.0, -9.0], [-9.0, 0.5], [-9.0, 0.1], [0.5, -9.0], [0.4, -9.0]],
        [one, one, one, two, two, three, three],
    )
    rule, threshold = StageRule(member_tau=0.2), torch.tensor([0.8, 0.6])
    candidates, clusters = lenient(stage, predictions, rule, threshold)
    assert candidates.sample.tolist() == [0, 1, 3, 4]
    assert candidates.label.tolist() == [0, 0, 1, 1]
    assert candidates.logit.tolist() == pytest.approx([-1.0, 2.0, 0.5, 0.1])
    assert candidates.box.tolist() == [one, one, two, two]
    assert (clusters.cluster.tolist(), clusters.keep.tolist()) == ([0, 0, 1, 1], [1, 2])
    assert candidates.foreground.tolist() == [[True, True, False, True, True, False, False]]
    assert candidates.background.tolist() == [[False, False, True, False, False, True, True]]
    ignored = replace(rule, background_tau=0.6)  # sigmoid(0.4) = 0.599, sigmoid(0.5) = 0.622
    assert lenient(stage, predictions, ignored, threshold)[0].background.tolist() == [[False, False, True, False, False, False, True]]


@pytest.mark.parametrize("seed", range(20))
def test_likely_clusters_lose_no_member_by_unlikely_candidates(seed):
    """Against clusters of the likely candidates alone: the same boxes are kept, and those candidates stay where they were. And
    as many clusters as tau says, with member_tau above tau, too."""
    boxes, scores, groups, threshold = random_case(seed)
    logits = torch.full((len(boxes), 4), -9.0)
    logits[torch.arange(len(boxes)), groups] = scores.logit(1e-6)
    stage, predictions = constant_case(logits.tolist(), (boxes % 40).sort(1).values.tolist())
    rule = StageRule(tau=0.6, member_tau=0.1, nms_iou=threshold)
    candidates, clusters = lenient(stage, predictions, rule)
    few, expected = lenient(stage, predictions, replace(rule, member_tau=0.9))
    assert candidates.sample[clusters.keep].tolist() == few.sample[expected.keep].tolist()
    place = {sample: number for number, sample in enumerate(candidates.sample.tolist())}
    rows = [place[sample] for sample in few.sample.tolist()]
    assert clusters.cluster[rows].tolist() == expected.cluster.tolist()
    assert not (candidates.foreground & candidates.background).any()
    assert (candidates.foreground | candidates.background).all()


def test_nothing_likely_leaves_no_cluster():
    stage, predictions = constant_case([[-1.0], [-1.0], [-9.0]], [[1.0, 1, 9, 9]] * 3)
    candidates, clusters = lenient(stage, predictions, StageRule(tau=0.5, member_tau=0.1))
    assert (len(candidates.image), clusters.num_clusters) == (0, 0)
    assert candidates.background.all()
