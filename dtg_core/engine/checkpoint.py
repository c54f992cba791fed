"""Checkpoints that survive a kill at any moment, and self-contained weights files. No pickle in either.

A checkpoint is a folder ``step_00000100`` of

    student.safetensors    teacher.safetensors    weights and buffers
    optimizer.safetensors                         its tensors as "<parameter>/<name>", e.g. "head.weight/exp_avg"
    state.json                                    the step, the caller's state, the optimizer's settings
    manifest.json                                 size and SHA-256 of the files above, and of itself

It is first written as ``step_00000100.tmp``, flushed to the disk and then renamed in one go, so a folder without ``.tmp``
is complete. Older ones are deleted only after that. One process writes; the folder belongs to one run.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.optim import Optimizer

from dtg_core.drafts import draft_of
from dtg_core.engine.folder import CHECKPOINT
from dtg_core.errors import UserError
from dtg_core.models.weights import read_weights

STUDENT, TEACHER, OPTIMIZER = "student.safetensors", "teacher.safetensors", "optimizer.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
_FILES = (STUDENT, TEACHER, OPTIMIZER, STATE)
_METADATA = "dtg_ssod"  # key of our JSON among a weights file's metadata


def _say(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


# Checkpoints -----------------------------------------------------------------------------------------------------------


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def save_checkpoint(
    folder: Path, step: int, student: nn.Module, teacher: nn.Module, optimizer: Optimizer, state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write the checkpoint of ``step`` into ``folder`` and delete all but the newest ``keep`` up to this step.

    Args:
        folder: holds the run's checkpoints; created if missing.
        step: number of finished steps.
        student: the plain module (not a wrapper), whose parameters ``optimizer`` holds.
        teacher: the plain module.
        optimizer: any torch optimizer whose state is tensors and plain values.
        state: JSON values to be returned by ``load_checkpoint``.
        keep: how many checkpoints stay.

    Returns:
        The checkpoint. A complete one of the same step is left unchanged.

    Raises:
        OSError: disk full or not writable; every older checkpoint is untouched, and nothing half-written is left behind
            unless deleting it fails too.
    """
    final = folder / checkpoint_name(step)
    if final.exists():
        try:
            _verified(final)
            return final
        except UserError:
            _remove(final)
    temporary = final.with_name(f"{final.name}.tmp")
    tensors, settings = _pack_optimizer(optimizer, student)
    full_state = {"step": step, "torch": torch.__version__, "optimizer": settings, "state": dict(state)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("step_*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir(exist_ok=True)
        entries = {}
        for name, content in (
            (STUDENT, lambda: safetensors.save(_plain(student.state_dict()))),
            (TEACHER, lambda: safetensors.save(_plain(teacher.state_dict()))),
            (OPTIMIZER, lambda: safetensors.save(_plain(tensors))),
            (STATE, lambda: json.dumps(full_state, indent=1).encode()),
        ):
            data = content()
            _write(temporary / name, data)
            entries[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _write(temporary / MANIFEST, _manifest(entries))
        _sync_folder(temporary)
        os.rename(temporary, final)
        _sync_folder(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in [path for number, path in _checkpoints(folder) if number <= step][keep:]:
        _remove(old)
    return final


def load_checkpoint(
    path: Path, student: nn.Module, teacher: nn.Module, optimizer: Optimizer,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Restore all three exactly, on the devices they are on.

    Args:
        check: looks at the saved ``state`` before anything is changed, and raises to refuse it.

    Returns:
        The ``state`` that was saved, and its step under "step".

    Raises:
        UserError: naming the file that is missing, damaged or made for other modules; nothing has been changed then.
    """
    contents, stored = _verified(path)
    if check is not None:
        check(stored["state"])
    weights = {module: safetensors.load(contents[name]) for module, name in ((student, STUDENT), (teacher, TEACHER))}
    _check_fit(student, weights[student], path / STUDENT)
    _check_fit(teacher, weights[teacher], path / TEACHER)
    restored = _unpack_optimizer(
        optimizer, student, safetensors.load(contents[OPTIMIZER]), stored["optimizer"], path / OPTIMIZER
    )
    student.load_state_dict(weights[student])
    teacher.load_state_dict(weights[teacher])
    optimizer.load_state_dict(restored)
    return {**stored["state"], "step": stored["step"]}


def newest_checkpoint(folder: Path, warn: Callable[[str], None] = _say) -> Path | None:
    """The newest complete checkpoint of a folder, None when there is none at all.

    Damaged ones are skipped with a warning that names the file. Raises UserError when all of them are damaged.
    """
    damaged = []
    for _, path in _checkpoints(folder):
        try:
            _verified(path)
            return path
        except UserError as error:
            warn(f"{error}; the checkpoint before it is tried")
            damaged.append(path.name)
    if damaged:
        found = f"{', '.join(damaged)} damaged"
        raise UserError(f"{folder}: no whole checkpoint ({found}) - restore one, or start with --overwrite")
    return None


def newer_checkpoints(folder: Path, step: int) -> list[Path]:
    """Those after ``step``, damaged ones included: resuming from ``step`` abandons the training that they belong to."""
    return [path for number, path in _checkpoints(folder) if number > step]


def discard_newer(folder: Path, step: int) -> None:
    """Delete the checkpoints after ``step``."""
    for path in newer_checkpoints(folder, step):
        _remove(path)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each checkpoint, the newest first."""
    if not folder.is_dir():
        return []
    found = ((CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def _remove(path: Path) -> None:
    """Delete a checkpoint; renamed first, so that half of one is never mistaken for a checkpoint. What cannot be deleted stays."""
    try:
        doomed = path.with_name(f"{path.name}.tmp")
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    except OSError:
        pass


def _manifest(entries: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The manifest's only valid form; it contains its own digest, so that a flipped bit in it is noticed too."""
    text = json.dumps(entries, indent=1, sort_keys=True)
    return f'{{"files": {text},\n"sha256": "{hashlib.sha256(text.encode()).hexdigest()}"}}\n'.encode()


def _verified(path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The bytes of a complete checkpoint's files and its parsed state.json. Raises UserError naming the damaged file."""
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint - give a folder step_NNNNNNNN, or auto")

    def damaged(name: str, found: str) -> UserError:
        return UserError(f"{path / name}: damaged checkpoint ({found}) - use an older one")

    def read(name: str) -> bytes:
        try:
            return (path / name).read_bytes()
        except OSError as error:
            raise damaged(name, error.strerror or "not readable") from error

    raw = read(MANIFEST)
    try:
        entries = json.loads(raw)["files"]
        whole = raw == _manifest(entries) and all(name in entries for name in _FILES)
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise damaged(MANIFEST, "its digest does not match")
    contents = {}
    for name in _FILES:
        contents[name] = read(name)
        if len(contents[name]) != entries[name]["size"]:
            raise damaged(name, f"{len(contents[name])} of {entries[name]['size']} bytes")
        if hashlib.sha256(contents[name]).hexdigest() != entries[name]["sha256"]:
            raise damaged(name, "its SHA-256 does not match")
    stored = json.loads(contents[STATE])
    match = CHECKPOINT.fullmatch(path.name)
    if match and int(match[1]) != stored["step"]:
        raise damaged(STATE, f"it is of step {stored['step']}")
    return contents, stored


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Tensors ---------------------------------------------------------------------------------------------------------------


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that are contiguous and share no memory, as safetensors requires."""
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()) for name, tensor in tensors.items()}


def _check_fit(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError unless names, shapes and dtypes are the module's own."""
    own = module.state_dict()
    wrong = [f"{name} missing" for name in own.keys() - tensors.keys()]
    wrong += [f"{name} unknown" for name in tensors.keys() - own.keys()]
    for name in own.keys() & tensors.keys():
        if own[name].shape != tensors[name].shape:
            wrong.append(f"{name} {list(tensors[name].shape)} for {list(own[name].shape)}")
        elif own[name].dtype != tensors[name].dtype:
            wrong.append(f"{name} {tensors[name].dtype} for {own[name].dtype}")
    if wrong:
        found = ", ".join(sorted(wrong)[:5])
        raise UserError(f"{path}: does not fit the detector ({len(wrong)} of {len(own)} tensors: {found}) - "
                        "use the settings it was made with")


def _parameter_names(optimizer: Optimizer, module: nn.Module) -> list[list[str]]:
    """Names of each group's parameters, in the optimizer's order."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _pack_optimizer(optimizer: Optimizer, module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's tensors by "<parameter>/<name>"; its groups and plain values as JSON values."""
    names = _parameter_names(optimizer, module)
    packed = optimizer.state_dict()
    order = [name for group in names for name in group]
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in packed["state"].items():
        for key, value in entries.items():
            target: dict[str, Any] = tensors if isinstance(value, Tensor) else values
            target[f"{order[index]}/{key}"] = value
    groups = [{**group, "params": own} for group, own in zip(packed["param_groups"], names)]
    return tensors, {"groups": groups, "values": values}


def _unpack_optimizer(
    optimizer: Optimizer, module: nn.Module, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """The optimizer's state dictionary from what ``_pack_optimizer`` made; without parameters that are now frozen."""
    names = _parameter_names(optimizer, module)
    held = {name for group in names for name in group}
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad} - held
    if names != [[name for name in group["params"] if name not in frozen] for group in settings["groups"]]:
        raise UserError(f"{path}: made for other trained parameters or groups - use the settings it was made with")
    order = [name for group in names for name in group]
    index = {name: number for number, name in enumerate(order)}
    parameters = dict(module.named_parameters())
    state: dict[int, dict[str, Any]] = {}
    for full_name, value in [*tensors.items(), *settings["values"].items()]:
        name, _, key = full_name.rpartition("/")
        if name in frozen:
            continue
        if isinstance(value, Tensor) and value.shape == parameters[name].shape:
            # the parameter's memory layout: another order of elements may round differently in vectorised kernels
            value = torch.empty_like(parameters[name], dtype=value.dtype, requires_grad=False).copy_(value)
        state.setdefault(index[name], {})[key] = value
    # The settings are this run's, and so are the kernels: requested changes take effect, and the device may differ.
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


# Weights files ---------------------------------------------------------------------------------------------------------


def save_weights(path: Path, module: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Write a module's weights and JSON ``metadata`` as one safetensors file, replacing an older one at once.

    Raises OSError if that fails; the older file is then untouched.
    """
    data = safetensors.save(_plain(module.state_dict()), {_METADATA: json.dumps(dict(metadata))})
    with draft_of(path) as draft:
        _write(draft, data)
    _sync_folder(path.parent)


def load_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a weights file of this program. Raises UserError: missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})[_METADATA])
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: not a whole weights file - train again") from error


def weights_step(folder: Path) -> int | None:
    """The step of which the weights in a run's folder are; None: there are none."""
    try:
        return load_metadata(folder / "weights" / "teacher.safetensors").get("step")
    except UserError:
        return None


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a weights file on the CPU, and its metadata ({} if it has none of ours).

    Raises UserError as ``read_weights`` does, and for damaged metadata.
    """
    tensors, metadata = read_weights(path)
    try:
        return tensors, json.loads(metadata.get(_METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}) - copy or make it anew") from error


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load all of a module's weights. Raises UserError, listing what does not fit, before anything has been changed."""
    _check_fit(module, tensors, path)
    module.load_state_dict(dict(tensors))
