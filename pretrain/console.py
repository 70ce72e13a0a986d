"""A run's console, which may be a file on a full disk, a pipe that nobody reads any more, or not UTF-8."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TextIO

from pretrain.errors import InputError

# What moves a terminal's cursor, sets its title or turns the reading direction (C0, DEL, C1, separators of lines, bidi
# controls), and bytes of a name that are not UTF-8, which no encoding writes.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text from outside (a class name, a key, a path) as one line that does nothing but show: controls are escaped."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str, *, to: TextIO | None = None, end: str = "\n") -> None:
    """A line on stdout, or on `to`; lost where it cannot be written: a run of months does not end over its notes.

    What is no text but controls the terminal (line breaks aside), or what the stream's encoding lacks, is written as a
    backslash escape.
    """
    with suppress(OSError, ValueError):  # ValueError: the stream is closed
        _print(text, to, end)


def open_streams() -> None:
    """Make the standard streams that the command was started without (`>&-`) lead nowhere.

    The next file to be opened would have the number of one of them, and hold what libraries write to it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (until the process ends)


def deliver(lines: Iterable[str]) -> None:
    """What a command was asked for, on stdout. Ends early where the reader has seen enough (`| head`).

    Raises InputError where it cannot be written: a result that is not there must not look like one.
    """
    for line in lines:
        try:
            _print(line)
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
            return
        except OSError as error:
            raise InputError(f"stdout: cannot be written: {error.strerror}; its content is not whole") from None


def _print(text: str, to: TextIO | None = None, end: str = "\n") -> None:
    shown = "\n".join(map(printable, text.split("\n")))
    try:
        print(shown, file=to, end=end, flush=True)
    except UnicodeEncodeError:
        encoding = (to or sys.stdout).encoding
        print(shown.encode(encoding, "backslashreplace").decode(encoding), file=to, end=end, flush=True)
