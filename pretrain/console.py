"""A run's console, which may be a file on a full disk or a pipe that nobody reads any more."""

from __future__ import annotations

from contextlib import suppress
from typing import TextIO


def say(text: str, *, to: TextIO | None = None, end: str = "\n") -> None:
    """A line on stdout, or on `to`; lost where it cannot be written: a run of months does not end over its notes."""
    with suppress(OSError):
        print(text, file=to, end=end, flush=True)
