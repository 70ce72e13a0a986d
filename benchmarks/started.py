"""Commands and scripts started on CPU ranks, one thread each, to be waited for, signalled or killed.

`Command` is the real `deepspeed` command. `Forked` runs the same script, from its words to its exit status, in ranks
forked from a warm parent, which has imported torch, DeepSpeed and the project once: a rank takes less than a second
of a core instead of five.
"""

import contextlib
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Protocol

from pretrain.ranks.launcher import free_port

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN = "launch/pretrain.py"
_WARM = "benchmarks.warm"
# No long wait for a resolver that loses questions: torch's store looks up the name of whoever connects, and answers
# nobody meanwhile.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "RES_OPTIONS": "timeout:1 attempts:1"}
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


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
    """Ranks forked from the warm parent, each in a session of its own; what all of them print goes to one file."""

    def __init__(
        self,
        world: int,
        words: Sequence[object],
        log: Path,
        *,
        script: str | Path = PRETRAIN,
        prelude: str = "",
        errors: Path | None = None,
        environment: Mapping[str, str] | None = None,
        folder: Path = ROOT,
    ) -> None:
        """
        Args:
            world: number of ranks; a single one is told of no launcher, as under plain `python`.
            words: the command line after the script.
            log: the ranks' stdout is appended to it, and their stderr unless `errors` takes it.
            script: run as `python script words`; relative to the repository's root.
            prelude: Python that every rank executes before the script.
            environment: of the ranks; this process's without a launcher's variables if left out.
            folder: the working directory.
        """
        warm_up()
        self._log, context = log, get_context("forkserver")
        for file in {log, errors or log}:
            file.touch()
        kept = dict(os.environ if environment is None else environment)
        if environment is None:
            kept = {name: value for name, value in kept.items() if name not in _PLACE} | _ENVIRONMENT
        place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        places = [{**place, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(world)] if world > 1 else [{}]
        start = (str(ROOT / script), [str(word) for word in words], (log, errors or log), prelude, folder)
        self._processes = [
            context.Process(target=_rank, args=({**kept, **place}, *start), daemon=True) for place in places
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

    def wait(self, seconds: float = 600) -> list[int | None]:
        """The ranks' exit statuses (a signal's is negative), None of one that has not ended in time."""
        deadline = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self._processes]


class Command:
    """`deepspeed … launch/pretrain.py`, in a session of its own."""

    def __init__(self, world: int, words: Sequence[object], log: Path) -> None:
        launcher = ["deepspeed", "--quiet", "--num_gpus", world, "--master_port", free_port(), PRETRAIN]
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

    def wait(self, seconds: float = 600) -> list[int | None]:
        """The command's exit status, None if it has not ended in time."""
        try:
            return [self._process.wait(seconds)]
        except subprocess.TimeoutExpired:
            return [None]


def warm_up() -> None:
    """Start the parent, if it does not run yet: the fork server of `multiprocessing`, warm for whoever uses it.

    It sees the environment as it is then.
    """
    before = dict(os.environ)
    os.environ.update(_ENVIRONMENT, PYTHONPATH=str(ROOT))
    try:
        forkserver.set_forkserver_preload([_WARM])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _rank(
    environment: dict[str, str], script: str, words: list[str], logs: tuple[Path, Path], prelude: str, folder: Path
) -> None:
    importlib.import_module(_WARM)  # the parent passes over what it cannot import, and would be cold
    os.setsid()
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may start workers
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, log in enumerate(logs, start=1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = [script, *words]
    sys.path.insert(0, str(Path(script).parent))  # as python does; launch/*.py replace it
    exec(prelude, {"__name__": "prelude"})
    runpy.run_path(script, run_name="__main__")
