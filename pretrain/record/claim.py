"""One run at a time in a run folder: two would take each other's half-written checkpoints for left-overs."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pretrain.console import say
from pretrain.errors import InputError, StorageError
from pretrain.ranks.collectives import World, all_gather_list, broadcast_object, together
from pretrain.record.folder import METRICS

_FILE = ".claim"
_PATIENCE = 10.0  # seconds in which a predecessor that is just ending may let go
_LEASE = 300.0  # seconds in which a file system may take the lock from a host that is gone: NFSv4 after 90, as a rule
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def claimed(folder: Path, world: World) -> Iterator[None]:
    """Inside, no other run writes to `folder`. Collective.

    The claim is a POSIX lock, which network file systems keep across hosts. It goes with the process that holds it,
    but a host that vanished (power, network) gives nothing up: its lock is held until the file system's lease on it
    has run out, or, where there are no leases (NFSv3), until it is back. Where a file system has no locks the run goes
    on without.

    Raises:
        InputError: another run is under way there; says where. Soon, if its process is on a host of this run; else
            once its metrics grow.
        StorageError: nothing tells whether it is, and the lock has not been given up within minutes.
    """
    path = folder / _FILE
    handle, holder = together(lambda: _claim(path, _PATIENCE) if world.main else (None, ""))
    holder = broadcast_object(holder)
    if holder:
        if any(all_gather_list([_alive(holder)])):
            raise _under_way(path, holder)
        handle = together(lambda: _outwait(path, holder) if world.main else None)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _claim(path: Path, patience: float) -> tuple[int | None, str]:
    """The locked file, or None and who holds it; None and "" where files cannot be locked."""
    until = time.monotonic() + patience
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # each time: it may have been removed by hand
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
            os.close(handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                say(f"{path}: {error.strerror}; nothing keeps a second run out of this folder")
                return None, ""
            if time.monotonic() >= until:
                return None, holder or "it does not say who"
            time.sleep(0.2)
    with suppress(OSError):  # a full disk has room for the lock, not for who holds it
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{_holder(os.getpid())}\n".encode(), 0)
        os.fsync(handle)  # for the other hosts to read; the file stays open
    return handle, ""


def _outwait(path: Path, holder: str) -> int | None:
    """The locked file, after waiting for a lock whose holder nobody can be asked for; None where there are no locks."""
    say(
        f"{path}: held by a process that no host of this run knows ({holder}); if its host is lost, the file system "
        f"gives the lock up after a while: waiting for that, {_LEASE / 60:.0f} minutes at most"
    )
    metrics, until = path.with_name(METRICS), time.monotonic() + _LEASE
    before = _changed(metrics)
    while True:
        handle, holder = _claim(path, patience=1.0)
        if not holder:
            return handle
        if _changed(metrics) != before:
            raise _under_way(path, holder)
        if time.monotonic() >= until:
            raise StorageError(
                f"--out {path.parent}: a run that is not heard of holds its lock ({holder}), for {_LEASE / 60:.0f} "
                f"minutes by now; stop it if it is alive; if it is gone for good, remove {path}"
            )


def _holder(process: int) -> str:
    """How a claim names a process of this host. A host that came back by the same name is another boot."""
    boot = _BOOT.read_text()[:8] if _BOOT.exists() else "unknown"
    return f"rank 0 is process {process} on {socket.gethostname()}, boot {boot}"


def _alive(holder: str) -> bool:
    """Whether that process is one of this host."""
    found = re.search(r"process (\d+) on ", holder)
    if found is None or holder != _holder(int(found[1])):
        return False
    try:
        os.kill(int(found[1]), 0)
    except OSError as error:
        return error.errno == errno.EPERM  # it is another user's
    return True


def _changed(path: Path) -> int | None:
    """When a file was last written to; None where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _under_way(path: Path, holder: str) -> InputError:
    return InputError(
        f"--out {path.parent}: a run is under way in it ({holder}); wait for it, stop it "
        f"(touch {path.parent / 'STOP'}), or give another --out"
    )
