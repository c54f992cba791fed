"""What the processes of a run do together."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

T = TypeVar("T")


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run ``action`` in the main process and return its result in all. If it fails, the others exit with status 2, not wait."""
    value: Any = None
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            value = action()
        except Exception as problem:
            error = problem
    failed = error is not None
    if accelerator.num_processes > 1:
        value, failed = broadcast_object_list([value, failed])
    if failed:
        raise error or SystemExit(2)
    return value


def main_first(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run ``action`` in every process, in the main one before the others, which may use the files that it has written. If it fails
    there, the others exit with status 2."""
    made: list[T] = []
    on_main(accelerator, lambda: made.append(action()))  # a list, since what is returned would be sent to the others
    return made[0] if made else action()


def greatest(accelerator: Accelerator, number: int) -> int:
    """The greatest of the processes' numbers."""
    if accelerator.num_processes == 1:
        return number
    mine = torch.tensor([number], device=accelerator.device)
    return int(cast(Tensor, accelerator.gather(mine)).max())  # sync: one per step of several processes
