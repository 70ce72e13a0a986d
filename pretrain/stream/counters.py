"""What a stream has done, and where its threads' time went."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, fields


@dataclass
class Counters:
    """Sums over all threads of a stream since it was opened."""

    images: int = 0
    unreadable: int = 0
    bytes_read: int = 0  # asked of the storage
    read_seconds: float = 0.0  # waiting for the storage, and taking apart what it gives
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
        """All fields as they stand now."""
        with self._lock:
            return {field.name: getattr(self, field.name) for field in fields(self) if field.compare}


class Laps:
    """A stopwatch of one thread: each lap goes to the account it names."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._at = time.perf_counter()

    def lap(self, account: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.spent[account] = self.spent.get(account, 0.0) + now - self._at
        self._at = now
