"""Checkpoints: exact, atomic, refused by name when damaged. Weights files: self-contained, no pickled code is run."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtg_core.config import BackboneConfig
from dtg_core.engine import checkpoint
from dtg_core.engine.checkpoint import (
    discard_newer,
    load_checkpoint,
    load_into,
    load_weights,
    newest_checkpoint,
    save_checkpoint,
    save_weights,
)
from dtg_core.errors import UserError
from dtg_core.models.backbone import build_pyramid

ROOT = Path(__file__).resolve().parents[3]
FILES = ("student.safetensors", "teacher.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "sgd without momentum": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.99), amsgrad=True),
    "fused sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True),
    "fused adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 7, 3), nn.Flatten(), nn.Linear(28, 2))


def parts(seed: int = 0, name: str = "adamw") -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    student, teacher = net(seed).to(memory_format=torch.channels_last), net(seed + 100)
    student[4].bias.requires_grad_(False)  # a frozen parameter that no group holds
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = [{"params": trained[:3]}, {"params": trained[3:], "weight_decay": 0.05}]
    return student, teacher, OPTIMIZERS[name](groups)


def train(student: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        student(torch.randn(4, 3, 6, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


def saved(folder: Path, step: int, seed: int = 0, keep: int = 2) -> Path:
    student, teacher, optimizer = parts(seed)
    train(student, optimizer, 0, 2)
    return save_checkpoint(folder, step, student, teacher, optimizer, {"best": 1.5}, keep)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_is_exact(tmp_path: Path, name: str) -> None:
    student, teacher, optimizer = parts(0, name)
    train(student, optimizer, 0, 3)
    path = save_checkpoint(tmp_path, 3, student, teacher, optimizer, {"best": 0.1 + 0.2, "names": ["a", None]})
    assert path.name == "step_00000003"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)

    other, other_teacher, other_optimizer = parts(7, name)
    state = load_checkpoint(path, other, other_teacher, other_optimizer)
    assert state == {"best": 0.1 + 0.2, "names": ["a", None], "step": 3}
    assert equal(other_teacher.state_dict(), teacher.state_dict())
    assert equal(other_optimizer.state_dict(), optimizer.state_dict())
    train(student, optimizer, 3, 8)
    train(other, other_optimizer, 3, 8)
    assert equal(other.state_dict(), student.state_dict())
    assert equal(other_optimizer.state_dict(), optimizer.state_dict())
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_the_settings_are_those_of_the_optimizer_that_goes_on(tmp_path: Path) -> None:
    """Its kernels, as those of its device, and what the run has been told to change."""
    student, teacher, _ = parts()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    former = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1, foreach=True, fused=False)
    train(student, former, 0, 2)
    path = save_checkpoint(tmp_path, 2, student, teacher, former, {})
    settings = {"lr": 5.0, "weight_decay": 0.3, "betas": (0.5, 0.7), "foreach": False, "fused": True}
    own = torch.optim.AdamW(trained, **settings)  # type: ignore[arg-type]
    load_checkpoint(path, student, teacher, own)
    assert {key: own.param_groups[0][key] for key in settings} == settings
    assert equal(own.state_dict()["state"], former.state_dict()["state"])


def test_a_parameter_that_is_frozen_by_now_is_left_out(tmp_path: Path) -> None:
    student, teacher, optimizer = parts()
    train(student, optimizer, 0, 2)
    path = save_checkpoint(tmp_path, 2, student, teacher, optimizer, {})
    again, other_teacher, _ = parts(7)
    again[0].weight.requires_grad_(False)
    trained = [parameter for parameter in again.parameters() if parameter.requires_grad]
    own = torch.optim.AdamW([{"params": trained[:2]}, {"params": trained[2:]}], lr=0.01, amsgrad=True)
    load_checkpoint(path, again, other_teacher, own)
    assert equal(own.state[again[0].bias], optimizer.state[student[0].bias])
    assert equal(own.state[again[4].weight], optimizer.state[student[4].weight])
    assert len(own.state) == len(optimizer.state) - 1


def test_before_the_first_step_and_with_shared_memory(tmp_path: Path) -> None:
    student, teacher, optimizer = parts()
    student[2].weight = nn.Parameter(torch.randn(14, 5, 3, 3)[::2])  # a view into larger memory, not contiguous
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    teacher.register_buffer("same", teacher[1].running_mean)
    path = save_checkpoint(tmp_path, 0, student, teacher, optimizer, {})
    other = torch.optim.SGD(student.parameters(), lr=1.0)
    assert load_checkpoint(path, student, teacher, other) == {"step": 0}


def test_retention_and_newest(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") is None
    for step in (10, 20, 30):
        saved(tmp_path, step)
    (tmp_path / "step_00000040.tmp").mkdir()  # left by a kill
    (tmp_path / "notes").mkdir()
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000020", "step_00000030", "step_00000040.tmp"]
    assert newest_checkpoint(tmp_path) == tmp_path / "step_00000030"
    saved(tmp_path, 50)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step_00000030", "step_00000050"]
    discard_newer(tmp_path, 30)
    assert newest_checkpoint(tmp_path) == tmp_path / "step_00000030"


def test_what_another_course_has_left_is_not_counted(tmp_path: Path) -> None:
    """Later checkpoints than the one that is saved: they neither replace nor are replaced by it."""
    for step in (10, 30, 20):
        saved(tmp_path, step, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000020", "step_00000030"]


def test_a_refused_state_changes_nothing(tmp_path: Path) -> None:
    path, (student, teacher, optimizer) = saved(tmp_path, 10), parts(7)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}

    def refuse(state: Any) -> None:
        assert state == {"best": 1.5}
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        load_checkpoint(path, student, teacher, optimizer, refuse)
    assert equal(dict(student.state_dict()), before)
    assert not optimizer.state


def test_saving_a_step_again(tmp_path: Path) -> None:
    path = saved(tmp_path, 10)
    before = (path / "student.safetensors").read_bytes()
    assert saved(tmp_path, 10, seed=3) == path
    assert (path / "student.safetensors").read_bytes() == before
    (path / "state.json").write_text("{")  # damaged: replaced
    saved(tmp_path, 10, seed=3)
    assert (path / "student.safetensors").read_bytes() != before
    assert newest_checkpoint(tmp_path) == path


def refused(folder: Path, whole: Path, name: str) -> None:
    """The damaged newest checkpoint is refused by the name of its file, and the older one is used."""
    damaged = folder / "step_00000020"
    warnings: list[str] = []
    assert newest_checkpoint(folder, warnings.append) == whole
    assert len(warnings) == 1
    assert str(damaged / name) in warnings[0]
    student, teacher, optimizer = parts(5)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    with pytest.raises(UserError, match=name):
        load_checkpoint(damaged, student, teacher, optimizer)
    assert equal(student.state_dict(), before)
    assert not optimizer.state_dict()["state"]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    whole, newest = saved(tmp_path, 10), saved(tmp_path, 20, seed=1)
    shutil.copytree(newest, tmp_path / "copy")
    return whole, newest


@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused_by_name(tmp_path: Path, pair: tuple[Path, Path], name: str) -> None:
    whole, newest = pair
    data, rng = (newest / name).read_bytes(), random.Random(name)
    damaged = [data[: rng.randrange(len(data))] for _ in range(20)] + [b"", data + b"\0", data[1:]]
    for _ in range(60):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    for content in damaged:
        (newest / name).write_bytes(content)
        refused(tmp_path, whole, name)
    (newest / name).unlink()
    refused(tmp_path, whole, name)
    if name != "manifest.json":
        shutil.copy(whole / name, newest / name)  # from another step
        refused(tmp_path, whole, name)
    (newest / name).write_bytes(data)
    assert newest_checkpoint(tmp_path) == newest


def test_all_damaged_and_renamed(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    whole, newest = pair
    (newest / "state.json").unlink()
    shutil.rmtree(whole)
    with pytest.raises(UserError, match="no whole checkpoint"):
        newest_checkpoint(tmp_path, lambda _: None)
    (tmp_path / "copy").rename(tmp_path / "step_00000030")
    with pytest.raises(UserError, match=r"state.json.*of step 20"):
        load_checkpoint(tmp_path / "step_00000030", *parts())
    with pytest.raises(UserError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "step_00000099", *parts())


def test_other_modules_are_refused_before_anything_changes(tmp_path: Path) -> None:
    path = saved(tmp_path, 10)
    student, teacher, optimizer = parts()
    wrong = nn.Sequential(*net()[:4], nn.Linear(28, 3))
    for modules in ((wrong, teacher, optimizer), (student, wrong, optimizer)):
        with pytest.raises(UserError, match=r"does not fit the detector \(2 of 11 tensors: 4.bias \[2\] for \[3\]"):
            load_checkpoint(path, *modules)
    with pytest.raises(UserError, match=r"optimizer.safetensors: made for other trained parameters"):
        load_checkpoint(path, student, teacher, torch.optim.AdamW(student.parameters()))


CALLS = ("open", "write", "fsync", "mkdir", "rename")


def count_and_fail(monkeypatch: pytest.MonkeyPatch, fail_at: int, stop: BaseException) -> list[str]:
    """Every call to the file system of a save is counted; the one of number ``fail_at`` raises ``stop``."""
    calls: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == fail_at:
                raise stop
            return real(*arguments, **options)

        return call

    class Half:
        """A file that takes only half of what is written before it fails."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Half:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            calls.append("write")
            if len(calls) == fail_at:
                self.file.write(data[: len(data) // 2])
                raise stop
            self.file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    monkeypatch.setattr(checkpoint, "open", counted("open", lambda *arguments: Half(open(*arguments))), raising=False)  # noqa: SIM115
    monkeypatch.setattr(checkpoint.os, "fsync", counted("fsync", os.fsync))
    monkeypatch.setattr(checkpoint.os, "rename", counted("rename", os.rename))
    return calls


def test_full_disk_at_every_call_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        calls = count_and_fail(patch, -1, OSError())
        saved(tmp_path / "count", 20)
    assert calls.count("write") == 5
    assert calls.count("fsync") == 7
    assert calls.index("rename") > max(index for index, name in enumerate(calls) if name == "write")
    for number in range(1, len(calls) + 1):
        folder = tmp_path / f"enospc{number}"
        old = saved(folder, 10, keep=1)
        with monkeypatch.context() as patch:
            count_and_fail(patch, number, OSError(errno.ENOSPC, "No space left on device"))
            with pytest.raises(OSError, match="No space"):
                saved(folder, 20, seed=1, keep=1)
        assert old.is_dir()
        found = newest_checkpoint(folder)
        assert found == (folder / "step_00000020" if number == len(calls) else old)  # the last call is after the rename
        assert not list(folder.glob("*.tmp"))
        saved(folder, 20, seed=1, keep=1)
        assert newest_checkpoint(folder) == folder / "step_00000020"


class Killed(BaseException):
    """A kill runs no cleaning up."""


def test_kill_at_every_call_keeps_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1, 30):
        folder = tmp_path / f"kill{number}"
        saved(folder, 10, keep=1)
        with monkeypatch.context() as patch:
            calls = count_and_fail(patch, number, Killed())
            try:
                saved(folder, 20, seed=1, keep=1)
            except Killed:
                pass
            else:
                assert len(calls) < number
                break
        found = newest_checkpoint(folder, pytest.fail)  # no damaged one either
        assert found is not None
        saved(folder, 30, seed=1, keep=1)
        assert [path.name for path in folder.iterdir()] == ["step_00000030"]
    else:
        pytest.fail("a save does not end")


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path\nimport test_checkpoint as t\nstep = int(sys.argv[2])\nprint('go', flush=True)\n"
        "while True:\n    step += 1\n    t.saved(Path(sys.argv[1]), step, keep=1)\n"
    )
    rng, step = random.Random(0), 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(step)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        while not list(tmp_path.glob("step_????????")):
            pass
        try:
            process.wait(rng.uniform(0.02, 0.2))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = newest_checkpoint(tmp_path, pytest.fail)
        assert found is not None
        assert int(found.name[5:]) >= step
        step = int(found.name[5:])


def test_weights_file(tmp_path: Path) -> None:
    module, path = net().to(memory_format=torch.channels_last), tmp_path / "weights" / "teacher.safetensors"
    metadata = {"class_names": ["ä", "b"], "category_ids": [3, "x"], "config": "a: 1\n"}
    save_weights(path, module, metadata)
    tensors, found = load_weights(path)
    assert found == metadata
    assert equal(tensors, {key: value.contiguous() for key, value in module.state_dict().items()})
    other = net(3)
    load_into(other, tensors, path)
    assert equal(other.state_dict(), module.state_dict())
    assert [file.name for file in path.parent.iterdir()] == ["teacher.safetensors"]
    tensors.pop("4.bias")
    tensors["5.bias"] = torch.zeros(1)
    tensors["0.bias"] = tensors["0.bias"].double()
    with pytest.raises(
        UserError, match=r"3 of 11 tensors: 0.bias torch.float64 for torch.float32, 4.bias missing, 5.bias unknown"
    ):
        load_into(other, tensors, path)


def test_full_disk_keeps_old_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, net(), {"which": 1})
    with monkeypatch.context() as patch:
        count_and_fail(patch, 2, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OSError, match="No space"):
            save_weights(path, net(1), {"which": 2})
    assert load_weights(path)[1] == {"which": 1}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_damaged_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, net(), {"which": 1})
    data = path.read_bytes()
    for content in [data[:size] for size in range(0, len(data), len(data) // 20)] + [b"\xff" * 100, b"<html>"]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"w\.safetensors: not a whole"):
            load_weights(path)
    with pytest.raises(UserError, match="no such weights"):
        load_weights(tmp_path / "none.safetensors")
    (tmp_path / "w.onnx").write_bytes(data)
    with pytest.raises(UserError, match="unknown kind"):
        load_weights(tmp_path / "w.onnx")


def test_headers_that_ask_for_too_much(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    empty = {f"{number:x}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(120_000)}
    many = json.dumps(empty).encode()
    wrong = [json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 8]}}).encode()
             for dtype, shape in (("F32", [3]), ("F99", [2]), ("F32", [2**40, 2**40]), ("F32", [-2]))]  # fmt: skip
    for header, claimed in ((b"{}", 2**62), (many, len(many)), *((text, len(text)) for text in wrong)):
        path.write_bytes(claimed.to_bytes(8, "little") + header + bytes(8 if header in wrong else 0))
        with pytest.raises(UserError, match=r"w\.safetensors: not a whole safetensors file"):
            load_weights(path)


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_weights_in_a_pt_file_may_lie_under_usual_names(tmp_path: Path) -> None:
    """Flat, or where mmdetection's and Detectron2's files have them; what is no tensor is refused before anything is loaded."""
    path, tensors = tmp_path / "w.pt", {"a": torch.ones(2), "b.c": torch.zeros(1)}
    for content in (tensors, {"state_dict": tensors, "epoch": 3}, {"model": tensors, "iteration": 9}):
        torch.save(content, path)
        assert equal(load_weights(path)[0], tensors)
    for content in ({**tensors, "epoch": 3}, {"model": {**tensors, "epoch": 3}}, [torch.ones(1)], {"state_dict": [1]}):
        torch.save(content, path)
        with pytest.raises(UserError, match="no dictionary of tensors"):
            load_weights(path)


def test_pickles_are_never_run(tmp_path: Path) -> None:
    mark, hostile = tmp_path / "mark", tmp_path / "hostile.pt"
    for content in (Hostile(mark), {"a": Hostile(mark)}, {"state_dict": {"a": Hostile(mark)}}):
        torch.save(content, hostile)
        with pytest.raises(UserError, match=r"hostile\.pt: holds more than tensors"):
            load_weights(hostile)
        hostile.write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=r"hostile\.pt: holds more than tensors"):
            load_weights(hostile)
    assert not mark.exists()
    torch.save([torch.zeros(1)], hostile)
    with pytest.raises(UserError, match="no dictionary"):
        load_weights(hostile)
    for content in (net().state_dict(), {"state_dict": net().state_dict()}):
        torch.save(content, hostile)
        assert equal(load_weights(hostile)[0], dict(net().state_dict()))


def test_fault_82_an_old_torch_reads_no_pt_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a detector's weights nor a backbone's."""
    path = tmp_path / "w.pt"
    torch.save(net().state_dict(), path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    for version in ("2.9.1", "2.8.0+cpu", "1.13.0"):
        monkeypatch.setattr(torch, "__version__", version)
        backbone = BackboneConfig("test_resnet", weights=str(path))
        for read in (lambda: load_weights(path), lambda config=backbone: build_pyramid(config, 8, (8, 16), "conv")):
            with pytest.raises(UserError, match=rf"w\.pt: \.pt files are read from torch 2\.10 on \(found {re.escape(version)}\)"):
                read()
