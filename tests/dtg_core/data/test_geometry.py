"""Matrices against torchvision's box kernels, and the warp against painted squares."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as v2
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from dtg_core.boxes import project
from dtg_core.config import ViewsConfig
from dtg_core.data.geometry import FILL, Matrix, fitted, flip, random_move, rotation, scale, shear, shift, warp

HEIGHT, WIDTH = 60, 100
BOX = (30.0, 20.0, 50.0, 34.0)


def moved(matrix: Matrix, box: Sequence[float] = BOX) -> np.ndarray:
    return project(torch.tensor(box, dtype=torch.float64), torch.from_numpy(matrix), "corners").numpy()


def painted(box: Sequence[float] = BOX) -> Image.Image:
    image = Image.new("RGB", (WIDTH, HEIGHT))
    left, top, right, bottom = (int(edge) for edge in box)
    image.paste((255, 255, 255), (left, top, right, bottom))
    return image


def found_box(image: Image.Image) -> np.ndarray:
    """Box of a bright object on black or fill, to a fraction of a pixel: how bright the outermost rows are counts."""
    bright = (np.asarray(image)[..., 0].astype(float) - 125).clip(min=0) / 130
    rows, columns = np.nonzero(bright.max(1) > 0.4)[0], np.nonzero(bright.max(0) > 0.4)[0]
    return np.array((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), float)


def torchvision_box(angle: float = 0.0, translate: Sequence[float] = (0, 0), shears: Sequence[float] = (0, 0)) -> np.ndarray:
    boxes = BoundingBoxes(
        torch.tensor([BOX], dtype=torch.float64), format=BoundingBoxFormat.XYXY, canvas_size=(HEIGHT, WIDTH),
        clamping_mode=None,
    )  # fmt: skip
    center = [0.0, 0.0] if any(shears) else None
    return v2.affine(boxes, angle, list(translate), 1.0, list(shears), center=center)[0].numpy()


def test_against_torchvision() -> None:
    np.testing.assert_allclose(moved(rotation(17, HEIGHT, WIDTH)), torchvision_box(17), atol=1e-4)
    np.testing.assert_allclose(moved(shift(7, -3)), torchvision_box(translate=(7, -3)), atol=1e-4)
    for degrees in (25.0, -25.0):
        angle = np.degrees(np.arctan(np.tanh(np.radians(degrees))))  # torchvision takes the factor's arc tangent
        np.testing.assert_allclose(moved(shear(-degrees, 0)), torchvision_box(shears=(angle, 0)), atol=1e-4)
        np.testing.assert_allclose(moved(shear(0, -degrees)), torchvision_box(shears=(0, angle)), atol=1e-4)
    boxes = BoundingBoxes(torch.tensor([BOX]), format=BoundingBoxFormat.XYXY, canvas_size=(HEIGHT, WIDTH))
    np.testing.assert_allclose(moved(flip(WIDTH)), v2.horizontal_flip(boxes)[0].numpy(), atol=1e-4)
    np.testing.assert_allclose(moved(scale(0.5, 2)), v2.resize(boxes, [120, 50])[0].numpy(), atol=1e-4)


@pytest.mark.parametrize("degrees", [90.0, -90.0])
def test_positive_rotation_is_clockwise(degrees: float) -> None:
    right_of_center = np.array((90, 50, 1.0))
    x, y, _ = rotation(degrees, 100, 100) @ right_of_center
    np.testing.assert_allclose((x, y), (50, 90 if degrees > 0 else 10), atol=1e-9)


@pytest.mark.parametrize(
    "matrix",
    [np.eye(3), shift(7, 0), shift(0, -5), shift(2.5, 0), flip(WIDTH), shear(20, 0), shear(0, -20), shear(-15, 25),
     rotation(90, HEIGHT, WIDTH), rotation(30, HEIGHT, WIDTH), rotation(-12, HEIGHT, WIDTH)],
)  # fmt: skip
def test_painted_square(matrix: Matrix) -> None:
    np.testing.assert_allclose(found_box(warp(painted(), matrix)), moved(matrix), atol=1)


def test_painted_square_exactly() -> None:
    """Whole-pixel moves and flips lose nothing; half a pixel off would blur every edge."""
    for matrix, box in ((np.eye(3), BOX), (shift(7, -5), (37, 15, 57, 29)), (flip(WIDTH), (50, 20, 70, 34))):
        expected = np.asarray(painted(box)).copy()
        found = np.asarray(warp(painted(), matrix))
        inside = found != FILL[0]
        np.testing.assert_array_equal(found[inside], expected[inside])
        assert inside.mean() > 0.8


def test_random_compositions() -> None:
    generator = np.random.default_rng(0)
    config = ViewsConfig(rotate=15, shear=15)
    for _ in range(40):
        matrix = np.eye(3)
        for _ in range(2):
            matrix = random_move(HEIGHT, WIDTH, config, generator) @ matrix
        expected = moved(matrix)
        if (expected[:2] > 1).all() and expected[2] < WIDTH - 1 and expected[3] < HEIGHT - 1:
            np.testing.assert_allclose(found_box(warp(painted(), matrix)), expected, atol=1.2)


def test_shear_is_along_x_first() -> None:
    factor = np.tanh(np.radians(20))
    np.testing.assert_allclose(shear(20, 20) @ (0, 10, 1), (10 * factor, 10 + 10 * factor**2, 1))


def test_fill() -> None:
    found = np.asarray(warp(Image.new("RGB", (WIDTH, HEIGHT)), shift(10, 0)))
    assert (found[:, :10] == FILL).all()
    assert (found[:, 10:] == 0).all()


def test_random_move_keeps_its_limits() -> None:
    config = ViewsConfig(rotate=30, shear=30, translate=0.1)
    generator = np.random.default_rng(0)
    kinds = np.zeros(4)
    for _ in range(1000):
        matrix = random_move(HEIGHT, WIDTH, config, generator)
        if np.allclose(matrix[:2, :2], np.eye(2)):
            kinds[0 if matrix[0, 2] else 1] += 1
            assert abs(matrix[0, 2]) <= 0.1 * WIDTH
            assert abs(matrix[1, 2]) <= 0.1 * HEIGHT
        elif np.isclose(matrix[0, 0], matrix[1, 1]):
            kinds[2] += 1
            assert matrix[0, 0] >= np.cos(np.radians(30)) - 1e-9
        else:
            kinds[3] += 1
            assert abs(matrix[[0, 1], [1, 0]]).max() <= np.tanh(np.radians(30))
    assert kinds.min() > 200


def test_random_moves_go_both_ways_and_about_the_centre() -> None:
    """Up to their limits, which are shares of the own side; both shears are drawn apart."""
    config, generator = ViewsConfig(rotate=30, shear=30, translate=0.1), np.random.default_rng(0)
    x, y, turns, shears = [], [], [], []
    for _ in range(1000):
        matrix = random_move(HEIGHT, WIDTH, config, generator)
        if np.allclose(matrix[:2, :2], np.eye(2)):
            (x if matrix[0, 2] else y).append(matrix[0, 2] or matrix[1, 2])
        elif np.isclose(matrix[0, 0], matrix[1, 1]):
            turns.append(np.degrees(np.arcsin(matrix[1, 0])))
            np.testing.assert_allclose(matrix @ (WIDTH / 2, HEIGHT / 2, 1), (WIDTH / 2, HEIGHT / 2, 1), atol=1e-9)
        else:
            shears.append(np.degrees(np.arctanh((matrix[0, 1], matrix[1, 0]))))
    for drawn, limit in ((x, 0.1 * WIDTH), (y, 0.1 * HEIGHT), (turns, 30), (np.ravel(shears), 30)):
        assert -limit <= min(drawn) < -0.9 * limit
        assert 0.9 * limit < max(drawn) <= limit
    assert abs(np.corrcoef(np.transpose(shears))[0, 1]) < 0.3


def test_a_move_by_half_a_pixel_mixes_neighbours() -> None:
    found = np.asarray(warp(painted(), shift(0.5, 0)))[27, :, 0]
    assert found[30] == pytest.approx(127.5, abs=1)
    assert (found[31:50] == 255).all()


def test_moves_at_the_limits_can_be_undone() -> None:
    """Fault 69: the largest moves that the settings allow, of the narrowest images."""
    config, generator = ViewsConfig(rotate=180, shear=80, translate=0.999), np.random.default_rng(0)
    for height, width in ((HEIGHT, WIDTH), (1, 4000), (4000, 1)):
        for _ in range(300):
            matrix = random_move(height, width, config, generator)
            assert np.linalg.det(matrix) == pytest.approx(1)
            np.testing.assert_allclose(np.linalg.inv(matrix) @ matrix, np.eye(3), atol=1e-6)


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [((480, 640), (800, 1333), (800, 1067)), ((640, 480), (800, 1333), (1067, 800)), ((100, 400), (800, 1333), (333, 1333)),
     ((160, 160), (160, 1333), (160, 160)), ((1, 5000), (800, 1333), (1, 1333))],
)  # fmt: skip
def test_fitted(size: tuple[int, int], limits: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fitted(*size, *limits) == expected
