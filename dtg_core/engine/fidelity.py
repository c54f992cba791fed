"""How much guidance pulls the student where true labels would: a way to compare settings without training.

On the strong views of unlabelled images whose labels are known but hidden from the teacher, each unlabelled loss has a
gradient, and so has the detector's labelled loss on the true labels. Their cosine says whether the guidance pulls in the right
direction, the ratio of their norms how hard. Gradients are those of head and feature pyramid (the backbone's follow from
them) of a student in evaluation mode, batch by batch.

The measure is biased: the true labels are assigned by the detector's own rule and reduced by its own divisors, as sparse
guidance does. So it favours sparse guidance over dense, and ``normalization: stage`` over ``cluster``. It ranks the settings of
one paradigm; between paradigms only training decides.
"""
from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from dtg_core.boxes import to_float64
from dtg_core.config import StageRule
from dtg_core.engine.train_step import add_up
from dtg_core.guidance.paradigms import teach
from dtg_core.losses import weigh
from dtg_core.models.backbone import Pyramid
from dtg_core.models.student import learn, loss_terms
from dtg_core.protocol import Detector, Stage
from dtg_core.structures import Assignment, LossName, LossTerm, PairBatch, Samples, Supervision, Targets, ViewBatch

#: The loss terms of a gradient, and which gradient of the labelled loss it is compared with.
KINDS = {"class": (("cls", "background"), "class"), "box": (("box",), "box"), "rank": (("rank",), "class")}
ALL = "all"  # the sum of a stage's losses, or of all stages
RIGHT = 0.5  # IoU of a target box with a true object of its class from which the label counts as right

Key = tuple[str, str]  # stage and kind


@dataclass(frozen=True)
class Agreement:
    """Agreement of one unlabelled loss's gradient with that of the true labels."""

    cosine: float  # mean over the batches; a batch without a gradient counts as 0
    error: float | None  # standard error of that mean, None for a single batch
    ratio: float  # norm over that of the labelled loss's gradient, over all batches together; with beta for rank matching


@dataclass
class Measured:
    """Sums over batches of one setting."""

    products: dict[Key, list[tuple[float, float, float]]] = field(default_factory=dict)  # own with true, own, true
    labels: dict[str, dict[str, float]] = field(default_factory=dict)  # by stage, see ``count_labels``
    figures: dict[str, float] = field(default_factory=dict)  # of the guidance, ``guidance/<stage>/<name>``
    batches: int = 0

    def add_gradients(self, own: Mapping[Key, Tensor], true: Mapping[Key, Tensor]) -> None:
        """Add those of a batch, see ``gradients``."""
        for (stage, kind), gradient in own.items():
            other = true[stage, KINDS[kind][1] if kind in KINDS else ALL]
            products = float(gradient @ other), float(gradient @ gradient), float(other @ other)
            self.products.setdefault((stage, kind), []).append(products)

    def agreements(self, stage: str) -> dict[str, Agreement]:
        """Agreements of a stage, by kind."""
        return {kind: agreement(rows) for (at, kind), rows in self.products.items() if at == stage}

    def label_figures(self, stage: str) -> dict[str, float]:
        """Shares and means of the stage's labels, and what the teacher gave per image."""
        counts = self.labels[stage]
        prefix = f"guidance/{stage}/"
        told = {key.removeprefix(prefix): value / self.batches for key, value in self.figures.items() if key.startswith(prefix)}
        return told | {
            "positives": counts["positives"] / counts["images"],
            "precision": counts["right"] / max(counts["positives"], 1),
            "box_iou": counts["overlap"] / max(counts["right"], 1),
            "found": counts["found"] / max(counts["true"], 1),
            "missed": counts["missed"] / max(counts["true"], 1),
        }


def agreement(products: Sequence[tuple[float, float, float]]) -> Agreement:
    """Agreement from the products of own and true, own and own, true and true gradient, of each batch."""
    cosines = [dot / math.sqrt(own * true) if own * true > 0 else 0.0 for dot, own, true in products]
    error = statistics.stdev(cosines) / math.sqrt(len(cosines)) if len(cosines) > 1 else None
    own, true = (sum(row[place] for row in products) for place in (1, 2))
    return Agreement(statistics.fmean(cosines), error, math.sqrt(own / true) if true > 0 else 0.0)


def measure(
    teacher: Detector, student: Detector, batches: Iterable[tuple[PairBatch, Targets]],
    settings: Mapping[str, Mapping[str, StageRule]],
) -> dict[str, Measured]:
    """Compare guidance under several settings with the true labels, on the same views.

    Args:
        teacher, student: in evaluation mode. batches: unlabelled views and the true objects in the students' views.
        settings: rules of each stage, by the setting's name.

    Returns:
        Measured, by the settings' names. Stages that a setting does not guide are not in it, but count in ``ALL``.
    """
    names, parameters = list(student.stages), head_parameters(student)
    found = {name: Measured() for name in settings}
    for pair, truth in batches:
        learnt = learn(student, pair.student, {stage: Supervision(truth) for stage in names})
        true = gradients(loss_terms(student, learnt, {}, "unlabeled"), {}, parameters)
        for name, rules in settings.items():
            supervision, figures = teach(teacher, pair, rules)
            learnt = learn(student, pair.student, supervision)
            own = gradients(loss_terms(student, learnt, rules, "unlabeled"), rules, parameters)
            found[name].add_gradients(own, true)
            for stage, (predictions, assignment) in learnt.items():
                counts = count_labels(student.stages[stage], predictions.samples, assignment, truth, pair.student)
                add_up(found[name].labels.setdefault(stage, {}), counts)
            add_up(found[name].figures, {key: float(value) for key, value in figures.items()})
            found[name].batches += 1
    return found


def head_parameters(student: nn.Module) -> list[nn.Parameter]:
    """Parameters outside the backbone; the backbone is frozen, so that no backward pass enters it."""
    for module in student.modules():
        if isinstance(module, Pyramid):
            module.body.requires_grad_(False)
    return [parameter for parameter in student.parameters() if parameter.requires_grad]


def gradients(
    terms: Mapping[LossName, LossTerm], rules: Mapping[str, StageRule], parameters: Sequence[nn.Parameter]
) -> dict[Key, Tensor]:
    """Flat gradients [D] of the losses of one batch, by stage and kind of ``KINDS``, and their sums.

    Sums are those of a stage, (stage, ALL), and of all stages, (ALL, ALL). Rank matching is weighted by beta of its rule.
    """
    losses = {name: term.total / term.count.clamp(min=1) for name, term in terms.items()}
    found: dict[Key, Tensor] = {}
    for stage in dict.fromkeys(name.stage for name in terms):
        for kind, (parts, _) in KINDS.items():
            chosen = {name: loss for name, loss in losses.items() if name.stage == stage and name.kind in parts}
            if chosen:
                gradient = _flat_gradient(weigh(chosen, rules, 1.0), parameters)
                found[stage, kind] = gradient
                for key in ((stage, ALL), (ALL, ALL)):
                    found[key] = found[key] + gradient if key in found else gradient
    return found


def _flat_gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    flat = [torch.zeros_like(parameter) if part is None else part for part, parameter in zip(parts, parameters)]
    return to_float64(torch.cat([part.flatten() for part in flat]))


@torch.no_grad()
def count_labels(stage: Stage, samples: Samples, assignment: Assignment, truth: Targets, views: ViewBatch) -> dict[str, float]:
    """Labels of a batch against its true objects.

    Returns:
        ``images``; ``positives``: samples trained towards an object; ``right``: those whose target box overlaps a true object
        of their class by ``RIGHT``; ``overlap``: the sum of these IoUs; ``true``: samples that the stage's own rule gives to a
        true object; ``found``: those that are positives of that class; ``missed``: those that are called background.
    """
    classes = truth.labels if stage.num_classes > 1 else torch.zeros_like(truth.labels)  # an RPN only knows objects
    same = (assignment.image.unsqueeze(1) == truth.image) & (assignment.label.unsqueeze(1) == classes)
    overlap = torch.where(same, box_iou(assignment.box, truth.boxes), 0.0)
    best = nn.functional.pad(overlap, (0, 1)).amax(1)  # 0 if there is no object
    right = best >= RIGHT

    true = stage.assign(samples, truth, views.sizes, views.seeds)
    label = torch.full_like(assignment.background, -1, dtype=torch.int64)
    label[assignment.image, assignment.sample] = assignment.label
    return {
        "images": float(len(views.sizes)),
        "positives": float(len(assignment.image)),
        "right": float(right.sum()),
        "overlap": float(best[right].sum()),
        "true": float(len(true.image)),
        "found": float((label[true.image, true.sample] == true.label).sum()),
        "missed": float(assignment.background[true.image, true.sample].sum()),
    }
