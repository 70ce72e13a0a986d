"""Runs of launch/pretrain.py, started to be signalled and killed: on CPU ranks, one thread each.

`Command` is the `deepspeed` command. `Forked` runs the same script, from its words to its exit status, in ranks forked
from a warm parent, which has imported torch, DeepSpeed and the project once: a start takes one second instead of ten.
"""

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Protocol

from pretrain.ranks.launcher import free_port

ROOT = Path(__file__).resolve().parent.parent
_SCRIPT = ROOT / "launch" / "pretrain.py"
# The last is what DeepSpeed imports as it builds an engine; torch's compiler comes with it, three seconds of a rank.
_PRELOAD = ["pretrain.run.experiment", "deepspeed.runtime.zero.muon.muon_optimizer"]
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


class Started(Protocol):
    """A run that has been started, forked or as a command."""

    @property
    def running(self) -> bool: ...
    @property
    def said(self) -> str: ...
    @property
    def pids(self) -> list[int]: ...
    def send(self, number: signal.Signals, *ranks: int) -> None: ...
    def kill(self) -> None: ...
    def wait(self, seconds: float = ...) -> Sequence[int | None]: ...


class Forked:
    """Ranks forked from the warm parent, each in a session of its own, all writing what they say to one file."""

    def __init__(self, world: int, words: Sequence[object], log: Path, *, prelude: str = "") -> None:
        """
        Args:
            words: of the command, after launch/pretrain.py.
            log: what the ranks say is appended to it.
            prelude: Python that every rank executes first.
        """
        _warm_up()
        self._log, context = log, get_context("forkserver")
        log.touch()
        place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self._processes = [
            context.Process(
                target=_rank,
                args=({**place, "RANK": str(n), "LOCAL_RANK": str(n)}, list(map(str, words)), log, prelude),
                daemon=True,
            )
            for n in range(world)
        ]
        for process in self._processes:
            process.start()

    @property
    def said(self) -> str:
        """By all ranks, up to now."""
        return self._log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        """Whether every rank still runs."""
        return all(process.is_alive() for process in self._processes)

    @property
    def pids(self) -> list[int]:
        """The ranks' processes, in rank order."""
        return [process.pid or 0 for process in self._processes]

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """A signal to some ranks, or to all."""
        for rank in ranks or range(len(self._processes)):
            if self._processes[rank].is_alive():
                os.kill(self.pids[rank], number)

    def kill(self) -> None:
        """SIGKILL to all that are left, and wait until they are gone."""
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self, seconds: float = 120) -> list[int | None]:
        """The ranks' exit statuses (a signal's is negative), None of one that has not ended in time."""
        deadline = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self._processes]


class Command:
    """`deepspeed … launch/pretrain.py`, in a session of its own."""

    def __init__(self, world: int, words: Sequence[object], log: Path) -> None:
        launcher = ["deepspeed", "--quiet", "--num_gpus", world, "--master_port", free_port(), "launch/pretrain.py"]
        environment = {**os.environ, **_ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self._log, self._world = log, world
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*map(str, launcher), *map(str, words)],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def pids(self) -> list[int]:
        """The ranks' processes, where they have been started."""
        found = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                session = int(status.read_text().rpartition(")")[2].split()[3])
                words = (status.parent / "cmdline").read_bytes().split(b"\0")
            except (OSError, IndexError):  # gone meanwhile
                continue
            if session == self._process.pid and any(word.startswith(b"--local_rank=") for word in words):
                found.append(int(status.parent.name))
        return sorted(found)

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """A signal to some ranks, or to the process group: the launchers and all ranks."""
        if not ranks:
            os.killpg(self._process.pid, number)
        pids = self.pids
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError, IndexError):  # it has just ended
                os.kill(pids[rank], number)

    def kill(self) -> None:
        """SIGKILL to all that are left, and wait until the command is gone."""
        with contextlib.suppress(ProcessLookupError):  # all are gone
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait(self, seconds: float = 120) -> list[int | None]:
        """The command's exit status, None if it has not ended in time."""
        try:
            return [self._process.wait(seconds)]
        except subprocess.TimeoutExpired:
            return [None]


def _warm_up() -> None:
    """Start the parent, if it does not run yet. It sees the environment as it is then."""
    before = dict(os.environ)
    os.environ.update(_ENVIRONMENT)
    try:
        forkserver.set_forkserver_preload(_PRELOAD)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _rank(place: dict[str, str], words: list[str], log: Path, prelude: str) -> None:
    os.setsid()
    said = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    os.environ.update(place)
    sys.argv = [str(_SCRIPT), *words]
    exec(prelude, {})
    runpy.run_path(str(_SCRIPT), run_name="__main__")
