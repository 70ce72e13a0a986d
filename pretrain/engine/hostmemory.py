"""What memory this host still has for a process to take."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil

_CGROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available() -> int:
    """Bytes that can be had without swapping: the host's, or what the job's control groups leave, if that is less."""
    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def still_to_come() -> int:
    """Bytes that this process gave back since it held the most: it may well take as much again."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(0, most - int(psutil.Process().memory_info().rss))


def _left_in_groups() -> list[int]:
    """What each control group of version 2 above this process leaves; nothing where there is no limit."""
    left = []
    try:
        own = _OWN.read_text().rpartition("0::/")[2].strip()
        here = _CGROUPS / own.lstrip("/")
        for group in [here, *here.parents]:
            if (limit := group / "memory.max").is_file() and (most := limit.read_text().strip()) != "max":
                cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                used = int((group / "memory.current").read_text()) - int(cache.get("inactive_file", 0))
                left.append(int(most) - used)
    except (OSError, ValueError):
        pass
    return left
