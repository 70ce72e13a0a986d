"""An array that grows on disk: as long as the samples of an index, and no memory of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_PIECE = 1 << 20  # elements


class Column:
    """Appended to, then read or sorted through mapped pages. The file has no name: nothing of it can be left behind.

    `folder` is where it lies (default: TMPDIR).
    """

    def __init__(self, dtype: str, folder: Path | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (until close)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, part: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(part, self.dtype).data)
        self._length += len(part)

    def array(self) -> np.ndarray:
        """All of it, [n], mapped: what is written to it is written to the file."""
        self._file.flush()
        if not self._length:
            return np.zeros(0, self.dtype)
        return np.memmap(self._file, self.dtype, "r+", shape=(self._length,))

    def pieces(self, overlap: int = 0) -> Iterator[np.ndarray]:
        """From beginning to end, a few megabytes at a time, each with the first `overlap` elements of the next."""
        array = self.array()
        for at in range(0, len(array) - overlap, _PIECE):
            yield array[at : at + _PIECE + overlap]

    def close(self) -> None:
        self._file.close()
