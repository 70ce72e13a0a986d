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
from pretrain.errors import InputError
from pretrain.ranks.collectives import World, together
from pretrain.record.folder import CLAIM

_ENDING = 10.0  # seconds for a run that is just ending
_LEASE = 120.0  # seconds for a run on another host: of a host that is lost, NFSv4 releases the lock after 90


@contextmanager
def claimed(folder: Path, world: World) -> Iterator[None]:
    """Inside, no other run writes to `folder`. Collective.

    The claim is a POSIX lock, which network file systems keep across hosts and the kernel releases with the process
    that holds it. Where a file system has no locks the run starts without one.

    Raises:
        InputError: another run holds it.
    """
    handle = together(lambda: _lock(folder / CLAIM) if world.main else None)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(path: Path) -> int | None:
    """The locked file; None where files cannot be locked."""
    began, told = time.monotonic(), False
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
        host = holder.rpartition(" on ")[2].partition(",")[0]  # earlier versions recorded the host's boot after it
        patience, waited = _ENDING if host == socket.gethostname() else _LEASE, time.monotonic() - began
        if waited > patience:
            lost = "" if host == socket.gethostname() else f"; if {host} is lost for good, remove {path}"
            raise InputError(
                f"--out {path.parent}: a run is under way in it ({holder}); wait for it, stop it "
                f"(touch {path.parent / 'STOP'}), or give another --out{lost}"
            )
        if waited > _ENDING and not told:
            told = True
            say(f"{path}: held by a run ({holder}); waiting {_LEASE:.0f} s, in case {host} is lost")
        time.sleep(0.2)
    with suppress(OSError):  # a full disk has room for the lock, not for who holds it
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"rank 0 is process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        os.fsync(handle)  # for the other hosts to read; the file stays open
    return handle
