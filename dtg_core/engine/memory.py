"""Memory of the process: keeping what was freed, and the most that was ever used."""
from __future__ import annotations

import ctypes
import sys

import torch

# Of <malloc.h>: glibc's parameters for mallopt.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = 1 << 30  # bytes of freed memory that stay with the process
LARGE = 1 << 25  # bytes from which an allocation still gets pages of its own; the largest value that glibc accepts


def keep_freed_memory() -> bool:
    """Let the process keep freed memory for its next tensors instead of giving it back to the system at once.

    A step on the CPU frees and allocates the same tensors over and over, and the system has to clear each page that it hands out
    again: 5 to 20 % of a small network's step. This sets up glibc only; other systems' allocators keep memory by themselves.

    Returns:
        Whether it could be set.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(M_TRIM_THRESHOLD, KEPT) and mallopt(M_MMAP_THRESHOLD, LARGE))


def peak_memory(device: torch.device) -> int:
    """The most bytes that PyTorch has allocated on a GPU, or otherwise that the whole process has had in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
