"""Warnings about training that goes wrong without an error: each is given once, with a remedy.

They read the numbers of the log lines, so that watching costs the device nothing.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dtg_core.config import GuidanceConfig
from dtg_core.guidance.thresholds import LOWEST

PATIENCE = 200  # steps without a candidate or pseudo box before that is reported
FEW, MANY = 0.02, 30.0  # objects found by the teacher per labelled one; outside this range it has collapsed
SHRUNK = 1 / 3  # share of the most objects per image that the teacher has seen; below it, thresholds are too high
MINOR, MAJOR = 1e-3, 20.0  # weighted unlabelled loss per unit of labelled loss
NAMED = 5  # classes
FALL = 0.8  # share of the supervised phase's AP that the teacher should keep


class Watch:
    """Looks at log lines and evaluations.

    Args:
        guidance: the run's settings of it, with its detector's stages only. objects: mean boxes per labelled image.
        classes: their names.
        histogram: text about the teacher's scores on recent images; called when it never finds anything.
    """

    def __init__(
        self, guidance: GuidanceConfig, objects: float, classes: Sequence[str], histogram: Callable[[str], str],
    ) -> None:
        self.guidance, self.objects, self.classes, self.histogram = guidance, objects, classes, histogram
        self.told: list[str] = []  # kinds of warnings given
        self.quiet_since: dict[str, int] = {}  # last step at which a stage's teacher had found something
        self.level: dict[str, tuple[float, float]] = {}  # objects per image in the last steps, and the most so far; by stage
        self.supervised_ap: float | None = None

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {"told": self.told, "quiet_since": self.quiet_since, "level": self.level, "supervised_ap": self.supervised_ap}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.told, self.quiet_since = list(state["told"]), dict(state["quiet_since"])
        self.level = {stage: (now, most) for stage, (now, most) in state["level"].items()}
        self.supervised_ap = state["supervised_ap"]

    def line(self, done: int, steps: int, means: Mapping[str, float]) -> list[str]:
        """Warnings after ``done`` steps, whose last ``steps`` gave these means."""
        warnings = []
        for name, value in means.items():
            branch, _, rest = name.partition("/")
            stage, _, kind = rest.partition("/")
            if branch != "guidance":
                continue
            dense = self._dense(stage)  # its pseudo boxes are only logged for comparison
            if kind == ("candidates" if dense else "pseudo_boxes"):
                warnings += self._nothing_found(stage, value, done, steps)
            if kind == ("clusters" if dense else "pseudo_boxes"):
                warnings += self._collapse(stage, value) if value > 0 else []
                warnings += self._shrinks(stage, value, steps)
        ratio = means.get("loss_ratio", 0.0) * means.get("unlabeled_weight", 0.0)
        if ratio > MAJOR:
            text = f"the unlabelled losses are {ratio:.3g} times the labelled ones and decide the training"
            warnings += self._once("major", f"{text} - lower guidance.alpha")
        elif 0 < ratio < MINOR and not self.quiet_since:
            text = f"the unlabelled losses are {ratio:.3g} times the labelled ones and hardly count"
            warnings += self._once("minor", f"{text} - raise guidance.alpha")
        return warnings

    def thresholds(self, scores: Mapping[str, Sequence[float]]) -> list[str]:
        """Warnings about adaptive thresholds that have sunk as far as they may, by stage: [C], or [1] if it knows only objects.

        They sink where the teacher finds fewer objects than labelled images have, because it misses them or there are none.
        """
        warnings = []
        for stage, limits in scores.items():
            names = self.classes if len(limits) == len(self.classes) else ("objects",)
            low = (name for name, limit in zip(names, limits) if limit < 1.01 * LOWEST)
            sunk = [name for name in low if f"sunk/{stage}/{name}" not in self.told]
            if sunk and getattr(self.guidance.stages[stage], self._key(stage)) > LOWEST:  # otherwise it has begun there
                self.told += [f"sunk/{stage}/{name}" for name in sunk]
                named = ", ".join(sunk[:NAMED] + ["..."] * (len(sunk) > NAMED))
                text = f"{stage}'s adaptive thresholds have sunk to {LOWEST:g} for {named}"
                why = "the teacher finds fewer of them in an unlabelled image than labelled ones have"
                advice = f"if fewer are there, set guidance.stages.{stage}.tau_rate=0, or what is none will be taught"
                warnings.append(f"{text}: {why} - {advice}")
        return warnings

    def end(self, done: int) -> list[str]:
        """Warnings after the last step: of a stage whose teacher has never found anything, in a run too short for ``PATIENCE``."""
        never = [stage for stage in self.quiet_since if self.level.get(stage, (0, 0))[1] == 0]
        return [warning for stage in never for warning in self._quiet(stage, done)]

    def evaluation(self, done: int, teacher_ap: float | None) -> list[str]:
        """Warnings after an evaluation."""
        if done <= self.guidance.start_step:
            self.supervised_ap = teacher_ap  # also for a supervised run, which a guided one may continue
        elif all(rule.paradigm == "none" for rule in self.guidance.stages.values()):
            return []
        elif teacher_ap is not None and self.supervised_ap is not None and teacher_ap < FALL * self.supervised_ap:
            text = f"the teacher's AP has fallen to {teacher_ap:.1f} from {self.supervised_ap:.1f} before it guided"
            return self._once("fall", f"{text} - lower guidance.alpha or optim.lr, or change tau or pseudo_score")
        return []

    def _nothing_found(self, stage: str, found: float, done: int, steps: int) -> list[str]:
        if found > 0:
            self.quiet_since.pop(stage, None)
            return []
        since = self.quiet_since.setdefault(stage, done - steps)
        return self._quiet(stage, done) if done - since >= PATIENCE else []

    def _quiet(self, stage: str, done: int) -> list[str]:
        if f"nothing/{stage}" in self.told:  # before the histogram, which takes a pass of the network
            return []
        key = self._key(stage)
        limit = f"guidance.stages.{stage}.{key}={getattr(self.guidance.stages[stage], key)}"
        limit += ", or what it has adapted to," if self.guidance.stages[stage].tau_rate else ""
        text = f"the teacher's {stage} has found nothing over {limit} for {done - self.quiet_since[stage]} steps"
        advice = f"{self._remedy(stage, 'lower')}, or start the guidance later (guidance.start_step)"
        return self._once(f"nothing/{stage}", f"{text} ({self.histogram(stage)}) - {advice}")

    def _dense(self, stage: str) -> bool:
        return self.guidance.stages[stage].paradigm == "dense"

    def _key(self, stage: str) -> str:
        return "tau" if self._dense(stage) else "pseudo_score"

    def _remedy(self, stage: str, way: str) -> str:
        """What to do about a threshold; ``way`` is "raise" or "lower"."""
        if self.guidance.stages[stage].tau_rate:  # the threshold has adapted by itself
            return f"raise guidance.stages.{stage}.tau_rate, or set it to 0 and {way} {self._key(stage)}"
        return f"{way} guidance.stages.{stage}.{self._key(stage)}, let it adapt (guidance.stages.{stage}.tau_rate=0.05)"

    def _collapse(self, stage: str, found: float) -> list[str]:
        if FEW * self.objects <= found <= MANY * max(self.objects, 1):
            return []
        way = "raise" if found > self.objects else "lower"
        text = f"the teacher's {stage} sees {found:.3g} objects in an unlabelled image, labelled have {self.objects:.3g}"
        return self._once(f"collapse/{stage}", f"{text} - {self._remedy(stage, way)}, or lower guidance.alpha")

    def _shrinks(self, stage: str, found: float, steps: int) -> list[str]:
        """What is below a threshold is taught as background: if these are most objects, scores sink and ever fewer pass."""
        now, most = self.level.get(stage, (found, found))
        now += min(steps / PATIENCE, 1) * (found - now)
        self.level[stage] = now, max(now, most)
        if now >= SHRUNK * most or now >= self.objects / 2:
            return []
        text = f"the teacher's {stage} sees {now:.3g} objects in an unlabelled image after {most:.3g} before"
        advice = f"what it misses becomes background - {self._remedy(stage, 'lower')}"
        return self._once(f"shrinks/{stage}", f"{text}, labelled have {self.objects:.3g}: {advice}")

    def _once(self, kind: str, text: str) -> list[str]:
        if kind in self.told:
            return []
        self.told.append(kind)
        return [text]
