"""A trained detector as one graph, pixels in and boxes out, for torch.export and ONNX, compared with the detector itself.

The graph holds normalisation, network, decoding and NMS. It takes ``image`` [3, H, W] uint8 RGB of one fixed size, and ``size``
[2] int64, the (height, width) of the picture at its top left; the rest is padding, whose pixels do not matter. It returns
``boxes`` [D, 4] float32 in the pixels of ``image``, clipped to ``size``, ``scores`` [D] float32, best first, and ``labels`` [D]
int64, rows of the class names; D is free, and may be 0.
"""
from __future__ import annotations

import io
import json
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import ExportedProgram

from dtg_core.data.views import CANVAS_MULTIPLE, NO_BOXES, NO_LABELS
from dtg_core.engine.predict import Predictor
from dtg_core.errors import UserError, counted
from dtg_core.protocol import Detector
from dtg_core.structures import Targets, ViewBatch

#: Largest differences from the detector itself that are accepted. Float32 sums in another order stay far below both; a box
#: that NMS treats differently, changed rounding or a misread size goes far beyond.
BOX_TOLERANCE = 0.05  # px
SCORE_TOLERANCE = 1e-3
SUFFIXES = {"torch_export": ".pt2", "onnx": ".onnx"}  # of the formats

Prepared = tuple[Tensor, Tensor]  # image and size
Boxes = tuple[Tensor, Tensor, Tensor]  # boxes, scores and labels


class DetectorGraph(nn.Module):
    """What is exported: a detector on one image of fixed size.

    Args:
        detector: a ``dtg_core.protocol.Detector``. score_threshold: of boxes that are returned.
    """

    def __init__(self, detector: Detector, score_threshold: float) -> None:
        super().__init__()
        self.detector, self.score_threshold = detector, score_threshold

    def forward(self, image: Tensor, size: Tensor) -> Boxes:
        """Boxes, scores and labels of ``image`` [3, H, W] uint8, of which ``size`` [2] int64 is the picture."""
        height, width = image.shape[1:]
        pixels = nn.functional.pad(image, (0, -width % CANVAS_MULTIPLE, 0, -height % CANVAS_MULTIPLE))
        nothing = torch.zeros(1, dtype=torch.int64)
        objects = Targets(torch.from_numpy(NO_BOXES), torch.from_numpy(NO_LABELS), nothing[:0])
        views = ViewBatch(pixels.unsqueeze(0), size.float().unsqueeze(0), objects, nothing, torch.eye(3).unsqueeze(0))
        found = self.detector.detect(self.detector.run(views), views, self.score_threshold)
        return found.boxes, found.scores, found.labels


def on_canvas(picture: Image.Image, height: int, width: int) -> Prepared:
    """An RGB picture as the graph's inputs: resized to fit, at the top left of a black canvas."""
    factor = min(height / picture.height, width / picture.width)
    inner = max(1, round(picture.height * factor)), max(1, round(picture.width * factor))
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: inner[0], : inner[1]] = np.asarray(picture.resize(inner[::-1], Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), torch.tensor(inner)


@dataclass(frozen=True)
class Deviation:
    """The largest differences between two lists of detections."""

    boxes: float  # px
    scores: float

    @property
    def accepted(self) -> bool:
        return self.boxes <= BOX_TOLERANCE and self.scores <= SCORE_TOLERANCE


def difference(one: Boxes, other: Boxes) -> Deviation:
    """Each detection compared with the nearest of its class in the other list; infinite if the lists have no pairs."""
    if len(one[0]) != len(other[0]):
        return Deviation(math.inf, math.inf)
    if len(one[0]) == 0:
        return Deviation(0.0, 0.0)
    apart = (one[0].unsqueeze(1) - other[0]).abs().amax(-1)
    apart = apart.masked_fill(one[2].unsqueeze(1) != other[2], math.inf)
    near, column = apart.min(1)
    boxes = torch.maximum(near.max(), apart.amin(0).max())
    return Deviation(float(boxes), float((one[1] - other[1][column]).abs().max()))


def export(
    predictor: Predictor, pictures: Sequence[Image.Image], output: Path, stem: str, formats: Sequence[str],
    size: tuple[int, int], score_threshold: float, opset: int,
) -> Iterator[str]:
    """Write a detector's graph in each format, with its description next to it.

    A file gets its name if it ran on all pictures and agrees with the detector; otherwise its name ends in ``.rejected``.

    Args:
        predictor: on the CPU; its parameters are frozen. pictures: RGB, to compare on. output: folder. stem: of the files' names.
        formats: keys of ``SUFFIXES``. size: (H, W) of the graph's image. score_threshold: of boxes that the graph returns.
        opset: ONNX opset.

    Yields:
        A line about each file.

    Raises:
        UserError: a file exists already, an extra is not installed, the pictures show nothing to compare, the graph cannot
            be written in a format, or it differs from the detector.
    """
    files = {kind: output / f"{stem}{SUFFIXES[kind]}" for kind in formats}
    for path in (*files.values(), output / f"{stem}.json"):
        if path.exists():
            raise UserError(f"{path}: is there already - give another --output")
    if "onnx" in formats:
        _require_onnx()
    graph = DetectorGraph(predictor.detector, score_threshold).eval().requires_grad_(False)
    inputs = [on_canvas(picture, *size) for picture in pictures]
    with torch.no_grad():
        expected = [graph(*prepared) for prepared in inputs]
        count = sum(len(boxes) for boxes, _, _ in expected)
        if not count:
            raise UserError(f"--images: nothing is found in {counted(len(pictures), 'image')}, so there is nothing to compare - "
                            "give images with objects, or a lower --score")
        program = _traced(graph, inputs[0])
    told = description(predictor, size, score_threshold)
    checks: dict[str, dict[str, float]] = {}
    rejected = []
    output.mkdir(parents=True, exist_ok=True)
    for kind, path in files.items():
        with tempfile.TemporaryDirectory(dir=output) as folder:
            draft = Path(folder) / path.name
            worst, line = _compared(_written(kind, program, draft, told, opset), inputs, expected)
            os.replace(draft, path if worst.accepted else f"{path}.rejected")
        if worst.accepted:
            checks[kind] = {"boxes": worst.boxes, "scores": worst.scores, "detections": count, "images": len(inputs)}
            yield f"{path}: {line}, on {counted(count, 'box', 'boxes')} in {counted(len(inputs), 'image')}"
        else:
            rejected.append(f"{path}: differs from the detector ({line}) - it is kept as {path.name}.rejected, do not use it")
    if checks:
        text = json.dumps({**told, "checked": checks}, indent=1, ensure_ascii=False)
        (output / f"{stem}.json").write_text(text + "\n", encoding="utf-8")
    if rejected:
        raise UserError("; ".join(rejected))


def _compared(run: Callable[..., Boxes], inputs: Sequence[Prepared], expected: Sequence[Boxes]) -> tuple[Deviation, str]:
    """The largest difference over all images, in numbers and in words; infinite if the graph fails."""
    try:
        each = [difference(wanted, run(*prepared)) for prepared, wanted in zip(inputs, expected)]
    except Exception as error:  # from either runtime
        return Deviation(math.inf, math.inf), f"it breaks off with {_first_line(error)}"
    boxes, scores = np.max([(one.boxes, one.scores) for one in each], 0)  # NaN if any is
    worst = Deviation(float(boxes), float(scores))
    return worst, f"largest difference of boxes {worst.boxes:.2g} px, of scores {worst.scores:.2g}"


def description(predictor: Predictor, size: tuple[int, int], score_threshold: float) -> dict[str, Any]:
    """What a user of the graph has to know, as JSON values."""
    height, width = size
    return {
        "class_names": list(predictor.class_names),
        "category_ids": predictor.category_ids,
        "inputs": {
            "image": f"uint8 [3, {height}, {width}] RGB, the picture at the top left",
            "size": "int64 [2] (height, width) of the picture in it",
        },
        "outputs": {
            "boxes": "float32 [D, 4] (x1, y1, x2, y2) in pixels of the image",
            "scores": "float32 [D] best first",
            "labels": "int64 [D] rows of class_names and category_ids",
        },
        "height": height,
        "width": width,
        "score_threshold": score_threshold,
        # Done by the graph itself: (image - mean) / std.
        "mean": predictor.detector.get_buffer("pyramid.mean").flatten().tolist(),
        "std": predictor.detector.get_buffer("pyramid.std").flatten().tolist(),
    }


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx: the package {error.name} is missing - pip install onnx onnxscript onnxruntime, or use "
                        "--format torch_export") from error


def _nms_of_any_number(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The shape of the result of NMS, for tracing. torchvision's own says that at least two boxes are kept, so that a graph fails
    where there are fewer."""
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _traced(graph: nn.Module, inputs: Prepared) -> ExportedProgram:
    try:
        with _quiet():
            torch.library.register_fake("torchvision::nms", _nms_of_any_number, allow_override=True)
            return torch.export.export(graph, inputs)
    except Exception as error:  # any operation of any timm model may refuse, in its own way
        raise UserError(f"torch.export: cannot trace the detector ({_first_line(error)}) - use another backbone") from error


def _written(
    kind: str, program: ExportedProgram, path: Path, told: dict[str, Any], opset: int
) -> Callable[[Tensor, Tensor], Boxes]:
    """Write the file, and return its contents as a function."""
    with _quiet():
        if kind == "torch_export":
            whole = io.BytesIO()  # a write error makes PyTorch's own writer abort the process
            torch.export.save(program, whole, extra_files={"description.json": json.dumps(told)})
            path.write_bytes(whole.getbuffer())
            return torch.export.load(path).module()
        from dtg_core.engine import onnx_graph

        return onnx_graph.write(program, path, told, opset)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence exporters' reports of their own deprecations, defaults and attempts, about which a user can do nothing."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]
