"""Output to the console, which may be a file on a full disk, a closed pipe, or not UTF-8."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TextIO

from pretrain.errors import InputError

# Characters that move a terminal's cursor, set its title or turn the reading direction (C0, DEL, C1, line separators,
# bidi controls), and bytes of a name that are not UTF-8.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text from outside (a class name, a key, a path) as one harmless line: control characters are escaped."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str, *, to: TextIO | None = None, end: str = "\n") -> None:
    """Print a line on stdout, or on `to`. It is lost if it cannot be written: a run does not end over its notes.

    Control characters (line breaks aside), and characters that the stream's encoding lacks, become backslash escapes.
    """
    with suppress(OSError, ValueError):  # ValueError: the stream is closed
        _print(text, to, end)


def open_streams() -> None:
    """Open the standard streams that the command was started without (`>&-`) on the null device.

    The next file opened would otherwise get the number of one of them, and the output of libraries.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (until the process ends)


def deliver(lines: Iterable[str]) -> None:
    """Print a command's result on stdout. Ends early where the reader has closed the pipe (`| head`).

    Raises:
        InputError: it cannot be written: an incomplete result must not look complete.
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
