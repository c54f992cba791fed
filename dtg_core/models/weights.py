"""Reading weights files of any origin, which may be damaged, or hold more than tensors; code in them is never run."""
from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dtg_core.drafts import reading
from dtg_core.errors import UserError, one_line

SAFE = 2, 10  # before this version a hostile .pt can corrupt memory, even when only tensors are read (GHSA-63cw-57p8-fm3p)
MOST_TENSORS = 100_000  # in a weights file; a hostile one may list millions of empty ones


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a weights file on the CPU, and the metadata of a safetensors file.

    Args:
        path: ``.safetensors``, or ``.pt`` / ``.pth`` that holds nothing but tensors, flat or under "state_dict" or "model".

    Raises:
        UserError: missing, damaged, not a dictionary of tensors, or containing pickled code; a ``.pt`` with a torch that should
            not read one.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such weights file - give a .safetensors file")
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    if path.suffix not in (".pt", ".pth"):
        raise UserError(f"{path}: unknown kind of weights file - give a .safetensors file")
    return _from_pickle(path), {}


def _from_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            if len(file.keys()) > MOST_TENSORS:
                raise ValueError(f"{len(file.keys())} tensors, more than {MOST_TENSORS}")
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, OSError, ValueError) as error:
        with reading(path), open(path, "rb"):  # safetensors reports an unreadable file as missing
            pass
        raise UserError(f"{path}: not a whole safetensors file ({one_line(error)}) - copy or make it anew") from error


def _from_pickle(path: Path) -> dict[str, Tensor]:
    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE:
        raise UserError(f"{path}: .pt files are read from torch {SAFE[0]}.{SAFE[1]} on (found {torch.__version__}) - convert it to "
                        "safetensors")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile or damaged file can raise many kinds of errors
        raise UserError(f"{path}: holds more than tensors, or is damaged ({type(error).__name__}) - convert it to "
                        "safetensors where it was made") from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{path}: no dictionary of tensors (found {type(loaded).__name__}) - save module.state_dict()")
    return {str(name): tensor for name, tensor in loaded.items()}
