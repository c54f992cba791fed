"""An exported program as an ONNX file: two operators that PyTorch's exporter lacks or rounds, and readable errors.

Needs the extra ``export`` (onnx, onnxscript, onnxruntime).
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxscript import opset18
from onnxscript.onnx_types import DOUBLE, FLOAT, INT64
from torch import Tensor
from torch.export import ExportedProgram

from dtg_core.boxes import GROUP_SPAN
from dtg_core.errors import UserError, one_line

op: Any = opset18  # its annotations do not cover the Python numbers that it accepts
LOWEST = float(np.finfo(np.float32).min)


def grouped_nms(boxes: DOUBLE, scores: DOUBLE, iou_threshold: float) -> INT64:
    """``torchvision.ops.nms`` of boxes [M, 4] that ``dtg_core.boxes.spread_groups`` has moved apart.

    ONNX only has NMS in float32, which would round boxes that far from the origin. So they are moved back, and their groups
    become the operator's classes.
    """
    span = op.CastLike(op.Constant(value_float=float(GROUP_SPAN)), boxes)
    group = op.Round(op.Div(op.Slice(boxes, [0], [1], [1]), span))  # [M, 1]
    boxes = op.Cast(op.Sub(boxes, op.Mul(group, span)), to=FLOAT.dtype)
    group = op.Reshape(op.Cast(group, to=INT64.dtype), [1, -1])
    one = op.Constant(value_int=1)
    most = op.ReduceMax(op.Concat(op.Constant(value_ints=[0]), op.Reshape(group, [-1]), axis=0), keepdims=0)
    each = op.Unsqueeze(op.Range(op.Constant(value_int=0), op.Add(most, one), one), [1])  # [groups, 1]
    scores = op.Cast(scores, to=FLOAT.dtype)
    of_group = op.Where(op.Equal(group, each), op.Unsqueeze(scores, [0]), op.Constant(value_float=-np.inf))
    chosen = op.NonMaxSuppression(op.Unsqueeze(boxes, [0]), op.Unsqueeze(of_group, [0]), [2**62], [iou_threshold], [LOWEST])
    keep = op.Reshape(op.Slice(chosen, [2], [3], [1]), [-1])
    keep, _ = op.TopK(keep, op.Shape(keep), largest=0)  # by index first, because the best of equal scores is the first
    _, order = op.TopK(op.Gather(scores, keep), op.Shape(keep))
    return op.Gather(keep, order)


def stable_sort(values: FLOAT, stable: bool = True, dim: int = -1, descending: bool = False) -> tuple[FLOAT, INT64]:
    """``torch.sort(stable=True)``: ONNX's TopK puts the lower index first among equal values."""
    length = op.Gather(op.Shape(values), [dim])
    return op.TopK(values, length, axis=dim, largest=int(descending))


TRANSLATIONS: dict[Any, Any] = {
    torch.ops.torchvision.nms.default: grouped_nms, torch.ops.aten.sort.stable: stable_sort,
}  # fmt: skip


def write(
    program: ExportedProgram, path: Path, told: dict[str, Any], opset: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Write ``program`` with its description, a JSON text under each name of the model's metadata.

    Args:
        program: from ``torch.export``. path: of the file. told: the description; its keys "inputs" and "outputs" hold the
            names of the graph's inputs and outputs. opset: ONNX opset.

    Returns:
        The file as run by ONNX Runtime, a function of the graph's inputs.

    Raises:
        UserError: an operation has no counterpart in ONNX, the opset is not available, or ONNX Runtime does not accept the file.
    """
    names = list(told["inputs"])
    try:
        made = torch.onnx.export(
            program, dynamo=True, verbose=False, opset_version=opset, custom_translation_table=TRANSLATIONS,
            input_names=names, output_names=list(told["outputs"]),
        )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"ONNX: {_missing(error)} - use --format torch_export, or another backbone") from error
    assert made is not None
    if made.model.opset_imports[""] != opset:
        found = made.model.opset_imports[""]
        raise UserError(f"--opset {opset}: the graph cannot be converted to it (it is made in {found}) - leave --opset out")
    made.model.metadata_props.update({name: json.dumps(value, ensure_ascii=False) for name, value in told.items()})
    made.save(path)
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise UserError(f"ONNX Runtime {onnxruntime.__version__}: does not take the graph ({one_line(error)[:200]}) - use --opset, "
                        "or a newer onnxruntime") from error

    def run(image: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores, labels = session.run(None, dict(zip(names, (image.numpy(), size.numpy()))))
        return torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(labels)

    return run


def _missing(error: Exception) -> str:
    """The operation that PyTorch's exporter names in its long report."""
    named = re.search(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", str(error))
    return f"has no operator for {named[1]}" if named else f"cannot be written ({str(error).splitlines()[0][:200]})"
