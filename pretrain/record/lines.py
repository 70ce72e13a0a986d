"""A run's append-only files: a JSON line at a time, none lost to a disk that is full for a while."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, BinaryIO

from pretrain.console import say


class Lines:
    """Appends to a file, made with its first line.

    Each line is handed to the operating system, so that it outlives this process. What there is no room for waits in
    memory for the line after it: a run of months does not end over its notes.
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
                self._waiting = self._waiting[self._file.write(self._waiting) :]  # a part of it, at the disk's end
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
