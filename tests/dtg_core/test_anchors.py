"""The grid of a canvas: its numbers, and that the device makes them by itself."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dtg_core.anchors import anchor_grid, cell_anchors

CPU, META = torch.device("cpu"), torch.device("meta")


class HostTensors(TorchDispatchMode):
    """Names of the operators that take or give a tensor of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.device == CPU for leaf in tree_leaves((args, kwargs, result))):
            self.found.append(func.name())
        return result


@pytest.mark.parametrize("canvas", [(64, 96), (160, 256), (100, 75), (1344, 800)])
@pytest.mark.parametrize(("strides", "ratios"), [((4, 8, 16, 32, 64), (0.5, 1.0, 2.0)), ((8, 16, 32, 64, 128), (1.0,))])
def test_anchors_are_cells_at_each_place_of_each_level(
    canvas: tuple[int, int], strides: tuple[int, ...], ratios: tuple[float, ...]
) -> None:
    grid = anchor_grid(canvas, strides, 8.0, ratios, CPU)
    start = 0
    for level, stride in enumerate(strides):
        rows, columns = (-(-side // stride) for side in canvas)
        cell = cell_anchors(8.0 * stride, ratios)
        origin = torch.arange(rows * columns)
        x, y = origin % columns * stride, origin // columns * stride
        expected = (torch.stack((x, y, x, y), 1).unsqueeze(1) + cell).reshape(-1, 4)
        here = slice(start, start + len(expected))
        assert torch.equal(grid.anchors[here], expected)
        assert torch.equal(grid.cells[level], cell)
        assert (grid.level[here] == level).all()
        assert grid.tables[1][level].tolist() == [rows, columns, stride]
        assert int(grid.tables[2][level]) == start
        start += len(expected)
    assert grid.num_samples == start == len(grid.level)
    assert [tensor.dtype for tensor in (grid.anchors, grid.level, *grid.tables)] == [
        torch.float32, torch.int64, torch.float32, torch.int64, torch.int64
    ]  # fmt: skip


def test_what_is_kept_serves_training() -> None:
    """Grids that a trace or inference mode asks for first: the one's hold no numbers, the other's take no part in training."""
    class Grid(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + anchor_grid((40, 72), (8, 16), 7.0, (1.0,), x.device).anchors.sum()

    program = torch.export.export(Grid(), (torch.zeros(1),))
    grid = anchor_grid((40, 72), (8, 16), 7.0, (1.0,), torch.device("cpu"))
    assert type(grid.anchors) is Tensor
    assert float(program.module()(torch.zeros(1))) == pytest.approx(float(grid.anchors.sum()))
    with torch.inference_mode():
        anchor_grid((40, 40), (8, 16), 6.0, (1.0,), torch.device("cpu"))
    grid = anchor_grid((40, 40), (8, 16), 6.0, (1.0,), torch.device("cpu"))
    assert not any(tensor.is_inference() for tensor in (grid.anchors, *grid.cells))
    (grid.anchors * torch.ones(1, requires_grad=True)).sum().backward()


def test_a_new_canvas_takes_nothing_from_the_host() -> None:
    """A copy to a device makes the host wait, and training with random sizes sees hundreds of canvases."""
    anchor_grid((64, 64), (8, 16), 8.0, (1.0, 2.0), META)  # the cells, once in a run
    anchor_grid.cache_clear()
    with HostTensors() as host:
        grid = anchor_grid((96, 64), (8, 16), 8.0, (1.0, 2.0), META)
        found = grid.anchors, grid.level, *grid.tables
    assert host.found == []
    assert all(tensor.device == META for tensor in found)
