"""A rank's reading: the chunks it will need, read ahead of their use by a few threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

from pretrain.index.index import Index
from pretrain.storage.retry import Timeouts
from pretrain.stream.chunk import Chunk, reading_threads
from pretrain.stream.counters import Counters
from pretrain.stream.plan import Plan

_LAST_WORDS = 2.0  # seconds that reads under way are waited for in the end
READ_AHEAD = 1 << 30  # bytes, by default
# A disk answers in microseconds, a network file system in a millisecond, an object store in tens of them. More threads
# than needed take turns with the decode threads at the interpreter lock and in the cores' caches.
LOCAL_THREADS, REMOTE_THREADS = 2, 32


class Reader:
    """Starts the reading of a plan's chunks in the order of need, up to `window` samples and `budget` bytes ahead.

    Chunks are started as samples are used up, so reading is even although all lanes of a rank change chunk at
    about the same time; and what is asked for is always started, so nobody waits for a window to open.
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
        remote = any(file.remote for file in index.files)
        self._stop = threading.Event()
        self._members: list[threading.Thread] = []
        self._count = REMOTE_THREADS if remote else LOCAL_THREADS
        self._threads = reading_threads(self._count, self._stop, self._members, timeouts)

    def __iter__(self) -> Iterator[Plan]:
        return self

    def __next__(self) -> Plan:
        """The next micro-batch, all of whose chunks are being read. Not for several threads at once."""
        if not self._planned:
            self._plan()
        plan = self._planned.popleft()
        begun = [self._begin() for _ in range(sum(chunk.waiting for chunk in plan.fresh))]
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
        chunk.locate(self._index, self._stop)
        self._ahead += len(chunk.ids)
        self._bytes_ahead += chunk.bytes
        return chunk

    def give_up(self) -> None:
        """Read nothing more: every chunk that is not here yet is refused, soon."""
        self._stop.set()

    def close(self) -> None:
        """Drop what is queued; wait a little for the reads under way. One that its storage holds up ends by itself."""
        self.give_up()
        self._threads.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + _LAST_WORDS
        for thread in self._members:
            thread.join(max(0.0, deadline - time.monotonic()))


def _read(chunks: Sequence[Chunk], counters: Counters) -> None:
    for chunk in chunks:
        chunk.read(counters)
