"""Output to the console, which may be a file on a full disk, a closed pipe, or not UTF-8."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from typing import TextIO

from pretrain.errors import InputError

# Characters that move a terminal's cursor, set its title or turn the reading direction (C0, DEL, C1, line separators,
# bidi controls), that show nothing, so that two names look alike, and bytes of a name that are not UTF-8. Joiners stay:
# emoji and some scripts are written with them.
_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
# A name that `isolated` has made stays as it is.
ISOLATE, END = "\u2068", "\u2069"
_ISOLATED = re.compile(rf"({ISOLATE}(?:(?!{_CONTROL.pattern}).)*{END})")


def printable(text: str) -> str:
    """Text from outside (a class name, a key, a path) as one harmless line: control characters are escaped."""
    parts = _ISOLATED.split(text)  # every second one is isolated
    return "".join(part if number % 2 else _escaped(part) for number, part in enumerate(parts))


def isolated(name: str) -> str:
    """A name or path to stand beside other text, printable. One with right-to-left letters (of a path, each such part)
    is isolated as in Unicode's UAX 9: it reads in its own direction, and what stands beside it keeps its place.
    """
    return "/".join(map(_isolated, name.split("/")))


def _isolated(name: str) -> str:
    others = _escaped(_ISOLATED.sub("", name))
    turns = any(unicodedata.bidirectional(letter) in ("R", "AL", "AN") for letter in others)
    return f"{ISOLATE}{_escaped(name)}{END}" if turns else printable(name)


def _escaped(text: str) -> str:
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
