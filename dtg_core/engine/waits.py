"""What a piece of code demands of a device, counted on any machine: operations, and waits of the host for a result.

A wait is an operator whose result's size or value the host needs before it can go on. They are counted on the CPU as well,
where nothing waits, so that no GPU is needed to notice a new one.
"""
from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dtg_core import boxes

#: Operators whose result's number of rows depends on values, or is a Python number.
WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::equal", "aten::bincount", "aten::repeat_interleave.Tensor", "torchvision::nms",
}  # fmt: skip
INDEXING = {"aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
#: Methods that bring a tensor to the host; on the CPU no operator shows them.
FETCHING = {Tensor.cpu, Tensor.tolist, Tensor.numpy}


@dataclass
class DeviceWork:
    """Counts by the operator's name."""

    operations: collections.Counter[str] = field(default_factory=collections.Counter)  # without views, which only rename
    waits: collections.Counter[str] = field(default_factory=collections.Counter)


@contextlib.contextmanager
def device_work(host: Sequence[Tensor] = ()) -> Iterator[DeviceWork]:
    """Count what happens inside, backward passes too. ``host`` tensors are on the CPU wherever the others are.

    On any device, NMS is called as on one that the host waits for.
    """
    work = DeviceWork()
    with mock.patch.object(boxes, "NMS_BY_IMAGE", frozenset()), _Fetches(work), _Operators(work, host):
        yield work


class _Operators(TorchDispatchMode):
    def __init__(self, work: DeviceWork, host: Sequence[Tensor]) -> None:
        super().__init__()
        self.work, self.host = work, {id(tensor) for tensor in host}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if args and id(args[0]) in self.host:
            return func(*args, **(kwargs or {}))
        if not func.is_view:
            self.work.operations[name] += 1
        by_mask = name in INDEXING and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if name in WAITING or by_mask:
            self.work.waits[name] += 1
        return func(*args, **(kwargs or {}))


class _Fetches(TorchFunctionMode):
    def __init__(self, work: DeviceWork) -> None:
        super().__init__()
        self.work = work
        self.fetched: list[Tensor] = []  # kept, so that no other tensor takes their ids

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in FETCHING and not any(args[0] is tensor for tensor in self.fetched):
            self.work.waits[func.__name__] += 1
        if func is Tensor.cpu:
            self.fetched.append(result)
        return result
