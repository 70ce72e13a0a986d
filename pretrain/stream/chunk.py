"""A chunk: neighbouring samples, read together as byte ranges of shards, each given up once it is used.

webdataset's part is the table of openers and the expansion of unusual tars. It ends in silence where a tar is cut,
and its grouping can join the halves of two samples; so a chunk is a pipeline of its own, its bytes are counted before
they are parsed, and its keys are compared with the index.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import NamedTuple
from urllib.parse import quote, unquote

import numpy as np
import webdataset
from numpy.typing import NDArray
from webdataset.handlers import reraise_exception
from webdataset.tariterators import tar_file_expander

from pretrain.errors import InputError, StorageError
from pretrain.index.index import Extent, Index
from pretrain.index.indexfile import key_hash
from pretrain.index.members import plain_members
from pretrain.index.tar import BLOCK, ShardTar, split_name
from pretrain.storage.filekind import IMAGE_SUFFIXES
from pretrain.storage.location import read_range
from pretrain.storage.retry import Timeouts
from pretrain.stream.buffers import Ranges
from pretrain.stream.counters import Counters, Laps
from pretrain.stream.fault import NOT_READ, ChunkError

_SCHEME = "vfrange"

# How long a reading thread waits, what ends that, and its memory: webdataset's openers are given nothing but a URL.
_reading = threading.local()
_NEVER = threading.Event()
_LOOK_UP = 0.5  # seconds, until a waiting thread looks whether it should go on waiting

# By canonical id: key and encoded image, or why it is none.
Images = dict[int, tuple[str, memoryview] | ChunkError]


class RangeStream:
    """A stream of bytes in memory, `data`, as tarfile reads it; io.BytesIO would copy them."""

    def __init__(self, data: memoryview) -> None:
        self.data, self._at = data, 0

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end."""
        part = bytes(self.data[self._at : self._at + size])
        self._at += len(part)
        return part


def open_range(url: str, mode: str = "rb", bufsize: int = -1) -> RangeStream:
    """Opener in webdataset's table: `vfrange:BEGIN-END:SIZE:ETAG:SHARD` -> those bytes of a shard, local or remote.

    Raises ChunkError where they cannot be had, CancelledError where the thread's `stop` is set before they are.
    """
    _, span, size, etag, shard = url.split(":", 4)
    begin, end = (int(place) for place in span.split("-"))
    stop, timeouts = getattr(_reading, "stop", None), getattr(_reading, "timeouts", None)
    ranges = getattr(_reading, "ranges", None) or Ranges()
    try:
        found = read_range(shard, begin, end, unquote(etag), int(size), timeouts=timeouts, stop=stop, take=ranges.take)
    except InputError as error:
        raise ChunkError(str(error), isinstance(error, StorageError)) from error
    return RangeStream(found)


webdataset.gopen_schemes[_SCHEME] = open_range


def reading_threads(
    count: int, stop: threading.Event, members: list[threading.Thread], timeouts: Timeouts | None = None
) -> ThreadPoolExecutor:
    """Threads for reading chunks, themselves in `members`; once `stop` is set they begin no request any more."""
    ranges = Ranges()

    def begin() -> None:
        _reading.stop, _reading.ranges, _reading.timeouts = stop, ranges, timeouts
        members.append(threading.current_thread())

    return ThreadPoolExecutor(count, thread_name_prefix="read", initializer=begin)


def read_extents(extents: Sequence[Extent]) -> list[memoryview]:
    """The bytes of each byte range. Raises ChunkError naming the shard where it is missing, changed or too short."""
    # The table is asked directly: webdataset.gopen() lets GOPEN_REWRITE turn any URL into a shell command.
    opener = webdataset.gopen_schemes[_SCHEME]
    return [
        opener(f"{_SCHEME}:{one.begin}-{one.end}:{one.size}:{quote(one.etag, safe='')}:{one.url}", "rb").data
        for one in extents
    ]


class Sample(NamedTuple):
    """The bytes of one sample in its shard, from `begin` on, and what the index says of it."""

    url: str
    begin: int
    data: memoryview
    sample_id: int
    key_hash: int

    def image(self) -> tuple[str, memoryview]:
        """Its key and its image, a view of `data`, checked against the index.

        Raises ChunkError naming shard, bytes, key, and what was expected and found, where the bytes are damaged or are
        another sample.
        """
        found: list[tuple[str, memoryview]] = []
        for name, data in self._files():
            key, suffix = split_name(name) or ("", "")
            if suffix in IMAGE_SUFFIXES:
                found.append((key, data))
        if len(found) != 1:
            images = f"images of {', '.join(repr(key) for key, _ in found)}" if found else "no image"
            raise self._mismatch(f"{images}; the index expects that of sample {self.sample_id}")
        key = found[0][0]
        hashed = key_hash(key)
        if hashed != self.key_hash:
            raise self._mismatch(
                f"sample {self.sample_id} has key {key!r} (crc32 {hashed:08x}), the index expects a key of crc32 "
                f"{self.key_hash:08x}"
            )
        return found[0]

    def _files(self) -> list[tuple[str, memoryview]]:
        """Members with headers of the usual kinds by a walk over them, all others by webdataset's expansion of tars."""
        try:
            files = plain_members(self.data)
            if files is None:
                # Refuses what tarfile would take besides, compressed tars and sparse files of any size among it.
                list(ShardTar(io.BytesIO(bytes(self.data) + bytes(2 * BLOCK)), self.url).samples())
                # No other member is opened: webdataset's decoders would unpickle some of them.
                source = [{"url": self.url, "stream": RangeStream(self.data)}]
                expanded = tar_file_expander(source, reraise_exception, _is_image, eof_value=None)
                files = [(file["fname"], memoryview(file["data"])) for file in expanded]
        except MemoryError:
            raise
        except Exception as error:  # tarfile lets several kinds through from damaged headers
            reason = error.args[0] if error.args else type(error).__name__
            raise self._mismatch(f"no whole tar members: {reason}") from error
        return files

    def _mismatch(self, what: str) -> ChunkError:
        return ChunkError(
            f"{self.url}, bytes {self.begin}-{self.begin + len(self.data)}: {what}. The shard is damaged or was "
            "changed after it was indexed: restore it, or index it again and start a new run"
        )


def _is_image(name: str) -> bool:
    split = split_name(name)
    return split is not None and split[1] in IMAGE_SUFFIXES


class Chunk:
    """The samples of one chunk that this rank will use: ids [n], ascending; read together, handed over one by one.

    A reading thread also takes its bytes apart: a few samples, one after the other. A decode thread would come to each
    of them with other things in its caches, and take longer.
    """

    def __init__(self, ids: NDArray[np.int64]) -> None:
        self.ids = ids
        self.bytes = 0  # in the shards; known once it is located
        self._index: Index | None = None
        self._extents: list[Extent] = []
        self._here = threading.Event()  # read, or found that it cannot be
        self._error: BaseException | None = None
        # What was read is held by these alone.
        self._samples: Images = {}

    def locate(self, index: Index, stop: threading.Event | None = None) -> None:
        """Look up where it lies, before a reading thread's `read`; once `stop` is set, nobody waits for that."""
        self._index, self._stop = index, stop or threading.Event()
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
                self._samples = self._read()
        except BaseException as error:
            self._error = error
        self._here.set()
        laps.lap("read_seconds")
        counters.add(bytes_read=self.bytes, **laps.spent)

    @property
    def waiting(self) -> bool:
        """Whether it is still to be located."""
        return self._index is None

    def take(self, sample_id: int) -> tuple[str, memoryview]:
        """Key and encoded image of one sample, once; waits for the reading and raises its error."""
        assert self._index is not None, "taken before it was located"
        # A read that its storage holds up cannot be ended, only left.
        while not self._here.is_set() and not self._here.wait(0 if self._stop.is_set() else _LOOK_UP):
            if self._stop.is_set() and not self._here.is_set():
                raise ChunkError(NOT_READ)
        if self._error is not None:
            raise self._error
        sample = self._samples.pop(sample_id)
        if isinstance(sample, ChunkError):
            raise sample
        return sample

    def _read(self) -> Images:
        assert self._index is not None
        try:
            found: Images = {}
            for extent, data in zip(self._extents, read_extents(self._extents), strict=True):
                borders, hashes = self._index.borders(extent)
                for at, key_hash in enumerate(hashes):
                    begin, end, sample_id = borders[at], borders[at + 1], extent.first_id + at
                    part = data[begin - extent.begin : end - extent.begin]
                    try:
                        found[sample_id] = Sample(extent.url, begin, part, sample_id, key_hash).image()
                    except ChunkError as error:  # the others are none the worse
                        found[sample_id] = error
            return found
        except CancelledError:
            raise ChunkError(NOT_READ) from None
        except (ChunkError, MemoryError):
            raise
        except Exception as error:  # what nobody foresaw is still a chunk, in its shard, that cannot be read
            first = self._extents[0]
            raise ChunkError(f"{first.url}, bytes {first.begin}-{first.end}: {error!r}") from error
