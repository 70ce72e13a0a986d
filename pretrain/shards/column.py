"""An array that grows on disk: as long as the samples of an index, and no memory of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from pretrain.errors import InputError

_PIECE = 1 << 20  # elements


class Column:
    """Filled by appending, then read or sorted as a memory-mapped array. The file has no name: nothing is left behind.

    It is in `folder` (default: TMPDIR). Raises InputError that names the folder where it cannot be written.
    """

    def __init__(self, dtype: str, folder: Path | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self._folder = folder
        self._length = 0
        with self._naming_folder():
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (until close)

    def __len__(self) -> int:
        return self._length

    def append(self, part: np.ndarray) -> None:
        with self._naming_folder():
            self._file.write(np.ascontiguousarray(part, self.dtype).data)
        self._length += len(part)

    def array(self) -> np.ndarray:
        """The whole column, [n], mapped: what is written to the array is written to the file."""
        with self._naming_folder():
            self._file.flush()
        if not self._length:
            return np.zeros(0, self.dtype)
        return np.memmap(self._file, self.dtype, "r+", shape=(self._length,))

    def pieces(self, overlap: int = 0) -> Iterator[np.ndarray]:
        """The column in pieces of a few megabytes, each with the first `overlap` elements of the next."""
        array = self.array()
        for at in range(0, len(array) - overlap, _PIECE):
            yield array[at : at + _PIECE + overlap]

    def close(self) -> None:
        with suppress(OSError):  # of content that was not flushed and is not needed
            self._file.close()

    @contextmanager
    def _naming_folder(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"{self._folder}" if self._folder else f"{tempfile.gettempdir()} (another place: TMPDIR)"
            raise InputError(f"{where}: temporary files cannot be written: {error.strerror}") from error
