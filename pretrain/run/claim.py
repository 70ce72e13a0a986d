"""One run at a time in a run folder: two would take each other's half-written checkpoints for left-overs."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pretrain.engine.distributed import World, together
from pretrain.errors import InputError

_FILE = ".claim"
_PATIENCE = 10.0  # seconds in which a predecessor that is just ending may let go


@contextmanager
def claimed(folder: Path, world: World) -> Iterator[None]:
    """Inside, no other run writes to `folder`. Collective.

    The claim is a POSIX lock, which network file systems keep across hosts and every system gives up with the process
    that holds it. Where a file system has no locks the run goes on without.

    Raises:
        InputError: another run is under way there; says where.
    """
    handle = together(lambda: _claim(folder / _FILE) if world.main else None)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _claim(path: Path) -> int | None:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    patience = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            held = error.errno in (errno.EACCES, errno.EAGAIN)
            if held and time.monotonic() < patience:
                time.sleep(0.2)
                continue
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
            os.close(handle)
            if held:
                raise InputError(
                    f"--out {path.parent}: a run is under way in it ({holder}); wait for it, stop it "
                    f"(touch {path.parent / 'STOP'}), or give another --out"
                ) from None
            print(f"{path}: {error.strerror}; nothing keeps a second run out of this folder", flush=True)
            return None
    with suppress(OSError):  # a full disk has room for the lock, not for who holds it
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"rank 0 is process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return handle
