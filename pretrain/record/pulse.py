"""A rank's pulse: where it is, for the watchdog, and how long each part of a step takes it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch

from pretrain.engine.quiet import get_accelerator
from pretrain.ranks.watchdog import Watchdog

Item = TypeVar("Item")


@dataclass(frozen=True)
class Window:
    """This rank's time since the last window, in seconds."""

    seconds: float  # of training: saves and evaluations are not counted
    waited: float  # for batches
    forward: float  # of the device, in forward passes
    paused: dict[str, float]  # by what it was for, as `Pulse.paused`; without what `Pulse.pauses` has told

    def times(self, waited: float | None = None) -> dict[str, float]:
        """What the time went to, by the names of metrics.jsonl.

        Args:
            waited: for batches, on the worst rank, for which all wait; None: on this one.
        """
        waited = min(self.waited if waited is None else waited, self.seconds)
        return _named({"training": self.seconds - waited, "waiting": waited, **self.paused})


def _named(spent: dict[str, float]) -> dict[str, float]:
    return {f"time/{part}": round(seconds, 3) for part, seconds in spent.items()}


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


class Pulse:
    """Tells the watchdog which part of which step this rank enters, and takes the time.

    As a context manager it is the watchdog: it ends with the block, and names the rank that is gone where a collective
    fails inside.
    """

    def __init__(self, watchdog: Watchdog, device: torch.device) -> None:
        self._watchdog, self._forward = watchdog, Stopwatch(device)
        self._began, self._waited, self._paused = time.perf_counter(), 0.0, dict[str, float]()

    def beat(self, step: int, part: str) -> None:
        """This rank enters `part` of `step` (from 0), or makes progress in it."""
        self._watchdog.beat(step, part)

    def batches(self, step: int, source: Iterable[Item]) -> Iterator[Item]:
        """The micro-batches of `step`, with the time spent waiting for each counted."""
        batches = iter(source)
        while True:
            self.beat(step, "data")
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - began
            yield batch

    @contextmanager
    def forward(self, step: int) -> Iterator[None]:
        """The forward pass of a micro-batch, timed without waiting for the device; the backward pass follows it."""
        self.beat(step, "forward")
        with self._forward.running():
            yield
        self.beat(step, "backward")

    @contextmanager
    def paused(self, what: Literal["saving", "evaluating"]) -> Iterator[None]:
        """Time that does not count as training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused[what] = self._paused.get(what, 0.0) + time.perf_counter() - began

    def pauses(self) -> dict[str, float]:
        """The pauses since the last call (or window), by the names of metrics.jsonl; no window counts them again."""
        taken, self._paused = self._paused, {}
        self._began += sum(taken.values())
        return _named(taken)

    def window(self, *, wait: bool = True) -> Window:
        """The time since the last call (or the start).

        Args:
            wait: for the device, so that the time is real; False after a failure, when it may never answer.
        """
        forward = self._forward.take() if wait else 0.0
        now = time.perf_counter()
        taken = Window(now - self._began - sum(self._paused.values()), self._waited, forward, self._paused)
        self._began, self._waited, self._paused = now, 0.0, {}
        return taken

    def __enter__(self) -> Pulse:
        self._watchdog.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watchdog.__exit__(kind, error, trace)
