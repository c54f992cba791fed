"""The benchmark's arithmetic, its counts and the keys of its figures; no test of how long anything takes."""
from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from dtg_core.engine.benchmark import PARTS, Stopwatch, summary, table
from dtg_core.engine.benchmark_data import PAIRS, rates
from dtg_core.engine.waits import device_work


def test_overhead_is_the_median_of_the_repeats_quotients() -> None:
    times = {"step": [11.0, 60.0, 3.0], "bare_passes": [10.0, 40.0, 2.0], "data": [1.0, 2.0, 9.0]}
    found = summary(times)
    assert found["overhead"] == pytest.approx(1.5)
    assert found["seconds"] == {"step": 11.0, "bare_passes": 10.0, "data": 2.0}


def test_a_part_does_not_count_the_parts_that_it_calls() -> None:
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    watch = Stopwatch(torch.device("cpu"), lambda: next(now))
    inner = watch.timed("teacher", lambda: None)
    watch.timed("guidance", inner)()
    watch.lap()
    assert watch.seconds == {"other": 1.0 + 5.0, "guidance": 2.0 + 4.0, "teacher": 3.0}


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps", "xpu"])
def test_the_clock_is_read_when_the_device_has_finished(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    order: list[object] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", order.append)
    device = torch.device(kind)
    watch = Stopwatch(device, lambda: float(order.append("clock") or 0))
    order.clear()
    watch.lap()
    assert order == (["clock"] if kind == "cpu" else [device, "clock"])


def test_waits_and_operations() -> None:
    values = torch.arange(6.0)
    with device_work() as work:
        values.cpu().tolist()  # one wait
        values[values > 2]
        values.view(2, 3)[0]  # views are no operations
        values.nonzero()
        float(values.sum())
    assert work.waits == {"cpu": 1, "aten::index.Tensor": 1, "aten::nonzero": 1, "aten::_local_scalar_dense": 1}
    assert work.operations["aten::view"] == 0
    assert work.operations["aten::sum"] == 1


def test_rates_compare_with_the_faster_of_torchvisions() -> None:
    found = rates({"dtg": [1.0, 2.0], "v2_tensor": [4.0, 4.0], "v2_pil": [2.0, 8.0]})
    assert found["ratio"] == pytest.approx(2.0)
    assert found["pairs_per_second"]["v2_tensor"] == PAIRS / 4


def test_a_table_has_a_line_for_each_part() -> None:
    seconds = dict.fromkeys(("step", "bare_passes", *PARTS), 1.0)
    figures: dict[str, Any] = {"overhead": 1.1, "seconds": seconds, "host_waits": 6, "operations": 9, "peak_memory": 1,
                               "guidance": {"head/candidates": 3.0}}  # fmt: skip
    lines = list(table(figures))
    assert all(any(line.split()[0] == name for line in lines) for name in PARTS)
    json.dumps(figures)


def test_numbers_that_live_on_the_host_are_no_waits() -> None:
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], foreach=True)

    def step() -> None:
        weight.grad = torch.ones(3)
        optimizer.step()

    step()
    with device_work() as everything:
        step()
    with device_work([optimizer.state[weight]["step"]]) as work:
        step()
    assert everything.waits
    assert not work.waits
    assert work.operations
