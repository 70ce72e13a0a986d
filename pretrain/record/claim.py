"""One run at a time in a run folder: two would remove each other's half-written checkpoints."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pretrain.console import say
from pretrain.errors import InputError, StorageError
from pretrain.ranks.collectives import World, together
from pretrain.record.folder import METRICS

_FILE = ".claim"
_PATIENCE = 10.0  # seconds for a predecessor that is just ending
_ELSEWHERE = 60.0  # seconds in which a run on another host that is alive logs a step


@contextmanager
def claimed(folder: Path, world: World) -> Iterator[None]:
    """Inside, no other run writes to `folder`. Collective.

    The claim is a POSIX lock, which network file systems keep across hosts and the kernel releases with the process
    that holds it. Where a file system has no locks the run starts without one.

    Raises:
        InputError: a run on this host holds it, or one on another host that logs steps.
        StorageError: one on another host that is not heard of. Should that host be lost, the file system releases its
            lock after a while (NFSv4), so the same command may succeed later.
    """
    handle = together(lambda: _lock(folder / _FILE) if world.main else None)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(path: Path) -> int | None:
    """The locked file; None where files cannot be locked."""
    began, metrics = time.monotonic(), path.with_name(METRICS)
    logged = _size(metrics)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # each time: it may have been removed by hand
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "it does not say who"
            os.close(handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                say(f"{path}: {error.strerror}; nothing keeps a second run out of this folder")
                return None
        waited = time.monotonic() - began
        if waited < _PATIENCE:
            logged = _size(metrics)  # one that is just ending may still log
        else:
            _refuse(path, holder, alive=_size(metrics) != logged, lost=waited >= _ELSEWHERE)
        time.sleep(0.2)
    with suppress(OSError):  # a full disk has room for the lock, not for who holds it
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"rank 0 is process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        os.fsync(handle)  # for the other hosts to read; the file stays open
    return handle


def _refuse(path: Path, holder: str, *, alive: bool, lost: bool) -> None:
    """Raise where the holder is on this host or `alive`, and where it may be `lost`."""
    text = (
        f"--out {path.parent}: a run is under way in it ({holder}); wait for it, stop it "
        f"(touch {path.parent / 'STOP'}), or give another --out"
    )
    host = holder.rpartition(" on ")[2].partition(",")[0]  # earlier versions recorded the host's boot after it
    if host == socket.gethostname() or alive:
        raise InputError(text)
    if lost:
        raise StorageError(f"{text}; if {host} is lost for good, remove {path}")


def _size(path: Path) -> int | None:
    """Bytes of a file; None where it cannot be opened. A network file system asks its server when a file is opened."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size
    except OSError:
        return None
