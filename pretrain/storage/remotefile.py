"""A remote shard as a file."""

from __future__ import annotations

import io
import os
import threading
from collections import deque

from pretrain.storage.retry import Timeouts
from pretrain.storage.store import read_range, stat

_FIRST_WINDOW, _LARGEST_WINDOW = 16 << 10, 4 << 20  # bytes read ahead


class RemoteFile(io.RawIOBase):
    """An object as a seekable file, read in ranges of the version found when it was opened.

    What is read ahead starts small after a jump and doubles while reading goes on, so that headers cost a small
    request each and a whole read few large ones. The window before the last is kept: a label stands just before
    the header that told a sample's end.
    """

    def __init__(self, url: str, *, timeouts: Timeouts | None = None, stop: threading.Event | None = None) -> None:
        self.stat = stat(url, timeouts, stop)
        self._url, self._timeouts, self._stop = url, timeouts, stop
        self._at = 0
        self._windows: deque[tuple[int, bytes]] = deque([(0, b"")], maxlen=2)
        self._ahead = _FIRST_WINDOW // 2  # doubled by the first read

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.stat.size}[whence]
        if self._at < 0:
            raise ValueError(f"negative position {self._at}")
        return self._at

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, fewer only at the end of the object."""
        end = self.stat.size if size is None or size < 0 else min(self._at + size, self.stat.size)
        pieces = []
        while self._at < end:
            begin, data = self._window(end)
            pieces.append(data[self._at - begin : end - begin])
            self._at += len(pieces[-1])
        return b"".join(pieces)

    def _window(self, end: int) -> tuple[int, bytes]:
        """The window that holds the next byte, fetched if need be."""
        for begin, data in self._windows:
            if begin <= self._at < begin + len(data):
                return begin, data
        last, data = self._windows[-1]
        skipped = self._at - (last + len(data))
        # Skipping less than is read ahead anyway is reading on.
        self._ahead = min(2 * self._ahead, _LARGEST_WINDOW) if 0 <= skipped <= self._ahead else _FIRST_WINDOW
        span = max(self._ahead, min(end - self._at, _LARGEST_WINDOW))
        until = min(self._at + span, self.stat.size)
        data = read_range(self._url, self._at, until, version=self.stat, timeouts=self._timeouts, stop=self._stop)
        self._windows.append((self._at, data))
        return self._windows[-1]
