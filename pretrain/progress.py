"""Progress of long work on stderr, with the time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from pretrain.console import say

_QUIET_SECONDS = 2.0  # shorter work prints nothing
_TERMINAL_SECONDS, _LOG_SECONDS = 0.5, 30.0


class Progress:
    """Counts `total` units of `what` ("samples", "shards"). On a terminal the line is rewritten; in a log one
    is added every half minute.
    """

    def __init__(self, doing: str, what: str, total: int) -> None:
        self._doing, self._what, self._total = doing, what, total
        self._done = 0
        self._terminal = sys.stderr.isatty()
        self._start = time.monotonic()
        self._next = self._start + (_QUIET_SECONDS if self._terminal else _LOG_SECONDS)
        self._spoke = False

    def advance(self, count: int = 1) -> None:
        self._done += count
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (_TERMINAL_SECONDS if self._terminal else _LOG_SECONDS)
        left = (now - self._start) / self._done * (self._total - self._done)
        line = f"{self._doing}: {self._done:,}/{self._total:,} {self._what}, {_clock(left)} left"
        if self._terminal:
            say(f"{line:<78}", to=sys.stderr, end="\r")
        else:
            say(line, to=sys.stderr)
        self._spoke = True

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._spoke and self._terminal:
            say(" " * 78, to=sys.stderr, end="\r")


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
