"""A rank's reading: the chunks it will need, read ahead by a few threads, each given up once it is used.

webdataset's part is the table of openers, the expansion of tars and the grouping of members. It ends in
silence where a tar is cut, and can join the halves of two samples; so a chunk is a pipeline of its own, its
bytes are counted before they are parsed, and its keys are compared with the index.
"""

from __future__ import annotations

import io
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import webdataset
from numpy.typing import NDArray
from webdataset.handlers import reraise_exception
from webdataset.tariterators import group_by_keys, tar_file_expander

from pretrain.errors import InputError
from pretrain.stream.index import Extent, Index
from pretrain.stream.location import open_shard
from pretrain.stream.order import Order
from pretrain.stream.tar import IMAGE_SUFFIXES, split_name

READ_THREADS = 4
_SCHEME = "vfrange"
_PLANNED_AT_ONCE = 4096  # positions: enough for numpy's cost per call to vanish
_EVALUATION_RUN = 16  # samples read together where ids run on


class ChunkError(InputError):
    """A chunk cannot be read, or is not what the index says. Other ranks read other chunks."""

    only_this_rank = True


@dataclass
class Counters:
    """What a stream has done. Seconds are summed over its threads."""

    images: int = 0
    unreadable: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    starved_seconds: float = 0.0  # decode threads waiting for a chunk
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **amounts: float) -> None:
        """Add to the fields named; from any thread."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)


def open_range(url: str, mode: str = "rb", bufsize: int = -1) -> BinaryIO:
    """Opener in webdataset's table: `vfrange:BEGIN-END:SHARD` -> those bytes of a local shard.

    An object store is one more case here. Raises ChunkError when bytes are missing, and for a URL.
    """
    _, span, shard = url.split(":", 2)
    begin, end = (int(place) for place in span.split("-"))
    try:
        with open_shard(shard) as file:
            file.seek(begin)
            data = file.read(end - begin)
    except InputError as error:
        raise ChunkError(str(error)) from error
    except OSError as error:
        raise ChunkError(f"{shard}: bytes {begin}-{end} cannot be read: {error.strerror}") from error
    if len(data) < end - begin:
        raise ChunkError(
            f"{shard}: truncated: the index places samples in bytes {begin}-{end}, the file ends at byte "
            f"{begin + len(data)}; copy or write the shard again"
        )
    return io.BytesIO(data)


webdataset.gopen_schemes[_SCHEME] = open_range


def read_images(index: Index, ids: NDArray[np.int64]) -> dict[int, bytes]:
    """Read the encoded images of ascending ids [n], a byte range for each run of them: id -> bytes.

    Raises ChunkError naming shard, bytes, key, and what was expected and found, where a shard is missing, too
    short, damaged, or holds other samples than the index says.
    """
    images: dict[int, bytes] = {}
    for extent in index.extents(ids):
        samples = _expand(extent)
        expected = index.key_hash(np.arange(extent.first_id, extent.first_id + extent.count))
        for number, (key, _) in enumerate(samples[: extent.count]):
            found = zlib.crc32(key.encode(errors="surrogateescape"))
            if found != expected[number]:
                raise _mismatch(
                    extent,
                    f"sample {extent.first_id + number} has key {key!r} (crc32 {found:08x}), "
                    f"the index expects a key of crc32 {expected[number]:08x}",
                )
        if len(samples) != extent.count:
            keys = f", {samples[0][0]!r} to {samples[-1][0]!r}" if samples else ""
            raise _mismatch(
                extent,
                f"{len(samples)} samples with an image{keys}; the index expects {extent.count}, "
                f"ids {extent.first_id} to {extent.first_id + extent.count - 1}",
            )
        images.update((extent.first_id + number, image) for number, (_, image) in enumerate(samples))
    return images


def _expand(extent: Extent) -> list[tuple[str, bytes]]:
    """(key, encoded image) of the samples in a byte range, as webdataset expands and groups them."""
    # The table is asked directly: webdataset.gopen() lets GOPEN_REWRITE turn any URL into a shell command.
    opener = webdataset.gopen_schemes[_SCHEME]
    stream = opener(f"{_SCHEME}:{extent.begin}-{extent.end}:{extent.url}", "rb")
    source = [{"url": extent.url, "stream": stream}]
    try:
        files = tar_file_expander(source, handler=reraise_exception, select_files=_is_image)
        grouped = list(group_by_keys(files, handler=reraise_exception))
    except Exception as error:  # tarfile lets several kinds through from damaged headers
        reason = error.args[0] if error.args else type(error).__name__
        raise _mismatch(extent, f"no whole tar members: {reason}") from error
    found = []
    for sample in grouped:
        images = [suffix for suffix in IMAGE_SUFFIXES if suffix in sample]
        if len(images) != 1:
            raise _mismatch(extent, f"sample {sample['__key__']!r} has images {images}, where one is expected")
        found.append((sample["__key__"], sample[images[0]]))
    return found


def _is_image(name: str) -> bool:
    # No other member is opened: webdataset's decoders would unpickle some of them.
    split = split_name(name)
    return split is not None and split[1] in IMAGE_SUFFIXES


def _mismatch(extent: Extent, what: str) -> ChunkError:
    return ChunkError(
        f"{extent.url}, bytes {extent.begin}-{extent.end}: {what}. The shard is damaged or was changed "
        "after it was indexed: restore it, or index it again and start a new run"
    )


class Chunk:
    """The samples of one chunk that this rank will use, read together and handed over one by one."""

    def __init__(self, ids: NDArray[np.int64]) -> None:
        self.ids = ids
        self._images: Future[dict[int, bytes]] | None = None

    def start(self, threads: ThreadPoolExecutor, index: Index, counters: Counters) -> None:
        """Queue the reading."""
        self._images = threads.submit(_timed_read, index, self.ids, counters)

    @property
    def waiting(self) -> bool:
        """Whether its reading is still to be queued."""
        return self._images is None

    def take(self, sample_id: int) -> bytes:
        """The image of one sample, once; waits for the reading and raises its error."""
        assert self._images is not None, "taken before it was started"
        return self._images.result().pop(sample_id)


def _timed_read(index: Index, ids: NDArray[np.int64], counters: Counters) -> dict[int, bytes]:
    begin = time.perf_counter()
    images = read_images(index, ids)
    size = sum(len(image) for image in images.values())
    counters.add(read_seconds=time.perf_counter() - begin, bytes_read=size)
    return images


@dataclass(frozen=True)
class Plan:
    """A micro-batch to come: ids and epochs [m] of its rows, and the chunk that each is read with.

    Rows that pad an evaluation have id -1 and no chunk. `fresh`: the chunks that are first needed here.
    """

    ids: NDArray[np.int64]
    epochs: NDArray[np.int64]
    chunks: Sequence[Chunk | None]
    fresh: Sequence[Chunk]


def plan_training(
    order: Order, micro_batch: int, rank: int, world: int, start_step: int, stop_step: int | None
) -> Iterator[Plan]:
    """A rank's micro-batches in slot order, of steps start_step <= t < stop_step (None: without end)."""
    batch, g = order.global_batch, order.chunk
    share = batch // world
    slots = np.arange(rank * share, (rank + 1) * share)
    at_once = max(1, _PLANNED_AT_ONCE // share)
    stop = stop_step if stop_step is not None else (1 << 62) // batch
    unfinished: dict[int, tuple[Chunk, int]] = {}  # chunk of an epoch -> (it, how many uses are planned)

    def open_chunks(positions: NDArray[np.int64], numbers: NDArray[np.int64]) -> list[Chunk]:
        """Chunks number [k] seen first at `positions` [k], each with the samples that fall to this rank."""
        places = order.siblings(positions)
        exist = places >= 0
        mine = exist & (places >= start_step * batch) & (places < stop * batch)
        mine &= (places % batch >= slots[0]) & (places % batch <= slots[-1])
        whole = (mine == exist).all(axis=1)
        counts = mine.sum(axis=1)
        parts = np.split(order.at(places[~whole][mine[~whole]]), np.cumsum(counts[~whole])[:-1])
        rest = iter(parts)
        return [
            Chunk(np.arange(number * g, number * g + count) if complete else np.sort(next(rest)))
            for number, count, complete in zip(numbers.tolist(), counts.tolist(), whole.tolist(), strict=True)
        ]

    for step in range(start_step, stop, at_once):
        steps = np.arange(step, min(step + at_once, stop))
        positions = (steps[:, None] * batch + slots).ravel()
        ids, epochs = order.at(positions), positions // order.samples
        keys = epochs * (order.samples // g + 1) + ids // g
        distinct, first, uses = np.unique(keys, return_index=True, return_counts=True)
        unseen = np.array([key not in unfinished for key in distinct.tolist()])
        begins = np.sort(first[unseen])
        opened = open_chunks(positions[begins], ids[begins] // g)
        unfinished.update(zip(keys[begins].tolist(), ((chunk, 0) for chunk in opened), strict=True))
        chunks = [unfinished[key][0] for key in keys.tolist()]
        for key, count in zip(distinct.tolist(), uses.tolist(), strict=True):
            chunk, planned = unfinished.pop(key)
            if planned + count < len(chunk.ids):
                unfinished[key] = chunk, planned + count
        for row in range(0, len(ids), micro_batch):
            rows = slice(row, row + micro_batch)
            begin, end = np.searchsorted(begins, [row, row + micro_batch])
            yield Plan(ids[rows], epochs[rows], chunks[rows], opened[begin:end])


def plan_evaluation(ids: NDArray[np.int64], batch: int, rank: int, world: int) -> Iterator[Plan]:
    """A rank's batches: step t takes run t·world + rank of `batch` ids; each rank has as many batches."""
    for step in range(-(-len(ids) // (batch * world))):
        begin = (step * world + rank) * batch
        taken = ids[begin : begin + batch]
        runs = np.split(taken, np.flatnonzero(np.diff(taken) != 1) + 1)
        fresh = [Chunk(run[at : at + _EVALUATION_RUN]) for run in runs for at in range(0, len(run), _EVALUATION_RUN)]
        chunks: list[Chunk | None] = [chunk for chunk in fresh for _ in chunk.ids]
        padding = batch - len(taken)
        padded = np.concatenate([taken, np.full(padding, -1, np.int64)])
        yield Plan(padded, np.zeros(batch, np.int64), chunks + [None] * padding, fresh)


class Reader:
    """Starts the reading of a plan's chunks in the order of need, `window` samples ahead of their use.

    Chunks are started as samples are used up, so reading is even although all lanes of a rank change chunk at
    about the same time; and what is asked for is always started, so nobody waits for a window to open.
    """

    def __init__(self, index: Index, plans: Iterator[Plan], window: int, counters: Counters) -> None:
        self._index, self._plans, self._window, self._counters = index, plans, window, counters
        self._planned: deque[Plan] = deque()
        self._waiting: deque[Chunk] = deque()  # of the planned, in the order of need
        self._ahead = 0  # samples started and not yet asked for
        self._threads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read")

    def __iter__(self) -> Iterator[Plan]:
        return self

    def __next__(self) -> Plan:
        """The next micro-batch, all of whose chunks are being read. Not for several threads at once."""
        if not self._planned:
            self._plan()
        plan = self._planned.popleft()
        for _ in range(sum(chunk.waiting for chunk in plan.fresh)):
            self._start()
        self._ahead -= sum(chunk is not None for chunk in plan.chunks)
        try:
            while self._ahead < self._window:
                if self._waiting:
                    self._start()
                else:
                    self._plan()
        except StopIteration:
            pass
        return plan

    def _plan(self) -> None:
        plan = next(self._plans)
        self._planned.append(plan)
        self._waiting.extend(plan.fresh)

    def _start(self) -> None:
        chunk = self._waiting.popleft()
        chunk.start(self._threads, self._index, self._counters)
        self._ahead += len(chunk.ids)

    def close(self) -> None:
        """Drop what is queued and wait for the reads under way."""
        self._threads.shutdown(cancel_futures=True)
