"""One training step: accumulation, precision, steps that are not finite, and the window of figures."""
from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import DETECTORS, make_pair, make_views, tiny_detector
from torch import Tensor, nn

from dtg_core.config import Config, GuidanceConfig, OptimConfig, RunConfig, StageRule, paper_stages
from dtg_core.engine.train_step import Lesson, Window, _found, heal_statistics, is_finite, make_optimizer, prepare, train_step
from dtg_core.guidance.paradigms import teach
from dtg_core.models.backbone import Pyramid
from dtg_core.models.teacher import make_teacher
from dtg_core.structures import LossName, PairBatch, StepBatch, Supervision, ViewBatch

BOXES = [[[4.0, 4, 30, 34]], [], [[20.0, 10, 60, 50], [2, 30, 20, 60]], [[10.0, 20, 50, 60]]]
LABELS = [[0], [], [1, 2], [2]]


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


BOX = LossName("labeled", "head", "box")


def config(paradigm: str = "dense", tau_rate: float = 0.0, **optim: Any) -> Config:
    changes: dict[str, Any] = {"paradigm": paradigm, "tau": 0.5, "pseudo_score": 0.5, "tau_rate": tau_rate}
    stages: dict[str, StageRule] = {name: replace(rule, **changes) for name, rule in paper_stages().items()}
    guidance = GuidanceConfig(alpha=2.0, start_step=0, ramp_steps=1, stages=stages)
    return Config(guidance=guidance, optim=OptimConfig(warmup_steps=0, **optim))


class Parts:
    """A student, its teacher and an optimizer, with class biases that make an untrained teacher find something."""

    def __init__(self, name: str, settings: Config, accelerator: Accelerator, batch_norm: str = "frozen") -> None:
        detector = tiny_detector(name, batch_norm=batch_norm)
        with torch.no_grad():
            for key, parameter in detector.named_parameters():
                if key.endswith("bias") and parameter.min() < -2:
                    parameter.fill_(0.3)
        self.detector, self.settings, self.accelerator = detector, settings, accelerator
        self.training = prepare(settings, detector, torch.ones(3), accelerator)
        self.training.student.train()

    def step(self, batches: Sequence[StepBatch]) -> dict[str, float]:
        losses, figures = train_step(self.training, batches)
        return {str(name): float(value) for name, value in {**losses, **figures}.items()}

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.detector.state_dict().items()}


def images(views: ViewBatch, first: int, last: int) -> ViewBatch:
    """Some images of a batch."""
    rows = (views.targets.image >= first) & (views.targets.image < last)
    targets = replace(
        views.targets, boxes=views.targets.boxes[rows], labels=views.targets.labels[rows],
        image=views.targets.image[rows] - first,
    )
    part = slice(first, last)
    return replace(
        views, pixels=views.pixels[part], sizes=views.sizes[part], targets=targets, seeds=views.seeds[part],
        view_from_image=views.view_from_image[part], image_ids=views.image_ids[part],
    )  # fmt: skip


def four_images(step: int = 0) -> StepBatch:
    pair = make_pair(4, 64, 64, seed=7)
    return StepBatch(step, make_views(4, 64, 64, BOXES, LABELS), replace(pair, student=make_views(4, 64, 64, seed=9)))


def split(batch: StepBatch, parts: int) -> list[StepBatch]:
    size = 4 // parts
    pair = batch.unlabeled
    assert pair is not None
    return [
        StepBatch(
            batch.step, images(batch.labeled, first, first + size),
            PairBatch(images(pair.teacher, first, first + size), images(pair.student, first, first + size),
                      pair.student_from_teacher[first : first + size]),
        )
        for first in range(0, 4, size)
    ]  # fmt: skip


@pytest.mark.parametrize("paradigm", ["dense", "sparse"])
@pytest.mark.parametrize("name", DETECTORS)
def test_four_micro_batches_are_one_batch(name: str, paradigm: str) -> None:
    """Also where one of them has no object at all."""
    accelerator, settings = Accelerator(cpu=True), config(paradigm, tau_rate=0.2, lr=0.01)
    one, four = Parts(name, settings, accelerator), Parts(name, settings, accelerator)
    first = one.weights()
    for step in range(3):
        together, apart = one.step([four_images(step)]), four.step(split(four_images(step), 4))
        for key, value in together.items():
            if not key.startswith("guidance/") or key.endswith(("/candidates", "/clusters", "/pseudo_boxes")):  # means over images
                assert apart[key] == pytest.approx(value, rel=1e-5, abs=1e-7), (step, key)
    assert any(key.startswith("unlabeled/") and value > 0 for key, value in together.items())
    changed = 0.0
    for key, tensor in four.weights().items():
        torch.testing.assert_close(tensor, one.weights()[key], rtol=1e-4, atol=4e-6, msg=key)
        changed = max(changed, float((tensor - first[key]).abs().max()))
    assert changed > 1e-3
    for stage, scores in one.training.thresholds.scores().items():
        torch.testing.assert_close(four.training.thresholds.scores()[stage], scores)
        assert (scores - 0.5).abs().max() > 0.02
    assert set(one.training.thresholds.scores()) == set(settings.guidance.stages) & set(one.detector.stages)


def test_what_the_teacher_finds_is_summed_over_parts_and_processes() -> None:
    """Three parts of two images, of which one is not guided, in each of two processes that find the same."""
    pair = make_pair(2, 64, 64)
    batch, bare = StepBatch(0, make_views(1, 64, 64), pair), StepBatch(0, make_views(1, 64, 64), None)
    told = {"rpn": Supervision(), "rcnn": Supervision(found=torch.tensor([1.0, 2.0]))}
    lessons = [Lesson(batch, 0, told, {}), Lesson(bare, 1, {}, {}), Lesson(batch, 2, told, {})]
    two = SimpleNamespace(num_processes=2, reduce=lambda tensor, how: tensor * 2)
    found, images = _found(lessons, two)  # type: ignore[arg-type]
    assert {name: counts.tolist() for name, counts in found.items()} == {"rcnn": [4, 8]}
    assert images == 8
    assert _found(lessons[1:2], two) == ({}, 0)  # type: ignore[arg-type]


def test_no_two_parts_of_a_step_share_their_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with two micro-batches each draw as one process with four does."""
    accelerator, settings = Accelerator(cpu=True), config("none")
    batches = split(four_images(), 4)
    seeds: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    drawn = []
    for rank, mine in ((0, batches), (0, batches[:2]), (1, batches[2:])):
        parts = Parts("gfl", settings, accelerator)
        seeds.clear()
        monkeypatch.setattr(Accelerator, "process_index", rank)
        parts.step(mine)
        drawn.append(seeds[len(mine) :])  # after those of the pass that counts ahead, which are the same
        assert drawn[-1] == seeds[: len(mine)]
    assert len(set(drawn[0])) == 4
    assert drawn[1] + drawn[2] == drawn[0]
    monkeypatch.setattr(Accelerator, "process_index", 0)
    other_run = replace(settings, run=replace(settings.run, seed=settings.run.seed + 1))
    for chosen, step in ((settings, 1), (other_run, 0)):
        parts = Parts("gfl", chosen, accelerator)
        seeds.clear()
        parts.step(split(four_images(step), 4))
        assert not set(seeds) & set(drawn[0])


def test_counting_ahead_leaves_batch_statistics_alone() -> None:
    accelerator, settings = Accelerator(cpu=True), config("none", lr=1e-9)
    parts, twice = (Parts("gfl", settings, accelerator, "train") for _ in range(2))
    batch = four_images()
    parts.step(split(batch, 2))
    for part in split(batch, 2):
        twice.step([part])  # each one forward pass
    for (key, buffer), other in zip(parts.detector.named_buffers(), twice.detector.buffers()):
        torch.testing.assert_close(buffer, other, rtol=1e-4, atol=1e-6, msg=key)


def test_the_optimizer_has_the_settings_and_leaves_frozen_parameters_out() -> None:
    """Two steps of gradient 1 from a weight of 2, by the textbook's formulas; a bias that is frozen."""
    accelerator = Accelerator(cpu=True)

    def moved(settings: OptimConfig) -> list[float]:
        module, course = nn.Linear(1, 1), []
        module.bias.requires_grad_(False)
        nn.init.constant_(module.weight, 2.0)
        optimizer = make_optimizer(module, settings, accelerator)
        assert [len(group["params"]) for group in optimizer.param_groups] == [1]
        for _ in range(2):
            module.weight.grad = torch.ones(1, 1)
            optimizer.step()
            course.append(module.weight.item())
        return course

    weight, speed, expected = 2.0, 0.0, []
    for _ in range(2):
        speed = 0.5 * speed + 1 + 0.1 * weight
        weight -= 0.01 * speed
        expected.append(weight)
    assert moved(OptimConfig(lr=0.01, momentum=0.5, weight_decay=0.1)) == pytest.approx(expected)
    # AdamW's step is lr for a constant gradient, besides the decay.
    expected = [2.0 * (1 - 0.01 * 0.1) - 0.01]
    expected.append(expected[0] * (1 - 0.01 * 0.1) - 0.01)
    assert moved(OptimConfig(name="adamw", lr=0.01, weight_decay=0.1)) == pytest.approx(expected)


@pytest.mark.parametrize("launched", ["1", "4"])
def test_a_step_follows_the_schedules(launched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 3 of a warm-up of 10 steps, before, at and after the start of the guidance, and the teacher's own rate; by a launcher
    with micro-batches, too, by which Accelerate would divide the losses."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", launched)
    guidance = replace(config().guidance, start_step=3, ramp_steps=2)
    settings = Config(guidance=guidance, optim=OptimConfig(lr=0.01, warmup_steps=10, ema=0.6, clip_norm=1e9))
    for step, weight in ((2, 0.0), (3, 1.0), (4, 2.0)):
        parts = Parts("gfl", settings, Accelerator(cpu=True))
        before = parts.weights()
        figures = parts.step([four_images(step)])
        (group,) = parts.training.optimizer.param_groups
        assert group["lr"] == pytest.approx(0.01 * (0.001 + 0.999 * step / 10))
        assert any(key.startswith("unlabeled/") for key in figures) == (weight > 0)
        assert any(key.startswith("guidance/") for key in figures) == (weight > 0)
        rate = min(0.6, 1 - 1 / (step + 1))
        for key, tensor in parts.training.teacher.state_dict().items():
            torch.testing.assert_close(tensor, torch.lerp(parts.weights()[key], before[key], rate) if tensor.is_floating_point() else tensor)
        assert all(parameter.grad is None for parameter in parts.detector.parameters())
        # What has moved the weights: the gradient of the labelled losses and, with its weight, of the unlabelled ones.
        again = Parts("gfl", settings, Accelerator(cpu=True))
        batch = four_images(step)
        assert batch.unlabeled is not None
        rules = settings.guidance.stages
        told = teach(again.training.teacher, batch.unlabeled, rules)[0] if weight else {}
        losses = again.training.module(batch.labeled, batch.unlabeled.student if weight else None, told)
        total = sum((1.0 if name.branch == "labeled" else weight * (rules["head"].rank_weight if name.kind == "rank" else 1.0))
                    * term.total / term.count.clamp(min=1) for name, term in losses.items())  # fmt: skip
        total.backward()
        for key, parameter in again.detector.named_parameters():
            if parameter.requires_grad:
                decayed = parameter.grad + settings.optim.weight_decay * before[key]
                torch.testing.assert_close(parts.weights()[key], before[key] - group["lr"] * decayed, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", DETECTORS)
def test_gradient_clipping(name: str) -> None:
    accelerator = Accelerator(cpu=True)
    free = Parts(name, config(lr=0.1, momentum=0.0, weight_decay=0.0), accelerator)
    clipped = Parts(name, config(lr=0.1, momentum=0.0, weight_decay=0.0, clip_norm=1e-3), accelerator)

    def move(parts: Parts) -> float:
        before = parts.weights()
        parts.step([four_images()])
        return sum(float((after - before[key]).square().sum()) for key, after in parts.weights().items()) ** 0.5

    assert move(free) > 1e-3
    assert move(clipped) == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("name", DETECTORS)
def test_bfloat16_trains_and_guides_as_float32_does(name: str) -> None:
    """Boxes and matches do not depend on the precision of the networks: given the same predictions they are identical."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    parts = Parts(name, config(lr=0.01), accelerator)
    figures = [parts.step([four_images(step)]) for step in range(6)]
    total = [sum(value for key, value in of_step.items() if key.startswith("labeled/")) for of_step in figures]
    assert all(of_step["skipped"] == 0 for of_step in figures)
    assert total[-1] < total[0]
    assert {tensor.dtype for tensor in parts.detector.parameters()} == {torch.float32}

    parts = Parts(name, config(), accelerator)  # untrained, so that it has many candidates

    class Rounded:
        """The teacher with predictions made once, under autocast; only what comes after can differ."""

        def __init__(self, teacher: nn.Module, outputs: Any) -> None:
            self.teacher, self.outputs = teacher, outputs

        def __getattr__(self, key: str) -> Any:
            return getattr(self.teacher, key)

        def run(self, views: ViewBatch, supervision: Any = None) -> Any:
            return self.outputs

    pair = four_images().unlabeled
    assert pair is not None
    with torch.no_grad(), accelerator.autocast():
        outputs = parts.training.teacher.run(pair.teacher)
    frozen, rules = Rounded(parts.training.teacher, outputs), parts.settings.guidance.stages
    half, _ = teach(frozen, pair, rules, autocast=accelerator.autocast)  # type: ignore[arg-type]
    with torch.autocast("cpu", enabled=False):
        full, _ = teach(frozen, pair, rules)  # type: ignore[arg-type]
    for stage in full:
        mine, other = half[stage].assignment, full[stage].assignment
        assert mine.box.dtype == torch.float32
        assert mine.box.shape[0] > 0
        for field in ("image", "sample", "label", "box", "background"):
            assert torch.equal(getattr(mine, field), getattr(other, field)), field
        assert torch.equal(mine.dense.teacher_logit, other.dense.teacher_logit)


def test_teacher_and_student_run_in_the_same_precision() -> None:
    """Otherwise the teacher's pass would take the time and the memory of float32."""
    parts = Parts("gfl", config(), Accelerator(cpu=True, mixed_precision="bf16"))
    seen: dict[str, set[bool]] = {"teacher": set(), "student": set()}
    for who, detector in (("teacher", parts.training.teacher), ("student", parts.detector)):
        conv = next(module for module in detector.modules() if isinstance(module, nn.Conv2d))  # type: ignore[attr-defined]
        conv.register_forward_hook(lambda *_, who=who: seen[who].add(torch.is_autocast_enabled("cpu")))
    parts.step([four_images()])
    assert seen == {"teacher": {True}, "student": {True}}


@pytest.mark.parametrize("name", DETECTORS)
def test_matches_of_a_bfloat16_student_are_those_of_float32(name: str) -> None:
    """The student's own assignment: a whole forward pass under autocast takes the same samples for the same boxes."""
    from dtg_core.structures import Supervision

    detector = tiny_detector(name)
    views = make_views(4, 64, 64, BOXES, LABELS)
    stage_name = next(iter(detector.stages))
    chosen = {}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            samples = detector.run(views, {stage_name: Supervision(views.targets)})[stage_name].samples
        chosen[enabled] = detector.stages[stage_name].assign(samples, views.targets, views.sizes, views.seeds)
        assert samples.anchors.dtype == torch.float32
    for field in ("image", "sample", "label", "box", "background"):
        assert torch.equal(getattr(chosen[True], field), getattr(chosen[False], field)), field
    assert chosen[True].sample.shape[0] > 0


@pytest.mark.parametrize("name", DETECTORS)
def test_a_step_that_is_not_finite_changes_nothing(name: str) -> None:
    accelerator = Accelerator(cpu=True)
    parts = Parts(name, config(lr=0.01), accelerator)
    parts.step([four_images(0)])
    before, teacher = parts.weights(), copy.deepcopy(parts.training.teacher.state_dict())
    momentum = copy.deepcopy(parts.training.optimizer.state_dict())
    with torch.no_grad():
        kept = next(p for p in parts.detector.parameters() if p.requires_grad)
        kept[(0,) * kept.dim()] += float("nan")
    assert parts.step([four_images(1)])["skipped"] == 1
    with torch.no_grad():
        kept.copy_(before[next(key for key, p in parts.detector.named_parameters() if p is kept)])
    for key, tensor in parts.weights().items():
        assert torch.equal(tensor, before[key]), key
    for key, tensor in parts.training.teacher.state_dict().items():
        assert torch.equal(tensor, teacher[key]), key
    assert all(torch.equal(new["momentum_buffer"], momentum["state"][number]["momentum_buffer"])
               for number, new in parts.training.optimizer.state_dict()["state"].items())  # fmt: skip
    assert parts.step([four_images(1)])["skipped"] == 0
    assert is_finite(parts.training.teacher)


def test_a_loss_scale_that_is_too_large_comes_down() -> None:
    """fp16's scaler has to see the steps that are skipped, or it would never lower its scale."""
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", 2.0**40, backoff_factor=2.0**-10)
    parts = Parts("gfl", config(lr=0.01), accelerator)
    before, skipped = parts.weights(), 0
    while parts.step([four_images(skipped)])["skipped"]:
        skipped += 1
        assert skipped < 6
        assert all(torch.equal(tensor, before[key]) for key, tensor in parts.weights().items())
    assert skipped > 0
    assert accelerator.scaler.get_scale() == 2.0 ** (40 - 10 * skipped)
    assert any(not torch.equal(tensor, before[key]) for key, tensor in parts.weights().items())


def test_a_norm_that_overflows_moves_nothing_under_a_scaler() -> None:
    """Each gradient is finite, which is all that a scaler looks at, but not the sum of their squares."""
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", 1.0)
    parts = Parts("gfl", config(lr=0.01, clip_norm=None), accelerator)
    assert not parts.step([four_images()])["skipped"]  # there is momentum
    before = parts.weights()
    for parameter in parts.detector.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad: torch.full_like(grad, 1e25))
    assert parts.step([four_images(1)])["skipped"] == 1
    for key, tensor in parts.weights().items():
        assert torch.equal(tensor, before[key]), key


def test_the_teacher_does_not_follow_a_student_that_overflows() -> None:
    accelerator = Accelerator(cpu=True)
    parts = Parts("gfl", config(lr=3e38), accelerator)
    teacher = copy.deepcopy(parts.training.teacher.state_dict())
    figures = parts.step([four_images()])
    assert not is_finite(parts.detector)
    assert figures["skipped"] == figures["overflowed"] == 1
    assert all(torch.equal(tensor, teacher[key]) for key, tensor in parts.training.teacher.state_dict().items())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_layout_and_compilation_are_those_of_the_config(compiled: bool, channels_last: bool) -> None:
    settings = replace(config(), run=RunConfig(compile=compiled, channels_last=channels_last))
    training = prepare(settings, tiny_detector("gfl"), torch.ones(3), Accelerator(cpu=True))
    for detector in (training.module.detector, training.teacher):
        pyramid = detector.pyramid  # type: ignore[union-attr]
        assert isinstance(pyramid, Pyramid)
        assert (pyramid.body._compiled_call_impl is not None) == compiled
        weights = [weight for weight in pyramid.parameters() if weight.ndim == 4 and min(weight.shape[1:]) > 1]
        assert all(weight.is_contiguous(memory_format=torch.channels_last) == channels_last for weight in weights)
        if not compiled:
            maps = pyramid(make_views(1, 64, 64))
            assert all((level.stride(1) == 1) == channels_last for level in maps)
    assert not any(weight.requires_grad for weight in training.teacher.parameters())


def test_spoilt_batch_statistics_come_back_from_the_teacher() -> None:
    detector = tiny_detector("gfl", batch_norm="train")
    teacher = make_teacher(detector)
    name, buffer = next((name, buffer) for name, buffer in detector.named_buffers() if name.endswith("running_var"))
    good = buffer.clone()
    buffer[0], buffer[1] = float("nan"), 5.0
    heal_statistics(detector, teacher)
    assert buffer[0] == good[0]
    assert buffer[1] == 5
    assert is_finite(detector), name


def test_a_skipped_step_leaves_no_spoilt_batch_statistics() -> None:
    """They are counted in the forward pass, before anyone knows that the step will be skipped."""
    parts = Parts("gfl", config(lr=0.01), Accelerator(cpu=True), "train")
    with torch.no_grad():
        weight = next(parameter for parameter in parts.detector.parameters() if parameter.requires_grad)
        good = weight.clone()
        weight.fill_(float("nan"))
    assert parts.step([four_images()])["skipped"] == 1
    with torch.no_grad():
        weight.copy_(good)
    assert is_finite(parts.detector)
    assert parts.step([four_images(1)])["skipped"] == 0


def test_window_takes_means_and_of_skipped_steps_only_that() -> None:
    accelerator, window = Accelerator(cpu=True), Window()
    for value, skipped in ((1.0, 0.0), (float("nan"), 1.0), (2.0, 0.0)):
        window.add({BOX: torch.tensor(value)}, {"guidance/head/clusters": value, "skipped": skipped})
    assert window.means(accelerator) == {"labeled/head/box": 1.5, "guidance/head/clusters": 1.5, "skipped": pytest.approx(1 / 3)}
    again = Window(window.floats(accelerator), dict(window.counts))
    for one in (window, again):
        one.add({BOX: torch.tensor(0.1)}, {"guidance/head/clusters": 1 / 3, "skipped": 0.0})
    assert again.means(accelerator) == window.means(accelerator)
    window.clear()
    assert window.means(accelerator) == {}
    window.add({BOX: torch.tensor(4.0)}, {"skipped": 0.0})
    assert window.means(accelerator) == {"labeled/head/box": 4.0, "skipped": 0.0}


def test_memory_does_not_grow() -> None:
    """3,000 steps with DTG_TEST_LONG=1, fewer otherwise; batches repeat, so that nothing but the steps can grow."""
    steps = 3000 if os.environ.get("DTG_TEST_LONG") else 60
    grown = {}
    for name in DETECTORS:
        parts, window, process = Parts(name, config(lr=1e-4), Accelerator(cpu=True)), Window(), psutil.Process()
        batches, start = itertools.cycle([make_small(step) for step in range(4)]), 0
        for step in range(steps + 50):
            if step == 50:
                start = process.memory_info().rss
            batch = replace(next(batches), step=step)
            window.add(*train_step(parts.training, [batch]))
            if step % 50 == 0:
                window.means(parts.accelerator)
                window.clear()
        grown[name] = (process.memory_info().rss - start) / 2**20
    print(f"MB over {steps} steps: {grown}")
    assert max(grown.values()) < 20


def make_small(step: int) -> StepBatch:
    return StepBatch(step, make_views(1, 64, 64, BOXES[:1], LABELS[:1], seed=step), make_pair(1, 64, 64, seed=step))


def pretend_step(shared: Path, *arguments: str) -> str:
    """What a step on the pretend device prints; in a process of its own, because the device stays registered."""
    import subprocess
    import sys

    script = Path(__file__).with_name("pretend_step.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
        [str(Path(__file__).parents[3]), str(Path(__file__).parents[2]), str(shared / "tools")])}  # fmt: skip
    ended = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=200, env=environment)
    assert ended.returncode == 0, ended.stderr
    print(ended.stdout)
    return ended.stdout


@pytest.mark.parametrize("name", DETECTORS)
def test_a_step_on_a_device_without_float64(name: str, shared: Path) -> None:
    pretend_step(shared, name, "lacks_float64")


@pytest.mark.parametrize(("name", "options"), [("gfl", []), ("faster_rcnn", []), ("faster_rcnn", ["consensus"])])
def test_device_purity_and_waits(name: str, options: list[str], shared: Path) -> None:
    told = pretend_step(shared, name, *options)
    waits = [int(line.split()[2]) for line in told.splitlines() if line.startswith("images")]
    assert len(waits) == 2
    optional = 2 if options else 0  # member_tau: one for each stage
    assert waits[0] == waits[1] <= {"gfl": 8, "faster_rcnn": 16}[name] + optional


def test_batches_are_pinned_with_all_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device there is no page-locked memory, so the tensors' own method is replaced."""
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    batch = make_small(0)
    again = batch.pin_memory()
    assert again.step == 0
    assert again.unlabeled is not None
    views = (batch.labeled, batch.unlabeled.teacher, batch.unlabeled.student)  # type: ignore[union-attr]
    for tensor in [view.pixels for view in views] + [view.targets.boxes for view in views]:
        assert any(tensor is other for other in pinned)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_loss_scaler_gets_other_kernels_and_all_make_the_same_step(name: str) -> None:
    settings = OptimConfig(name=name, lr=0.01, weight_decay=0.1)  # type: ignore[arg-type]
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1)).double()
    one = layers.to(memory_format=torch.channels_last)
    other = copy.deepcopy(one)
    accelerator = Accelerator(cpu=True)
    fused = make_optimizer(one, settings, accelerator)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    several = make_optimizer(other, settings, accelerator)
    assert (fused.defaults["fused"], fused.defaults["foreach"]) == (True, False)
    assert (several.defaults["fused"], several.defaults["foreach"]) == (False, True)
    start = [parameter.detach().clone() for parameter in one.parameters()]
    for seed in range(3):
        pixels = torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for module, optimizer in ((one, fused), (other, several)):
            module(pixels.contiguous(memory_format=torch.channels_last)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for mine, theirs, before in zip(one.parameters(), other.parameters(), start, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
        assert (mine != before).all()
