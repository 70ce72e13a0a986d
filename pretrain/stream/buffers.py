"""Memory for batches, given out again once nobody holds it."""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor


class Buffers:
    """Uninitialised tensors of one shape and type (uint8 or float32), on one device.

    A new tensor's memory has to be fetched page by page, at a fifth of the cost of writing it. On the host a tensor's
    memory comes back here when the last tensor that shares it is gone; page-locked memory and a device's have pools of
    torch's own, which also wait for the copies that are under way.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, pin: bool) -> None:
        self._shape, self._dtype = shape, dtype
        self._device, self._pin = device, pin and device.type == "cpu"
        self._free: list[np.ndarray] = []

    def take(self) -> Tensor:
        """A tensor that nobody else writes to for as long as it, or a view of it, is held."""
        if self._pin or self._device.type != "cpu":
            return torch.empty(self._shape, dtype=self._dtype, device=self._device, pin_memory=self._pin)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._shape, np.uint8 if self._dtype == torch.uint8 else np.float32)
        # torch holds this one array for all tensors that share its memory, and lets go of it with the last of them.
        lent = memory[:]
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent)
