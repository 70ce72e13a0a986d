"""Append-only files of JSON lines; none is lost to a disk that is full for a while."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, BinaryIO

from pretrain import files
from pretrain.console import say

CHECK = "check"
_DIGITS = 16
_CHECKED = re.compile(r'(.*), "check": "([0-9a-f]{16})"}')


class Lines:
    """Appends to a file, which its first line creates.

    Each line is passed to the operating system, so it outlives this process. Lines that the disk has no room for wait
    in memory for the next one: a run does not end over its notes.
    """

    def __init__(self, path: Path, *, checked: bool = False) -> None:
        """`checked`: each line ends with the running check of the file up to it, so that a later change shows."""
        self._path = path
        self._check = check_of(path) if checked else ""
        self._file: BinaryIO | None = None
        self._waiting, self._told = b"", False

    def add(self, *lines: dict[str, Any]) -> None:
        """Append; JSON has no NaN, so a number that is not finite becomes null."""
        self._waiting += "".join(self._text(line) + "\n" for line in lines).encode()
        try:
            if self._file is None:
                self._file = self._path.open("ab", buffering=0)
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]  # a part of it, on a full disk
            self._told = False
        except OSError as error:
            if not self._told:
                say(f"{self._path}: {error.strerror}; its lines wait in memory until there is room")
            self._told = True

    @property
    def check(self) -> str:
        """The running check of all lines up to now; empty where the lines are not checked."""
        return self._check

    def _text(self, line: dict[str, Any]) -> str:
        text = json.dumps(_finite(line), allow_nan=False)
        if not self._check:
            return text
        self._check = next_check(self._check, text)
        return f'{text[:-1]}, "{CHECK}": "{self._check}"}}'

    def close(self) -> None:
        """Close the file."""
        if self._waiting:
            self.add()
        if self._file is not None:
            self._file.close()


def check_of(path: Path) -> str:
    """The running check of a file: that of its last line; where that has none, a hash of all lines. 16 hex digits.

    Where there is no file, as of an empty one.
    """
    lines = path.read_bytes() if files.exists(path) else b""
    lines = lines[: lines.rfind(b"\n") + 1]  # without a torn one
    _, check = split_check(lines[lines.rfind(b"\n", 0, -1) + 1 :].decode(errors="replace").removesuffix("\n"))
    return check or first_check(lines)


def first_check(lines: bytes) -> str:
    """The running check of lines that carry none."""
    return hashlib.sha256(lines).hexdigest()[:_DIGITS]


def next_check(before: str, text: str) -> str:
    """The running check after one more line: of the check before it, and the line without its own."""
    return hashlib.sha256(f"{before}{text}".encode()).hexdigest()[:_DIGITS]


def split_check(line: str) -> tuple[str, str]:
    """A line without its check, and that; empty where it carries none."""
    found = _CHECKED.fullmatch(line)
    return (f"{found[1]}}}", found[2]) if found else (line, "")


def _finite(line: dict[str, Any]) -> dict[str, Any]:
    def odd(value: Any) -> bool:
        return isinstance(value, float) and not math.isfinite(value)

    return {key: None if odd(value) else value for key, value in line.items()}
