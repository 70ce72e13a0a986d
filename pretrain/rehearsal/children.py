"""The ranks of a rehearsed run: a child process of each rank of the rehearsal, on the same device.

The rehearsal can thus kill a run, signal it and start it anew on fewer ranks, whatever launcher started the rehearsal.
Its own ranks use no device, so all of the device's memory is the child's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

from pretrain.ranks.collectives import World, all_gather_list, broadcast_object
from pretrain.ranks.launcher import free_port

_POLL = 0.1  # seconds between two looks at the children
_OTHERS = 15.0  # seconds for the other ranks to end once one has
_SHOWN = 300  # letters of what a rank said last
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "MemoryError")


class Process(Protocol):
    """What is needed of a child process."""

    pid: int

    def poll(self) -> int | None:
        """Its exit status, a signal's negative; None while it runs."""


def spawn(words: Sequence[str], environment: dict[str, str], log: Path) -> Process:
    """Start a command whose output goes to the file `log`, out of reach of the terminal's Ctrl-C."""
    with log.open("wb") as file:
        return subprocess.Popen(words, env=environment, stdout=file, stderr=file, start_new_session=True)


class Children:
    """One run: a process for each of the first `count` ranks. All methods are collective over the rehearsal's ranks.

    As a context manager it leaves no process behind.
    """

    def __init__(self, world: World, words: Sequence[str], log: Path, count: int) -> None:
        """
        Args:
            world: of the rehearsal.
            words: the command that each rank runs.
            log: this rank's, for what its child prints.
            count: of the ranks of the run.
        """
        self._log, self._process, self._killed = log, None, False
        port = broadcast_object(free_port() if world.main else None)
        if world.rank < count:
            self._process = spawn(words, _environment(world, count, port), log)

    def until(self, reached: Callable[[], bool]) -> bool:
        """Wait until `reached` holds on rank 0; False if a process has ended before."""
        while True:
            now = broadcast_object(reached())
            if now or any(all_gather_list([self._status is not None])):
                return bool(now)
            time.sleep(_POLL)

    def send(self, number: signal.Signals) -> None:
        """A signal to every rank of the run."""
        if self._process is not None and self._status is None:
            os.kill(self._process.pid, number)

    def ended(self, within: float) -> bool:
        """Wait until every rank has ended; False if one has not `within` so many seconds."""
        deadline = time.monotonic() + within
        while True:
            left, late = all_gather_list([(self._running, time.monotonic() > deadline)]), False
            late = any(late for _, late in left)
            if late or not any(running for running, _ in left):
                return not late
            time.sleep(_POLL)

    def kill(self) -> None:
        """SIGKILL to every rank, and wait until they are gone."""
        self._end()
        all_gather_list([None])

    def statuses(self) -> list[int | None]:
        """The exit status of each rank of the run, None of one that runs."""
        return [status for there, status in all_gather_list([(self._process is not None, self._status)]) if there]

    def failure(self) -> str:
        """Why the run has ended: the words of the rank that says most of it, the same on every rank."""
        self.ended(_OTHERS)
        told = all_gather_list([(self._status, self._last_words())])
        failed = [(status, words) for status, words in told if status not in (None, 0)]
        for status, words in [*(one for one in failed if one[0] and one[0] > 0), *failed]:
            if words or status == -signal.SIGKILL:
                return words or "killed by SIGKILL: the host's memory may have run out (dmesg tells)"
        return f"ended with status {failed[0][0]}, without a word" if failed else "ended before its time"

    @property
    def _running(self) -> bool:
        return self._process is not None and self._status is None

    @property
    def _status(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def _last_words(self) -> str:
        """What this rank's child gives as its reason: a message that begins with "error:", or its last line."""
        if self._process is None:
            return ""
        lines = [line.strip() for line in self._log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        found = [line for line in lines if line.startswith("error: ")] or lines[-1:]
        starved = [line for line in lines if any(words in line for words in _NO_MEMORY)]
        return (starved or found or [""])[-1].removeprefix("error: ")[:_SHOWN]

    def _end(self) -> None:
        while self._running:
            os.kill(self._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
            time.sleep(0.01)

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()


def starved(words: str) -> bool:
    """Whether a failure is one of memory."""
    return "memory" in words.lower() or "MemoryError" in words


def _environment(world: World, count: int, port: int) -> dict[str, str]:
    """That of a rank of a run of `count` ranks, which meet at rank 0's host as the rehearsal's do, at another port."""
    # torchrun's ranks would look for the store of its agent, where those of the rehearsal meet.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    return kept | {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(world.local_rank),
        "MASTER_ADDR": os.environ["MASTER_ADDR"],
        "MASTER_PORT": str(port),
    }
