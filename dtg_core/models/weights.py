"""Safe loading of PyTorch's own weights files, which may hold more than tensors."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dtg_core.errors import UserError

SAFE = 2, 10  # before this version a hostile file can corrupt memory, even when only tensors are read (GHSA-63cw-57p8-fm3p)


def read_tensors(path: Path) -> Any:
    """What a ``.pt`` file holds, on the CPU. Code in it is never run.

    Raises UserError on a version of torch that should not read it, and whatever torch raises.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE:
        raise UserError(f"{path}: .pt files are read from torch {SAFE[0]}.{SAFE[1]} on (found {torch.__version__}) - convert it to "
                        "safetensors")
    return torch.load(path, map_location="cpu", weights_only=True)
