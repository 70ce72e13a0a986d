"""Memory for batches and for byte ranges of shards, reused once nobody holds it."""

from __future__ import annotations

import weakref
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor


class Buffers:
    """Uninitialised batches of images [rows, channels, size, size], uint8 or float32, in the host's memory.

    They are channels-last, as decoders write images. The system would hand out a new batch's memory page by page, at a
    fifth of the cost of writing it. Memory returns here when the last tensor that shares it is gone; for page-locked
    memory torch has a pool, which also waits for copies under way.
    """

    def __init__(self, rows: int, channels: int, size: int, dtype: torch.dtype, pin: bool) -> None:
        self._shape, self._dtype, self._pin = (rows, size, size, channels), dtype, pin
        self._free: list[np.ndarray] = []

    def take(self) -> Tensor:
        """A tensor that nobody else writes to for as long as it, or a view of it, is held."""
        if self._pin:
            return torch.empty(self._shape, dtype=self._dtype, pin_memory=True).permute(0, 3, 1, 2)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._shape, np.uint8 if self._dtype == torch.uint8 else np.float32)
        # torch holds this one array for all tensors that share its memory, and releases it with the last of them.
        return torch.from_numpy(_lend(memory, self._free)).permute(0, 3, 1, 2)


class Ranges:
    """Memory for byte ranges of any length, which the allocator would return to the system after each range."""

    def __init__(self) -> None:
        # By powers of two: if short ranges used the memory of long ones, all of it would grow to the longest.
        self._free: defaultdict[int, list[np.ndarray]] = defaultdict(list)

    def take(self, size: int) -> memoryview:
        """`size` bytes that nobody else writes to for as long as the view, or a part of it, is held."""
        bits = size.bit_length()
        free = self._free[bits]
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(1 << bits, np.uint8)
        return _lend(memory, free).data[:size]


def _lend(memory: np.ndarray, free: list[np.ndarray]) -> np.ndarray:
    """All of `memory`, which goes to `free` once nothing shares the array returned."""
    lent = memory[:]
    weakref.finalize(lent, free.append, memory).atexit = False
    return lent
