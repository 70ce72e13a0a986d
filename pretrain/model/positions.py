"""Position embeddings: moving a learned grid to another resolution, and the fixed sine-cosine grid."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.errors import InputError
from pretrain.model.spec import ViTSpec


def resize_positions(pos: Tensor, new_grid: tuple[int, int], class_slot: bool) -> Tensor:
    """Resize a learned position grid by 2-D interpolation, keeping the slot of the class token.

    pos: [1, 1 + g², d] with `class_slot`, else [1, g², d], row by row. new_grid: (rows, columns).
    Returns [1, (1 +) rows·columns, d] in the type of `pos`; `pos` itself where the grid does not change.

    Bilinear with corners aligned, in fp64: equals the official `scipy.ndimage.zoom(order=1)` to 1e-7, which
    half-pixel interpolation does not (off by 0.25 and more on unit-normal grids), nor fp32 (off by 4e-6).
    Raises InputError where `pos` is no square grid.
    """
    slots = 1 if class_slot else 0
    patches = pos.shape[1] - slots if pos.ndim == 3 and pos.shape[0] == 1 else -1
    side = math.isqrt(max(patches, 0))
    if patches < 1 or side**2 != patches:
        expected = "[1, 1 + g², d]: a class slot and a square grid" if class_slot else "[1, g², d]: a square grid"
        raise InputError(f"position embedding: found shape {list(pos.shape)}; it must be {expected}")
    if min(new_grid) < 1:
        raise InputError(f"position embedding: cannot resize to a grid of {new_grid}; both sides start at 1")
    if new_grid == (side, side):
        return pos
    grid = pos[:, slots:].double().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new_grid, mode="bilinear", align_corners=True)
    return torch.cat([pos[:, :slots], grid.flatten(2).transpose(1, 2).to(pos.dtype)], dim=1)


def resize_to(spec: ViTSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's tensors with learned positions, where it has any, resized to the grid of `spec`; the others uncopied.

    Raises InputError as `resize_positions` does.
    """
    resized = dict(tensors)
    if "position_embedding" in resized:
        grid = (spec.grid, spec.grid)
        resized["position_embedding"] = resize_positions(resized["position_embedding"], grid, spec.pool == "cls")
    return resized


def sincos2d(grid: int, width: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Fixed 2-D positions [1, grid², width], row by row: sin x, cos x, sin y, cos y, a quarter each.

    Frequencies fall geometrically from 1 to 1/10000, both ends included, as in big_vision (MoCo v3 stops one
    short of 1/10000).
    """
    quarter = width // 4
    frequencies = 10_000.0 ** -(torch.arange(quarter, device=device, dtype=torch.float32) / (quarter - 1))
    angles = torch.arange(grid, device=device, dtype=torch.float32)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    x = waves[None, :, :].expand(grid, grid, -1)
    y = waves[:, None, :].expand(grid, grid, -1)
    return torch.cat([x, y], dim=2).reshape(1, grid * grid, width).to(dtype)
