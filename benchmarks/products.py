"""The clock of the benchmarks, and what the machine gives just then: the rate of bare matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from pretrain.model.spec import ViTSpec


def timed(work: Callable[[], object], device: torch.device) -> float:
    """The seconds that `work` takes the device."""
    if device.type == "cpu":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    torch.cuda.synchronize(device)
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    work()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000


def block_flops(spec: ViTSpec, batch: int) -> int:
    """Operations of the matrix products of one block's forward pass, on all tokens; attention's own left out."""
    return sum(2 * batch * spec.tokens * inner * columns for inner, columns in _matrices(spec))


def _matrices(spec: ViTSpec) -> list[tuple[int, int]]:
    d = spec.width
    return [(d, 3 * d), (d, d), (d, spec.mlp), (spec.mlp, d)]


class Products:
    """The matrix products of one block's forward pass, as torch.mm of matrices that are at hand.

    Measured beside everything else, they tell how fast the machine was at that moment.
    """

    def __init__(self, spec: ViTSpec, batch: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        rows, self._device, self._times = batch * spec.tokens, device, 1 if device.type == "cpu" else 20
        self._pairs = [
            (torch.randn(rows, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype))
            for k, n in _matrices(spec)
        ]
        self._flops = self._times * block_flops(spec, batch)

    def rate(self) -> float:
        """FLOP/s, now."""
        return self._flops / timed(self._run, self._device)

    def _run(self) -> None:
        for _ in range(self._times):
            for left, right in self._pairs:
                torch.mm(left, right)
