"""A chunk: neighbouring samples, read together as byte ranges of shards, each given up once it is used.

webdataset's part is the table of openers and the expansion of unusual tars. It ends in silence where a tar is cut,
and its grouping can join the halves of two samples; so a chunk is a pipeline of its own, its bytes are counted before
they are parsed, and its keys are compared with the index.
"""

from __future__ import annotations

import io
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import webdataset
from numpy.typing import NDArray
from webdataset.handlers import reraise_exception
from webdataset.tariterators import tar_file_expander

from pretrain.errors import InputError, StorageError
from pretrain.stream.buffers import Ranges
from pretrain.stream.counters import Counters, Laps
from pretrain.stream.effort import Patience
from pretrain.stream.fault import NOT_READ, ChunkError
from pretrain.stream.index import Extent, Index
from pretrain.stream.location import read_range
from pretrain.stream.members import plain_members
from pretrain.stream.tar import BLOCK, IMAGE_SUFFIXES, ShardTar, split_name

_SCHEME = "vfrange"

# How long a reading thread waits, what ends that, and its memory: webdataset's openers are given nothing but a URL.
_reading = threading.local()
_NEVER = threading.Event()
_LOOK_UP = 0.5  # seconds, until a waiting thread looks whether it should go on waiting

Read = list[tuple[Extent, "RangeStream"]]
Images = dict[int, tuple[str, memoryview]]  # canonical id -> key, encoded image; views of what was read together


class RangeStream(io.RawIOBase):
    """A stream of bytes in memory, `data`; io.BytesIO would copy them."""

    def __init__(self, data: memoryview) -> None:
        self.data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self.data[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


def open_range(url: str, mode: str = "rb", bufsize: int = -1) -> RangeStream:
    """Opener in webdataset's table: `vfrange:BEGIN-END:SIZE:ETAG:SHARD` -> those bytes of a shard, local or remote.

    Raises ChunkError where they cannot be had, CancelledError where the thread's `stop` is set before they are.
    """
    _, span, size, etag, shard = url.split(":", 4)
    begin, end = (int(place) for place in span.split("-"))
    stop, patience = getattr(_reading, "stop", None), getattr(_reading, "patience", None)
    ranges = getattr(_reading, "ranges", None) or Ranges()
    try:
        found = read_range(shard, begin, end, unquote(etag), int(size), patience=patience, stop=stop, take=ranges.take)
    except InputError as error:
        raise ChunkError(str(error), isinstance(error, StorageError)) from error
    return RangeStream(found)


webdataset.gopen_schemes[_SCHEME] = open_range


def reading_threads(
    count: int, stop: threading.Event, members: list[threading.Thread], patience: Patience | None = None
) -> ThreadPoolExecutor:
    """Threads for reading chunks, themselves in `members`; once `stop` is set they begin no request any more."""
    ranges = Ranges()

    def begin() -> None:
        _reading.stop, _reading.ranges, _reading.patience = stop, ranges, patience
        members.append(threading.current_thread())

    return ThreadPoolExecutor(count, thread_name_prefix="read", initializer=begin)


def read_extents(extents: Sequence[Extent]) -> Read:
    """The bytes of byte ranges. Raises ChunkError naming the shard where it is missing, changed or too short."""
    # The table is asked directly: webdataset.gopen() lets GOPEN_REWRITE turn any URL into a shell command.
    opener = webdataset.gopen_schemes[_SCHEME]
    urls = [
        f"{_SCHEME}:{extent.begin}-{extent.end}:{extent.size}:{quote(extent.etag, safe='')}:{extent.url}"
        for extent in extents
    ]
    return [(extent, opener(url, "rb")) for extent, url in zip(extents, urls, strict=True)]


def expand_images(index: Index, read: Read) -> Images:
    """The encoded images in what was read, checked against the index.

    Raises ChunkError naming shard, bytes, key, and what was expected and found, where the bytes are damaged or hold
    other samples than the index says.
    """
    images: Images = {}
    for extent, stream in read:
        samples = _expand(extent, stream)
        ids = range(extent.first_id, extent.first_id + extent.count)
        for sample_id, (key, _), expected in zip(ids, samples, index.key_hash(np.array(ids)).tolist(), strict=False):
            found = zlib.crc32(key.encode(errors="surrogateescape"))
            if found != expected:
                raise _mismatch(
                    extent,
                    f"sample {sample_id} has key {key!r} (crc32 {found:08x}), the index expects a key of crc32 "
                    f"{expected:08x}",
                )
        if len(samples) != extent.count:
            keys = f", {samples[0][0]!r} to {samples[-1][0]!r}" if samples else ""
            raise _mismatch(
                extent,
                f"{len(samples)} samples with an image{keys}; the index expects {extent.count}, "
                f"ids {ids[0]} to {ids[-1]}",
            )
        images.update(zip(ids, samples, strict=True))
    return images


def _expand(extent: Extent, stream: RangeStream) -> list[tuple[str, memoryview]]:
    """(key, encoded image) of the samples in a byte range.

    Members with headers of the usual kinds are found by a walk over them, all others by webdataset's expansion of tars.
    """
    try:
        files = plain_members(stream.data)
        if files is None:
            # Refuses what tarfile would take besides, compressed tars and sparse files of any size among it.
            list(ShardTar(io.BytesIO(bytes(stream.data) + bytes(2 * BLOCK)), extent.url).samples())
            # No other member is opened: webdataset's decoders would unpickle some of them.
            source = [{"url": extent.url, "stream": stream}]
            expanded = tar_file_expander(source, reraise_exception, _is_image, eof_value=None)
            files = [(file["fname"], memoryview(file["data"])) for file in expanded]
    except Exception as error:  # tarfile lets several kinds through from damaged headers
        reason = error.args[0] if error.args else type(error).__name__
        raise _mismatch(extent, f"no whole tar members: {reason}") from error
    found: list[tuple[str, memoryview]] = []
    for name, data in files:
        key, suffix = split_name(name) or ("", "")
        if suffix in IMAGE_SUFFIXES:
            if found and found[-1][0] == key:
                raise _mismatch(extent, f"sample {key!r} has more than one image, the last in {name!r}")
            found.append((key, data))
    return found


def _is_image(name: str) -> bool:
    split = split_name(name)
    return split is not None and split[1] in IMAGE_SUFFIXES


def _mismatch(extent: Extent, what: str) -> ChunkError:
    return ChunkError(
        f"{extent.url}, bytes {extent.begin}-{extent.end}: {what}. The shard is damaged or was changed "
        "after it was indexed: restore it, or index it again and start a new run"
    )


class Chunk:
    """The samples of one chunk that this rank will use: ids [n], ascending; read together, handed over one by one.

    Whoever takes the first of them takes the bytes apart: a decode thread, which holds the interpreter lock anyhow. A
    reading thread would have to get hold of it, and keep all decode threads waiting meanwhile.
    """

    def __init__(self, ids: NDArray[np.int64]) -> None:
        self.ids = ids
        self.bytes = 0  # in the shards; known once it is located
        self._index: Index | None = None
        self._extents: list[Extent] = []
        self._read: Read = []
        self._done = False  # read, or found that it cannot be
        self._error: BaseException | None = None
        self._images: Images = {}
        self._apart = False
        self._lock = threading.Lock()  # held until it is read, and then by whoever takes it apart

    def locate(self, index: Index, stop: threading.Event | None = None) -> None:
        """Look up where it lies, before a reading thread's `read`; once `stop` is set, nobody waits for that."""
        self._index, self._stop = index, stop or threading.Event()
        self._lock.acquire()
        try:
            self._extents = index.extents(self.ids)
            self.bytes = sum(extent.end - extent.begin for extent in self._extents)
        except InputError as error:  # of a damaged index; told where the samples are asked for, as all that is
            self._error = ChunkError(str(error))

    def read(self, counters: Counters) -> None:
        """Read it, in a reading thread."""
        laps = Laps()
        try:
            if self._error is None:
                if getattr(_reading, "stop", _NEVER).is_set():
                    raise ChunkError(NOT_READ)
                with _telling(self._extents[0]):
                    self._read = read_extents(self._extents)
        except BaseException as error:
            self._error = error
        self._done = True
        self._lock.release()
        laps.lap("read_seconds")
        counters.add(bytes_read=self.bytes, **laps.spent)

    @property
    def waiting(self) -> bool:
        """Whether it is still to be located."""
        return self._index is None

    def take(self, sample_id: int) -> tuple[str, memoryview]:
        """Key and encoded image of one sample, once; waits for the reading and raises its error."""
        if not self._apart:
            self._take_apart()
        return self._images.pop(sample_id)

    def _take_apart(self) -> None:
        assert self._index is not None, "taken before it was located"
        # A read that its storage holds up cannot be ended, only left.
        while not self._lock.acquire(timeout=0 if self._stop.is_set() and not self._done else _LOOK_UP):
            if self._stop.is_set() and not self._done:
                raise ChunkError(NOT_READ)
        try:
            if self._error is not None:
                raise self._error
            if not self._apart:
                with _telling(self._extents[0]):
                    self._images = expand_images(self._index, self._read)
                self._read, self._apart = [], True  # its memory goes with the last of the images
        finally:
            self._lock.release()


@contextmanager
def _telling(extent: Extent) -> Iterator[None]:
    """What nobody foresaw is still a chunk, in its shard, that cannot be read."""
    try:
        yield
    except CancelledError:
        raise ChunkError(NOT_READ) from None
    except (ChunkError, MemoryError):
        raise
    except Exception as error:
        raise ChunkError(f"{extent.url}, bytes {extent.begin}-{extent.end}: {error!r}") from error
