"""Memory for batches and for byte ranges of shards, given out again once nobody holds it."""

from __future__ import annotations

import weakref
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor


class Buffers:
    """Uninitialised batches of images [rows, channels, size, size], uint8 or float32, in the host's memory.

    They are channels-last, as decoders write images. A new batch's memory has to be fetched page by page, at a fifth
    of the cost of writing it. It comes back here when the last tensor that shares it is gone; page-locked memory has a
    pool of torch's own, which also waits for the copies that are under way.
    """

    def __init__(self, rows: int, channels: int, size: int, dtype: torch.dtype, pin: bool) -> None:
        self._shape, self._dtype, self._pin = (rows, size, size, channels), dtype, pin
        self._free: list[np.ndarray] = []

    def take(self) -> Tensor:
        """A tensor that nobody else writes to for as long as it, or a view of it, is held."""
        return self._memory().permute(0, 3, 1, 2)

    def _memory(self) -> Tensor:
        if self._pin:
            return torch.empty(self._shape, dtype=self._dtype, pin_memory=True)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._shape, np.uint8 if self._dtype == torch.uint8 else np.float32)
        # torch holds this one array for all tensors that share its memory, and lets go of it with the last of them.
        return torch.from_numpy(_lend(memory, self._free))


class Ranges:
    """Memory for byte ranges, of any length.

    The allocator would give so much back to the system and fetch it again page by page, for every range.
    """

    def __init__(self) -> None:
        # By powers of two: were a short range lent what a long one needed, all memory would grow to the longest.
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
