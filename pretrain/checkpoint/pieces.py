"""A checkpoint's values, by kind, parameter and place, whatever ranks wrote them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from pretrain.checkpoint import checkpoint
from pretrain.checkpoint.archive import Archive
from pretrain.checkpoint.checkpoint import Saved, file_name, tensor_name
from pretrain.checkpoint.find import verify_with_progress
from pretrain.checkpoint.fingerprint import AVERAGE, WEIGHT
from pretrain.checkpoint.reading import patiently
from pretrain.errors import InputError


class Pieces:
    """The values in a checkpoint, by kind, parameter and place, whatever ranks wrote them."""

    def __init__(self, saved: Saved) -> None:
        self._saved = saved
        self._files: dict[str, Archive] = {}
        self._pieces: dict[str, list[tuple[int, int, int]]] = {}  # parameter → (begin, numel, rank)
        path = saved.path / checkpoint.LAYOUT
        layout = json.loads(patiently(path, partial(path.read_text, encoding="utf-8")))
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
                values = self._archive(kind, rank).read(tensor_name(kind, name, first), at - first, upto - at)
                into[at - begin : upto - begin].copy_(values)
                at = upto
        if at < end:
            raise InputError(f"checkpoint {self._saved.path}: holds no {kind} of {name} from value {at} on")

    def _archive(self, kind: str, rank: int) -> Archive:
        name = file_name(kind, rank)
        if name not in self._files:
            self._files[name] = Archive(self._saved.path / name)
        return self._files[name]


def read_whole(saved: Saved, shapes: Mapping[str, tuple[int, ...]], *, averaged: bool = False) -> dict[str, Tensor]:
    """A checkpoint's weights, or their Polyak average, as whole fp32 tensors on the CPU; hashes are checked first.

    Raises:
        InputError: it keeps no average, is damaged, or is of a network of other parameters.
    """
    kind = AVERAGE if averaged else WEIGHT
    if kind not in saved.state["fingerprints"]:
        raise InputError(
            f"checkpoint {saved.path}: keeps no averaged weights (optimizer.averaging was not set); take the raw ones"
        )
    verify_with_progress(saved, [checkpoint.LAYOUT, *(file_name(kind, rank) for rank in range(saved.state["ranks"]))])
    return dict(_whole(Pieces(saved), kind, shapes))


def _whole(pieces: Pieces, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        values = torch.empty(math.prod(shape))
        pieces.read(kind, name, values, 0)
        yield name, values.view(shape)
