"""The slowest rank of a run: how long each takes for what it does by itself, and who takes longer than the rest.

A step begins with work that waits for nobody: the data, then the forward pass. What comes after holds collectives, in
which all ranks take as long as the slowest. (ZeRO 3 gathers parameters in the forward pass already: there only the data
tell the ranks apart.)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.engine.quiet import get_accelerator

PARTS = ("data", "forward")
TELLING = 1.2  # an excess that the progress line mentions


class Stopwatch:
    """Seconds that a device spends on what is launched inside `running`.

    An accelerator runs behind the host: its own marks are read, at the end of a window, so that no step waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: Any = None if device.type == "cpu" else get_accelerator().Event
        self._seconds, self._marks = 0.0, list[tuple[Any, Any]]()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what is launched inside."""
        if self._event is None:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        began, ended = self._event(enable_timing=True), self._event(enable_timing=True)
        began.record()
        yield
        ended.record()
        self._marks.append((began, ended))

    def take(self) -> float:
        """The seconds since the last call; waits for the device to come so far."""
        if self._marks:
            self._marks[-1][1].synchronize()
        seconds = self._seconds + sum(began.elapsed_time(ended) for began, ended in self._marks) / 1000
        self._seconds, self._marks = 0.0, []
        return seconds


@dataclass(frozen=True)
class Straggler:
    """The slowest rank, the part in which it is, and its time over the median rank's."""

    rank: int
    part: str
    excess: float


def slowest(times: Sequence[Sequence[float]]) -> Straggler:
    """Who takes longest, given each rank's seconds for each of `PARTS`."""
    totals = [sum(of_rank) for of_rank in times]
    rank = max(range(len(totals)), key=totals.__getitem__)
    # The lower median: of two ranks, the quicker one is the measure.
    usual = [statistics.median_low(of_part) for of_part in zip(*times, strict=True)]
    _, part = max(zip((mine - other for mine, other in zip(times[rank], usual, strict=True)), PARTS, strict=True))
    return Straggler(rank, part, totals[rank] / max(statistics.median_low(totals), 1e-9))
