"""A rank that hangs is named, with its stack, and the run ends rather than wait for it for ever.

The loop says where it is (`beat`). A thread of each rank writes that into a store which all ranks reach, every two
seconds: a sign of life. Where a rank gets no further for too long it reads what the others wrote. The ranks furthest
behind hold up the rest, or those from which nothing comes any more. The first rank to find them out leaves its verdict
in the store; one rank of each host says it, and all end.
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
import warnings
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

# Parts of a step that may take long, for all that is known.
SLOW = ("start", "evaluation", "save")
_FIRST = 1800.0  # seconds for all up to the end of the first step: shards are opened, kernels compiled
_GAP = 3  # signs of life that must fail to come before a rank counts as silent
_PATIENCE = 5  # intervals to wait for an answer from the store
_MARGIN = 60.0  # seconds by which a collective outlives the watchdog, whose message is the better one
_VERDICT = "verdict"
_GO_ON = "the run ends; the same command goes on from the last checkpoint"


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life: where it is in the run, and since when."""

    rank: int
    host: str
    step: int  # from 0
    turn: int  # parts entered in this step: the ranks enter the same ones in the same order
    part: str
    limit: float  # seconds that it may take
    age: float = 0.0  # seconds that it has taken
    number: int = 0  # of signs given
    where: str = ""  # the innermost Python line of the main thread
    waits: bool = False  # whether that line is one of torch's collectives


class Watchdog:
    """Watches the main thread of this rank from its making to `close`, and all ranks with it. Making it is collective.

    As a context manager it also says, where a collective fails inside, whether that was because a rank is gone.
    """

    def __init__(self, folder: Path, world: World, *, hang: float, slow: float, every: float = 2.0) -> None:
        """
        Args:
            folder: the run folder; stacks go to `hangs/rank_00000.txt`.
            hang: seconds that a part of a step may take, after the first step.
            slow: seconds that a part in `SLOW` may take without a `beat`.
            every: seconds between signs of life.
        """
        self._world, self._hang, self._slow, self._every = world, hang, slow, every
        self._sign = Sign(world.rank, socket.gethostname(), -1, 0, "start", max(_FIRST, slow))
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
        barrier()  # all have given a first sign: from here on, none is a thing to tell
        self._arm(self._since)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _open(self) -> TextIO:
        self._stacks.mkdir(parents=True, exist_ok=True)
        return self._path.open("a")

    def beat(self, step: int, part: str) -> None:
        """This rank enters `part` of `step` (from 0) or, if it is in it already, gets on with it. Main thread only."""
        now, sign = time.monotonic(), self._sign
        if step != sign.step:
            self._steps += 1
            if self._steps == 2:
                shorten_collectives(max(self._hang, self._slow) + _MARGIN)
            sign = replace(sign, step=step, turn=0)
        if part != sign.part or not sign.turn:
            limit = self._slow if part in SLOW else self._hang
            sign = replace(sign, part=part, turn=sign.turn + 1, limit=limit if self._steps > 1 else max(_FIRST, limit))
        changed = sign.limit != self._sign.limit
        self._since = now  # first: the watching thread must not measure a new part from the beginning of the last
        self._sign = sign
        if changed or now - self._armed > self._every:  # 50 µs, not for every beat
            self._arm(now)

    def close(self) -> None:
        """Watch no longer."""
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
        # What gloo and NCCL raise when a peer is gone; refusals and the guards' errors are of other types.
        if self._board and (type(error) is RuntimeError or isinstance(error, dist.DistError)):
            verdict = self._diagnose(failed=True)
            if verdict is not None:
                self._end(verdict)
        self.close()

    def _arm(self, now: float) -> None:
        """Have the stack written even if nothing in this process gets to run Python any more.

        Such a rank is found by the others, whose end makes the launcher end it; alone, it ends itself.
        """
        alone = self._world.size == 1
        self._armed = now
        faulthandler.dump_traceback_later(
            self._sign.limit + 2 * self._every, file=2 if alone else self._file, exit=alone
        )

    def _watch(self) -> None:
        while not self._closed.wait(self._every):
            verdict = self._publish()
            if verdict is None and time.monotonic() - self._since > self._sign.limit:
                faulthandler.cancel_dump_traceback_later()  # this thread runs: it writes the stack if it comes to that
                verdict = self._diagnose()
            if verdict is not None and not self._closed.is_set():
                self._dump()
                self._end(verdict)

    def _publish(self) -> dict[str, Any] | None:
        """Give a sign of life; the verdict, if one has been reached."""
        if self._board is None:
            return None
        self._number += 1
        return self._board.exchange(replace(self._look(), number=self._number))

    def _look(self) -> Sign:
        sign = replace(self._sign, age=time.monotonic() - self._since)
        if threading.get_ident() == self._main_thread:
            return sign  # at a line of this file
        frame = sys._current_frames()[self._main_thread]
        file = Path(frame.f_code.co_filename)
        where = f"{file.name}:{frame.f_lineno} in {frame.f_code.co_name}"
        waits = file.parts[-3:-1] == ("torch", "distributed")
        return replace(sign, where=where, waits=waits)

    def _dump(self) -> None:
        """Write this process's stacks to its file."""
        sign = self._look()
        with contextlib.suppress(ValueError, OSError):  # closed by now; a full disk
            self._file.write(f"rank {sign.rank} ({sign.host}), process {os.getpid()}: {_place(sign)}\n")
            self._file.flush()
            faulthandler.dump_traceback(self._file)

    def _diagnose(self, failed: bool = False) -> dict[str, Any] | None:
        """Who holds up the run, if it is held up for too long; `failed`: only who is gone, at once."""
        mine = self._look()
        if self._board is None:
            return {"speakers": [mine.rank], "text": f"{self._hangs([mine])}; {_GO_ON}"}
        before = self._board.read()
        for _ in range(_GAP if before else 0):
            time.sleep(self._every)
            verdict = self._publish()
            if verdict is not None:
                return verdict
        after = self._board.read() if before else None
        mine = self._look()
        late = failed or mine.age > mine.limit
        if before is None or after is None:
            if not failed and mine.age <= max(mine.limit, self._slow):  # others may be in a part that takes long
                return None
            store = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            text = (
                f"no answer from {store}, where the ranks meet (rank 0 or its launcher): ended, frozen or cut off; "
                f"rank {mine.rank} ({mine.host}) is {_place(mine)}; {_GO_ON}"
            )
            # Nobody can be asked: rank 0 is the first of its host, and the one that is gone.
            return {"speakers": [mine.rank] if self._world.local_rank == 0 or mine.rank == 1 else [], "text": text}
        silent = [new for old, new in zip(before, after, strict=True) if new.number == old.number]
        alive = [sign for sign in after if sign not in silent]
        if silent:
            culprits, text = silent, self._silent(silent)
            # The limit in a last sign may be out of date; that this rank's is exceeded says enough of a short part.
            if not failed and any(sign.part in SLOW for sign in silent):
                late = late and mine.age > self._slow
        else:
            culprits = _behind(alive)
            late = not failed and any(sign.age > sign.limit for sign in culprits)
            text = self._hangs(culprits)
        if not late:
            return None
        waiting = [sign.rank for sign in alive if sign not in culprits]
        text += f"; {ranks_text(waiting)} wait{'s' * (len(waiting) == 1)}" if waiting else ""
        first = {sign.host: sign.rank for sign in reversed(alive)}
        return self._board.decide({"speakers": list(first.values()), "text": f"{text}; {_GO_ON}"})

    def _hangs(self, culprits: Sequence[Sign]) -> str:
        first = max(culprits, key=lambda sign: sign.age)
        verb, stacks = ("hangs", self._stack(first)) if len(culprits) == 1 else ("hang", self._stacks)
        return f"{_names(culprits)} {verb} {_place(first)}; stack: {stacks}"

    def _silent(self, silent: Sequence[Sign]) -> str:
        return (
            f"no sign of life from {_names(silent)}, last seen {_place(silent[0])}: ended, frozen, cut off, or stuck "
            f"in code that holds the interpreter (then its stack is in {self._stack(silent[0])})"
        )

    def _stack(self, sign: Sign) -> Path:
        return self._stacks / f"rank_{sign.rank:05d}.txt"

    def _end(self, verdict: dict[str, Any]) -> None:
        self._ending.acquire()  # and never released: the watching and the main thread may both come here
        if self._world.rank in verdict["speakers"]:
            with contextlib.suppress(OSError):  # a full disk: the run must end all the same
                os.write(
                    2, f"error: {printable(verdict['text'])}\n".encode()
                )  # what hangs may hold the lock of sys.stderr
        if self._world.size > 1:
            # The others are still to read the verdict, from a store that is in rank 0's process.
            time.sleep((2 if self._world.main else 1) * _GAP * self._every)
        os._exit(1)


class _Board:
    """The ranks' signs of life and the verdict, in the store they met at.

    A connection of its own: a rank that waits in a collective may hold that of the process group. A call to a frozen
    or unreachable host may never return, so each has a thread, and is given up after `patience` seconds.
    """

    def __init__(self, world: World, run: str, patience: float) -> None:
        self._rank, self._size, self._patience = world.rank, world.size, patience
        self._run = run  # a store may outlive a run, as torchrun's does when it restarts the ranks
        self._store: Any = None
        self._calling, self._lock = threading.Thread(), threading.Lock()

    def exchange(self, sign: Sign) -> dict[str, Any] | None:
        """Write this rank's sign; the verdict, if there is one."""

        def call(store: Any) -> dict[str, Any] | None:
            store.set(self._key(self._rank), json.dumps(asdict(sign)))
            return json.loads(store.get(self._key(_VERDICT))) if store.check([self._key(_VERDICT)]) else None

        return self._call(call)

    def read(self) -> list[Sign] | None:
        """All ranks' last signs; None where the store cannot be reached."""
        keys = [self._key(rank) for rank in range(self._size)]
        return self._call(lambda store: [Sign(**json.loads(said)) for said in store.multi_get(keys)])

    def decide(self, verdict: dict[str, Any]) -> dict[str, Any]:
        """The first verdict that any rank gave, which may be this one."""

        def call(store: Any) -> dict[str, Any]:
            first: dict[str, Any] = json.loads(store.compare_set(self._key(_VERDICT), "", json.dumps(verdict)))
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
            except Exception:  # in one of several types: the connection is broken, and torch would not mend it
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


def shorten_collectives(seconds: float) -> None:
    """Have the collectives of every process group fail after so long, where torch can change it."""
    set_timeout = getattr(dist, "set_timeout", None) or getattr(dist.distributed_c10d, "_set_pg_timeout", None)
    groups = getattr(getattr(dist.distributed_c10d, "_world", None), "pg_map", {})
    if set_timeout is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for group in list(groups):
            with contextlib.suppress(Exception):  # a backend that has no time-out
                set_timeout(timedelta(seconds=seconds), group)


def _behind(signs: Sequence[Sign]) -> list[Sign]:
    """Those the others wait for: furthest behind or, where all are level, not waiting in a collective themselves."""
    least = min((sign.step, sign.turn) for sign in signs)
    behind = [sign for sign in signs if (sign.step, sign.turn) == least]
    busy = [sign for sign in behind if not sign.waits]
    return busy or behind


def _place(sign: Sign) -> str:
    at = f" (at {sign.where})" if sign.where else ""
    step = f" at step {sign.step + 1}" if sign.step >= 0 else ""
    return f"in {sign.part}{step} for {sign.age:.0f} s{at}"


def _names(signs: Sequence[Sign]) -> str:
    """Which ranks, and on which hosts."""
    hosts = list(dict.fromkeys(sign.host for sign in signs))
    listed = ", ".join(hosts[:8]) + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")
    return f"{ranks_text([sign.rank for sign in signs])} ({listed})"
