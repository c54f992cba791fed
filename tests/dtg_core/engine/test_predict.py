"""A weights file alone as a detector: what it holds, boxes in the images' own pixels, and what is refused."""
from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, make_views
from looking import CLASSES, tiny_settings, write_weights
from PIL import Image

from dtg_core import load_detector
from dtg_core.engine.checkpoint import load_weights, save_weights
from dtg_core.engine.predict import pick_device
from dtg_core.errors import UserError
from dtg_core.structures import Detections


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["gfl", "faster_rcnn"])
def test_boxes_are_in_the_pixels_of_the_image(name, tmp_path):
    predictor = load_detector(write_weights(tmp_path, name), "cpu")
    image = noise(64, 96)
    (found,) = predictor.predict([image])
    views = make_views(1, 64, 96)
    views.pixels[0] = torch.from_numpy(np.array(image).transpose(2, 0, 1))
    with torch.no_grad():
        direct = predictor.detector.detect(predictor.detector.run(views), views, 0.005)
    assert len(found.boxes) == len(direct.boxes) > 0
    torch.testing.assert_close(torch.from_numpy(found.boxes), direct.boxes)
    torch.testing.assert_close(torch.from_numpy(found.scores), direct.scores)


def test_boxes_are_scaled_back_and_clipped(tmp_path):
    """A detector that always sees the same two boxes of its view."""
    predictor = load_detector(write_weights(tmp_path), "cpu")
    boxes = torch.tensor([[8.0, 4, 24, 20], [70, 30, 96, 64]])
    stub = Mock(detect=lambda outputs, views, score: Detections(
        boxes.repeat(len(views.pixels), 1), torch.tensor([0.9, 0.8]).repeat(len(views.pixels)),
        torch.tensor([1, 2]).repeat(len(views.pixels)), torch.arange(len(views.pixels)).repeat_interleave(2),
    ))  # fmt: skip
    large, small = replace(predictor, detector=stub).predict([noise(128, 192), noise(64, 80)])
    assert (large.size, small.size) == ((128, 192), (64, 80))
    np.testing.assert_allclose(large.boxes, 2 * boxes.numpy())
    np.testing.assert_allclose(small.boxes, [[8, 4, 24, 20], [70, 30, 80, 64]])
    assert small.labels.tolist() == [1, 2]


def test_files_batches_and_empty_input(tmp_path):
    predictor = load_detector(write_weights(tmp_path), "cpu")
    images = [noise(64, 80, seed) for seed in range(3)]
    for seed, image in enumerate(images):
        image.save(tmp_path / f"{seed}.png")
    alone = [predictor.predict([image])[0] for image in images]
    for some in (predictor.predict(images, batch=2), predictor.predict([tmp_path / f"{seed}.png" for seed in range(3)])):
        for one, other in zip(alone, some):
            np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
            assert (one.labels == other.labels).all()
    for single in (images[0], tmp_path / "0.png", str(tmp_path / "0.png")):
        (one,) = predictor.predict(single)
        np.testing.assert_allclose(one.boxes, alone[0].boxes, atol=1e-3)
    assert predictor.predict([]) == []
    assert len(predictor.predict(images[:1], 0.999)[0].boxes) == 0
    with pytest.raises(UserError, match="no such image"):
        predictor.predict([tmp_path / "absent.png"])


def test_opened_images_of_other_modes_are_like_their_files(tmp_path):
    """Pillow itself would make 16 bits white, and show what is hidden under transparency."""
    predictor = load_detector(write_weights(tmp_path), "cpu")
    colors = np.asarray(noise(64, 80))
    deep = Image.fromarray(colors[..., 0].astype(np.uint16) * 257)
    clear = Image.fromarray(np.dstack((colors, colors[..., :1])))
    for image in (deep, clear):
        image.save(tmp_path / "image.png")
        (opened,), (read,) = predictor.predict(Image.open(tmp_path / "image.png"), 0), predictor.predict(tmp_path / "image.png", 0)
        np.testing.assert_array_equal(opened.scores, read.scores)
        np.testing.assert_array_equal(opened.boxes, read.boxes)


def test_what_is_found_does_not_depend_on_the_other_images(tmp_path):
    """Group normalisation would see the padding of a larger canvas."""
    predictor = load_detector(write_weights(tmp_path), "cpu")
    images = [noise(64, 96, 1), noise(96, 64, 2), noise(64, 96, 3), noise(300, 64, 4)]
    for one, image in zip(predictor.predict(images, 0.0), images):
        alone = predictor.predict([image], 0.0)[0]
        assert one.size == alone.size
        np.testing.assert_allclose(one.scores, alone.scores, atol=1e-5)
        assert len(one.scores) > 0


def test_refusals(tmp_path):
    folder = write_weights(tmp_path)
    with pytest.raises(UserError, match="no such weights"):
        load_detector(tmp_path / "absent")
    for name in ("warp9", "cpu:7"):
        with pytest.raises(UserError, match=f"^--device {name}: there is no such device - use cpu"):
            load_detector(folder, name)
    tensors, told = load_weights(folder / "weights" / "teacher.safetensors")
    module = torch.nn.Module()
    module.state_dict = lambda: tensors  # type: ignore[method-assign]
    for change, words in (
        ({"detector": "yolo"}, "which detector"), ({"config": "gfl: {towers: 3}"}, "another version.*towers"),
        ({"config": "{"}, "another version"), ({"class_names": ["one"]}, "does not fit"),
    ):
        save_weights(tmp_path / "odd.safetensors", module, {**told, **change})
        with pytest.raises(UserError, match=words):
            load_detector(tmp_path / "odd.safetensors", "cpu")


def test_weights_from_where_there_are_more_detectors_load(tmp_path):
    folder = write_weights(tmp_path)
    tensors, told = load_weights(folder / "weights" / "teacher.safetensors")
    module = torch.nn.Module()
    module.state_dict = lambda: tensors  # type: ignore[method-assign]
    more = told["config"].replace("  stages:\n", "  stages:\n    fcos:\n      tau: 0.2\n") + "\nfcos:\n  channels: 64\n"
    assert "fcos:\n      tau" in more
    save_weights(tmp_path / "other.safetensors", module, {**told, "config": more})
    assert load_detector(str(tmp_path / "other.safetensors"), "cpu").settings.guidance == load_detector(folder, "cpu").settings.guidance


def test_devices_of_a_machine_with_two_gpus(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "zeros", Mock())
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert str(pick_device(name)) == name
    assert pick_device(None) == torch.device("cuda")
    with pytest.raises(UserError, match=r"^--device cuda:2: there is no such device - use cpu or cuda or cuda:0 or cuda:1$"):
        pick_device("cuda:2")
    torch.zeros.side_effect = RuntimeError("CUDA error: busy\nand more")
    with pytest.raises(UserError, match=r"^--device cuda: cannot be used \(CUDA error: busy\) - use cpu$"):
        pick_device("cuda")


def test_the_package_is_light():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import dtg_core; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    write_weights(tmp_path / "runs" / "gfl-dense-seed0")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "index.md").read_text(), re.DOTALL)
    exec(code.replace("score_threshold=0.3", "score_threshold=0.0"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    assert all(re.fullmatch(rf"({'|'.join(CLASSES)}) 0\.\d+ \[.*\]", line) for line in lines)


def test_settings_survive(tmp_path):
    settings = tiny_settings("gfl", 96)
    predictor = load_detector(write_weights(tmp_path, "gfl", settings), "cpu")
    assert predictor.settings.views.test_short_edge == 96


def test_the_students_weights(tmp_path):
    folder = write_weights(tmp_path)
    student = load_detector(folder, "cpu", which="student").detector.state_dict()
    alone = load_detector(folder / "weights" / "student.safetensors", "cpu").detector.state_dict()
    teacher = load_detector(folder, "cpu").detector.state_dict()
    assert all(torch.equal(student[name], alone[name]) for name in student)
    assert any(not torch.equal(student[name], teacher[name]) for name in student)
