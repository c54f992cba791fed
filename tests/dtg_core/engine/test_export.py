"""Exported graphs against the detector itself, in processes that know nothing of this project; and what is refused."""
from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from looking import CLASSES, IDS, write_weights
from oracles import greedy_nms
from PIL import Image

from dtg_core import load_detector
from dtg_core.boxes import grouped_nms
from dtg_core.config import ViewsConfig
from dtg_core.engine import export as exporting
from dtg_core.engine.export import Deviation, difference, on_canvas
from dtg_core.errors import UserError

sys.path[:0] = [str(ROOT / "scripts")]
import export as script  # noqa: E402

HEIGHT, WIDTH = 150, 200  # no multiples of 32

#: Reads a file and its description without this project.
ALONE = {
    ".pt2": """
import sys, json, numpy, torch, torchvision
extra = {"description.json": ""}
graph = torch.export.load(sys.argv[1], extra_files=extra).module()
run = lambda image, size: graph(torch.from_numpy(image), torch.from_numpy(size))
told = json.loads(extra["description.json"])
""",
    ".onnx": """
import sys, json, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
run = lambda image, size: session.run(None, {"image": image, "size": size})
told = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
""",
}


def needs_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=["gfl", "faster_rcnn"])
def exported(request, tmp_path_factory) -> tuple[Path, Path]:
    """A run folder, and the folder that its teacher was exported to."""
    needs_onnx()
    folder = tmp_path_factory.mktemp(request.param)
    run = write_weights(folder / "run", request.param)
    for seed, size in enumerate(((150, 200), (96, 70), (400, 100))):
        noise(*size, seed).save(folder / f"{seed}.png")
    flags = ["--size", str(HEIGHT), str(WIDTH), "--images", str(folder / "*.png")]
    assert script.main([str(run), "--output", str(folder / "out"), *flags]) == 0
    return run, folder / "out"


@pytest.mark.parametrize("suffix", ALONE)
def test_files_need_nothing_of_this_project(exported, suffix, tmp_path):
    run, output = exported
    picture = noise(140, 180, 5)  # the graph's image is larger, so that a margin is padding
    image, size = np.full((3, HEIGHT, WIDTH), 77, np.uint8), np.array((140, 180))
    image[:, :140, :180] = np.asarray(picture).transpose(2, 0, 1)
    np.savez(tmp_path / "given.npz", image=image, size=size)
    code = ALONE[suffix] + """
given = numpy.load(sys.argv[2])
found, nothing = (run(given["image"], size) for size in (given["size"], 0 * given["size"]))  # all of the second is padding
assert [tuple(part.shape) for part in nothing] == [(0, 4), (0,), (0,)]
assert not [name for name in sys.modules if name.startswith(("dtg_core", "gfl_dtg", "faster_rcnn_dtg"))]
print(json.dumps([told, *(numpy.asarray(part).tolist() for part in found)]))
"""
    command = [sys.executable, "-c", code, str(output / f"teacher{suffix}"), str(tmp_path / "given.npz")]
    made = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PATH": "", "OMP_NUM_THREADS": "1"}, timeout=280)
    assert made.returncode == 0, made.stderr
    told, boxes, scores, labels = json.loads(made.stdout)

    predictor = load_detector(run, "cpu")
    graph = exporting.DetectorGraph(predictor.detector, 0.005)
    with torch.no_grad():
        expected = graph(torch.from_numpy(image), torch.from_numpy(size))
    assert len(boxes) > 10
    found = torch.tensor(boxes), torch.tensor(scores), torch.tensor(labels)
    assert difference(expected, found).accepted
    assert (found[0].amax(0) <= torch.tensor([180, 140, 180, 140])).all()
    assert scores == sorted(scores, reverse=True)
    assert (told["class_names"], told["category_ids"]) == (CLASSES, IDS)
    assert (told["height"], told["width"], told["score_threshold"]) == (HEIGHT, WIDTH, 0.005)
    beside = json.loads((output / "teacher.json").read_text())
    checked = beside.pop("checked")
    assert beside == told
    assert set(checked) == {"torch_export", "onnx"}
    assert all(figures["images"] == 3 and figures["detections"] > 10 for figures in checked.values())


def test_the_examples_of_the_documentation_run(exported, tmp_path):
    _, output = exported
    (tmp_path / "exported").symlink_to(output)
    noise(HEIGHT // 2, WIDTH // 2, 3).save(tmp_path / "photo.jpg")
    onnx, torch_export, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    made = subprocess.run([sys.executable, "-c", onnx + torch_export], capture_output=True, text=True, cwd=tmp_path, timeout=280)
    assert made.returncode == 0, made.stderr
    assert len(made.stdout.splitlines()) > 10


def test_the_graph_finds_what_predict_finds(exported):
    """On a picture that fills the canvas, so that neither side resizes or pads."""
    run, _ = exported
    predictor = load_detector(run, "cpu")
    picture = noise(64, 96)
    (found,) = predictor.predict([picture])
    with torch.no_grad():
        boxes, scores, labels = exporting.DetectorGraph(predictor.detector, 0.005)(*on_canvas(picture, 64, 96))
    assert len(boxes) == len(found.boxes) > 0
    np.testing.assert_allclose(boxes, found.boxes, atol=1e-4)
    np.testing.assert_allclose(scores, found.scores, atol=1e-6)
    assert labels.tolist() == found.labels.tolist()


class Nms(torch.nn.Module):
    def forward(self, boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        return grouped_nms(boxes, scores, groups, 0.5)


@pytest.fixture(scope="module")
def onnx_nms(tmp_path_factory):
    """``grouped_nms`` of any number of boxes by ONNX Runtime."""
    needs_onnx()
    import onnxruntime

    from dtg_core.engine.onnx_graph import TRANSLATIONS

    path = tmp_path_factory.mktemp("nms") / "nms.onnx"
    rows = torch.export.Dim.DYNAMIC
    shapes = {"boxes": {0: rows}, "scores": {0: rows}, "groups": {0: rows}}
    given = torch.rand(8, 4), torch.rand(8), torch.arange(8)
    with exporting._quiet():
        torch.library.register_fake("torchvision::nms", exporting._nms_of_any_number, allow_override=True)
        program = torch.export.export(Nms(), given, dynamic_shapes=shapes)
        made = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=18, custom_translation_table=TRANSLATIONS)
    made.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda *values: session.run(None, dict(zip(shapes, (value.numpy() for value in values))))[0].tolist()


@pytest.mark.parametrize("seed", range(5))
def test_onnx_nms_equals_the_loop(onnx_nms, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(400, 2, generator=generator) * 80 + 1000
    boxes = torch.cat((corner, corner + torch.rand(400, 2, generator=generator) * 60), 1)
    scores = (torch.rand(400, generator=generator) * 50).round() / 50  # with ties
    groups = torch.randint(0, 10, (400,), generator=generator) * 9
    assert onnx_nms(boxes, scores, groups) == greedy_nms(boxes, scores, groups, 0.5)[1]


def test_onnx_nms_does_not_round_boxes_of_late_groups(onnx_nms):
    """An overlap of 0.5 less a hair, which float32 so far from the origin takes for 0.5 and more."""
    width = 10.0
    shift = width / 3 + 1e-4
    boxes = torch.tensor([[0, 0, width, 10], [shift, 0, shift + width, 10], [shift - 3e-4, 0, shift - 3e-4 + width, 10]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    far = torch.full((3,), 500)
    assert onnx_nms(boxes[:2], scores[:2], far[:2]) == grouped_nms(boxes[:2], scores[:2], far[:2], 0.5).tolist() == [0, 1]
    assert onnx_nms(boxes[::2], scores[::2], far[::2]) == grouped_nms(boxes[::2], scores[::2], far[::2], 0.5).tolist() == [0]


def test_onnx_nms_of_nothing(onnx_nms):
    assert onnx_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long()) == []


def test_on_canvas():
    image, size = on_canvas(Image.new("RGB", (40, 20), (9, 8, 7)), 64, 96)
    assert (tuple(image.shape), image.dtype, size.tolist()) == ((3, 64, 96), torch.uint8, [48, 96])
    assert image[:, 47, 95].tolist() == [9, 8, 7]
    assert image[:, 48:].max() == 0
    assert on_canvas(Image.new("RGB", (1000, 1)), 64, 96)[1].tolist() == [1, 96]


def test_difference_with_a_pencil():
    one = torch.tensor([[0.0, 0, 10, 10], [5, 5, 9, 9]]), torch.tensor([0.9, 0.5]), torch.tensor([0, 1])
    other = torch.tensor([[5.0, 5, 9, 9.25], [0, 0, 10, 10]]), torch.tensor([0.5, 0.8]), torch.tensor([1, 0])
    worst = difference(one, other)
    assert worst.boxes == 0.25
    assert worst.scores == pytest.approx(0.1)
    assert not worst.accepted
    assert difference(one, one) == Deviation(0, 0)
    infinite = Deviation(math.inf, math.inf)
    assert difference(one, tuple(part[:1] for part in one)) == infinite
    assert difference(one, (*one[:2], torch.tensor([0, 0]))).boxes == math.inf  # nothing of that class
    twice = tuple(part[[0, 0]] for part in (one[0], one[1], torch.zeros(2, dtype=torch.int64)))
    assert difference(twice, (*one[:2], torch.tensor([0, 0]))).boxes == 5  # one that is found too much is no match
    empty = tuple(part[:0] for part in one)
    assert difference(empty, empty).accepted
    nan = Deviation(math.nan, 0)
    assert not nan.accepted


@pytest.mark.parametrize(("change", "words"), [
    (lambda boxes: boxes + 1, "boxes 1 px, of scores 0"), (lambda boxes: boxes[1:], "boxes inf px"), (lambda boxes: boxes * math.nan, "boxes nan px"),
    (lambda boxes: boxes / None, "breaks off with TypeError"),
])  # fmt: skip
def test_a_graph_that_differs_is_rejected(change, words, tmp_path, monkeypatch, capsys):
    """The file is written, but what is read back changes the boxes."""
    run, output = write_weights(tmp_path / "run"), tmp_path / "out"
    flags = [str(run), "--output", str(output), "--format", "torch_export"]

    def written(kind, graph, path, told, opset):
        path.write_bytes(b"graph")

        def read_back(*inputs):
            boxes, scores, labels = graph(*inputs)
            return change(boxes), scores, labels

        return read_back

    monkeypatch.setattr(exporting, "_traced", lambda graph, inputs: graph)
    monkeypatch.setattr(exporting, "_written", written)
    with pytest.raises(UserError, match=rf"teacher.pt2: differs.*{words}.*kept as teacher.pt2.rejected"):
        script.main(flags)
    assert [path.name for path in output.iterdir()] == ["teacher.pt2.rejected"]
    change = torch.clone
    assert script.main(flags) == 0
    assert "largest difference of boxes 0 px" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"teacher.pt2: is there already"):
        script.main(flags)


def test_what_onnx_lacks_is_named(tmp_path, monkeypatch):
    needs_onnx()
    from dtg_core.engine import onnx_graph

    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.special.bessel_j1(x)

    told = {"inputs": {"x": ""}, "outputs": {"y": ""}}
    program = torch.export.export(Odd(), (torch.rand(3),))
    with exporting._quiet(), pytest.raises(UserError, match=r"no operator for \w+.\w*bessel_j1"):
        onnx_graph.write(program, tmp_path / "x.onnx", told, 18)
    padded = torch.export.export(torch.nn.ConstantPad2d(1, 0.0), (torch.rand(1, 1, 3, 3),))
    with exporting._quiet(), pytest.raises(UserError, match="--opset 17: the graph cannot be converted"):
        onnx_graph.write(padded, tmp_path / "x.onnx", told, 17)
    run = write_weights(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"the package onnxscript is missing - pip install onnx onnxscript onnxruntime, or use"):
        script.main([str(run), "--output", str(tmp_path / "out")])


def test_refusals(tmp_path):
    run, out = write_weights(tmp_path / "run"), ["--output", str(tmp_path / "out")]
    for flags, words in (
        (["--size", "16", "64"], "^--size: .* use at least 32 and at most 8192$"), (["--score", "1"], r"^--score: .*\(found 1\.0\) .* less than 1$"),
        (["--format", "onx"], "did you mean 'onnx'"), (["--images", str(tmp_path / "none")], "no image there"),
        (["--score", "0.999", "--format", "torch_export"], "nothing is found in 20 images"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            script.main([str(run), *out, *flags])
    assert not (tmp_path / "out").exists()


def test_a_graph_of_another_size_than_evaluation_is_told():
    views = ViewsConfig(test_short_edge=128, long_edge=128)
    photos = [noise(480, 640), noise(240, 320)]  # evaluated at 96 x 128
    (told,) = script.other_sizes(photos, (128, 171), views)
    assert told.startswith("--size: in 128 x 171 px, objects have up to 1.33 times the size")
    assert told.endswith("give --size 96 128 to keep it")
    assert script.other_sizes(photos, (96, 128), views) == script.other_sizes(photos, (128, 128), views) == []
    (told,) = script.other_sizes([*photos, noise(640, 480)], (128, 96), views)  # the first two are shown smaller
    assert "up to 0.75 times" in told
    assert "--size 128 128" in told
    assert script.other_sizes([], (32, 32), views) == []


def test_images_that_cannot_be_read_are_passed_over(tmp_path, capsys):
    run, photos = write_weights(tmp_path / "run"), tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(b"")
    flags = [str(run), "--output", str(tmp_path / "out"), "--format", "torch_export", "--images", str(photos)]
    with pytest.raises(UserError, match=r"photos: no image there can be read"):
        script.main(flags)
    noise(64, 64).save(photos / "b.png")
    assert script.main(flags) == 0
    shown = capsys.readouterr()
    assert f"skipped: {photos / 'a.png'}: " in shown.err
    assert "in 1 image\n" in shown.out
