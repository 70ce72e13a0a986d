"""A rank's reading: the chunks it will need, read ahead of their use by a few threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from pretrain.index.index import Index
from pretrain.storage.retry import Timeouts
from pretrain.storage.shardfile import ShardReader
from pretrain.stream.buffers import Ranges
from pretrain.stream.chunk import Chunk
from pretrain.stream.counters import Counters
from pretrain.stream.plan import Plan

_CLOSING = 2.0  # seconds that `close` waits for the reads under way
READ_AHEAD = 1 << 30  # bytes, by default
# A disk answers in microseconds, a network file system in a millisecond, an object store in tens of them. More threads
# than needed take turns with the decode threads at the interpreter lock and in the cores' caches.
LOCAL_THREADS, REMOTE_THREADS = 2, 32


class Reader:
    """Starts the reading of a plan's chunks in the order of need, up to `window` samples and `budget` bytes ahead.

    Chunks are started as samples are used up, so reading is even although all lanes of a rank change chunk at about
    the same time; and what is asked for is always started, so nobody waits for a window to open.
    """

    def __init__(
        self,
        index: Index,
        plans: Iterator[Plan],
        window: int,
        budget: int,
        counters: Counters,
        timeouts: Timeouts | None = None,
    ) -> None:
        self._index, self._plans, self._counters = index, plans, counters
        self._window, self._budget = window, budget
        self._planned: deque[Plan] = deque()
        self._waiting: deque[Chunk] = deque()  # of the planned, in the order of need
        self._ahead, self._bytes_ahead = 0, 0.0  # samples started and not yet asked for
        self._shards = ShardReader(timeouts, memory=Ranges().take)
        self._count = REMOTE_THREADS if any(file.remote for file in index.files) else LOCAL_THREADS
        # The threads refer to this list alone, not to the reader: a forgotten one ends its threads.
        started = self._started = list[threading.Thread]()
        self._threads = ThreadPoolExecutor(
            self._count, "read", initializer=lambda: started.append(threading.current_thread())
        )

    def __iter__(self) -> Iterator[Plan]:
        return self

    def __next__(self) -> Plan:
        """The next micro-batch, all of whose chunks are being read. Not for several threads at once."""
        if not self._planned:
            self._plan()
        plan = self._planned.popleft()
        begun = [self._begin() for _ in range(sum(not chunk.located for chunk in plan.fresh))]
        for chunk in plan.chunks:
            if chunk is not None:
                self._ahead -= 1
                self._bytes_ahead -= chunk.bytes / len(chunk.ids)
        try:
            while self._ahead < self._window and self._bytes_ahead < self._budget:
                if self._waiting:
                    begun.append(self._begin())
                else:
                    self._plan()
        except StopIteration:
            pass
        # One call a thread, not a chunk: each wakes one up.
        for first in range(min(self._count, len(begun))):
            self._threads.submit(_read, begun[first :: self._count], self._counters)
        return plan

    def _plan(self) -> None:
        plan = next(self._plans)
        self._planned.append(plan)
        self._waiting.extend(plan.fresh)

    def _begin(self) -> Chunk:
        chunk = self._waiting.popleft()
        chunk.locate(self._index, self._shards)
        self._ahead += len(chunk.ids)
        self._bytes_ahead += chunk.bytes
        return chunk

    def stop(self) -> None:
        """Read nothing more: every chunk that was not read yet is refused, soon."""
        self._shards.stop.set()

    def close(self) -> None:
        """Drop what is queued; wait a little for the reads under way. One that its storage holds up ends by itself."""
        self.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + _CLOSING
        for thread in self._started:
            thread.join(max(0.0, deadline - time.monotonic()))


def _read(chunks: Sequence[Chunk], counters: Counters) -> None:
    for chunk in chunks:
        chunk.read(counters)
