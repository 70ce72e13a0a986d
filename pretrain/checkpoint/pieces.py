"""A checkpoint's values: pieces of named, flattened parameters, written by any number of ranks, read back by any other.

Pieces bear the names of the network's parameters and know nothing of ZeRO.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import files
from pretrain.checkpoint import archive
from pretrain.checkpoint.archive import Archive
from pretrain.checkpoint.step import LAYOUT, Checkpoint
from pretrain.errors import InputError

# Kinds of values; all others are states of the optimizer, by their names there.
WEIGHT = "weight"
AVERAGE = "average"  # the Polyak average of the weights

_FILES = {WEIGHT: "weights", AVERAGE: "average"}  # all other kinds are in "optimizer"
_CHUNK = 1 << 20  # values fingerprinted at a time
_MIX = (-7046029254386353131, -4658895280553007687)  # odd constants of splitmix64, as signed 64-bit integers

Piece = tuple[str, int, int]  # parameter, first value, number of values


@dataclass(frozen=True)
class Share:
    """What one rank has written of a checkpoint."""

    rank: int
    pieces: list[Piece]
    files: dict[str, dict[str, Any]]  # name → bytes, sha256
    fingerprints: dict[str, int]  # by kind, of its own values


def write_share(
    path: Path, rank: int, pieces: Sequence[Piece], values: dict[str, Sequence[Tensor]], begins: dict[str, int]
) -> Share:
    """Write one rank's share of a checkpoint into the folder `path`. Not collective: ranks write side by side.

    Args:
        path: where the checkpoint is put together (`folder.partial_path`).
        rank: this rank.
        pieces: what it writes.
        values: by kind, the fp32 values [n] of each of `pieces`, on the host.
        begins: where each parameter begins when all are laid out one after the other.
    """
    path.mkdir(parents=True, exist_ok=True)
    contents: dict[str, list[tuple[str, Tensor]]] = {}
    prints = {}
    for kind, tensors in values.items():
        found = list(zip(pieces, tensors, strict=True))
        contents.setdefault(file_name(kind, rank), []).extend(
            (_tensor_name(kind, name, begin), tensor) for (name, begin, _), tensor in found
        )
        prints[kind] = sum(fingerprint(tensor, begins[name] + begin) for (name, begin, _), tensor in found)
    written = {name: archive.write(path / name, tensors) for name, tensors in contents.items()}
    files.flush(path)
    return Share(rank, list(pieces), written, prints)


class Pieces:
    """The values in a checkpoint, by kind, parameter and position, whatever ranks wrote them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._path = checkpoint.path
        self._files: dict[str, Archive] = {}
        self._pieces: dict[str, list[tuple[int, int, int]]] = {}  # parameter → (begin, numel, rank)
        path = checkpoint.path / LAYOUT
        layout = json.loads(files.patiently(path, partial(path.read_text, encoding="utf-8")))
        for rank, pieces in layout.items():
            for name, begin, numel in pieces:
                self._pieces.setdefault(name, []).append((begin, numel, int(rank)))
        for found in self._pieces.values():
            found.sort()

    def read(self, kind: str, name: str, into: Tensor, begin: int) -> None:
        """Fill `into` [n] with the values of parameter `name` from `begin` on.

        Raises:
            InputError: the checkpoint does not hold all of them.
        """
        at, end = begin, begin + len(into)
        for first, numel, rank in self._pieces.get(name, ()):
            if first <= at < first + numel and at < end:
                upto = min(first + numel, end)
                values = self._archive(kind, rank).read(_tensor_name(kind, name, first), at - first, upto - at)
                into[at - begin : upto - begin].copy_(values)
                at = upto
        if at < end:
            raise InputError(f"checkpoint {self._path}: holds no {kind} of {name} from value {at} on")

    def _archive(self, kind: str, rank: int) -> Archive:
        name = file_name(kind, rank)
        if name not in self._files:
            self._files[name] = Archive(self._path / name)
        return self._files[name]


def read_tensors(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], *, averaged: bool = False
) -> dict[str, Tensor]:
    """A checkpoint's weights, or their Polyak average, as fp32 tensors on the CPU; hashes are checked first.

    Args:
        checkpoint: to read.
        shapes: of the network's parameters, by name.
        averaged: whether to read the average.

    Raises:
        InputError: it keeps no average, is damaged, or is of a network of other parameters.
    """
    kind = weight_kind(checkpoint, averaged=averaged)
    checkpoint.verify_with_progress([LAYOUT, *(file_name(kind, rank) for rank in range(checkpoint.state["ranks"]))])
    pieces, tensors = Pieces(checkpoint), {}
    for name, shape in shapes.items():
        tensors[name] = torch.empty(math.prod(shape))
        pieces.read(kind, name, tensors[name], 0)
    return {name: tensor.view(shapes[name]) for name, tensor in tensors.items()}


def weight_kind(checkpoint: Checkpoint, *, averaged: bool) -> str:
    """The kind of values that are a checkpoint's weights, or their Polyak average.

    Raises:
        InputError: it keeps no average.
    """
    kind = AVERAGE if averaged else WEIGHT
    if kind not in checkpoint.state["fingerprints"]:
        raise InputError(
            f"checkpoint {checkpoint.path}: keeps no averaged weights (optimizer.averaging was not set); take the raw "
            "ones"
        )
    return kind


def fingerprint(values: Tensor, position: int) -> int:
    """A 64-bit integer of fp32 `values` [n] that does not depend on how they were cut into pieces.

    The sum modulo 2⁶⁴, over the values, of a hash of (bits, position): of two parts it is the sum of theirs.

    Args:
        values: to take it of, on any device.
        position: of the first value, when all parameters are laid out one after the other.
    """
    total = 0
    for start in range(0, len(values), _CHUNK):
        part = values[start : start + _CHUNK]
        bits = part.contiguous().view(torch.int32).to(torch.int64)
        positions = torch.arange(position + start, position + start + len(part), device=bits.device)
        mixed = (bits + positions * _MIX[0]).mul_(_MIX[1])
        mixed ^= mixed >> 31
        total += int(mixed.mul_(_MIX[0]).sum().item())
    return total % 2**64


def file_name(kind: str, rank: int) -> str:
    """The file that holds a rank's pieces of `kind`."""
    return f"{_FILES.get(kind, 'optimizer')}.{rank:05d}.safetensors"


def _tensor_name(kind: str, name: str, begin: int) -> str:
    """The name, in its file, of the piece of the parameter `name` that starts at `begin`."""
    return f"{kind}:{name}:{begin}"
