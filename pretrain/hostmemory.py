"""The memory of this host and of this process: what there is, what can be had, what was taken at the most."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_CGROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def total_memory() -> int:
    """Bytes that all processes here may take together: the host's, or the job's control groups', if that is less."""
    return min([int(psutil.virtual_memory().total), *(most for most, _ in _limited_groups())])


def available_memory() -> int:
    """Bytes that can be had without swapping: the host's, or what the job's control groups leave, if that is less."""
    return min([int(psutil.virtual_memory().available), *(most - used for most, used in _limited_groups())])


def released_memory() -> int:
    """Bytes that this process has released since its peak: it may take as much again."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(0, peak - resident_memory())


def resident_memory() -> int:
    """Bytes that this process takes now."""
    return int(psutil.Process().memory_info().rss)


def restart_peak() -> None:
    """Let `peak_memory` begin anew. Where the system does not allow it, the peak stays that of the whole process."""
    with suppress(OSError):
        _CLEAR.write_text("5")  # proc(5)


def peak_memory() -> int:
    """Bytes that this process took at the most, since it began or since `restart_peak`."""
    with suppress(OSError, StopIteration):
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _limited_groups() -> Iterator[tuple[int, int]]:
    """Limit and use of each control group (version 2) above this process that has a limit."""
    with suppress(OSError, ValueError):
        own = _OWN.read_text().rpartition("0::/")[2].strip()
        here = _CGROUPS / own.lstrip("/")
        for group in [here, *here.parents]:
            if (limit := group / "memory.max").is_file() and (most := limit.read_text().strip()) != "max":
                cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                used = int((group / "memory.current").read_text()) - int(cache.get("inactive_file", 0))
                yield int(most), used
