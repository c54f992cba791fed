"""study.py: grids, what runs share, interruptions and failures, on tiny runs of a few steps."""
from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT, TINY, TinyData, lines, weights
from runs import run as fork

sys.path[:0] = [str(ROOT / "scripts")]
import study as script  # noqa: E402
from common import STAGES  # noqa: E402

from dtg_core.engine.study import Plan, plan, read_study  # noqa: E402

STEPS, START = 6, 3
SETTINGS = [*TINY, f"run.steps={STEPS}", f"guidance.start_step={START}", "guidance.ramp_steps=1", "run.log_every=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData.write(tmp_path_factory.mktemp("data"))


def write_study(folder: Path, text: str, data: TinyData | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "empty.yaml").touch()
    files = ""
    if data is not None:
        files = f"data: {{labeled: {data.labeled}, unlabeled: {data.unlabeled}, val: {data.val}}}\n"
    (folder / "study.yaml").write_text(f"config: empty.yaml\n{files}{text}")
    return folder / "study.yaml"


def planned(file: Path, *overrides: str, folder: str = "out") -> Plan:
    def parse(arguments: Sequence[str]) -> Mapping[str, Any]:
        return script.settings_of(arguments, [])

    return plan(read_study(file), file, file.parent / folder, overrides, parse, STAGES)


def train(plan_: Plan, logs: Path) -> None:
    """What the study starts, one after another, in forks of this process."""
    for work in [*plan_.phases, *plan_.runs]:
        ended = fork(work.command(), logs)
        assert ended.status == 0, ended.err


@pytest.mark.parametrize("detector", ["gfl", "faster_rcnn"])
def test_shared_supervised_phases_change_nothing(data: TinyData, tmp_path: Path, detector: str) -> None:
    """Every weight and every figure of the log, as if each run had been trained from its first step."""
    file = write_study(tmp_path, f"detectors: [{detector}]\nparadigms: [supervised, dense, sparse]\n", data)
    shared = planned(file, *SETTINGS, "run.evaluate_every=3")
    file.write_text(file.read_text() + "share_supervised_phase: false\n")
    alone = planned(file, *SETTINGS, "run.evaluate_every=3", folder="alone")
    assert (len(shared.phases), len(alone.phases)) == (1, 0)
    train(shared, tmp_path / "logs")
    train(alone, tmp_path / "logs")
    assert not shared.phases
    final = []
    for one, other in zip(shared.runs, alone.runs):
        assert one.phase is not None
        assert weights(one.folder) == weights(other.folder)
        assert lines(one.folder) == lines(other.folder)
        assert (one.folder / "results.json").read_text() == (other.folder / "results.json").read_text()
        assert not (one.folder / "checkpoints" / "step_00000003").exists()  # it went on from the phase's
        final.append(weights(one.folder))
    assert final[0] != final[1] != final[2]
