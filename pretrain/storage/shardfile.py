"""Shards opened as files, and read as byte ranges: every reader of shards, local or remote, comes through here."""

from __future__ import annotations

import errno
import io
import os
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import BinaryIO, cast

from pretrain import files
from pretrain.errors import InputError, StorageError
from pretrain.storage import store
from pretrain.storage.location import local_path
from pretrain.storage.retry import Timeouts
from pretrain.storage.store import Extent, is_remote

_PAUSES = (0.5, 2.0, 8.0)  # seconds before each further attempt at a local read; a disk that is broken stays so
_FIRST_WINDOW, _LARGEST_WINDOW = 16 << 10, 4 << 20  # bytes that a remote file reads ahead


class ShardReader:
    """Reads byte ranges of shards; for any number of threads."""

    def __init__(
        self,
        timeouts: Timeouts | None = None,
        stop: threading.Event | None = None,
        memory: Callable[[int], memoryview] = lambda size: memoryview(bytearray(size)),
    ) -> None:
        """
        Args:
            timeouts: how long a remote shard is waited for; by default `retry.TIMEOUTS`.
            stop: once it is set, reads under way and later ones raise CancelledError, soon.
            memory: size → memory for the bytes of a local shard.
        """
        self.stop = stop or threading.Event()
        self._timeouts, self._memory = timeouts, memory

    def read(self, extent: Extent) -> memoryview:
        """All bytes of an extent.

        Raises InputError where the shard is missing, not readable, changed, or too short; StorageError where that may
        pass.
        """
        if self.stop.is_set():
            raise CancelledError
        if is_remote(extent.url):
            return memoryview(store.read_range(extent, timeouts=self._timeouts, stop=self.stop))
        path, data = local_path(extent.url), self._memory(extent.end - extent.begin)
        for pause in (*_PAUSES, None):
            try:
                reached, size = _fill(path, extent.begin, data)
                break
            except OSError as error:
                passing = error.errno in files.PASSING
                if pause is None or not passing:
                    text = f"{path}: bytes {extent.begin}-{extent.end} cannot be read: {error.strerror}"
                    # A disk that is broken says EIO too, and says so for ever.
                    raise (StorageError if passing and error.errno != errno.EIO else InputError)(text) from error
                if self.stop.wait(pause):
                    raise CancelledError from None
        if reached < extent.end:
            raise InputError(
                f"{path}: truncated: the index places samples in bytes {extent.begin}-{extent.end}, the file ends at "
                f"byte {reached}; copy or write the shard again"
            )
        if extent.size and size > extent.size:
            raise InputError(
                f"{path}: changed since it was indexed: {size} bytes, not {extent.size}; restore it, or index it "
                "again and start a new run"
            )
        return data


def _fill(path: Path, begin: int, data: memoryview) -> tuple[int, int]:
    """Read a file from `begin` on until `data` is full or it ends; the byte reached, and the file's size."""
    at = begin
    # Unbuffered: a buffered file would copy what it reads once more.
    with open(path, "rb", buffering=0) as file:
        while at < begin + len(data) and (count := os.preadv(file.fileno(), [data[at - begin :]], at)):
            at += count
        return at, os.fstat(file.fileno()).st_size


def open_shard(url: str | Path, *, stop: threading.Event | None = None) -> BinaryIO:
    """A shard, local or remote, opened for seekable binary reading.

    Raises InputError when it is missing, not a file, or not readable. Reading a remote one raises CancelledError
    once `stop` is set.
    """
    if is_remote(url):
        return cast(BinaryIO, RemoteFile(str(url), stop))
    path = local_path(url)
    try:
        return open(path, "rb")
    except OSError as error:
        raise files.failure(path, error) from error


def open_whole(url: str, *, stop: threading.Event | None = None) -> BinaryIO:
    """A shard that will be read whole and more than once: a remote one is copied to a temporary file (in TMPDIR).

    Raises as `open_shard`, and InputError when the copy does not fit on the disk.
    """
    file = open_shard(url, stop=stop)
    if not is_remote(url):
        return file
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller's)
    try:
        shutil.copyfileobj(file, copy, 4 << 20)
    except OSError as error:
        raise InputError(
            f"{url}: its copy in {tempfile.gettempdir()} cannot be written: {error.strerror}; name a larger disk in "
            "TMPDIR"
        ) from error
    copy.seek(0)
    return cast(BinaryIO, copy)


class RemoteFile(io.RawIOBase):
    """An object as a seekable file, read in ranges of the version found when it was opened.

    Read-ahead starts small after a jump and doubles while reading is sequential, so that headers cost a small request
    each and a whole read few large ones. The window before the last is kept: a label stands just before the header
    that told a sample's end.
    """

    def __init__(self, url: str, stop: threading.Event | None = None) -> None:
        self.stat = store.stat(url, stop=stop)
        self._url, self._stop = url, stop
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
        """The window that holds the next byte, read where it is not there yet: its first byte, and its bytes."""
        for begin, data in self._windows:
            if begin <= self._at < begin + len(data):
                return begin, data
        last, data = self._windows[-1]
        skipped = self._at - (last + len(data))
        # To skip less than is read ahead anyway is no jump.
        self._ahead = min(2 * self._ahead, _LARGEST_WINDOW) if 0 <= skipped <= self._ahead else _FIRST_WINDOW
        span = max(self._ahead, min(end - self._at, _LARGEST_WINDOW))
        extent = Extent(self._url, self._at, min(self._at + span, self.stat.size))
        data = store.read_range(extent, version=self.stat, stop=self._stop)
        self._windows.append((self._at, data))
        return self._windows[-1]
