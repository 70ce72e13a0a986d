"""What a stream did, and where its threads' time went."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, fields


@dataclass
class Counters:
    """Sums over all threads of a stream since it was opened."""

    images: int = 0
    unreadable: int = 0
    bytes_read: int = 0  # from storage
    read_seconds: float = 0.0  # waiting for storage, and splitting what was read into samples
    starved_seconds: float = 0.0  # decode threads waiting for a chunk
    decode_seconds: float = 0.0
    augment_seconds: float = 0.0
    collate_seconds: float = 0.0  # writing rows into the batch
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **amounts: float) -> None:
        """Add to the fields named; from any thread."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def seen(self) -> dict[str, float]:
        """The current values of all fields."""
        with self._lock:
            return {field.name: getattr(self, field.name) for field in fields(self) if field.compare}


class Laps:
    """A stopwatch of one thread: the seconds of each lap are added to the name it is given."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._at = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to `name`."""
        now = time.perf_counter()
        self.spent[name] = self.spent.get(name, 0.0) + now - self._at
        self._at = now
