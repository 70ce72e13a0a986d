import math

import numpy as np
import pytest
import torch
from scipy.ndimage import zoom

from pretrain.errors import InputError
from pretrain.model.positions import resize_positions, sincos2d

GRIDS = [
    (14, 24, 24),
    (14, 32, 32),
    (7, 12, 12),
    (16, 37, 37),
    (16, 27, 27),
    (24, 14, 14),
    (14, 9, 30),
    (1, 3, 2),
]


def unit_normal(tokens, width=6, dtype=torch.float64):
    return torch.empty(1, tokens, width, dtype=dtype).normal_(generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("old", "rows", "columns"), GRIDS)
def test_equals_scipys_zoom_of_order_one_in_fp64(old, rows, columns):
    pos = unit_normal(1 + old * old)
    found = resize_positions(pos, (rows, columns), class_slot=True)
    grid = pos[0, 1:].reshape(old, old, 6).numpy()
    wanted = zoom(grid, (rows / old, columns / old, 1), order=1)
    assert found.shape == (1, 1 + rows * columns, 6)
    assert np.abs(found[0, 1:].reshape(rows, columns, 6).numpy() - wanted).max() < 1e-7
    assert torch.equal(found[:, :1], pos[:, :1])


def test_without_a_class_slot_every_position_is_of_the_grid():
    pos = unit_normal(1 + 49)
    with_slot = resize_positions(pos, (12, 10), class_slot=True)
    assert torch.equal(resize_positions(pos[:, 1:], (12, 10), class_slot=False), with_slot[:, 1:])


def test_an_unchanged_grid_is_bit_equal():
    for dtype in (torch.float32, torch.bfloat16):
        pos = unit_normal(1 + 25, dtype=dtype)
        assert torch.equal(resize_positions(pos, (5, 5), class_slot=True), pos)


def test_fp32_is_interpolated_in_fp64_and_rounded_once():
    pos = unit_normal(1 + 196, dtype=torch.float32)
    found = resize_positions(pos, (24, 24), class_slot=True)
    assert found.dtype == torch.float32
    assert torch.equal(found, resize_positions(pos.double(), (24, 24), class_slot=True).float())


@pytest.mark.parametrize(
    ("shape", "class_slot"), [((1, 196, 4), True), ((1, 197, 4), False), ((197, 4), True), ((1, 1, 4), True)]
)
def test_what_is_no_square_grid_is_refused_with_its_shape(shape, class_slot):
    with pytest.raises(InputError) as refused:
        resize_positions(torch.zeros(shape), (24, 24), class_slot)
    assert str(list(shape)) in str(refused.value)


def test_an_empty_target_grid_is_refused():
    with pytest.raises(InputError, match=r"\(0, 4\)"):
        resize_positions(unit_normal(17), (0, 4), class_slot=True)


def test_sine_cosine_positions_follow_the_formula():
    grid, width = 5, 16
    found = sincos2d(grid, width, device=torch.device("cpu"), dtype=torch.float32)
    assert found.shape == (1, grid * grid, width)
    for y in range(grid):
        for x in range(grid):
            waves = [1 / 10_000 ** (k / (width // 4 - 1)) for k in range(width // 4)]
            wanted = [f(p * w) for p, f in ((x, math.sin), (x, math.cos), (y, math.sin), (y, math.cos)) for w in waves]
            assert found[0, y * grid + x].tolist() == pytest.approx(wanted, abs=1e-6)
