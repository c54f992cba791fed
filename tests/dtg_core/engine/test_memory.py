"""Memory that stays with the process, seen in a process of its own because an allocator's settings cannot be taken back."""
from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dtg_core.engine.memory import peak_memory

CHURN = """
import resource, torch
from dtg_core.engine.memory import keep_freed_memory

def churn():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        tensors = [torch.ones(1 << 22) for _ in range(8)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

churn()
before, told = churn(), keep_freed_memory()
churn()
print(told, before, churn())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    done = subprocess.run([sys.executable, "-c", CHURN], capture_output=True, text=True, check=True)
    told, before, after = done.stdout.split()
    if told == "False":
        pytest.skip("not glibc")
    if int(before) == 0:  # memory of this size cannot come without faults: a sandbox's kernel that does not count them
        pytest.skip("this kernel counts no page faults")
    assert int(before) > 1000
    assert int(after) < 100


def test_peak_memory_counts_a_tensor_that_is_gone() -> None:
    before = peak_memory(torch.device("cpu"))
    size = before + (1 << 26)  # more than the process has ever had
    large = torch.ones(size // 4)
    del large
    assert peak_memory(torch.device("cpu")) >= size
