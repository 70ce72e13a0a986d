"""A run's console, which may be a file on a full disk, a pipe that nobody reads any more, or not UTF-8."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TextIO


def say(text: str, *, to: TextIO | None = None, end: str = "\n") -> None:
    """A line on stdout, or on `to`; lost where it cannot be written: a run of months does not end over its notes.

    What the stream's encoding lacks is written as a backslash escape.
    """
    with suppress(OSError, ValueError):  # ValueError: the stream is closed
        try:
            print(text, file=to, end=end, flush=True)
        except UnicodeEncodeError:
            encoding = (to or sys.stdout).encoding
            print(text.encode(encoding, "backslashreplace").decode(encoding), file=to, end=end, flush=True)
