"""A chunk: neighbouring samples, read together as byte ranges of shards, each released once it is used.

webdataset expands unusual tars. It ends in silence where a tar is cut, and its grouping can join the halves of two
samples; so the bytes of a chunk are counted before they are parsed, and its keys are compared with the index.
"""

from __future__ import annotations

import io
import threading
from concurrent.futures import CancelledError
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from webdataset.handlers import reraise_exception
from webdataset.tariterators import tar_file_expander

from pretrain.errors import InputError, StorageError
from pretrain.index.index import Index, SampleExtent
from pretrain.index.indexfile import key_hash
from pretrain.index.members import plain_members
from pretrain.index.tar import BLOCK, ShardTar, key_and_suffix
from pretrain.storage.filekind import IMAGE_SUFFIXES
from pretrain.storage.shardfile import ShardReader
from pretrain.stream.counters import Counters, Laps
from pretrain.stream.fault import NOT_READ, ChunkError

_POLL = 0.5  # seconds until a thread that waits for a chunk looks whether reading was stopped

# By canonical id: key and encoded image, or why there is none.
Images = dict[int, tuple[str, memoryview] | ChunkError]


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
            key, suffix = key_and_suffix(name) or ("", "")
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
        """Name and content of the members: by a walk over plain headers, else by webdataset's expansion of tars."""
        try:
            files = plain_members(self.data)
            if files is None:
                tar = bytes(self.data) + bytes(2 * BLOCK)
                # Refuses what tarfile would take as well: compressed tars, and sparse files of any size.
                list(ShardTar(io.BytesIO(tar), self.url).samples())
                # No other member is opened: webdataset's decoders would unpickle some of them.
                source = [{"url": self.url, "stream": io.BytesIO(tar)}]
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
    split = key_and_suffix(name)
    return split is not None and split[1] in IMAGE_SUFFIXES


class Chunk:
    """The samples of one chunk that this rank will use: ids [n], ascending; read together, taken one by one.

    A reading thread also splits its bytes into samples, a few in a row: a decode thread, which comes to each with
    other things in its caches, would take longer.
    """

    def __init__(self, ids: NDArray[np.int64]) -> None:
        self.ids = ids
        self.located = False
        self.bytes = 0  # in the shards; known once it is located
        self._index: Index
        self._reader: ShardReader
        self._extents: list[SampleExtent] = []
        self._done = threading.Event()  # it was read, or cannot be
        self._error: BaseException | None = None
        self._samples: Images = {}  # holds the only references to what was read

    def locate(self, index: Index, reader: ShardReader) -> None:
        """Look up the byte ranges that `read` will ask `reader` for; once that is stopped, nobody waits for them."""
        self._index, self._reader, self.located = index, reader, True
        try:
            self._extents = index.extents(self.ids)
            self.bytes = sum(extent.end - extent.begin for extent in self._extents)
        except InputError as error:  # a damaged index; raised where a sample is taken, as every error is
            self._error = ChunkError(str(error))

    def read(self, counters: Counters) -> None:
        """Read it, in a reading thread. An error is raised where its samples are taken."""
        laps = Laps()
        try:
            if self._error is None:
                self._samples = self._read()
        except BaseException as error:
            self._error = error
        self._done.set()
        laps.lap("read_seconds")
        counters.add(bytes_read=self.bytes, **laps.spent)

    def take(self, sample_id: int) -> tuple[str, memoryview]:
        """Key and encoded image of one sample, once; waits until it was read.

        Raises ChunkError where it cannot be had.
        """
        stop = self._reader.stop
        # A read that its storage holds up cannot be interrupted, only abandoned.
        while not (self._done.is_set() or self._done.wait(0 if stop.is_set() else _POLL)):
            if stop.is_set() and not self._done.is_set():
                raise ChunkError(NOT_READ)
        if self._error is not None:
            raise self._error
        sample = self._samples.pop(sample_id)
        if isinstance(sample, ChunkError):
            raise sample
        return sample

    def _read(self) -> Images:
        found: Images = {}
        try:
            for extent, data in [(extent, self._reader.read(extent)) for extent in self._extents]:
                borders, hashes = self._index.borders(extent)
                for number, hashed in enumerate(hashes):
                    begin, end, sample_id = borders[number], borders[number + 1], extent.first_id + number
                    part = data[begin - extent.begin : end - extent.begin]
                    try:
                        found[sample_id] = Sample(extent.url, begin, part, sample_id, hashed).image()
                    except ChunkError as error:  # of this sample alone
                        found[sample_id] = error
            return found
        except CancelledError:
            raise ChunkError(NOT_READ) from None
        except InputError as error:
            raise ChunkError(str(error), isinstance(error, StorageError)) from error
        except MemoryError:
            raise
        except Exception as error:  # unforeseen, and still a chunk that cannot be read
            raise ChunkError(f"{self._extents[0]}: {error!r}") from error
