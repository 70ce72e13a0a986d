"""A format's table: which tensor of a file holds which values of the network, and how its axes lie."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from pretrain.errors import InputError
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import tensor_shapes
from pretrain.weights.tensorfile import TensorFile


@dataclass(frozen=True)
class Row:
    """One tensor of a file.

    Args:
        name: in the file.
        ours: the network's parameter that holds its values.
        axes: ours → the file's, as einops writes it, h being the heads; empty: they lie alike.
        part: the file holds only [start, start + length) of one axis of ours: (axis, start, length). What no row
            holds is zero.
    """

    name: str
    ours: str
    axes: str = ""
    part: tuple[int, int, int] | None = None


def third(width: int, number: int) -> tuple[int, int, int]:
    """The part of the fused q, k, v rows [3·width, …] that is q (0), k (1) or v (2)."""
    return 0, number * width, width


def of_network(rows: Iterable[Row], spec: ViTSpec) -> list[Row]:
    """Those rows whose parameters the network has: none of a class token, say, where patches are averaged."""
    ours = tensor_shapes(spec)
    return [row for row in rows if row.ours in ours]


def to_file(row: Row, tensors: Mapping[str, Tensor], spec: ViTSpec) -> Tensor:
    """The values of a file's tensor, as a view of the network's where its axes allow."""
    values = tensors[row.ours] if row.part is None else tensors[row.ours].narrow(*row.part)
    if not row.axes:
        return values
    return rearrange(values, row.axes, **({"h": spec.heads} if "h" in re.split(r"\W+", row.axes) else {}))


def file_shapes(rows: Sequence[Row], spec: ViTSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the file of a network."""
    meta = {name: torch.empty(shape, device="meta") for name, shape in tensor_shapes(spec).items()}
    return {row.name: tuple(to_file(row, meta, spec).shape) for row in rows}


def from_file(file: TensorFile, rows: Sequence[Row], spec: ViTSpec) -> dict[str, Tensor]:
    """The network's tensors in fp32, by our names, once all names and shapes are those of the table.

    Raises:
        InputError: it lists every tensor that is missing, left over or of another shape.
    """
    check_complete(file, file_shapes(rows, spec), spec)
    shapes = tensor_shapes(spec)
    tensors: dict[str, Tensor] = {}
    for row in rows:
        left, _, right = row.axes.partition(" -> ")
        values = file.read(row.name)
        if row.axes:
            values = rearrange(values, f"{right} -> {left}")
        if row.part is None:
            tensors[row.ours] = values.contiguous()
        else:
            whole = tensors.setdefault(row.ours, torch.zeros(shapes[row.ours]))
            whole.narrow(*row.part).copy_(values)
    return tensors


def check_complete(file: TensorFile, wanted: Mapping[str, tuple[int, ...]], spec: ViTSpec) -> None:
    """Raises InputError unless a file has exactly the names and shapes `wanted`; it lists all that differ."""
    missing = [name for name in wanted if name not in file.shapes]
    left_over = [name for name in file.shapes if name not in wanted]
    misshaped = [
        f"{name} {list(file.shapes[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in file.shapes and tuple(file.shapes[name]) != shape
    ]
    faults = (("missing", missing), ("left over", left_over), ("of another shape", misshaped))
    said = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults if names)
    if said:
        raise InputError(f"weights {file.where}: not the tensors of a network of {spec.describe()}: {said}")
