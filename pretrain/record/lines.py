"""Append-only files of JSON lines; none is lost to a disk that is full for a while."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, BinaryIO

from pretrain.console import say


class Lines:
    """Appends to a file, which its first line creates.

    Each line is passed to the operating system, so it outlives this process. Lines that the disk has no room for wait
    in memory for the next one: a run does not end over its notes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._waiting, self._told = b"", False

    def add(self, *lines: dict[str, Any]) -> None:
        """Append; JSON has no NaN, so a number that is not finite becomes null."""
        self._waiting += "".join(json.dumps(_finite(line), allow_nan=False) + "\n" for line in lines).encode()
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

    def close(self) -> None:
        """Close the file."""
        if self._waiting:
            self.add()
        if self._file is not None:
            self._file.close()


def _finite(line: dict[str, Any]) -> dict[str, Any]:
    def odd(value: Any) -> bool:
        return isinstance(value, float) and not math.isfinite(value)

    return {key: None if odd(value) else value for key, value in line.items()}
