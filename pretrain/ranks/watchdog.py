"""A rank that hangs is named, with its stack, and the run ends instead of waiting for ever.

The loop says where it is (`beat`). Every two seconds a thread of each rank writes that, its heartbeat, into the store
where the ranks met. A rank that gets no further for too long reads the others' heartbeats: the run waits for the ranks
furthest behind, or for those whose heartbeats have stopped. The first rank to find them writes its verdict into the
store; one rank of each host prints it, and all end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeVar

import torch.distributed as dist

from pretrain.console import printable
from pretrain.ranks.collectives import World, barrier, broadcast_object, together
from pretrain.ranks.rendezvous import ranks_text

Result = TypeVar("Result")
Verdict = dict[str, Any]  # "speakers": the ranks that print it, "text"

SLOW = ("start", "evaluation", "save")  # parts of a step whose duration is not known
_FIRST = 1800.0  # seconds for every part up to the end of the first step: shards are opened, kernels compiled
_GAP = 3  # heartbeats that must fail to come before a rank counts as silent
_PATIENCE = 5  # intervals to wait for an answer from the store
_VERDICT = "verdict"
_RESUME = "the run ends; the same command resumes from the last checkpoint"


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank is in the run, and since when."""

    rank: int
    host: str
    step: int  # from 0
    turn: int  # parts entered in this step: all ranks enter the same ones in the same order
    part: str
    limit: float  # seconds that the part may take
    age: float = 0.0  # seconds since the last `beat`
    number: int = 0  # of heartbeats given
    where: str = ""  # the innermost Python line of the main thread
    waits: bool = False  # whether that line is in one of torch's collectives


class Watchdog:
    """Watches the main thread of this rank until `close`, and all ranks with it. The constructor is collective.

    As a context manager it also finds out, where a collective fails inside, whether a rank is gone.
    """

    def __init__(self, folder: Path, world: World, *, hang: float, slow: float, every: float = 2.0) -> None:
        """
        Args:
            folder: the run folder; stacks go to `hangs/rank_00000.txt`.
            world: the ranks.
            hang: seconds that a part of a step may take, after the first step.
            slow: seconds that a part in `SLOW` may take without a `beat`.
            every: seconds between heartbeats.
        """
        self._world, self._hang, self._slow, self._every = world, hang, slow, every
        self._last = Heartbeat(world.rank, socket.gethostname(), -1, 0, "start", max(_FIRST, slow))
        self._since, self._armed, self._steps, self._number = time.monotonic(), 0.0, 0, 0
        self._main_thread = threading.get_ident()
        self._stacks = folder / "hangs"
        self._path = self._stacks / f"rank_{world.rank:05d}.txt"
        self._file = together(self._open)
        self._board = (
            _Board(world, broadcast_object(os.urandom(4).hex()), patience=_PATIENCE * every) if world.size > 1 else None
        )
        self._closed, self._ending = threading.Event(), threading.Lock()
        self._publish()
        barrier()  # all have given a first heartbeat
        self._arm(self._since)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int, part: str) -> None:
        """This rank enters `part` of `step` (from 0) or, if it is in it already, makes progress. Main thread only."""
        now, last = time.monotonic(), self._last
        if step != last.step:
            self._steps += 1
            last = replace(last, step=step, turn=0)
        if part != last.part or not last.turn:
            limit = self._slow if part in SLOW else self._hang
            last = replace(last, part=part, turn=last.turn + 1, limit=limit if self._steps > 1 else max(_FIRST, limit))
        changed = last.limit != self._last.limit
        self._since = now  # first: the watching thread must not measure a new part from the beginning of the last
        self._last = last
        if changed or now - self._armed > self._every:  # it takes 50 µs, too much for every beat
            self._arm(now)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):  # a full disk
            self._file.close()
            if not self._path.stat().st_size:
                self._path.unlink()
            self._stacks.rmdir()  # unless there are stacks in it

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        # What gloo and NCCL raise when a peer is gone; refusals and the guard's errors are of other types.
        if self._board and (type(error) is RuntimeError or isinstance(error, dist.DistError)):
            verdict = self._diagnose(failed=True)
            if verdict is not None:
                self._end(verdict)
        self.close()

    def _open(self) -> TextIO:
        self._stacks.mkdir(parents=True, exist_ok=True)
        return self._path.open("a")

    def _arm(self, now: float) -> None:
        """Have the stack written even if this process cannot run Python any more: C code holds the interpreter.

        The other ranks find such a rank, and their end makes the launcher end it; a single rank ends itself.
        """
        alone = self._world.size == 1
        self._armed = now
        faulthandler.dump_traceback_later(
            self._last.limit + 2 * self._every, file=2 if alone else self._file, exit=alone
        )

    def _watch(self) -> None:
        while not self._closed.wait(self._every):
            verdict = self._publish()
            if verdict is None and time.monotonic() - self._since > self._last.limit:
                faulthandler.cancel_dump_traceback_later()  # this thread runs, so it will write the stack
                verdict = self._diagnose()
            if verdict is not None and not self._closed.is_set():
                self._dump()
                self._end(verdict)

    def _publish(self) -> Verdict | None:
        """Give a heartbeat; the verdict, if there is one."""
        if self._board is None:
            return None
        self._number += 1
        return self._board.exchange(replace(self._now(), number=self._number))

    def _now(self) -> Heartbeat:
        beat = replace(self._last, age=time.monotonic() - self._since)
        if threading.get_ident() == self._main_thread:
            return beat  # its line is in this file
        frame = sys._current_frames()[self._main_thread]
        file = Path(frame.f_code.co_filename)
        where = f"{file.name}:{frame.f_lineno} in {frame.f_code.co_name}"
        return replace(beat, where=where, waits=file.parts[-3:-1] == ("torch", "distributed"))

    def _dump(self) -> None:
        """Write this process's stacks to its file."""
        beat = self._now()
        with contextlib.suppress(ValueError, OSError):  # closed by now; a full disk
            self._file.write(f"rank {beat.rank} ({beat.host}), process {os.getpid()}: {_position(beat)}\n")
            self._file.flush()
            faulthandler.dump_traceback(self._file)

    def _diagnose(self, failed: bool = False) -> Verdict | None:
        """Who holds up the run, if it has been held up for too long.

        Args:
            failed: a collective has failed: say who is gone, and without waiting for the time limit.
        """
        if self._board is None:
            mine = self._now()
            return {"speakers": [mine.rank], "text": f"{self._hangs([mine])}; {_RESUME}"}
        before = self._board.read()
        for _ in range(_GAP if before else 0):
            time.sleep(self._every)
            verdict = self._publish()
            if verdict is not None:
                return verdict
        after = self._board.read() if before else None
        mine = self._now()
        if before is None or after is None:
            return self._cut_off(mine) if failed or mine.age > max(mine.limit, self._slow) else None
        silent = [new for old, new in zip(before, after, strict=True) if new.number == old.number]
        alive = [beat for beat in after if beat not in silent]
        if silent:
            culprits, text = silent, self._silent(silent)
            limit = max(mine.limit, self._slow if any(beat.part in SLOW for beat in silent) else 0.0)
            late = failed or mine.age > limit
        else:
            culprits = _behind(alive)
            text = self._hangs(culprits)
            late = not failed and any(beat.age > beat.limit for beat in culprits)
        if not late:
            return None
        waiting = [beat.rank for beat in alive if beat not in culprits]
        text += f"; {ranks_text(waiting)} wait{'s' * (len(waiting) == 1)}" if waiting else ""
        first = {beat.host: beat.rank for beat in reversed(alive)}
        return self._board.decide({"speakers": list(first.values()), "text": f"{text}; {_RESUME}"})

    def _cut_off(self, mine: Heartbeat) -> Verdict:
        """The verdict of a rank that does not reach the store: nobody can be asked."""
        store = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        text = (
            f"no answer from {store}, where the ranks meet (rank 0 or its launcher): ended, frozen or cut off; "
            f"rank {mine.rank} ({mine.host}) is {_position(mine)}; {_RESUME}"
        )
        # Rank 0 is the first of its host, and the one that is gone.
        return {"speakers": [mine.rank] if self._world.local_rank == 0 or mine.rank == 1 else [], "text": text}

    def _hangs(self, culprits: Sequence[Heartbeat]) -> str:
        first = max(culprits, key=lambda beat: beat.age)
        verb, stacks = ("hangs", self._stack(first)) if len(culprits) == 1 else ("hang", self._stacks)
        return f"{_names(culprits)} {verb} {_position(first)}; stack: {stacks}"

    def _silent(self, silent: Sequence[Heartbeat]) -> str:
        return (
            f"no sign of life from {_names(silent)}, last seen {_position(silent[0])}: ended, frozen, cut off, or "
            f"stuck in code that holds the interpreter (then its stack is in {self._stack(silent[0])})"
        )

    def _stack(self, beat: Heartbeat) -> Path:
        return self._stacks / f"rank_{beat.rank:05d}.txt"

    def _end(self, verdict: Verdict) -> None:
        self._ending.acquire()  # and never released: the watching and the main thread may both come here
        if self._world.rank in verdict["speakers"]:
            with contextlib.suppress(OSError):  # a full disk: the run must end all the same
                # Not by way of sys.stderr: what hangs may hold its lock.
                os.write(2, f"error: {printable(verdict['text'])}\n".encode())
        if self._world.size > 1:
            # The others are still to read the verdict, from a store that is in rank 0's process.
            time.sleep((2 if self._world.main else 1) * _GAP * self._every)
        os._exit(1)


class _Board:
    """The ranks' heartbeats and the verdict, in the store where the ranks met.

    It has a connection of its own: a rank that waits in a collective may hold that of the process group. A call to a
    frozen or unreachable host may never return, so each has a thread, and is given up after `patience` seconds.
    """

    def __init__(self, world: World, run: str, patience: float) -> None:
        self._rank, self._size, self._patience = world.rank, world.size, patience
        self._run = run  # a store may outlive a run, as torchrun's does when it restarts the ranks
        self._store: Any = None
        self._calling, self._lock = threading.Thread(), threading.Lock()

    def exchange(self, beat: Heartbeat) -> Verdict | None:
        """Write this rank's heartbeat; the verdict, if there is one."""

        def call(store: Any) -> Verdict | None:
            store.set(self._key(self._rank), json.dumps(asdict(beat)))
            return json.loads(store.get(self._key(_VERDICT))) if store.check([self._key(_VERDICT)]) else None

        return self._call(call)

    def read(self) -> list[Heartbeat] | None:
        """All ranks' last heartbeats; None where the store cannot be reached."""
        keys = [self._key(rank) for rank in range(self._size)]
        return self._call(lambda store: [Heartbeat(**json.loads(text)) for text in store.multi_get(keys)])

    def decide(self, verdict: Verdict) -> Verdict:
        """The first verdict that any rank reached, which may be this one."""

        def call(store: Any) -> Verdict:
            first: Verdict = json.loads(store.compare_set(self._key(_VERDICT), "", json.dumps(verdict)))
            return first

        return self._call(call) or verdict

    def _key(self, of: int | str) -> str:
        return f"vit-foundry/{self._run}/{of}"

    def _call(self, call: Callable[[Any], Result]) -> Result | None:
        answers: list[Result] = []

        def work() -> None:
            try:
                self._store = self._store or dist.TCPStore(
                    os.environ["MASTER_ADDR"],
                    int(os.environ["MASTER_PORT"]),
                    is_master=False,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=max(self._patience, 1)),
                )
                answers.append(call(self._store))
            except Exception:  # of several types: the connection is broken, and torch would not mend it
                self._store = None

        with self._lock:
            if self._calling.is_alive():  # the last call has not returned: one thread waits, not one for each
                self._calling.join(self._patience)
            if self._calling.is_alive():
                return None
            self._calling = threading.Thread(target=work, daemon=True)
            self._calling.start()
            self._calling.join(self._patience)
            return answers[0] if answers else None


def _behind(beats: Sequence[Heartbeat]) -> list[Heartbeat]:
    """Those the others wait for: furthest behind or, where all are level, not waiting in a collective themselves."""
    least = min((beat.step, beat.turn) for beat in beats)
    behind = [beat for beat in beats if (beat.step, beat.turn) == least]
    return [beat for beat in behind if not beat.waits] or behind


def _position(beat: Heartbeat) -> str:
    at = f" (at {beat.where})" if beat.where else ""
    step = f" at step {beat.step + 1}" if beat.step >= 0 else ""
    return f"in {beat.part}{step} for {beat.age:.0f} s{at}"


def _names(beats: Sequence[Heartbeat]) -> str:
    """Which ranks, and on which hosts."""
    hosts = list(dict.fromkeys(beat.host for beat in beats))
    listed = ", ".join(hosts[:8]) + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")
    return f"{ranks_text([beat.rank for beat in beats])} ({listed})"
