"""Losses of the second stage against torchvision and formulas written out."""
from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, one_hot
from torchvision.ops import sigmoid_focal_loss

from dtg_core.anchors import anchor_grid
from dtg_core.deltas import encode
from dtg_core.focal import sigmoid_focal
from dtg_core.losses import ordinary_terms
from dtg_core.structures import Assignment, DenseGuidance, Predictions, Proposals, Targets, Unreduced
from faster_rcnn_dtg.config import RCNNConfig, RPNConfig
from faster_rcnn_dtg.losses import log_odds, softmax_focal
from faster_rcnn_dtg.rcnn import RCNNStage
from faster_rcnn_dtg.rpn import RPNStage

STDS = (0.1, 0.1, 0.2, 0.2)


def test_sigmoid_focal_equals_torchvisions() -> None:
    logits = torch.randn(50, 4, requires_grad=True)
    target = (torch.rand(50, 4) > 0.5).float()
    torch.testing.assert_close(sigmoid_focal(logits, target), sigmoid_focal_loss(logits, target))


def test_sigmoid_focal_is_smallest_at_a_soft_target() -> None:
    scores = torch.linspace(0.01, 0.99, 99)
    losses = sigmoid_focal(torch.logit(scores), torch.full((99,), 0.3))
    assert scores[losses.argmin()] == pytest.approx(0.3, abs=0.011)


def test_log_odds() -> None:
    log_probability = torch.tensor([0.5, 0.01, 1e-12, 0.999]).log()
    torch.testing.assert_close(log_odds(log_probability).sigmoid(), log_probability.exp(), rtol=1e-4, atol=0)
    torch.testing.assert_close(logsigmoid(log_odds(log_probability)), log_probability, rtol=1e-4, atol=1e-6)
    certain = torch.zeros(1, requires_grad=True)
    log_odds(certain).sum().backward()
    assert torch.isfinite(log_odds(certain)).all()
    assert certain.grad is not None
    assert torch.isfinite(certain.grad).all()


def case(config: RCNNConfig, seed: int = 0) -> tuple[Tensor, Tensor, Predictions, Assignment]:
    """2 images, 6 proposals, 3 classes, 2 + 1 positives."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(2, 6, 2, generator=generator) * 40
    boxes = torch.cat((corner, corner + 10 + torch.rand(2, 6, 2, generator=generator) * 20), -1)
    proposals = Proposals(boxes, torch.ones(2, 6, dtype=torch.bool))
    outputs = torch.randn(2, 6, 3 + (config.focal == "softmax"), generator=generator).requires_grad_()
    deltas = torch.randn(2, 6, 4 if config.class_agnostic else 12, generator=generator).requires_grad_()
    predictions = Predictions(proposals, outputs, deltas)
    if config.focal == "softmax":
        log_probability = outputs.log_softmax(-1)
        raw = torch.cat((deltas, log_probability[..., -1:]), -1)
        predictions = Predictions(proposals, log_odds(log_probability[..., :-1]), raw)
    background = torch.zeros(2, 6, dtype=torch.bool)
    background[0, 3:], background[1, :2] = True, True
    image, sample, label = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 5]), torch.tensor([2, 0, 1])
    assignment = Assignment(image, sample, label, boxes[image, sample] + 1.5, background)
    return outputs, deltas, predictions, assignment


@pytest.mark.parametrize("focal", ["sigmoid", "softmax"])
def test_an_ignored_sample_may_overflow(focal: str) -> None:
    """Its loss is 0, not infinity times 0."""
    config = RCNNConfig(focal=focal)
    _, _, predictions, assignment = case(config)
    stage, place = RCNNStage(config, 3), (0, 0)  # neither assigned nor background
    assert not assignment.background[place]
    expected = stage.losses(predictions, assignment).background
    predictions.logits.data[place], predictions.raw.data[place] = torch.inf, torch.inf
    torch.testing.assert_close(stage.losses(predictions, assignment).background, expected)


@pytest.mark.parametrize("loss", ["bce", "focal"])
def test_an_ignored_anchor_may_overflow(loss: str) -> None:
    proposals = Proposals(torch.tensor(((0.0, 0, 10, 10),) * 3).expand(1, 3, 4), torch.ones(1, 3, dtype=torch.bool))
    predictions = Predictions(proposals, torch.tensor((torch.inf, 0.5, 1.5)).view(1, 3, 1), torch.zeros(1, 3, 4))
    first = torch.zeros(1, dtype=torch.int64)
    assignment = Assignment(first, first + 2, first, torch.tensor(((0.0, 0, 10, 10),)), torch.tensor(((False, True, False),)))
    found = RPNStage(RPNConfig(loss=loss)).losses(predictions, assignment).background[0]
    assert found.isfinite().all()
    assert found.count_nonzero() == 1


def test_sigmoid_stage() -> None:
    config = RCNNConfig()
    outputs, _, predictions, assignment = case(config)
    losses = RCNNStage(config, 3).losses(predictions, assignment)
    rows = outputs[assignment.image, assignment.sample]
    expected = sigmoid_focal_loss(rows, one_hot(assignment.label, 3).float()).sum(1)
    torch.testing.assert_close(losses.classification, expected)
    dense = sigmoid_focal_loss(outputs, torch.zeros_like(outputs)).sum(-1)
    torch.testing.assert_close(losses.background, torch.where(assignment.background, dense, 0.0))
    assert losses.box_count == 3 + 5
    # PseCo: 10 * sum / samples, also of fewer than 10 samples, for which a tenth of the divisor would be less than 1
    term = ordinary_terms(losses)["cls"]
    assert term.total.item() / max(term.count.item(), 1) == pytest.approx(10 * expected.sum().item() / (3 + 5))


def test_softmax_stage_is_unbiased_teachers() -> None:
    config = RCNNConfig(focal="softmax")
    outputs, _, predictions, assignment = case(config)
    losses = RCNNStage(config, 3).losses(predictions, assignment)
    log_loss = cross_entropy(outputs[assignment.image, assignment.sample], assignment.label, reduction="none")
    torch.testing.assert_close(losses.classification, (1 - (-log_loss).exp()) ** 1.5 * log_loss)
    log_loss = cross_entropy(outputs.flatten(0, 1), torch.full((12,), 3), reduction="none").view(2, 6)
    expected = torch.where(assignment.background, (1 - (-log_loss).exp()) ** 1.5 * log_loss, 0.0)
    torch.testing.assert_close(losses.background, expected)
    torch.testing.assert_close(predictions.logits.sigmoid(), outputs.softmax(-1)[..., :3])
    assert losses.classification_count == 8
    assert losses.classification_weight == 1


def test_softmax_losses_stay_finite_for_certain_outputs() -> None:
    log_probability = torch.tensor([[60.0, -60.0, 0.0]]).log_softmax(-1).requires_grad_()
    loss = softmax_focal(logsigmoid(log_odds(log_probability))).sum() + softmax_focal(log_probability).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert log_probability.grad is not None
    assert torch.isfinite(log_probability.grad).all()


@pytest.mark.parametrize("focal", ["sigmoid", "softmax"])
@pytest.mark.parametrize("agnostic", [False, True])
def test_box_loss_and_decoding_take_the_labels_channel(focal: str, agnostic: bool) -> None:
    config = RCNNConfig(focal=focal, class_agnostic=agnostic)  # type: ignore[arg-type]
    _, deltas, predictions, assignment = case(config)
    stage = RCNNStage(config, 3)
    losses = stage.losses(predictions, assignment)
    image, sample, label = assignment.rows
    samples = predictions.samples.take(image, sample)
    for row in range(3):
        first = 0 if agnostic else 4 * int(label[row])
        own = deltas[image[row], sample[row], first : first + 4]
        target = encode(samples[row], assignment.box[row], STDS)
        torch.testing.assert_close(losses.box[row], (own - target).abs().sum())
    losses.box.sum().backward()
    assert deltas.grad is not None
    assert int((deltas.grad != 0).sum()) == 12
    # A prediction that equals the encoded target decodes to the target.
    raw = torch.zeros_like(predictions.raw)
    index = torch.zeros_like(label) if agnostic else label
    columns = 4 * index.unsqueeze(1) + torch.arange(4)
    raw[image.unsqueeze(1), sample.unsqueeze(1), columns] = encode(samples, assignment.box, STDS)
    decoded = stage.decode(replace(predictions, raw=raw), assignment.rows)
    torch.testing.assert_close(decoded, assignment.box, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("focal", ["sigmoid", "softmax"])
def test_quality_is_the_class_target(focal: str) -> None:
    config = RCNNConfig(focal=focal)  # type: ignore[arg-type]
    *_, predictions, assignment = case(config)
    quality = torch.tensor([1.0, 0.0, 0.4])
    dense = DenseGuidance(
        torch.arange(3), 3, torch.arange(3), torch.zeros(3), torch.ones(3), torch.tensor(3), quality=quality
    )
    stage = RCNNStage(config, 3)
    plain = stage.losses(predictions, assignment).classification
    given = Assignment(
        assignment.image, assignment.sample, assignment.label, assignment.box, torch.ones(2, 6, dtype=torch.bool), dense
    )
    losses = stage.losses(predictions, given)
    torch.testing.assert_close(losses.classification[0], plain[0])
    torch.testing.assert_close(losses.classification[1], losses.background[0, 2])


@pytest.mark.parametrize("focal", ["sigmoid", "softmax"])
def test_class_targets_may_be_shared_out(focal: str) -> None:
    """All of it to the label is the plain loss; otherwise a loss is least where the scores are as the shares say."""
    config = RCNNConfig(focal=focal)  # type: ignore[arg-type]
    *_, predictions, assignment = case(config)
    stage = RCNNStage(config, 3)

    def losses(shares: Tensor, predictions: Predictions = predictions) -> Tensor:
        dense = DenseGuidance(torch.arange(3), 3, torch.arange(3), torch.zeros(3), torch.ones(3), torch.tensor(3), shares=shares)
        return stage.losses(predictions, replace(assignment, dense=dense)).classification

    torch.testing.assert_close(losses(torch.eye(3)[assignment.label]), stage.losses(predictions, assignment).classification)
    mixed = torch.tensor([[0.5, 0.3, 0.2]]).repeat(3, 1)
    if focal == "softmax":
        labels = [replace(assignment, label=torch.full((3,), label)) for label in range(3)]
        whole = [stage.losses(predictions, told).classification for told in labels]
        torch.testing.assert_close(losses(mixed), 0.5 * whole[0] + 0.3 * whole[1] + 0.2 * whole[2])
    else:
        right = replace(predictions, logits=mixed[:1].logit().expand(2, 6, 3))
        for label in range(3):
            for shift in (-0.1, 0.1):
                moved = right.logits + shift * torch.eye(3)[label]
                assert (losses(mixed, right) < losses(mixed, replace(right, logits=moved))).all()


@pytest.mark.parametrize("loss", ["bce", "focal"])
def test_quality_is_the_rpns_target(loss: str) -> None:
    """A quality of 1 is the plain loss, of 0 the background's, and a loss is least at its quality."""
    *_, predictions, whole = case(RCNNConfig())
    quality = torch.tensor([1.0, 0.0, 0.4])
    dense = DenseGuidance(torch.arange(3), 3, torch.arange(3), torch.zeros(3), torch.ones(3), torch.tensor(3), quality=quality)
    told = Assignment(whole.image, whole.sample, torch.zeros(3, dtype=torch.int64), whole.box, torch.ones(2, 6, dtype=torch.bool), dense)
    logits = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(0))
    stage = RPNStage(RPNConfig(loss=loss))  # type: ignore[arg-type]

    def losses(assignment: Assignment, shift: float = 0.0) -> Unreduced:
        moved = torch.where(torch.arange(6).view(1, 6, 1) == 5, math.log(0.4 / 0.6) + shift, logits)
        return stage.losses(Predictions(predictions.samples, moved, torch.zeros(2, 6, 4)), assignment)

    guided, plain = losses(told), losses(replace(told, dense=None))
    torch.testing.assert_close(guided.classification[0], plain.classification[0])
    torch.testing.assert_close(guided.classification[1], guided.background[0, 2])
    assert guided.classification[2] < min(losses(told, shift).classification[2] for shift in (-0.1, 0.1))


def test_degenerate_boxes_stay_finite() -> None:
    config = RCNNConfig()
    *_, predictions, assignment = case(config)
    assert isinstance(predictions.samples, Proposals)
    flat = replace(predictions.samples, boxes=predictions.samples.boxes[..., :2].repeat(1, 1, 2))
    losses = RCNNStage(config, 3).losses(replace(predictions, samples=flat), assignment)
    assert torch.isfinite(losses.box).all()


def test_rpn_focal_loss() -> None:
    *_, predictions, assignment = case(RCNNConfig())
    logits = torch.randn(2, 6, 1)
    assignment = Assignment(
        assignment.image, assignment.sample, torch.zeros(3, dtype=torch.int64), assignment.box, assignment.background
    )
    predictions = Predictions(predictions.samples, logits, torch.zeros(2, 6, 4))
    losses = RPNStage(RPNConfig(loss="focal")).losses(predictions, assignment)
    rows = logits[assignment.image, assignment.sample, 0]
    torch.testing.assert_close(losses.classification, sigmoid_focal_loss(rows, torch.ones(3)))
    plain = RPNStage(RPNConfig()).losses(predictions, assignment)
    torch.testing.assert_close(plain.classification, torch.log1p((-rows).exp()))
    assert math.isclose(float(plain.box_count), 8)


def test_the_rpn_knows_one_class() -> None:
    objects = Targets(torch.tensor([[10.0, 10, 50, 60], [30.0, 5, 60, 40]]), torch.tensor([2, 1]), torch.tensor([0, 0]))
    grid = anchor_grid((64, 64), (8, 16, 32), 4, (0.5, 1.0, 2.0), torch.device("cpu"))
    found = RPNStage(RPNConfig()).assign(grid, objects, torch.tensor([[64, 64]]), torch.tensor([5]))
    assert len(found.label) > 0
    assert not found.label.any()
